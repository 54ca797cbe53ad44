"""How well `match` does over all families of timm, and over models of other libraries.

    python benchmarks/match_zoo.py              # stage ends against feature_info, and the plans of all ordered pairs
    python benchmarks/match_zoo.py --foreign    # the same for the models of foreign_stages.csv, with timm's families
    python benchmarks/match_zoo.py --steps      # also one training step of every family as student and as teacher
    python benchmarks/match_zoo.py --zoo        # stage ends against feature_info of every model of timm, ten minutes

The definitions are in docs/matching.md.
"""

import argparse
import collections
import contextlib
import csv
import itertools
import logging
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from families import families
from foreign_stages import ForeignModel, foreign_models, trace_foreign

from probe_kd import Distiller, MatchWarning, Objective, ProbeKDError, Trace, match, trace
from probe_kd.engine.anatomy.strides import SAME_STRIDE
from probe_kd.engine.matching import blocks, stages
from probe_kd.engine.models import build_model, build_on_meta
from probe_kd.engine.spec import FeatureSpec, Pair, Tap
from probe_kd.methods.adapters import adapt

T = TypeVar("T")
U = TypeVar("U")
LOWEST = 4 / SAME_STRIDE  # features of stride 1 and 2 belong to the stem
LEVELS = ("same", "normed", "alike")  # the same tensor; up to a norm or an activation; the same stride and channels


@dataclass(frozen=True)
class Truth:
    """One stage end as the author of a model names it."""

    tap: Tap
    stride: float
    channels: int


@dataclass
class Share:
    """How many layers agree, from strict to loose; each figure includes the ones before it."""

    layers: int = 0
    same: int = 0
    normed: int = 0
    alike: int = 0

    def count(self, levels: Sequence[int]) -> None:
        """Add layers, each as `_agree` judged it."""
        self.layers += len(levels)
        for least, name in zip((3, 2, 1), LEVELS, strict=True):
            setattr(self, name, getattr(self, name) + sum(level >= least for level in levels))

    def __str__(self) -> str:
        shares = [f"{getattr(self, name)} ({getattr(self, name) / max(self.layers, 1):.1%})" for name in LEVELS]
        return f"{self.layers} | " + " | ".join(shares)


@dataclass
class Score:
    """Recall, over the stage ends that authors name, and precision, over the ends that `stages` gives."""

    models: int = 0
    recall: Share = field(default_factory=Share)
    precision: Share = field(default_factory=Share)

    def add(self, traced: Trace, expected: Sequence[Truth]) -> str:
        """Score one model. Returns what was missed and what was wrong, as text."""
        ends = [spec for spec in stages(traced) if (spec.reduction or 1) > LOWEST]
        named = _last_of_each_stride(expected)
        recalled = [max((_agree(traced, spec, truth) for spec in ends), default=0) for truth in named]
        right = [max(_agree(traced, spec, truth) for truth in expected) for spec in ends]
        self.models += 1
        self.recall.count(recalled)
        self.precision.count(right)
        missed = [f"{truth.tap} ({level})" for truth, level in zip(named, recalled, strict=True) if level < 3]
        wrong = [f"{spec.tap} ({level})" for spec, level in zip(ends, right, strict=True) if level < 3]
        return f"named {', '.join(missed)}; given {', '.join(wrong)}" if missed or wrong else ""


def _last_of_each_stride(expected: Sequence[Truth]) -> list[Truth]:
    """The last of several stage ends of one stride: a stage in parts, dilated stages, the blocks of a plain ViT."""
    lasts: list[Truth] = []
    for truth in expected:
        if lasts and truth.stride <= SAME_STRIDE * lasts[-1].stride:
            lasts.pop()
        lasts.append(truth)
    return lasts


def truths(name: str) -> list[Truth]:
    """The stage ends in timm's `feature_info`. An isotropic model lists all its blocks."""
    with torch.device("meta"):
        info = build_on_meta(name, {}).feature_info
    entries = info.info if hasattr(info, "info") else list(info)
    every = [Truth(Tap(str(entry["module"] or "")), entry["reduction"], entry["num_chs"]) for entry in entries]
    return [truth for truth in every if truth.stride > LOWEST]


def foreign_truths(model: ForeignModel, traced: Trace) -> list[Truth]:
    """The stage ends of foreign_stages.csv, with traced strides and channels. One without a grid is never found."""
    specs = [_at(traced, Tap.parse(stage)) for stage in model.stages]
    every = [Truth(spec.tap, spec.reduction or math.inf, spec.channels) for spec in specs]
    return [truth for truth in every if truth.stride > LOWEST]


