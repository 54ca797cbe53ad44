"""Whole epochs of `probe-kd train` on JPEGs: beside timm's training script, and what the GPU does meanwhile.

python benchmarks/gpu.py [--quick] [--device cuda] [--timm-script train.py] [--images 4096]

timm's script is not part of its package: give a checkout's `train.py`. It takes no weights for a teacher but those of
the hub, so its teacher has random ones, as this recipe's has: a step costs the same.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import timm
import torch
from input import photographs
from rich.console import Console

from probe_kd.engine.weights import save_weights
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.loop import Loop
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

CASES = (("resnet18", "resnet50"), ("vit_small_patch16_224", "vit_base_patch16_224"))
QUICK = (("resnet10t", "resnet10t"),)
RECIPE = """\
student: {{model: {student}}}
teacher: {{model: {teacher}, checkpoint: {weights}}}
data: {{root: {root}, input_size: [3, {size}, {size}], batch_size: {batch}}}
stages:
  - epochs: {epochs}
    losses: {{task: {{loss: cross_entropy}}, soft: {{loss: soft_targets, temperature: 4.0}}}}
"""
# The script asks the hub for its teacher's weights, and there may be no network.
WITHOUT_HUB = """\
import runpy, sys
import timm.task.distillation as distillation
make = distillation.create_model
distillation.create_model = lambda *args, **kwargs: make(*args, **{**kwargs, "pretrained": False})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call_of_script(
    script: str, device: str, case: tuple[str, str], folder: Path, size: int, batch: int, epochs: int, *options: str
) -> list[str]:
    """The command line of timm's script: labels and soft targets, everything else by default but for `options`."""
    student, teacher = case
    values = {
        "--device": device,
        "--data-dir": folder,
        "--model": student,
        "--kd-model-name": teacher,
        "--kd-loss-type": "kl",
        "--num-classes": 2,
        "--img-size": size,
        "-b": batch,
        "--epochs": epochs,
        "--opt": "adamw",
        "--lr": 1e-4,
        "--log-interval": 1000,
        "--output": folder / "timm",
    }
    pairs = [text for name, value in values.items() for text in (name, str(value))]
    return [sys.executable, "-c", WITHOUT_HUB, script, *pairs, *options]


def of_script(
    script: str, device: str, case: tuple[str, str], folder: Path, size: int, batch: int, epochs: int
) -> float:
    """Images a second of the last epoch, as timm's script counts them: reading, step and schedule."""
    options = ("-j", "16", "--amp", "--amp-dtype", "bfloat16", "--channels-last")
    call = call_of_script(script, device, case, folder, size, batch, epochs, *options)
    run = subprocess.run(call, capture_output=True, text=True)
    rates = re.findall(rf"Train: {epochs - 1} .*?\([\d.]+s,\s*([\d.]+)/s\)", run.stdout + run.stderr)
    if not rates:
        raise SystemExit(f"timm's script told no rate:\n{(run.stdout + run.stderr)[-2000:]}")
    return float(rates[-1])


def text_of_recipe(case: tuple[str, str], folder: Path, size: int, batch: int, epochs: int) -> str:
    """What a recipe says that does as `call_of_script`. Writes the weights of its teacher."""
    student, teacher = case
    weights = folder / f"{teacher}.safetensors"
    if not weights.exists():
        sized = {"img_size": size} if "vit" in teacher else {}
        save_weights(timm.create_model(teacher, num_classes=2, **sized), weights, {})
    return RECIPE.format(
        student=student, teacher=teacher, weights=weights, root=folder, size=size, batch=batch, epochs=epochs
    )


def of_recipe(case: tuple[str, str], folder: Path, size: int, batch: int, epochs: int) -> tuple[float, float]:
    """(images a second, share of the time in which the GPU had nothing to do) of the last epoch of a recipe.

    The first is what metrics.csv says of a run that is not watched, the second of a run under torch's profiler.
    """
    text = text_of_recipe(case, folder, size, batch, epochs)
    planned, quiet = plan(parse(text, "gpu.yaml")), Progress(Console(quiet=True), quiet=True)
    with tempfile.TemporaryDirectory() as place:
        rows = train(planned, Path(place) / "run", quiet).rows
        rate = float([row for row in rows if row["role"] == "student"][-1]["images_per_second"])  # type: ignore[arg-type]
        idle = _idle(lambda: train(planned, Path(place) / "watched", quiet)) if torch.cuda.is_available() else 0.0
    return rate, idle


def _idle(job: measure.Arm) -> float:
    """The share of the last epoch in which no kernel and no copy ran."""
    shares: list[float] = []
    steps = Loop.run

    def watched(self: Loop, epoch: int, first: int = 0):  # type: ignore[no-untyped-def]
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as seen:
            yield from steps(self, epoch, first)
            torch.cuda.synchronize()
        shares.append(_gaps(seen))

    Loop.run = watched  # type: ignore[method-assign]
    try:
        job()
    finally:
        Loop.run = steps  # type: ignore[method-assign]
    return shares[-1]


def _gaps(seen: torch.profiler.profile) -> float:
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = sorted(
        (event.start_ns(), event.end_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    )
    if not spans:
        return float("nan")
    busy, end = 0, spans[0][0]
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--timm-script", help="train.py of a checkout of timm")
    parser.add_argument("--images", type=int, default=4096)
    wishes = parser.parse_args()
    cases, size, batch, images = (QUICK, 32, 4, 8) if wishes.quick else (CASES, 224, 128, wishes.images)
    epochs, rows = 1 if wishes.quick else 3, []
    with tempfile.TemporaryDirectory() as place:
        photographs(Path(place), images)
        for case in cases:
            rate, idle = of_recipe(case, Path(place), size, batch, epochs)
            beside = ("-", "-")
            if wishes.timm_script:
                other = of_script(wishes.timm_script, wishes.device, case, Path(place), size, batch, epochs)
                beside = (f"{other:.0f}", f"{other / rate:.3f}")
            rows.append((" <- ".join(case), f"{rate:.0f}", *beside, f"{idle:.1%}"))
            print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
    print(
        measure.section(
            "Whole epochs, beside timm's training script",
            measure.command(),
            f"{images} JPEGs of 500x375, {size} pixels, {batch} a batch, labels and soft targets, everything else by "
            "default; timm's script with `--amp --amp-dtype bfloat16 --channels-last -j 16`. Images a second of the "
            "last of three epochs of training, evaluation left out; probe-kd's time as a multiple of timm's; and the "
            "share of a watched epoch in which the GPU ran neither a kernel nor a copy.",
            ("student <- teacher", "probe-kd, images/s", "timm's script", "time", "GPU idle"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
