"""Losses of tokens and patches, against numpy in float64 and finite differences, between unlike layouts."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_adapters import KINDS, feature
from torch import Tensor

from probe_kd import LOSSES, Layout, adapt
from probe_kd.errors import LossError
from probe_kd.methods.adapters import adapt_maps

Numbers = NDArray[np.float64]
TOKEN, PATCH = LOSSES["token_match"].function, LOSSES["patch_similarity"].function
MAPS = [kind for kind in KINDS if kind[0] is not Layout.NC]


def rows(map_: Tensor) -> Numbers:
    """(batch, positions, channels)"""
    return map_.detach().double().flatten(2).transpose(1, 2).numpy()


def token_match(student: Tensor, teacher: Tensor, cosine: float, smooth_l1: float, beta: float) -> float:
    u, v = rows(student), rows(teacher)
    angle = (u * v).sum(-1) / np.sqrt((u**2).sum(-1) * (v**2).sum(-1))
    distance = np.abs(u - v)
    huber = np.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)
    return float(cosine * (1 - angle).mean() + smooth_l1 * huber.mean())


def patch_similarity(student: Tensor, teacher: Tensor, temperature: float) -> float:
    values = []
    for ours, theirs in zip(rows(student), rows(teacher), strict=True):
        p, q = (side / np.sqrt((side**2).sum(1, keepdims=True)) for side in (ours, theirs))
        p, q = (np.exp(side @ side.T / temperature) for side in (p, q))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        values.append((q * np.log(q / p)).sum(1).mean())
    return float(np.mean(values))


@pytest.mark.parametrize("kind", MAPS, ids=str)
def test_values_are_those_of_the_equations_between_any_layouts(kind: Any) -> None:
    spec, student, *_ = feature(kind, (3, 4), 6, 1)
    for other_kind in MAPS:
        other, teacher, *_ = feature(other_kind, (3, 4), 6, 2)
        sides = adapt(spec, other, policy="never")(student, teacher)
        for options in ({}, {"cosine": 0.5, "smooth_l1": 0.5, "beta": 0.3}):
            expected = token_match(*sides, **{"cosine": 0.9, "smooth_l1": 0.1, "beta": 1.0, **options})
            assert float(TOKEN(*sides, **options)) == pytest.approx(expected, rel=1e-5)
        wider, teacher, *_ = feature(other_kind, (6, 8), 10, 2)
        maps = adapt_maps(spec, wider)(student, teacher)
        for temperature in (0.07, 1.0):
            expected = patch_similarity(*maps, temperature)
            assert float(PATCH(*maps, temperature=temperature)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["token_match", "patch_similarity"])
def test_gradients_are_those_of_finite_differences_and_equal_features_have_none(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 2, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    function = LOSSES[name].function
    assert torch.autograd.gradcheck(lambda value: function(value, teacher), (student.requires_grad_(),))
    same = function(student, student)
    assert same.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(same, student)
    assert gradient.abs().max() < 1e-12
    assert not function(student, teacher.requires_grad_()).backward()  # type: ignore[func-returns-value]
    assert teacher.grad is None


def test_half_precision_large_numbers_and_zeros_stay_numbers() -> None:
    zeros, map_ = torch.zeros(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    for function in (TOKEN, PATCH):
        function(zeros, map_).backward()
        assert zeros.grad is not None
        assert zeros.grad.abs().max() < 1e4  # with torch's own eps of 1e-8 it is 1e7, which AdamW does not forget
        exact = function(map_, map_.flip(0))
        torch.testing.assert_close(function(map_.bfloat16(), map_.flip(0).bfloat16()), exact, rtol=0.05, atol=0.01)
    torch.testing.assert_close(PATCH(map_ * 1e30, map_.flip(0) * 1e-30), PATCH(map_, map_.flip(0)))


@pytest.mark.parametrize(
    ("function", "shapes", "options", "says"),
    [
        (TOKEN, ((2, 4, 3), (2, 5, 3)), {}, "differ in shape"),
        (TOKEN, ((3,), (3,)), {}, r"expected \(batch, channels, ...\)"),
        (TOKEN, ((2, 4), (2, 4)), {"beta": 0.0}, "beta 0.0; it has to be positive"),
        (TOKEN, ((2, 4), (2, 4)), {"cosine": -0.1}, "expected factors from 0 on, and one above it"),
        (TOKEN, ((2, 4), (2, 4)), {"cosine": 0.0, "smooth_l1": 0.0}, "expected factors from 0 on, and one above it"),
        (PATCH, ((2, 4, 3, 3), (2, 4, 3, 2)), {}, "two maps .* of one batch and grid"),
        (PATCH, ((2, 4, 3, 3), (2, 5, 3, 3)), {"temperature": -1.0}, "temperature -1.0; it has to be positive"),
    ],
)
def test_what_cannot_be_compared_is_refused(function: Any, shapes: Any, options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        function(*(torch.randn(shape) for shape in shapes), **options)
