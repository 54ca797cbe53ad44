"""Losses: each against the paper's equation, written out in float64 numpy over single images."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe_kd import LOSSES, Loss
from probe_kd.errors import LossError
from probe_kd.losses import cross_entropy, fsp, hint, logits, soft_targets

Array = NDArray[np.float64]


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def test_cross_entropy_is_minus_log_of_the_probability_of_the_label() -> None:
    z, y = draw(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = np.mean([-np.log(softmax(row)[label]) for row, label in zip(z.numpy(), y, strict=True)])
    assert cross_entropy(z, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_distributions_and_label_smoothing(smoothing: float) -> None:
    z, y = draw(5, 7), draw(5, 7, seed=1).softmax(1)
    mixed = y.numpy() * (1 - smoothing) + smoothing / 7
    expected = np.mean([-(q * np.log(softmax(row))).sum() for row, q in zip(z.numpy(), mixed, strict=True)])
    assert cross_entropy(z, y, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)
    labels = torch.tensor([0, 6, 3, 3, 1])
    one_hot, by_label = (
        cross_entropy(z, target, label_smoothing=smoothing) for target in (torch.eye(7).double()[labels], labels)
    )
    torch.testing.assert_close(one_hot, by_label, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_are_the_papers_cross_entropy_less_the_teachers_entropy(temperature: float) -> None:
    z, v = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    value = soft_targets(z, v, temperature=temperature)
    (gradient,) = torch.autograd.grad(value, z)
    rows = [
        (softmax(a / temperature), softmax(b / temperature)) for a, b in zip(z.detach().numpy(), v.numpy(), strict=True)
    ]
    expected = temperature**2 * np.mean([(p * (np.log(p) - np.log(q))).sum() for q, p in rows])
    assert value.item() == pytest.approx(expected, rel=1e-9)
    # Hinton et al. 2015, eq. 2: dC/dz_i = (q_i - p_i) / T, times T^2, over the batch
    by_hand = np.stack([temperature * (q - p) / 5 for q, p in rows])
    np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-9, atol=1e-15)


def test_soft_targets_of_a_high_temperature_are_centred_logit_regression() -> None:
    z, v = draw(5, 7) + 3, draw(5, 7, seed=1) - 1
    limit = logits(z, v, center=True, reduction="sum") / (2 * 7)
    assert soft_targets(z, v, temperature=1e4).item() == pytest.approx(limit.item(), rel=1e-3)
    assert logits(z, v, reduction="sum").item() > 2 * logits(z, v, center=True, reduction="sum").item()


@pytest.mark.parametrize("loss", [logits, hint])
def test_squared_errors_sum_or_average_one_image_and_average_the_batch(loss: Callable[..., Tensor]) -> None:
    shape = (5, 7) if loss is logits else (5, 3, 4, 2)
    s, t = draw(*shape), draw(*shape, seed=1)
    per_image = [((a - b) ** 2).sum() for a, b in zip(s.numpy(), t.numpy(), strict=True)]
    assert loss(s, t, reduction="sum").item() == pytest.approx(np.mean(per_image), rel=1e-12)
    assert loss(s, t).item() == pytest.approx(np.mean(per_image) / s[0].numel(), rel=1e-12)


def gram(first: Array, second: Array) -> Array:
    """Yim et al. 2017, eq. 1, as it stands there: sums over positions, for maps (channels, height, width)."""
    _, height, width = second.shape
    matrix = np.zeros((len(first), len(second)))
    for i, j, s, t in np.ndindex(len(first), len(second), height, width):
        matrix[i, j] += first[i, s, t] * second[j, s, t] / (height * width)
    return matrix


def halve(map_: Array) -> Array:
    """2x2 max pooling."""
    channels, height, width = map_.shape
    return map_.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))


@pytest.mark.parametrize("downsamples", [False, True])
def test_fsp_is_the_squared_distance_of_the_flow_matrices(downsamples: bool) -> None:
    inner, outer = (4, 6), (2, 3) if downsamples else (4, 6)
    student = draw(3, 2, *inner), draw(3, 5, *outer, seed=1)
    teacher = draw(3, 2, 6, 6, seed=2), draw(3, 5, 6, 6, seed=3)  # another grid than the student's: no matter
    shrink = halve if downsamples else np.asarray
    expected = [
        ((gram(shrink(a), b) - gram(c, d)) ** 2).sum()
        for a, b, c, d in zip(*(map_.numpy() for map_ in (*student, *teacher)), strict=True)
    ]
    assert fsp(student, teacher).item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert fsp(student, teacher, reduction="mean").item() == pytest.approx(np.mean(expected) / 10, rel=1e-12)


CASES: dict[str, Callable[[int], Tensor | tuple[Tensor, Tensor]]] = {
    "soft_targets": lambda seed: draw(5, 7, seed=seed),
    "logits": lambda seed: draw(5, 7, seed=seed),
    "hint": lambda seed: draw(5, 3, 4, 4, seed=seed),
    "fsp": lambda seed: (draw(5, 3, 4, 4, seed=seed), draw(5, 2, 4, 4, seed=seed + 9)),
}


def parts(side: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return side if isinstance(side, tuple) else (side,)


def cast(side: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    return tuple(part.to(dtype) for part in side) if isinstance(side, tuple) else side.to(dtype)


def test_every_loss_is_tested_here() -> None:
    assert {*CASES, "cross_entropy"} == set(LOSSES)


@pytest.mark.parametrize("name", CASES)
def test_zero_at_equality_and_a_gradient_for_the_student_only(name: str) -> None:
    loss, student, teacher = LOSSES[name].function, CASES[name](0), CASES[name](1)
    assert loss(student, CASES[name](0)).item() == pytest.approx(0, abs=1e-12)
    for part in (*parts(student), *parts(teacher)):
        part.requires_grad_()
    loss(student, teacher).backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts(student))
    assert all(part.grad is None for part in parts(teacher))


@pytest.mark.parametrize("name", CASES)
def test_a_teacher_given_by_keyword_would_keep_its_gradient_and_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="teacher"):
        LOSSES[name].function(CASES[name](0), teacher=CASES[name](1))


@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_autocast_change_nothing_but_the_inputs(name: str) -> None:
    loss = LOSSES[name].function
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = cast(CASES[name](0), dtype), cast(CASES[name](1), dtype)
        exact = loss(cast(student, torch.float32), cast(teacher, torch.float32))  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert torch.equal(value, exact)


def test_a_float16_gram_matrix_of_large_values_does_not_overflow() -> None:
    flow = torch.full((2, 3, 8, 8), 3e4, dtype=torch.float16), torch.full((2, 3, 8, 8), 3e4, dtype=torch.float16)
    assert torch.isinf(flow[0] * flow[1]).all()
    nothing = torch.zeros_like(flow[0]), torch.zeros_like(flow[1])
    assert fsp(flow, nothing).item() == pytest.approx(9 * (torch.tensor(3e4).half().item() ** 2) ** 2, rel=1e-5)


@pytest.mark.parametrize("name", ["soft_targets", "logits", "hint"])
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    with pytest.raises(LossError, match=r"\(5, 7\) and teacher \(5, 1\) differ in shape.*probe_kd.adapt"):
        LOSSES[name].function(draw(5, 7), draw(5, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ((draw(5, 3, 4, 4), draw(5, 2, 4, 4)), (draw(5, 3, 4, 4), draw(5, 6, 4, 4)), r"\(5, 3, 2\).*\(5, 3, 6\)"),
        ((draw(5, 16, 3), draw(5, 16, 2)), (draw(5, 16, 3), draw(5, 16, 2)), r"two maps.*\(5, 16, 3\)"),
        (draw(5, 3, 4, 4), draw(5, 3, 4, 4), r"two maps.*\(5, 3, 4, 4\)"),
        ((draw(5, 3, 4, 4), draw(2, 2, 4, 4)), (draw(5, 3, 4, 4), draw(5, 2, 4, 4)), r"two maps.*\(2, 2, 4, 4\)"),
    ],
)
def test_flows_that_make_no_comparable_matrices_are_refused(student: object, teacher: object, words: str) -> None:
    with pytest.raises(LossError, match=words):
        fsp(student, teacher)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "kind"), [((5, 8), "probabilities"), ((4,), "class indices")])
def test_targets_that_do_not_fit_the_logits_are_refused(shape: tuple[int, ...], kind: str) -> None:
    target = torch.zeros(shape) if kind == "probabilities" else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(LossError, match=rf"logits \(5, 7\) with a target .*{kind}"):
        cross_entropy(draw(5, 7), target)


def test_values_of_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(LossError, match="reduction 'batchmean': expected 'sum' or 'mean'"):
        hint(draw(5, 7), draw(5, 7), reduction="batchmean")  # type: ignore[arg-type]
    with pytest.raises(LossError, match=r"temperature 0.*positive"):
        soft_targets(draw(5, 7), draw(5, 7), temperature=0)


def test_an_option_that_a_loss_does_not_have_gets_the_nearest_that_it_has() -> None:
    LOSSES["soft_targets"].check_options("soft_targets", {"temperature": 2.0})
    with pytest.raises(LossError, match="'soft_targets' has no option 'temprature'; did you mean 'temperature'"):
        LOSSES["soft_targets"].check_options("soft_targets", {"temprature": 2.0})
    with pytest.raises(LossError, match="it has none"):
        Loss(lambda student, teacher: student, "outputs").check_options("mine", {"a": 1})
