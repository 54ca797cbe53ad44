"""The adapters of all comparisons, and the targets of a frozen teacher that a cache may store."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from probe_kd.engine.spec import Tap, Trace, Traces
from probe_kd.methods.adapters import Adapter, Target
from probe_kd.methods.objectives import Comparison, Objective


def make_adapters(
    objectives: Iterable[Objective],
    student: Trace,
    teacher: Trace | Traces,
    class_map: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> nn.ModuleDict:
    """Make the adapters of every objective, in the order of its comparisons, for `Distiller.adapters`.

    `class_map` may be a mapping from the names of teachers to their class maps.

    Raises AdapterError for features that cannot be compared, and TapError for a layer that does not exist.
    """
    adapters = {
        module_key(objective.name): nn.ModuleList(
            objective.adapter(comparison, student, teacher, class_map) for comparison in objective.comparisons
        )
        for objective in objectives
    }
    return nn.ModuleDict(adapters)


def compared(objectives: Iterable[Objective], adapters: nn.ModuleDict) -> list[tuple[Objective, Comparison, Adapter]]:
    """List every comparison with its objective and its adapter; `adapters` is the result of `make_adapters`."""
    comparisons: list[tuple[Objective, Comparison, Adapter]] = []
    for objective in objectives:
        key = module_key(objective.name)
        own_adapters: Any = adapters[key].children() if key in adapters else ()
        comparisons += [
            (objective, *comparison_and_adapter)
            for comparison_and_adapter in zip(objective.comparisons, own_adapters, strict=True)
        ]
    return comparisons


def targets_of(objectives: Iterable[Objective], adapters: nn.ModuleDict, teacher: Trace | Traces) -> dict[str, Target]:
    """The targets that the objectives read from a frozen teacher, by name."""
    targets: dict[str, Target] = {}
    for _, comparison, adapter in compared(objectives, adapters):
        feature_targets = [
            Target(str(pair.teacher.local), tuple(teacher[pair.teacher].shape[1:]), pair.teacher.model)
            for pair in comparison.pairs
        ]
        targets |= {str(target): target for target in ([adapter.target] if adapter.target else feature_targets)}
    return targets


def target_of(tap: Tap) -> str:
    """The name of the target that is the feature of a teacher's tap itself."""
    return str(Target(str(tap.local), (), tap.model))


def teacher_side(
    objective: Objective,
    comparison: Comparison,
    adapter: Adapter,
    features: Mapping[Tap, Tensor],
    cached: Mapping[str, Tensor],
) -> Tensor:
    """The teacher's side of a comparison: from the cached target if there is one, otherwise from the features."""
    target: Tensor = adapter.fitted_steps(unfitted_side(objective, comparison, adapter, features, cached))
    return target


def unfitted_side(
    objective: Objective,
    comparison: Comparison,
    adapter: Adapter,
    features: Mapping[Tap, Tensor],
    cached: Mapping[str, Tensor],
) -> Tensor:
    """The teacher's side of a comparison before fitted statistics, on which what a cache stores does not depend."""
    if adapter.target is not None and str(adapter.target) in cached:
        return cached[str(adapter.target)]
    teacher_features = comparison.features("teacher", features, matrices=objective.resolved.reads_matrices)
    target: Tensor = adapter.teacher_steps(teacher_features)
    return target


def module_key(name: str) -> str:
    """The objective's key in a ModuleDict: without dots, and unlike any attribute of ModuleDict."""
    return f"{name.replace('.', '_')}_"
