"""Whose layers and outputs the objectives read, where there are several teachers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import TypeVar

from torch import nn

from probe_kd.engine.spec import FeatureSpec, Tap, Trace, Traces, check_model_name
from probe_kd.errors import LossError, TapError, nearest
from probe_kd.methods.objectives import MEAN, Objective

T = TypeVar("T")


def teachers_by_name(teacher: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """The teachers by name: a single one has the empty name. Raises TapError for a name that no tap can begin with."""
    if teacher is None:
        return {}
    if not isinstance(teacher, Mapping | nn.ModuleDict):
        return {"": teacher}
    for name in teacher:
        if not isinstance(name, str) or not name:
            raise TapError(f"{name!r} cannot be the name of a teacher; expected a name as in {{'dino': model}}")
        check_model_name(name)
    return dict(teacher.items())


def by_teacher(argument: str, value: T | Mapping[str, T] | None, names: Iterable[str]) -> dict[str, T]:
    """An argument of the Distiller by the name of the teacher that it is for.

    Raises LossError for a name of no teacher, and for a single value where there are several teachers.
    """
    names = tuple(names)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        for name in value:
            if name not in names:
                listed = ", ".join(filter(None, names)) or "there is one teacher, without a name"
                raise LossError(f"{argument} is for {name!r}{nearest(str(name), names)}; the teachers: {listed}")
        return dict(value)
    if len(names) > 1:
        raise LossError(f"{argument} has to say which teacher it is for: {{{names[0]!r}: ...}} of {', '.join(names)}")
    return dict.fromkeys(names or ("",), value)


def name_teachers(
    objectives: Iterable[Objective],
    student: Trace,
    teachers: Traces,
    *,
    class_maps: Mapping[str, Sequence[int]],
    weights: Mapping[str, float],
    outputs: Mapping[str, Tap] | None = None,
) -> tuple[Objective, ...]:
    """Return the objectives with the name of a teacher in each of their taps, and with the teachers' weights.

    A loss of outputs that names no teacher, or `mean`, gets the outputs of all teachers that classify. `outputs` are
    the taps that hold those, by default the models' own outputs.

    Raises TapError for a tap that names no teacher or an unknown one, and LossError if no teacher classifies.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (isfinite(weight) and weight > 0):
            raise LossError(f"weight {weight!r} of the teacher {name!r}: expected a finite number above 0")
    named = []
    for objective in objectives:
        pairs = tuple(replace(pair, teacher=teachers.named(pair.teacher)) for pair in objective.pairs)
        objective = replace(objective, pairs=pairs, teacher_weights={**objective.teacher_weights, **weights})
        if objective.resolved.reads == "outputs":
            objective = replace(objective, teacher=_output_of(objective, student, teachers, class_maps, outputs or {}))
        named.append(objective)
    return tuple(named)


def _output_of(
    objective: Objective,
    student: Trace,
    teachers: Traces,
    class_maps: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Tap],
) -> Tap | tuple[Tap, ...]:
    """The teacher's output that a loss reads, or those whose mean it reads."""
    taps = objective.teacher_taps
    if len(taps) > 1 or taps[0] not in (MEAN, Tap("")):
        return tuple(map(teachers.named, taps))
    if taps[0] == MEAN and len(teachers.by_model) == 1 and "mean" in next(iter(teachers.by_model.values())).modules:
        return teachers.named(MEAN)  # a layer of that name
    if taps[0] == MEAN and "" in teachers.by_model:
        raise TapError("'mean' is the mean of several teachers' outputs, and there is one; leave `teacher` out")
    all_outputs = {name: replace(outputs.get(name, Tap("")), model=name) for name in teachers.by_model}
    if len(all_outputs) == 1:
        return next(iter(all_outputs.values()))
    spec = student[objective.outputs.student]
    classifiers = tuple(
        tap for name, tap in all_outputs.items() if _classifies(teachers, tap, spec, name in class_maps)
    )
    if not classifiers:
        legal = ", ".join(f"{name} yields {_described(teachers, tap)}" for name, tap in all_outputs.items())
        raise LossError(
            f"{objective.name!r} compares outputs and names no teacher, and no teacher classifies the student's "
            f"{spec.channels} classes ({legal}); name one, as in teacher='{next(iter(all_outputs.values()))}', or give "
            "a `class_map`"
        )
    return classifiers


def _classifies(teachers: Traces, tap: Tap, student: FeatureSpec, mapped: bool) -> bool:
    """Whether a teacher's output is one row of the student's classes per image, by a class map if there is one."""
    try:
        spec = teachers[tap]
    except TapError:  # several tensors, say
        return False
    return len(spec.shape) == 2 and (mapped or spec.channels == student.channels)


def _described(teachers: Traces, tap: Tap) -> str:
    try:
        return teachers[tap].describe()
    except TapError:
        return "no single tensor"


def localised(objective: Objective, name: str) -> Objective | None:
    """The part of an objective that one teacher takes part in, as if it was the only one; None if there is none.

    What reads labels alone is part of it.
    """
    reads = objective.resolved
    pairs = [replace(pair, teacher=pair.teacher.local) for pair in objective.pairs if pair.teacher.model == name]
    taps = [tap.local for tap in objective.teacher_taps if tap.model == name]
    if (reads.reads_layers and not pairs) or (reads.reads == "outputs" and not taps):
        return None
    return replace(objective, pairs=pairs, teacher=taps[0] if taps else "", between=(), teacher_weights={})


def compared_alone(objectives: Iterable[Objective]) -> list[str]:
    """The teachers that comparisons read alone, without the mean of several."""
    comparisons = [comparison for objective in objectives for comparison in objective.comparisons]
    return list(dict.fromkeys(name for comp in comparisons if not comp.is_mean for name in comp.teachers))