def _at(traced: Trace, tap: Tap) -> FeatureSpec:
    """What a module of the table yields; the first item of a tuple. A module that runs several times, at its end."""
    specs = [spec for spec in traced.specs if spec.tap.module == tap.module and spec.tap.port == "output"]
    if not specs:
        raise LookupError(f"{traced.model} yields nothing at {tap}, which foreign_stages.csv names")
    last = max(spec.tap.call or 0 for spec in specs) if tap.call is None else tap.call
    return next(
        spec for spec in specs if (spec.tap.call or 0) == last and spec.tap.items[: len(tap.items)] == tap.items
    )


def _agree(traced: Trace, spec: FeatureSpec, truth: Truth) -> int:
    """3 the same tensor, 2 the same up to a norm or an activation, 1 the same stride and channels, 0 another."""
    there = [other for other in traced.specs if other.tap.module == truth.tap.module]
    own = [other for other in traced.specs if other.tap.module == spec.tap.module]
    alike = abs((spec.reduction or 1) / truth.stride - 1) < 0.25 and spec.channels == truth.channels
    named = [other for other in there if other.tap.items[: len(truth.tap.items)] == truth.tap.items]
    if (alike and spec.tap.module == truth.tap.module) or _meet([spec], named, "output"):
        return 3
    if not there:  # a name that timm makes up, which no hook can reach: there is nothing else to compare
        return 3 * alike
    if _is_norm(traced, truth.tap.module) and _meet([spec], there, "input"):
        return 2
    if _is_norm(traced, spec.tap.module) and _meet(
        [other for other in there if other.tap.port == "output"], own, "input"
    ):
        return 2
    return int(alike)


def _meet(some: Iterable[FeatureSpec], others: Iterable[FeatureSpec], port: str) -> bool:
    """Whether one of the tensors stands at such a port of the others."""
    return bool({spec.tensor for spec in some} & {other.tensor for other in others if other.tap.port == port})


def _is_norm(traced: Trace, name: str) -> bool:
    """A layer that costs no multiplication: a norm, an activation, both in one."""
    module = traced.modules.get(name)
    return module is not None and module.calls > 0 and module.macs == 0


def score_timm(names: Iterable[str], traces: dict[str, Trace]) -> Score:
    total = Score()
    for name in names:
        differences = total.add(traces.get(name) or trace(name), truths(name))
        if differences:
            print(f"{name:34} {differences}")
    return total


def score_foreign(models: Iterable[ForeignModel], traces: dict[str, Trace]) -> dict[str, Score]:
    """The scores of the libraries, by name."""
    scores: dict[str, Score] = {}
    for model in models:
        total = scores.setdefault(model.library, Score())
        traced = traces.get(model.label)
        try:
            traced = traced or trace_foreign(model)
            differences = total.add(traced, foreign_truths(model, traced))
        except ProbeKDError as refusal:  # refused with a reason: nothing is found, and nothing is wrong
            differences = f"refused: {refusal}"
            total.models += 1
            total.recall.count([0] * (1 if "{" in "".join(model.stages) else len(model.stages)))
        if differences:
            print(f"{model.label:60} {differences}", flush=True)
    return scores


def show(scores: dict[str, Score]) -> None:
    """The table of docs/matching.md."""
    columns = " | ".join(["stage ends named", *LEVELS, "stage ends given", *LEVELS])
    print(f"| library | models | {columns} |")
    print("|---" * (2 + 2 * (1 + len(LEVELS))) + "|")
    for name, total in scores.items():
        print(f"| {name} | {total.models} | {total.recall} | {total.precision} |")


@dataclass(frozen=True)
class Judged:
    """A trace with its layers that an author names as stage ends or blocks, and those that end the last stage.

    `elsewhere` are layers that another author names: timm_stages.csv.
    """

    name: str
    traced: Trace
    expected: Sequence[Truth]
    right: frozenset[Tap]
    last: frozenset[Tap]
    elsewhere: frozenset[Tap]


def judged(name: str, traced: Trace, expected: Sequence[Truth]) -> Judged:
    layers = {spec.tap: spec for spec in [*stages(traced), *blocks(traced)]}
    deep = {tap: spec for tap, spec in layers.items() if (spec.reduction or 1) > LOWEST}
    right = {tap for tap, spec in deep.items() if any(_agree(traced, spec, truth) for truth in expected)}
    last = {tap for tap, spec in deep.items() if _agree(traced, spec, expected[-1])}
    return Judged(name, traced, expected, frozenset(right), frozenset(last), named_elsewhere().get(name, frozenset()))


