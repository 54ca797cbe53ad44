"""Losses beside their equations: drawn inputs, contents that are hard on numbers, and what agreement means."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "drawn": lambda it: it,
    "zeros": torch.zeros_like,
    "equal": lambda it: torch.full_like(it, 0.7),
    "equal and large": lambda it: torch.full_like(it, 1e15),
    "one row for all": lambda it: it[:1].expand_as(it).clone(),
    "small": lambda it: 1e-3 * it,
}


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(
    function: Callable[..., Tensor],
    written: Callable[..., Tensor],
    sides: tuple[Tensor, Tensor],
    options: Mapping[str, Any],
    *,
    scale: float,
    in_float32: Any,
) -> None:
    """Compare value and gradient of a loss with its equation, in float64 and in float32.

    The student's numbers are about `scale`. `in_float32` are the arguments of `pytest.approx` for the value.
    """
    s, t = sides[0].requires_grad_(), sides[1]
    value, expected = function(s, t, **options), written(s, t, **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-14)
    gradients = [torch.autograd.grad(side, s)[0] * scale for side in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    single = s.detach().float().requires_grad_()
    value = function(single, t.float(), **options)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), **in_float32)
    (gradient,) = torch.autograd.grad(value, single)
    torch.testing.assert_close(gradient.double() * scale, gradients[1], rtol=1e-3, atol=1e-5)
