"""Losses of both models' outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.checks import Reduction, check_outputs, check_temperature, dense_outputs, has_values
from probe_kd.methods.losses.distances import in_float64, softmax_divergence, squared_error
from probe_kd.methods.losses.parts import check_first_derivative
from probe_kd.methods.losses.units import power_of_two


@loss_function
def soft_targets(
    student: Float[Tensor, "batch classes"] | Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "batch classes"] | Float[Tensor, "batch classes height width"],
    /,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    dense: bool = False,
) -> Float[Tensor, ""]:
    """Compute T^2 KL(softmax(v/T) || softmax(z/T)), summed over the classes and averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2; z are the student's logits, v the teacher's. The KL
    divergence differs from the paper's cross entropy by a constant, and is 0 for equal outputs. The factor T^2 keeps
    the size of the gradient when T changes. There is no `reduction`: the mean over the classes, which many
    implementations use, divides the paper's loss by the number of classes.

    `standardize` first replaces each image's logits by their z-scores, so that the student need not reach the
    teacher's scale (Sun et al. 2024, arXiv 2403.01427, with a temperature of about 2 and a weight of about 9). Equal
    logits, as from a classifier that is initialised to zero, have z-scores of 0. Classes that the teacher masks by -inf
    do not count.

    `dense` takes maps of logits, as of segmentation, and averages over the positions too. It is an option, because a
    map that arrives by mistake is no set of classes.
    """
    if dense:
        student, teacher = dense_outputs("soft_targets", student, teacher)
    check_outputs("soft_targets", student, teacher)
    check_temperature("soft_targets", temperature)
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    dtype = student.dtype
    student, teacher = in_float64(temperature, student, teacher)
    return (temperature**2 * softmax_divergence(student, teacher, temperature)).to(dtype)


@loss_function
def hard_labels(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the cross entropy -log softmax(z)_y of the student's logits z, where y is the teacher's largest logit.

    Hard-label distillation, Touvron et al. 2021 (DeiT, arXiv 2012.12877), sec. 4, eq. 3, in which it has the weight
    1/2, beside the cross entropy with the labels. `label_smoothing` mixes in the uniform distribution, 0.1 in the
    paper's experiments.
    """
    check_outputs("hard_labels", student, teacher)
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"hard_labels: label_smoothing {label_smoothing}; expected a share between 0 and 1")
    largest, index = teacher.detach().max(1)
    value = F.cross_entropy(student, index, label_smoothing=label_smoothing)
    return value.add(largest.sum(), alpha=0)  # NaN is a maximum too, so the loss is made NaN


@loss_function
def logits(
    student: Float[Tensor, "batch classes"] | Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "batch classes"] | Float[Tensor, "batch classes height width"],
    /,
    *,
    center: bool = False,
    standardize: bool = False,
    reduction: Reduction = "mean",
    dense: bool = False,
) -> Float[Tensor, ""]:
    """Compute the squared error ||z - v||^2 of the logits before the softmax.

    Ba and Caruana 2014 (arXiv 1312.6184), eq. 1. The paper has a factor 1/2 before the sum: use weight 0.5 with
    `reduction="sum"`. `center` subtracts from both logits their mean over the classes, which a softmax ignores. Then
    1/(2 C) of the sum over C classes is the limit of `soft_targets` for a high temperature (Hinton et al. 2015, sec.
    2.1; Kim et al. 2021, arXiv 2105.08919). `standardize` also divides by the standard deviation over the
    classes (Sun et al. 2024). `dense` is that of `soft_targets`.
    """
    if dense:
        student, teacher = dense_outputs("logits", student, teacher)
    check_outputs("logits", student, teacher)
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    elif center:
        student, teacher = _centre(student), _centre(teacher)
    return squared_error(student, teacher, reduction)


