"""Losses of several labels an image, against float64 arithmetic written out, torch's own, and the two-class softmax."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.labels import cross_entropy
from probe_kd.methods.losses.multilabel import binary_cross_entropy, multilabel_soft_targets
from probe_kd.methods.losses.outputs import soft_targets


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets(*shape: int) -> Tensor:
    return (draw(*shape, seed=9) > 0).double()


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 1.0), (0.2, 3.0), (0.1, [0.5, 1.0, 2.0, 4.0])])
def test_binary_cross_entropy_is_the_sum_over_the_classes_written_out(smoothing: float, weight: Any) -> None:
    z, y = draw(5, 4), sets(5, 4)
    p, q = 1 / (1 + np.exp(-z.numpy())), y.numpy() * (1 - smoothing) + smoothing / 2
    by_hand = -(np.asarray(weight) * q * np.log(p) + (1 - q) * np.log(1 - p))
    options = {"pos_weight": weight, "label_smoothing": smoothing}
    assert binary_cross_entropy(z, y, **options).item() == pytest.approx(by_hand.mean(), rel=1e-12)
    summed = binary_cross_entropy(z, y, reduction="sum", **options)
    assert summed.item() == pytest.approx(by_hand.sum(1).mean(), rel=1e-12)
    half = binary_cross_entropy(z.bfloat16(), y.bfloat16(), **options)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(by_hand.mean(), rel=0.02)


def test_one_output_is_the_second_of_two_whose_first_is_zero() -> None:
    z, labels = draw(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = cross_entropy(torch.cat([torch.zeros_like(z), z], 1), labels)
    assert binary_cross_entropy(z, labels).item() == pytest.approx(expected.item(), rel=1e-12)
    mixed = 0.3 * F.one_hot(labels, 2).double() + 0.7 * F.one_hot(labels.flip(0), 2).double()
    expected = cross_entropy(torch.cat([torch.zeros_like(z), z], 1), mixed)
    assert binary_cross_entropy(z, mixed).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1000.0])
def test_multilabel_soft_targets_are_soft_targets_of_each_class_against_zero(temperature: float) -> None:
    z, v = draw(5, 4).requires_grad_(), draw(5, 4, seed=1)
    value = multilabel_soft_targets(z, v, temperature=temperature, reduction="sum")
    pairs = [torch.stack([torch.zeros_like(side), side], -1).flatten(0, 1) for side in (z, v)]
    expected = soft_targets(*pairs, temperature=temperature) * 4  # rows are images times classes
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand = temperature * (torch.sigmoid(z / temperature) - torch.sigmoid(v / temperature)) / 5
    torch.testing.assert_close(*torch.autograd.grad(value, z), by_hand.detach(), rtol=1e-6, atol=1e-15)
    mean = multilabel_soft_targets(z.float(), v.float(), temperature=temperature)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(expected.item() / 4, rel=1e-3)


def test_logits_of_any_size_have_a_loss_and_a_gradient() -> None:
    z = torch.tensor([[1e4, -1e4, 60.0, 0.0, -60.0]], requires_grad=True)
    v = torch.tensor([[-1e4, 1e4, 59.0, -torch.inf, -torch.inf]])
    for value in (multilabel_soft_targets(z, v), binary_cross_entropy(z, v.sigmoid())):
        assert value.isfinite()
        assert torch.autograd.grad(value, z, retain_graph=True)[0].isfinite().all()
    assert multilabel_soft_targets(z, v, reduction="sum").item() == pytest.approx(2e4 + np.log(2), rel=1e-6)
    masked = torch.tensor([[-torch.inf, 2.0]], requires_grad=True)
    assert multilabel_soft_targets(masked, masked.detach()).item() == 0


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (torch.zeros(4, dtype=torch.long), {}, "one class index an image is for `cross_entropy`"),
        (torch.full((4, 3), 2.0), {}, "the target holds 2"),
        (torch.zeros(4, 2), {}, r"expected \(4, 3\) numbers between 0 and 1"),
        (torch.zeros(4, 3), {"pos_weight": [1.0, 2.0]}, "pos_weight has 2 numbers, and there are 3 classes"),
        (torch.zeros(4, 3), {"pos_weight": -1.0}, "expected positive numbers"),
        (torch.zeros(4, 3), {"pos_weight": True}, "pos_weight True; expected positive numbers"),
        (torch.zeros(4, 3), {"label_smoothing": 2}, "expected a share"),
        (torch.zeros(4, 3), {"reduction": "max"}, "expected 'sum' or 'mean'"),
    ],
)
def test_targets_and_options_that_mean_nothing_are_refused(target: Tensor, options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        binary_cross_entropy(torch.zeros(4, 3), target, **options)
