"""Values computed in parts: as many images as a cache holds, or a sum with its gradient, part by part."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probe_kd.errors import LossError

IN_CACHE = 2**17  # numbers
SMALL = 2**20  # numbers that a matrix may hold, however small the features are


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some images at a time of each tensor, as many as the cache of a CPU holds; elsewhere all at once."""
    images, numbers = len(tensors[0]), tensors[0].numel()
    some = tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, IN_CACHE * images // numbers) if some else images
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def in_parts(
    part: Callable[..., Tensor], split: Sequence[Tensor], whole: Sequence[Tensor], *, numbers: int, largest: int
) -> Tensor:
    """Add up `part(*rows, *whole)` over some rows of `split` at a time, of `numbers` each and `largest` together.

    The gradient of a part is computed with its value, so that no part is computed twice or stays in memory.
    """
    size = max(1, largest // numbers)
    if size >= len(split[0]):
        return part(*split, *whole)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _recomputed(part, size, split, whole)
    total: Tensor = _Parts.apply(part, size, len(split), *split, *whole)
    return total


def _recomputed(part: Callable[..., Tensor], size: int, split: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """The sum over all parts, each of which is computed once more in the backward."""
    parts = zip(*(torch.split(tensor, size) for tensor in split), strict=True)
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(part, *rows, *whole, **options) for rows in parts]).sum()


class _Parts(torch.autograd.Function):
    """The sum of a function over parts, of which the gradients are known before the backward."""

    @staticmethod
    def forward(ctx: Any, part: Callable[..., Tensor], size: int, split: int, *tensors: Tensor) -> Tensor:
        needed = [place for place, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        gradients = {place: torch.zeros_like(tensors[place]) for place in needed}
        values = []
        for start in range(0, len(tensors[0]), size):
            rows = [slice(start, start + size) if place < split else ... for place in range(len(tensors))]
            some = [tensor.detach()[which] for tensor, which in zip(tensors, rows, strict=True)]
            leaves = [some[place].requires_grad_() for place in needed]
            with torch.set_grad_enabled(bool(needed)):
                value = part(*some)
            values.append(value.detach())
            of_part = torch.autograd.grad(value, leaves) if needed else ()
            for place, gradient in zip(needed, of_part, strict=True):
                gradients[place][rows[place]] += gradient
        ctx.save_for_backward(*tensors, *(gradients.get(place) for place in range(len(tensors))))
        ctx.arguments = part, size, split
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        part, size, split = ctx.arguments
        count = len(ctx.saved_tensors) // 2
        tensors, known = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # to be differentiated once more
            total = _recomputed(part, size, tensors[:split], tensors[split:])
            return None, None, None, *gradients_at(total, tensors, ctx.needs_input_grad[3:], gradients[0])
        return None, None, None, *(None if whole is None else gradients[0] * whole for whole in known)


def gradients_at(
    value: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of a value at the needed tensors, with a graph of their own if they are to be differentiated."""
    inputs = [tensor for tensor, needs in zip(tensors, needed, strict=True) if needs]
    given = iter(torch.autograd.grad(value, inputs, gradient, create_graph=torch.is_grad_enabled()))
    return [next(given) if needs else None for needs in needed]


def check_first_derivative(name: str) -> None:
    """Raise LossError in a backward that is to be differentiated, where a constant is saved that is none."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise LossError(f"the gradient of {name} cannot be differentiated; leave out `create_graph`")
