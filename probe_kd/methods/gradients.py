"""Gradients by objective and parameter, and training only the parameters that a loss reaches."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probe_kd.engine.randomness import RandomState
from probe_kd.engine.surgery import buffers_aside
from probe_kd.methods.distiller import Distiller


def gradient_norms(
    distiller: Distiller, images: Tensor, target: Tensor | None = None, index: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Return `{objective: {parameter: gradient norm}}` of the unweighted objectives.

    A parameter that an objective does not reach is left out. Parameters are named as by `named_parameters()`. The
    gradients, the buffers and the state of the random numbers do not change. `index` is that of a step.
    """
    parameters = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    norms: dict[str, dict[str, float]] = {}
    with RandomState(distiller).again(), buffers_aside(distiller):
        result = distiller(images, target, index=index)
        for objective in distiller.objectives:
            term = result[objective.name]
            assert term is not None
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if term.requires_grad:
                gradients = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
            pairs = zip(parameters, gradients, strict=True)
            norms[objective.name] = {name: float(gradient.norm()) for name, gradient in pairs if gradient is not None}
    return norms


@contextmanager
def training_only(module: nn.Module, names: Collection[str]) -> Iterator[list[nn.Parameter]]:
    """Freeze all parameters but those of the given names inside the context, and yield these.

    Names are those of `named_parameters()`. Parameters that are frozen already stay frozen.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    frozen = [parameter for name, parameter in trainable if name not in names]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield [parameter for name, parameter in trainable if name in names]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
