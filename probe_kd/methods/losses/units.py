"""Vectors scaled to length 1, without overflow or underflow, with a gradient that keeps nothing but the result."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe_kd.methods.losses.parts import check_first_derivative


def power_of_two(numbers: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """The power of two above each positive number, and 1 for zero. Dividing by it causes no rounding error."""
    numbers = numbers.detach().masked_fill(numbers == 0, 0.5)
    return numbers / torch.frexp(numbers).mantissa


def unit(rows: Float[Tensor, "rows n ..."]) -> Float[Tensor, "rows n ..."]:
    """Scale rows along axis 1 to length 1, without overflow or underflow of their squares. Rows of zeros stay zero.

    The gradient of zeros is that of the numbers themselves.
    """
    scaled = rows / power_of_two(rows.abs().amax(1, keepdim=True))
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    result: Tensor = scaled / length.masked_fill(length == 0, 1.0)
    return result


def unit_features(features: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """As `unit`, along `dim`, for whole features: the backward keeps nothing but the result."""
    scaled: Tensor = _Unit.apply(features, dim, None)
    return scaled


def unit_deviation(features: Float[Tensor, "..."], dim: Sequence[int]) -> Float[Tensor, "..."]:
    """Subtract the mean over `dim` and scale to length 1. Equal numbers become zeros, within rounding.

    The backward keeps nothing but the result. The gradient of equal numbers is that of the numbers over their length.
    """
    mean = features.mean(tuple(dim), keepdim=True)
    lengths = mean.detach().abs() * (features.numel() // mean.numel()) ** 0.5
    scaled: Tensor = _Unit.apply(features - mean, tuple(dim), lengths)
    return scaled


class _Unit(torch.autograd.Function):
    """Scale to length 1 along some axes. What is no longer than the rounding error of `of` is divided by that.

    What is shorter than 1e-30 counts as zeros, so that no gradient overflows.
    """

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, dim: int | tuple[int, ...], of: Tensor | None) -> Tensor:
        scale = power_of_two(numbers.abs().amax(dim, keepdim=True))
        scaled = numbers / scale
        length = scaled.square().sum(dim, keepdim=True).sqrt_().mul_(scale)
        least = torch.zeros_like(length) if of is None else of
        is_rounding = length <= (4 * torch.finfo(numbers.dtype).eps * least).clamp_min(1e-30)
        length = torch.where(is_rounding, least.masked_fill(least <= 1e-30, 1.0), length)
        scaled *= scale / length
        ctx.save_for_backward(scaled, length)
        ctx.dim = dim
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        check_first_derivative("a loss of unit vectors")
        scaled, length = ctx.saved_tensors
        along = (gradients[0] * scaled).sum(ctx.dim, keepdim=True)
        return (gradients[0] - scaled * along) / length, None, None
