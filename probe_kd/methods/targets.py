"""The adapters of all comparisons, and the targets of a frozen teacher that a cache may store."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import Pair, Tap, Trace, Traces
from probe_kd.errors import AdapterError, LossError, TapError, nearest
from probe_kd.methods.adapters import (
    Adapter,
    Target,
    adapt,
    adapt_all,
    adapt_maps,
    adapt_matrices,
    adapt_outputs,
    adapt_vectors,
)
from probe_kd.methods.comparisons import Comparison
from probe_kd.methods.ensembles import adapt_mean
from probe_kd.methods.objectives import ADAPTER_OPTIONS, Objective
from probe_kd.methods.outputs import output_spec, tensor_at

CachedTargets = Sequence[Tensor] | Mapping[str, Tensor]


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
            make_adapter(objective, comparison, student, teacher, class_map) for comparison in objective.comparisons
        )
        for objective in objectives
    }
    return nn.ModuleDict(adapters)


def make_adapter(
    objective: Objective,
    comparison: Comparison,
    student: Trace,
    teacher: Trace | Traces,
    class_map: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Make the adapter of one comparison. `class_map` may be a mapping from the names of teachers.

    Raises AdapterError for features that cannot be compared, TapError for a layer that does not exist, and TraceError
    for an output of several tensors.
    """
    reads = objective.resolved.reads
    class_maps = class_map if isinstance(class_map, Mapping) else {} if class_map is None else {"": class_map}
    if reads == "outputs":
        return _adapter_of_outputs(objective, comparison, student, teacher, class_maps)
    student_specs = [student[pair.student] for pair in comparison.pairs]
    teacher_specs = [teacher[pair.teacher] for pair in comparison.pairs]
    # A pair's own options come first; with two pairs, those of the second, the end of the flow.
    own_options = comparison.pairs[-1].adapter
    options: dict[str, Any] = {key: own_options.get(key, getattr(objective, key)) for key in ADAPTER_OPTIONS}
    match reads:
        case "vectors":
            tap = comparison.pairs[0].teacher
            is_output = objective.reads_labels and tap.local == Tap("")  # whose numbers are classes, like the labels
            own_map = class_maps.get(tap.model) if is_output else None
            return adapt_vectors(student_specs[0], teacher_specs[0], tokens=options["tokens"], class_map=own_map)
        case "maps":
            return adapt_maps(student_specs[0], teacher_specs[0], grid=options["grid"])
        case "grams" | "flows":
            return adapt_matrices(student_specs, teacher_specs, policy=options["policy"])
        case "all_pairs":
            return adapt_all(student_specs, teacher_specs)
    return adapt(student_specs[0], teacher_specs[0], **options)


def _adapter_of_outputs(
    objective: Objective,
    comparison: Comparison,
    student: Trace,
    teacher: Trace | Traces,
    class_maps: Mapping[str, Sequence[int]],
) -> Adapter:
    read = tensor_at if objective.is_dense else output_spec
    student_output = read(student, objective.outputs.student, "student")
    teacher_outputs = [read(teacher, tap, "teacher") for tap in objective.teacher_taps]
    if objective.is_dense and comparison.is_mean:
        raise AdapterError("`dense` compares with one teacher; name it as `teacher` of the loss")
    if comparison.is_mean:
        weights, multilabel = [pair.weight for pair in comparison.pairs], objective.resolved.multilabel
        return adapt_mean(student_output, teacher_outputs, weights, class_maps, multilabel=multilabel)
    own_map = class_maps.get(objective.outputs.teacher.model)
    return adapt_outputs(student_output, teacher_outputs[0], own_map, dense=objective.is_dense, grid=objective.grid)


def expanded(objective: Objective, student: Trace, teacher: Trace | Traces) -> Objective:
    """The same objective, with each pair of `tokens="all"` as one pair for every part that is compared.

    A pair of a layer that does not exist stays as it is: its adapter raises TapError.
    """
    if "tokens" not in objective.adaptable:
        return objective
    pairs = [
        part
        for pair in objective.pairs
        for part in (
            _parts(pair, student, teacher) if pair.adapter.get("tokens", objective.tokens) == "all" else [pair]
        )
    ]
    return objective if pairs == list(objective.pairs) else replace(objective, pairs=pairs)


def _parts(pair: Pair, student: Trace, teacher: Trace | Traces) -> Iterator[Pair]:
    try:
        specs = student[pair.student], teacher[pair.teacher]
    except TapError:
        yield pair
        return
    vector = "cls" if any(spec.prefix_tokens for spec in specs) else "pool"
    for tokens in (vector, "drop") if all(spec.spatial for spec in specs) else (vector,):
        yield replace(pair, adapter={**pair.adapter, "tokens": tokens})


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


def targets_from(
    objectives: Iterable[Objective], adapters: nn.ModuleDict, features: Mapping[Tap, Tensor], teachers: Sequence[str]
) -> dict[str, Tensor]:
    """The targets of some teachers by name, from their features."""
    targets = {target_of(tap): feature for tap, feature in features.items()}
    for objective, comparison, adapter in compared(objectives, adapters):
        if adapter.target is not None and adapter.target.teacher in teachers:
            targets[str(adapter.target)] = unfitted_side(objective, comparison, adapter, features, targets)
    return targets


def by_target(cached: CachedTargets | None, targets: Mapping[str, Target]) -> dict[str, Tensor] | None:
    """Cached targets by name. Raises LossError for a name that is none of the targets."""
    if cached is None:
        return None
    if not isinstance(cached, Mapping):
        return dict(zip(targets, cached, strict=True))
    for name in cached:
        if name not in targets:
            raise LossError(f"cached_targets has {name!r}{nearest(name, targets)}; the targets: {tuple(targets)}")
    return dict(cached)


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


def teacher_sides(
    objectives: Iterable[Objective],
    adapters: nn.ModuleDict,
    features: Mapping[Tap, Tensor],
    cached: Mapping[str, Tensor],
) -> dict[tuple[int, int], Any]:
    """The teacher's sides of all comparisons, by the number of the objective and of the comparison in it.

    What several comparisons read is computed once. No side holds the memory of a feature that is much larger.
    """
    sides: dict[tuple[int, int], Any] = {}
    targets = dict(cached)
    for position, objective in enumerate(objectives):
        for number, (_, comparison, adapter) in enumerate(compared([objective], adapters)):
            side = unfitted_side(objective, comparison, adapter, features, targets)
            if adapter.target is not None:
                targets[str(adapter.target)] = side
            side = adapter.fitted_steps(side)
            sides[position, number] = tuple(map(_of_own, side)) if isinstance(side, tuple) else _of_own(side)
    return sides


def _of_own(side: Tensor) -> Tensor:
    """The side itself, or a copy of one that is a small part of a larger tensor, as a class token is."""
    if torch.compiler.is_compiling() or side.untyped_storage().nbytes() <= 2 * side.nbytes:
        return side
    return side.clone()


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
    teacher_features = comparison.features("teacher", features, several=objective.resolved.reads_several)
    target: Tensor = adapter.teacher_steps(teacher_features)
    return target


def module_key(name: str) -> str:
    """The objective's key in a ModuleDict: without dots, and unlike any attribute of ModuleDict."""
    return f"{name.replace('.', '_')}_"
