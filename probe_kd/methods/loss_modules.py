"""The losses with parameters or state: one module for each comparison, which the Distiller owns."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap, Trace, Traces
from probe_kd.errors import LossError, ProbeKDError, TraceError
from probe_kd.methods.adapters import Adapter
from probe_kd.methods.comparisons import Comparison
from probe_kd.methods.losses.calling import described
from probe_kd.methods.normalisation import without_statistics
from probe_kd.methods.objectives import Objective
from probe_kd.methods.outputs import tensor_at
from probe_kd.methods.targets import compared, module_key


def make_losses(
    objectives: Iterable[Objective],
    adapters: nn.ModuleDict,
    student: Trace,
    teacher: Trace | Traces,
    *,
    frozen: Mapping[str, nn.Module],
    num_images: int | None = None,
) -> nn.ModuleDict:
    """Build the modules of all losses that have one, in the order of their comparisons, for `Distiller.losses`.

    `frozen` are the frozen teachers by name, and `num_images` is the number of training images. Raises LossError for a
    loss that cannot be built for what it compares, or that needs a classifier or a number of images which do not exist.
    """
    modules: dict[str, nn.ModuleList] = {}
    for objective, comparison, adapter in compared(objectives, adapters):
        if objective.resolved.builds_module:
            specs = seen_specs(objective, comparison, adapter, student, teacher)
            needed = _needed(objective, comparison, frozen, num_images)
            module = _build(objective, specs, needed)
            modules.setdefault(module_key(objective.name), nn.ModuleList()).append(module)
    return nn.ModuleDict(modules)


def _build(objective: Objective, specs: tuple[Any, Any], needed: Mapping[str, Any]) -> nn.Module:
    loss, name = objective.resolved, objective.name
    try:
        module = loss.function(*specs, **objective.options, **needed)
    except (ProbeKDError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of code that is not ours, of any type
        raise LossError(f"the loss {name!r} cannot be built: {described(error)}") from error
    if not isinstance(module, nn.Module):
        raise LossError(f"the loss {name!r} says that it builds a module, and built a {type(module).__name__}")
    loss.check_call(name, module)
    return module


def _needed(
    objective: Objective, comparison: Comparison, frozen: Mapping[str, nn.Module], num_images: int | None
) -> dict[str, Any]:
    """What a module gets beside its options."""
    needed: dict[str, Any] = {}
    if "classifier" in objective.resolved.needs:
        needed["classifier"] = _classifier(objective.name, frozen.get(comparison.teachers[0]))
    if "num_images" in objective.resolved.needs:
        if num_images is None:
            raise LossError(
                f"the loss {objective.name!r} keeps something of every training image; give the Distiller their number "
                "as `num_images`"
            )
        needed["num_images"] = num_images
    return needed


def _classifier(name: str, teacher: nn.Module | None) -> nn.Module:
    """A copy of the teacher's classifier, which does not train. `teacher` is None for one that trains."""
    if teacher is None:
        raise LossError(
            f"the loss {name!r} needs the classifier of a frozen teacher, and this one trains together with the "
            "student; leave the loss out, or train the teacher first (`teacher: {train: ...}`, without `share`)"
        )
    get_classifier: Any = getattr(teacher, "get_classifier", None)
    classifier = get_classifier() if get_classifier is not None else None
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
        raise LossError(
            f"the loss {name!r} needs the teacher's classifier, and {type(teacher).__name__} has none that "
            "`get_classifier()` returns"
        )
    return copy.deepcopy(classifier).requires_grad_(False).eval()


def seen_specs(
    objective: Objective, comparison: Comparison, adapter: Adapter, student: Trace, teacher: Trace | Traces
) -> tuple[Any, Any]:
    """The specs of what a loss sees of the student and of the teacher, after the adapter.

    Of all pairs they are two tuples.
    """
    specs = [
        [_spec(trace, getattr(pair, side), side) for pair in comparison.pairs]
        for side, trace in (("student", student), ("teacher", teacher))
    ]
    several = objective.resolved.reads_several
    inputs = [tuple(torch.zeros(spec.shape, device=_device(adapter)) for spec in of_model) for of_model in specs]
    with torch.no_grad(), without_statistics(adapter):
        sides = adapter(*(tensors if several else tensors[0] for tensors in inputs))
    if objective.resolved.reads == "all_pairs":
        student_specs, teacher_specs = (
            tuple(_after(spec, tensor) for spec, tensor in zip(of_model, side, strict=True))
            for of_model, side in zip(specs, sides, strict=True)
        )
        return student_specs, teacher_specs
    return _after(specs[0][-1], sides[0]), _after(specs[1][-1], sides[1])


def _spec(trace: Trace | Traces, tap: Tap, side: str) -> FeatureSpec:
    try:
        return trace[tap]
    except TraceError:
        return tensor_at(trace, tap, side)


def _device(adapter: nn.Module) -> torch.device:
    tensors: Sequence[Tensor] = [*adapter.parameters(), *adapter.buffers()]
    return tensors[0].device if tensors else torch.get_default_device()


def _after(spec: FeatureSpec, tensor: Tensor) -> FeatureSpec:
    layouts = {2: Layout.NC, 4: Layout.NCHW}
    grid = (tensor.shape[2], tensor.shape[3]) if tensor.ndim == 4 else None
    layout = layouts.get(tensor.ndim, Layout.OTHER)
    form = FeatureSpec(spec.tap, layout, tuple(tensor.shape), channels=tensor.shape[1], grid=grid)
    return replace(form, reduction=spec.reduction, order=spec.order, tensor=spec.tensor, activation=spec.activation)
