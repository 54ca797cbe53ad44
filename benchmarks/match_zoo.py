"""How well `match` does over all families of timm.

    python benchmarks/match_zoo.py              # stage ends against feature_info, and the plans of all ordered pairs
    python benchmarks/match_zoo.py --steps      # also one training step of every family as student and as teacher
    python benchmarks/match_zoo.py --zoo        # stage ends against feature_info of every model of timm, ten minutes

The definitions are in docs/matching.md.
"""

import argparse
import collections
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from families import families

from probe_kd import Distiller, Objective, ProbeKDError, Trace, match, trace
from probe_kd.engine.matching import stages
from probe_kd.engine.models import build_model, build_on_meta
from probe_kd.engine.spec import FeatureSpec
from probe_kd.methods.adapters import adapt

LOWEST = 4  # features of stride 1 and 2 belong to the stem


@dataclass(frozen=True)
class Truth:
    """One stage end as timm's `feature_info` names it."""

    module: str
    stride: float
    channels: int


@dataclass
class Score:
    """Agreement, from strict to loose; each figure includes the ones before it."""

    stages: int = 0
    same: int = 0  # the same tensor
    normed: int = 0  # the same up to a norm or an activation
    alike: int = 0  # the same stride and channels

    def add(self, other: "Score") -> None:
        for key in vars(other):
            setattr(self, key, getattr(self, key) + getattr(other, key))

    def __str__(self) -> str:
        shares = ((name, getattr(self, name)) for name in ("same", "normed", "alike"))
        return ", ".join(f"{name} {count}/{self.stages} = {count / self.stages:.1%}" for name, count in shares)


def truths(name: str) -> list[Truth]:
    """timm's own list; where it names several modules of one stride (a stage in parts), the last of them."""
    with torch.device("meta"):
        info = build_on_meta(name, {}).feature_info
    entries = info.info if hasattr(info, "info") else list(info)
    found = [Truth(str(entry["module"] or ""), entry["reduction"], entry["num_chs"]) for entry in entries]
    return [truth for truth in found if truth.stride >= LOWEST]


def score(name: str, traced: Trace) -> tuple[Score, list[str]]:
    """The agreement of one model, and what was missed."""
    expected, found = truths(name), stages(traced)
    if len({truth.stride for truth in expected}) == 1:  # isotropic: timm lists all blocks, and `stages` some of them
        pairs = [(spec, expected) for spec in found]
        scores = [max((_agree(traced, spec, truth) for truth in all_), default=0) for spec, all_ in pairs]
        missed = [str(spec.tap) for spec, agreed in zip(found, scores, strict=True) if agreed < 3]
    else:
        last = {truth.stride: truth for truth in expected}
        scores = [max(_agree(traced, spec, truth) for spec in found) for truth in last.values()]
        missed = [truth.module for truth, agreed in zip(last.values(), scores, strict=True) if agreed < 3]
    counts = [sum(agreed >= least for agreed in scores) for least in (3, 2, 1)]
    return Score(len(scores), *counts), missed


def _agree(traced: Trace, spec: FeatureSpec, truth: Truth) -> int:
    """3 the same tensor, 2 the same up to a norm or an activation, 1 the same stride and channels, 0 another."""
    there = [other for other in traced.specs if other.tap.module == truth.module]
    own = [other for other in traced.specs if other.tap.module == spec.tap.module]
    alike = abs((spec.reduction or 1) / truth.stride - 1) < 0.25 and spec.channels == truth.channels
    if spec.tap.module == truth.module or _meet([spec], there, "output"):
        return 3
    if not there:  # a name that timm makes up, which no hook can reach: there is nothing else to compare
        return 3 * alike
    if _is_norm(traced, truth.module) and _meet([spec], there, "input"):
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


def score_all(names: Iterable[str], traces: dict[str, Trace]) -> None:
    total = Score()
    for name in names:
        traced = traces.get(name) or trace(name)
        result, missed = score(name, traced)
        total.add(result)
        if missed:
            print(f"{name:34} {result}; not the same tensor: {', '.join(missed)}")
    print(f"stage ends against feature_info: {total}")


def plan_all(names: list[str], students: dict[str, Trace], teachers: dict[str, Trace]) -> None:
    """Every ordered pair: a monotone match whose adapters can be planned."""
    counts: collections.Counter[int] = collections.Counter()
    refused = []
    for student in names:
        for teacher in names:
            try:
                counts[check_plan(students[student], teachers[teacher])] += 1
            except (ProbeKDError, AssertionError) as refusal:
                refused.append(f"{student} <- {teacher}: {refusal!r}")
    print(*refused[:20], sep="\n")
    done, every = sum(counts.values()), len(names) ** 2
    sizes = ", ".join(f"{size} pairs {count}" for size, count in sorted(counts.items()))
    print(f"ordered pairs of families with a legal plan: {done}/{every} = {done / every:.1%} ({sizes})")


def check_plan(student: Trace, teacher: Trace) -> int:
    """The number of pairs, each of which has to come after the one before it and to be adaptable."""
    pairs = match(student, teacher)
    orders = [(student[pair.student].order, teacher[pair.teacher].order) for pair in pairs]
    assert pairs, "no pairs"
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(orders)), f"not monotone: {orders}"
    with torch.device("meta"):
        for pair in pairs:
            adapt(student[pair.student], teacher[pair.teacher])
    return len(pairs)


def rings(names: list[str], distances: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Pairs in which every family is a student once, and a teacher once, for every distance."""
    for distance in distances:
        yield from ((name, names[(index + distance) % len(names)]) for index, name in enumerate(names))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="one training step of each family with another")
    parser.add_argument("--zoo", action="store_true", help="score every model of timm")
    parser.add_argument("--limit", type=int, help="only so many families, evenly chosen")
    options = parser.parse_args()
    names = families()
    names = names[:: max(1, len(names) // options.limit)] if options.limit else names
    started = time.perf_counter()
    if options.zoo:
        import timm

        score_all(timm.list_models(), {})
        return
    teachers = {name: trace(name) for name in names}
    students = {name: trace(name, training=True) for name in names}
    score_all(names, teachers)
    plan_all(names, students, teachers)
    if options.steps:
        step_all(list(rings(names, (1, 29, 47))))
    print(f"{len(names)} families, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