@cache
def named_elsewhere() -> dict[str, frozenset[Tap]]:
    """Stage ends of models of timm by another word of an author than `feature_info`, by hand, with the source."""
    with Path(__file__).with_name("timm_stages.csv").open(encoding="utf-8", newline="") as file:
        return {row["model"]: frozenset(map(Tap.parse, row["stages"].split())) for row in csv.DictReader(file)}


def plan_all(models: Iterable[tuple[Judged, Judged]]) -> None:
    """Every ordered pair: a monotone match whose adapters can be planned, and whether it is right."""
    sizes: collections.Counter[int] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    verdicts: collections.Counter[str] = collections.Counter()
    refused = []
    every = 0
    for student, teacher in models:
        every += 1
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                pairs = match(student.traced, teacher.traced)
            sizes[check_pairs(student.traced, teacher.traced, pairs)] += 1
        except (ProbeKDError, AssertionError) as refusal:
            refused.append(f"{student.name} <- {teacher.name}: {refusal!r}")
            continue
        doubted = any(issubclass(warning.category, MatchWarning) for warning in warned)
        mistakes, verdict = judge(student, teacher, pairs, doubted)
        verdicts[verdict] += 1
        wrong.update(mistakes if verdict == SILENT else [])
    done = sum(sizes.values())
    print(*refused[:20], sep="\n")
    print(*(f"wrong in {count} pairs: {layer}" for layer, count in wrong.most_common(30)), sep="\n")
    counts = ", ".join(f"{size} pairs {count}" for size, count in sorted(sizes.items()))
    print(f"ordered pairs of models with a legal plan: {done}/{every} = {done / every:.1%} ({counts})")
    print(*(f"... {verdict}: {count}" for verdict, count in verdicts.most_common()), sep="\n")


SILENT = "a layer that no author names as a stage end, and nothing says so"


def judge(student: Judged, teacher: Judged, pairs: Sequence[Pair], doubted: bool) -> tuple[list[str], str]:
    """The wrong layers of a match, and whether anything says so."""
    mistakes = wrong_layers(student, teacher, pairs)
    if not mistakes:
        return [], "every layer is named as a stage end, with a warning" if doubted else "every layer is named"
    if doubted:
        return mistakes, "a layer that is not named, with a warning"
    mistakes = wrong_layers(student, teacher, pairs, elsewhere=True)
    if not mistakes:
        return [], "a layer that is named by another author, or in a comment"
    sides = [(student, "student", pairs[-1].student), (teacher, "teacher", pairs[-1].teacher)]
    left = set(mistakes)
    for side, word, tap in sides:
        if _names_the_last(pairs[-1].reason, side, word):
            left -= {f"{side.name}: {tap}", f"{side.name}: {tap} as the last"}
    return mistakes, SILENT if left else "a last layer that is not named, and the pair's reason says which other is"


def _names_the_last(reason: str, side: Judged, word: str) -> bool:
    """Whether the reason of a pair names the end of the last stage as another choice."""
    other = re.search(rf"or '([^']+)' of the {word}", reason)
    return other is not None and bool(_agree(side.traced, side.traced[other[1]], side.expected[-1]))


def check_plan(student: Trace, teacher: Trace) -> int:
    """The number of pairs, each of which has to come after the one before it and to be adaptable."""
    return check_pairs(student, teacher, match(student, teacher))


def check_pairs(student: Trace, teacher: Trace, pairs: Sequence[Pair]) -> int:
    orders = [(student[pair.student].order, teacher[pair.teacher].order) for pair in pairs]
    assert pairs, "no pairs"
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(orders)), f"not monotone: {orders}"
    with torch.device("meta"):
        for pair in pairs:
            adapt(student[pair.student], teacher[pair.teacher])
    return len(pairs)


def wrong_layers(student: Judged, teacher: Judged, pairs: Sequence[Pair], *, elsewhere: bool = False) -> list[str]:
    """The paired layers that no author names, and the last ones where they do not end the last stage.

    With `elsewhere`, layers that another author names are right too.
    """
    taps = [(student, pair.student) for pair in pairs] + [(teacher, pair.teacher) for pair in pairs]
    ends = [(student, pairs[-1].student), (teacher, pairs[-1].teacher)]
    wrong = [(side, tap, "") for side, tap in taps if tap not in side.right]
    wrong += [(side, tap, " as the last") for side, tap in ends if tap not in side.last]
    return [f"{side.name}: {tap}{place}" for side, tap, place in wrong if not elsewhere or tap not in side.elsewhere]


