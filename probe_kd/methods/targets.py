"""What a student is compared with: the adapters of all comparisons, and the targets that may be stored of a teacher."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from probe_kd.engine.spec import Tap, Trace
from probe_kd.methods.adapters import Adapter, Target
from probe_kd.methods.objectives import Comparison, Objective


def make_adapters(
    objectives: Iterable[Objective], student: Trace, teacher: Trace, class_map: Sequence[int] | None = None
) -> nn.ModuleDict:
    """The adapters of every objective, in the order of their comparisons: what `Distiller.adapters` is.

    Raises AdapterError where nothing brings two features together, TapError where no layer is.
    """
    found = {
        module_key(objective.name): nn.ModuleList(
            objective.adapter(comparison, student, teacher, class_map) for comparison in objective.comparisons
        )
        for objective in objectives
    }
    return nn.ModuleDict(found)


def compared(objectives: Iterable[Objective], adapters: nn.ModuleDict) -> list[tuple[Objective, Comparison, Adapter]]:
    """Every comparison with its objective and its adapter, of those that `make_adapters` made."""
    found: list[tuple[Objective, Comparison, Adapter]] = []
    for objective in objectives:
        key = module_key(objective.name)
        made: Any = adapters[key].children() if key in adapters else ()
        found += [(objective, *both) for both in zip(objective.comparisons, made, strict=True)]
    return found


def targets_of(objectives: Iterable[Objective], adapters: nn.ModuleDict, teacher: Trace) -> dict[str, Target]:
    """By name, what these objectives read of a frozen teacher, in the form in which it may be stored."""
    found: dict[str, Target] = {}
    for _, comparison, adapter in compared(objectives, adapters):
        raw = [Target(str(pair.teacher), tuple(teacher[pair.teacher].shape[1:])) for pair in comparison.pairs]
        found |= {target.name: target for target in ([adapter.target] if adapter.target else raw)}
    return found


def teacher_side(
    objective: Objective,
    comparison: Comparison,
    adapter: Adapter,
    features: Mapping[Tap, Tensor],
    cached: Mapping[str, Tensor],
) -> Tensor:
    """The teacher's side of a comparison: as it was stored, or else made of its features."""
    if adapter.target is not None and adapter.target.name in cached:
        return cached[adapter.target.name]
    taken = comparison.features("teacher", features, matrices=objective.resolved.reads_matrices)
    target: Tensor = adapter.teacher_steps(taken)
    return target


def module_key(name: str) -> str:
    """A module name cannot hold a dot, and must not hide an attribute of ModuleDict."""
    return f"{name.replace('.', '_')}_"
