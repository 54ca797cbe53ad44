"""What the losses of a step move: gradients by objective and parameter, and training nothing else."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probe_kd.engine.randomness import RandomState
from probe_kd.engine.surgery import buffers_aside
from probe_kd.methods.distiller import Distiller


def gradient_norms(distiller: Distiller, images: Tensor, target: Tensor | None = None) -> dict[str, dict[str, float]]:
    """The norm of the gradient that each objective, unweighted, gives to each parameter that it reaches.

    Names are those of `named_parameters()`. Neither gradients, buffers nor random numbers are changed.
    """
    named = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    found: dict[str, dict[str, float]] = {}
    with RandomState(distiller).again(), buffers_aside(distiller):
        result = distiller(images, target)
        for objective in distiller.objectives:
            term = result[objective.name]
            assert term is not None
            gradients: Sequence[Tensor | None] = [None] * len(named)
            if term.requires_grad:
                gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
            pairs = zip(named, gradients, strict=True)
            found[objective.name] = {name: float(g.norm()) for name, g in pairs if g is not None}
    return found


@contextmanager
def training_only(module: nn.Module, names: Collection[str]) -> Iterator[list[nn.Parameter]]:
    """Inside, of what trains only these of `named_parameters()` do, as `gradient_norms` names them. Gives them."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    resting = [parameter for name, parameter in named if name not in names]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield [parameter for name, parameter in named if name in names]
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