@loss_function
def dist(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute T^2 (inter (1 - r over each image's classes) + intra (1 - r over each class's images)).

    r is Pearson's correlation of the probabilities at temperature T. DIST, Huang et al. 2022 (arXiv 2205.10536), eq. 6
    to 10; `inter` and `intra` are the paper's beta and gamma. The student has to match relations of a strong teacher's
    probabilities, and not their values. The second part compares the images of a batch, so it needs at least two. Equal
    probabilities, as from a classifier that is initialised to zero, have r = 0.
    """
    check_outputs("dist", student, teacher)
    check_temperature("dist", temperature)
    if intra and len(student) < 2:
        raise LossError(
            "dist: `intra` compares the images of a batch with each other, and this one has a single image; give "
            "larger batches, or `intra: 0`"
        )
    dtype = student.dtype
    student, teacher = in_float64(temperature, student, teacher)
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    value: Tensor = inter * (1 - _Correlation.apply(p, q, 1, temperature)).mean()
    if intra:
        value = value + intra * (1 - _Correlation.apply(p, q, 0, temperature)).mean()
    return (temperature**2 * value).to(dtype)


def _standardize(logits: Float[Tensor, "batch classes"], eps: float = 1e-7) -> Float[Tensor, "batch classes"]:
    """The z-scores of each row. Those of equal logits are zeros, with the gradient of logits / _FLAT."""
    freedom = min(1, logits.shape[1] - 1)
    with torch.no_grad():
        deviation = logits.std(1, correction=freedom, keepdim=True)
        equal = deviation <= _rounding(logits).clamp_min(16 * torch.finfo(logits.dtype).tiny ** 0.5)
    logits = _damped(logits, deviation.masked_fill(equal, 0.0) / _FLAT)
    deviation, mean = torch.std_mean(logits, 1, correction=freedom, keepdim=True)
    # eps is a share of a deviation that is small itself.
    divisor = (deviation + eps * (100 * deviation).clamp_max(1)).masked_fill(equal, _FLAT)
    return _without_value(logits - mean, equal) / divisor


def _centre(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    centred = logits - logits.mean(1, keepdim=True)
    return _without_value(centred, centred.detach().abs().amax(1, keepdim=True) <= _rounding(logits.detach()))


class _Correlation(torch.autograd.Function):
    """Pearson's correlation of probabilities along one axis. Equal numbers have r = 0, and the gradient of x / norm."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, dim: int, temperature: float) -> Tensor:
        own, own_factor = _standardized_probabilities(first, dim, temperature)
        other, other_factor = _standardized_probabilities(second, dim, temperature)
        correlation = (own * other).sum(dim, keepdim=True)
        ctx.save_for_backward(own, other, own_factor, other_factor, correlation)
        return correlation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("dist")
        own, other, own_factor, other_factor, correlation = ctx.saved_tensors
        sides = (own, other, own_factor), (other, own, other_factor)
        needed = ctx.needs_input_grad[:2]
        of_sides = [
            torch.addcmul(target, numbers, correlation, value=-1).mul_(gradients[0] * factor) if needs else None
            for (numbers, target, factor), needs in zip(sides, needed, strict=True)
        ]
        return *of_sides, None, None


def _standardized_probabilities(rows: Float[Tensor, "n m"], dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Numbers less their mean, of length 1 along an axis, and the factor of their gradient, one over their length.

    The gradient of flat rows is damped. At T = 1, a row is flat if its deviation is below 1.5 times its mean, or below
    less if it has too few numbers to reach that. Rows of equal numbers become zeros.
    """
    count, largest = rows.shape[dim], rows.amax(dim, keepdim=True)
    scale = power_of_two(largest)  # so that nothing underflows
    centred = rows / scale
    mean = centred.mean(dim, keepdim=True)
    equal = centred.sub_(mean).abs().amax(dim, keepdim=True) <= 4 * torch.finfo(rows.dtype).eps * largest / scale
    lengths = centred.square().sum(dim, keepdim=True).sqrt_()
    flat = max(min(1.5, (count - 1) ** 0.5 / 2) / temperature, 1e-8)
    share = torch.where(equal, 1.0, (lengths / (count**0.5 * mean * flat)).clamp_max(1))
    centred.mul_(torch.where(equal, 0.0, 1 / lengths))
    lengths = torch.where(equal, count**0.5 * mean, lengths).mul_(scale).clamp_min_(torch.finfo(rows.dtype).tiny)
    return centred, share / lengths.masked_fill_(largest == 0, 1.0)


class _Damped(torch.autograd.Function):
    """The same numbers, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def _damped(rows: Float[Tensor, "rows n"], share: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows n"]:
    """Return the rows unchanged, with their gradient multiplied by `share` if that is between 0 and 1.

    The gradient of a loss that divides a row by its deviation grows without bound as the row becomes flat, as for a
    classifier that is initialised at or near zero. The first steps would then dominate the moments of an optimizer such
    as AdamW. The value stays that of the formula. The gradient keeps its direction, and its size is bounded.
    """
    if not rows.requires_grad:
        return rows
    damped: Tensor = _Damped.apply(rows, torch.where(share > 0, share.clamp_max(1), 1.0))
    return damped


_FLAT = 0.5  # the deviation of an image's logits below which the gradient of their z-scores is damped


def _rounding(rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows 1"]:
    """The rounding error within which numbers of this size count as equal."""
    return 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)


def _without_value(centred: Float[Tensor, "rows n"], equal: Tensor) -> Float[Tensor, "rows n"]:
    """Set rows of equal numbers to exact zeros, without the rounding error of their mean, and keep their gradient."""
    if has_values(equal) and not equal.any():
        return centred
    return torch.where(equal, centred - centred.detach(), centred)