def rings(some: Sequence[T], others: Sequence[U], distances: Iterable[int]) -> Iterator[tuple[T, U]]:
    """Pairs in which each of some is first once for every distance, and each of as many others is second."""
    for distance in distances:
        yield from ((item, others[(index + distance) % len(others)]) for index, item in enumerate(some))


def step_all(pairs: list[tuple[str, str]]) -> None:
    """One step of training with real tensors: finite losses, and a gradient in the student."""
    failed = []
    for student, teacher in pairs:
        try:
            check_step(student, teacher)
        except (ProbeKDError, AssertionError, RuntimeError) as refusal:
            failed.append(f"{student} <- {teacher}: {refusal!r}")
            print(failed[-1], flush=True)
    done = len(pairs) - len(failed)
    print(f"steps with finite losses and a gradient in the student: {done}/{len(pairs)} = {done / len(pairs):.1%}")


def check_step(student_name: str, teacher_name: str) -> None:
    torch.manual_seed(0)
    student, teacher = build_model(student_name, {}), build_model(teacher_name, {})
    ours, theirs = trace(student, training=True), trace(teacher)
    pairs = match(ours, theirs)
    distiller = Distiller(student, teacher, [Objective("hint", pairs=pairs)], student_trace=ours, teacher_trace=theirs)
    size = [max(sides) for sides in zip(ours.input_size, theirs.input_size, strict=True)]
    distiller.student_view = torch.nn.Identity() if size == list(ours.input_size) else _Resize(ours.input_size[1:])
    loss = distiller.train()(torch.randn(2, *size))["loss"]
    loss.backward()
    gradients = [parameter.grad.norm().item() for parameter in student.parameters() if parameter.grad is not None]
    assert math.isfinite(loss.item()), f"loss {loss.item()}"
    assert all(map(math.isfinite, gradients)), "a gradient is not finite"
    assert sum(gradients) > 0, "no gradient in the student"
    assert all(parameter.grad is None for parameter in teacher.parameters()), "a gradient in the teacher"


class _Resize(torch.nn.Module):
    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, self.size)


def compare_timm(names: list[str]) -> tuple[list[Judged], list[Judged]]:
    """Score the families of timm, and plan every ordered pair. Returns their traces as students and as teachers."""
    expected = {name: truths(name) for name in names}
    teachers = {name: trace(name) for name in names}
    students = [judged(name, trace(name, training=True), expected[name]) for name in names]
    show({"timm": score_timm(names, teachers)})
    return students, [judged(name, traced, expected[name]) for name, traced in teachers.items()]


def compare_foreign(models: list[ForeignModel], names: list[str]) -> None:
    """Score the models of other libraries. Plan each with 20 others, and as a student and a teacher of 10 families."""
    traces = {}
    for model in models:
        with contextlib.suppress(ProbeKDError):  # `score_foreign` says why
            traces[model.label] = trace_foreign(model)
    scores = score_foreign(models, traces)
    students, teachers = compare_timm(names)
    show(scores)
    traced = [model for model in models if model.label in traces]
    foreign = [judged(model.label, traces[model.label], foreign_truths(model, traces[model.label])) for model in traced]
    plan_all(
        [
            *rings(foreign, foreign, range(1, 61, 3)),
            *rings(foreign, teachers, range(0, 90, 9)),
            *((student, teacher) for teacher, student in rings(foreign, students, range(0, 90, 9))),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--foreign", action="store_true", help="models of other libraries, among each other and with timm's"
    )
    parser.add_argument("--steps", action="store_true", help="one training step of each family with another")
    parser.add_argument("--zoo", action="store_true", help="score every model of timm")
    parser.add_argument("--limit", type=int, help="only so many families and models, evenly chosen")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of libraries that build models without weights
    names = _thinned(families(), options.limit)
    started = time.perf_counter()
    if options.zoo:
        import timm

        show({"timm": score_timm(timm.list_models(), {})})
    elif options.foreign:
        compare_foreign(_thinned(foreign_models(), options.limit), names)
    else:
        plan_all(itertools.product(*compare_timm(names)))
        if options.steps:
            step_all(list(rings(names, names, (1, 29, 47))))
    print(f"{time.perf_counter() - started:.0f} s")


def _thinned(items: list[T], limit: int | None) -> list[T]:
    return items[:: max(1, len(items) // limit)] if limit else items


if __name__ == "__main__":
    main()
