"""Losses of outputs with a probability for each class: several labels an image, or one output for two classes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.checks import (
    Reduction,
    check_outputs,
    check_reduction,
    check_rows,
    check_temperature,
    check_tensors,
    has_values,
    is_number,
)
from probe_kd.methods.losses.distances import in_float64
from probe_kd.methods.losses.parts import in_cache


@loss_function
def binary_cross_entropy(
    student: Float[Tensor, "batch classes"],
    target: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
    /,
    *,
    pos_weight: float | Sequence[float] = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Compute -w y log s(z) - (1 - y) log(1 - s(z)) of each class, averaged over the classes and over the batch.

    s is the sigmoid, z are logits. `target` has a row for each image, with 1 for the classes that it has and 0 for the
    others; Mixup and CutMix make numbers in between. With `reduction="sum"` the classes are summed. `pos_weight` is the
    weight w of the classes that an image has, one number or one a class. `label_smoothing` moves each y by this share
    towards 1/2.

    One output can tell two classes: with `student` (batch, 1), `target` may also be class indices 0 and 1, or one
    distribution over the two classes per image. Raises LossError for any other target.
    """
    check_rows("binary_cross_entropy", student)
    check_reduction(reduction)
    if target.shape != student.shape or target.dtype != student.dtype:
        target = _as_rows(student, target)
    if has_values(target):
        _check_shares(target)
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"binary_cross_entropy: label_smoothing {label_smoothing}; expected a share between 0 and 1")
    weights = None if type(pos_weight) is float and pos_weight == 1 else _weights(pos_weight, student)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / 2
    if reduction == "mean":
        return torch.binary_cross_entropy_with_logits(student, target, None, weights, 1)
    return torch.binary_cross_entropy_with_logits(student, target, None, weights, 2) / len(student)


@loss_function
def multilabel_soft_targets(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Compute T^2 KL(p || q) of the Bernoulli distributions p = s(v/T) and q = s(z/T) of each class.

    s is the sigmoid, z are the student's logits, v the teacher's. The classes are averaged, or summed with
    `reduction="sum"`, and the batch is averaged. This is `soft_targets` for classes that do not exclude each other
    (at T = 1 the multi-label logits distillation of Yang et al. 2023, arXiv 2308.06453). The divergence is 0
    for equal outputs, and the factor T^2 keeps the size of the gradient when T changes. Classes that the teacher masks
    by -inf count as absent.
    """
    check_outputs("multilabel_soft_targets", student, teacher)
    check_reduction(reduction)
    check_temperature("multilabel_soft_targets", temperature)
    dtype = student.dtype
    if temperature != 1:
        student, teacher = (logits / temperature for logits in in_float64(temperature, student, teacher))
    total: Tensor = _BernoulliDivergence.apply(student, teacher)
    return (temperature**2 * total / (student.numel() if reduction == "mean" else len(student))).to(dtype)


class _BernoulliDivergence(torch.autograd.Function):
    """The sum of KL(p || q) over all numbers, for p = s(teacher) and q = s(student).

    Both signs are turned where the teacher's is negative, which exchanges the two outcomes. Then p >= 1/2, and in
    log p - log q - (1 - p) (v - z) no large numbers cancel. A class that the teacher masks has (1 - p) (v - z) = 0.
    The backward keeps nothing but the logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        return torch.stack([_divergence(*sides) for sides in in_cache(student, teacher)]).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        student, teacher = ctx.saved_tensors
        p, q = teacher.sigmoid(), student.sigmoid()
        difference = q - p if torch.is_grad_enabled() else q.sub_(p)  # in place unless it is differentiated once more
        of_student = difference.mul_(gradients[0])
        if not ctx.needs_input_grad[1]:
            return of_student, None
        spread = p * (-teacher).sigmoid()
        return of_student, gradients[0] * (spread * (teacher - student)).masked_fill(spread == 0, 0.0)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of log p - log q - (1 - p) (v - z), in three tensors of this size.

    For turned signs, log p - log q is log (1 + e^-|z|) - log (1 + e^-v) - min(z, 0).
    """
    own, other = student.abs().neg_().exp_(), teacher.abs().neg_().exp_()
    both = other + 1
    terms = own.sub_(other).div_(both).log1p_()
    least = other.div_(both).copysign_(teacher)  # 1 - p, with the sign of v
    del both
    terms.sub_(torch.copysign(student.new_ones(()), teacher).mul_(student).clamp_max_(0.0))
    distances = teacher - student
    if not has_values(teacher) or torch.inf in (-teacher.amin().item(), teacher.amax().item()):
        distances.masked_fill_(teacher.abs() == torch.inf, 0.0)
    return terms.addcmul_(least, distances, value=-1).sum()


def _as_rows(student: Tensor, target: Tensor) -> Float[Tensor, "batch classes"]:
    """The target in the shape of the logits. Raises LossError for a target of another shape or type."""
    if student.shape[1] == 1 and not target.is_complex():
        if target.ndim == 1 and not target.is_floating_point():
            target = target[:, None]
        elif target.ndim == 2 and target.shape[1] == 2 and target.is_floating_point():
            target = target[:, 1:]
    if target.is_complex() or target.shape != student.shape:
        advice = (
            "; one class index an image is for `cross_entropy`, or for one output (batch, 1)"
            if target.ndim == 1
            else ""
        )
        raise LossError(
            f"binary_cross_entropy: logits {tuple(student.shape)} with a target {tuple(target.shape)} of {target.dtype}"
            f"; expected {tuple(student.shape)} numbers between 0 and 1, one for each class{advice}"
        )
    return target.to(student.dtype)


def check_shares(logits: Tensor, target: Tensor) -> None:
    """Check a target as `binary_cross_entropy` does, including its values. Raises LossError for any other target."""
    check_tensors("binary_cross_entropy", logits, [target])
    check_rows("binary_cross_entropy", logits)
    _check_shares(_as_rows(logits, target))


def _check_shares(target: Float[Tensor, "batch classes"]) -> None:
    least, largest = target.aminmax()
    if least.item() >= 0 and largest.item() <= 1:
        return
    outside = target[~((target >= 0) & (target <= 1))]
    if len(outside):
        raise LossError(
            f"binary_cross_entropy: the target holds {outside[0].item():g}; expected 1 for a class that the image has, "
            "and 0 for others"
        )


def _weights(pos_weight: float | Sequence[float], student: Tensor) -> Tensor | None:
    numbers = list(pos_weight) if isinstance(pos_weight, list | tuple) else [pos_weight]
    if len(numbers) not in (1, student.shape[1]):
        raise LossError(
            f"binary_cross_entropy: pos_weight has {len(numbers)} numbers, and there are {student.shape[1]} classes; "
            "give one number, or one for each class"
        )
    if not all(is_number(number) and number > 0 for number in numbers):
        raise LossError(f"binary_cross_entropy: pos_weight {pos_weight!r}; expected positive numbers")
    return None if numbers == [1.0] else student.new_tensor(numbers)
