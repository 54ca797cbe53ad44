"""Epochs with a cached teacher, beside a live one and beside none.

    python benchmarks/cache.py

An epoch of `told` has what the teacher gives in memory already, so that it is the same step with nothing asked and
nothing read: what a cache could be at best. The arms that "wait" read rows in the process that trains, after the
images, and write them before the step goes on. In the others the loader reads them with the images (in its processes,
with `--workers`), and a thread writes them.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import Arm, command, interleaved, options, section
from torch import Tensor

from probe_kd.data.cache import TeacherCache
from recipes import Ours, one_epoch, settle

RECIPE = """\
student: {model: resnet18, model_kwargs: {channels: [16, 32, 64, 128]}}
teacher: {model: resnet34, model_kwargs: {channels: [32, 64, 128, 256]}}
data: {dataset: sklearn/digits, input_size: [3, 32, 32], batch_size: 64, views: 1, scale: [0.7, 1.0], color_jitter: 0.0}
pairs: {layer1: layer1, layer2: layer2, layer3: layer3}
stages:
  - epochs: 100
    losses: {}
    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.05}
"""
LABELS = {"task": {"loss": "cross_entropy"}}
LOSSES = {
    "soft targets": LABELS | {"soft": {"loss": "soft_targets", "temperature": 4.0}},
    "hints of three layers": LABELS | {"hint": {"loss": "hint"}},
    "fsp of three blocks": LABELS | {"flow": {"loss": "fsp"}},
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--profile", metavar="LOSSES", help="the functions that an epoch from the cache spends its time in"
    )
    parser.add_argument("--only", metavar="LOSSES", choices=LOSSES, help="one set of losses: " + "; ".join(LOSSES))
    parser.add_argument("--workers", type=int, default=0, help="processes that read images and rows")
    parser.add_argument("--size", type=int, default=32, help="the width and height of the images, and so of the rows")
    wishes = parser.parse_args()
    settle(wishes.device)
    rows = []
    for name, losses in LOSSES.items():
        if {wishes.profile, wishes.only} <= {None, name}:
            rows += measured(name, losses, wishes)
    print(
        section(
            "A cached teacher",
            command(),
            f"resnet18 from a resnet34 of twice its width, {wishes.size}x{wishes.size} images, one view of each, "
            f"{wishes.workers} workers. Time of an epoch, median (quartiles) of the ratios of each round, to the "
            "student with labels alone, to the same losses with the teacher's answers in memory, and of cached epochs "
            "to those that wait; kB on disk for an image.",
            ["", "epoch", "images/s", "to no teacher", "to answers in memory", "to waiting", "kB an image"],
            rows,
        )
    )


def measured(name: str, losses: dict[str, Any], wishes: Any) -> list[list[object]]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arms: dict[str, Arm] = {
            "no teacher": _live(_made(LABELS, Path(folder, "alone"), stack, wishes)),
            "live": _live(_made(losses, Path(folder, "live"), stack, wishes)),
            "in memory": _told(_made(losses, Path(folder, "told"), stack, wishes)),
            "cached, first epoch, waits": _written(
                _made(losses, Path(folder, "first"), stack, wishes, cached=True), waits=True
            ),
            "cached, first epoch": _written(_made(losses, Path(folder, "behind"), stack, wishes, cached=True)),
        }
        waiting = _made(losses, Path(folder, "gathered"), stack, wishes, cached=True)
        arms["cached, every other, waits"] = _read(waiting, stack, waits=True)
        kept = _made(losses, Path(folder, "read"), stack, wishes, cached=True)
        arms["cached, every other"] = _read(kept, stack)
        _, _, loop = kept.stages[0]
        agree(kept)
        if wishes.profile:
            profiled(arms["cached, every other"])
        seen = interleaved(arms, 1 if wishes.quick else wishes.rounds or 7, 1, str(kept.models.accelerator.device))
        assert loop.caches
        size = sum(tap.bytes for tap in loop.caches[""].taps) / 1000
        images = loop.steps * loop.batches.loader.total_batch_size
    return [
        [
            name if arm == "no teacher" else "",
            arm,
            f"{images / seen.milliseconds(arm) * 1000:,.0f}",
            "1" if arm == "no teacher" else seen.ratio(arm, to="no teacher"),
            "1" if arm == "in memory" else seen.ratio(arm, to="in memory"),
            seen.ratio(arm, to=f"{arm}, waits") if f"{arm}, waits" in arms else "",
            f"{size:.2f}" if arm.startswith("cached") else "",
        ]
        for arm in arms
    ]


def _made(losses: dict[str, Any], folder: Path, stack: ExitStack, wishes: Any, *, cached: bool = False) -> Ours:
    folder.mkdir()
    tree = yaml.safe_load(RECIPE)
    tree["stages"][0]["losses"] = losses
    tree["data"]["fraction"] = 0.1 if wishes.quick else 0.5
    tree["data"] |= {"workers": wishes.workers, "input_size": [3, wishes.size, wishes.size]}
    if not any(loss["loss"] in ("hint", "fsp") for loss in losses.values()):
        del tree["pairs"]
    if losses is LABELS:
        del tree["teacher"]
    if cached:
        tree["teacher"]["cache"] = "cache"
    return Ours(tree, folder, stack)


def _live(ours: Ours) -> Arm:
    return lambda: one_epoch(ours.stages[0][2], 0)


def _told(ours: Ours) -> Arm:
    _, distiller, loop = ours.stages[0]
    kept: dict[int, list[Tensor]] = {}

    def told(images: Tensor, *_: Any) -> list[Tensor]:
        if len(images) not in kept:
            kept[len(images)] = distiller.teacher_targets(images)
        return kept[len(images)]

    loop._targets = told  # type: ignore[method-assign]
    return lambda: one_epoch(loop, 0)


def _written(ours: Ours, *, waits: bool = False) -> Callable[[], None]:
    """The first epoch; the folder is new each time. No rows are there to be read."""
    trained, distiller, loop = ours.stages[0]

    def epoch() -> None:
        ours.times += 1
        loop.caches = ours.caches(trained, distiller)
        if waits:
            _wait_for_writing(loop.caches[""])
        one_epoch(loop, 0)
        loop.caches[""].close()

    return epoch


def _wait_for_writing(cache: TeacherCache) -> None:
    keep = cache.keep

    def kept(indices: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        stored = keep(indices, features)
        cache._behind[-1].result()
        return stored

    cache.keep = kept  # type: ignore[method-assign]


def _read(ours: Ours, stack: ExitStack, *, waits: bool = False) -> Arm:
    trained, distiller, loop = ours.stages[0]
    caches = ours.caches(trained, distiller)
    if waits:
        loop.caches = caches
    else:
        ours.read_from(loop, caches)
    stack.callback(loop.caches[""].close)
    while len(loop.caches[""].some(loop.views.view, loop.caches[""].count)[0]) < loop.caches[""].count:
        one_epoch(loop, 0)
        loop.phase = replace(loop.phase, age=loop.phase.age + 1)  # another order
    return lambda: one_epoch(loop, 0)


def agree(ours: Ours) -> None:
    """What is read is what the teacher gives, to the bit."""
    _, distiller, loop = ours.stages[0]
    assert loop.caches
    loop._begin(0)
    images, _, _, rows = next(iter(loop.batches))
    found = loop.caches[""].features(rows[""])
    for kept, given in zip(found, distiller.teacher_targets(images), strict=True):
        torch.testing.assert_close(kept.to(given.device), given, rtol=1e-5, atol=1e-5)


def profiled(arm: Arm) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(arm)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
