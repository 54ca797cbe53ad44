"""The squared error and the divergence of probabilities, with gradients that keep little in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.methods.losses.checks import Reduction, check_reduction, has_values
from probe_kd.methods.losses.parts import gradients_at, in_cache
from probe_kd.methods.precision import widened


def squared_error(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """Sum or average the squared differences over each image's event, and average over the batch.

    This uses torch's own kernel, which holds one tensor of a feature's size in the backward. A difference, a square
    and two means hold five, and take twice the time.
    """
    check_reduction(reduction)
    if student.itemsize + teacher.itemsize in (4, 6):  # both in half precision, or one beside float32
        total: Tensor = _SquaresOfHalf.apply(student, teacher)
        return total / (student.numel() if reduction == "mean" else len(student))
    if reduction == "sum":
        return F.mse_loss(student, teacher, reduction="sum") / len(student)
    # Events of one batch are of one size, so the mean of their means is that of all. `F.mse_loss` calls this after a
    # broadcast, which takes a tenth of the time of some logits.
    value: Tensor = torch._C._nn.mse_loss(student, teacher, 1)  # type: ignore[arg-type]  # the stub is that of `F`
    if not has_values(value):
        return value.clone()  # the number that torch gives still holds the squares' memory
    value.untyped_storage().resize_(value.itemsize)  # as `clone`, without a node of its own in the backward
    return value


class _SquaresOfHalf(torch.autograd.Function):
    """The sum of squared differences, in float32, of two tensors of which at least one is in half precision.

    It saves both tensors for the backward as they are, which takes half the memory of promoting them first.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        squares = torch.empty_like(student, dtype=torch.float32)
        for part, own, other in in_cache(squares, student, teacher):
            part.copy_(own).sub_(other).square_()
        return squares.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        student, teacher = ctx.saved_tensors
        student_gradient = _differences(student, teacher, 2 * gradient, student.dtype)
        if not ctx.needs_input_grad[1]:
            return student_gradient, None
        return student_gradient, _differences(student, teacher, -2 * gradient, teacher.dtype)


def _differences(student: Tensor, teacher: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(student - teacher) times a factor, computed in float32."""
    differences = torch.empty_like(student, dtype=dtype)
    for part, own, other in in_cache(differences, student, teacher):
        part.copy_(own.to(torch.float32, copy=True).sub_(other).mul_(factor))
    return differences


def in_float64(temperature: float, *logits: Tensor) -> tuple[Tensor, ...]:
    """Convert the logits to float64 if T^2 is so large that rounding in float32 would dominate the loss.

    At T = 1e4 the probabilities differ by 1e-4 of themselves, and T^2 = 1e8 times the rounding of float32 is 10. Below
    20 it is less than 1e-4.
    """
    return tuple(map(widened, logits)) if temperature > 20 else logits


def softmax_divergence(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch. What the teacher masks adds 0."""
    if torch.compiler.is_compiling():  # which fuses the operations by itself
        return _divergence_of(student, teacher, temperature)
    value: Tensor = _SoftmaxDivergence.apply(student, teacher, temperature)
    return value


def _divergence_of(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return divergence(*(F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher)))


class _SoftmaxDivergence(torch.autograd.Function):
    """`softmax_divergence`, with two exponentials instead of five, and p - q as all that the backward needs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        # The largest logits are 0, so that no large numbers cancel, and their probabilities are at least 1 / classes.
        own, other = (logits.sub(logits.amax(1, keepdim=True)).div_(temperature) for logits in (student, teacher))
        p, q = own.softmax(1), other.softmax(1)
        scales = q.amax(1).div_(p.amax(1)).log_().sum()
        if has_values(other) and other.amin() > -torch.inf:
            total = other.sub_(own).mul_(q).sum()
        else:
            masked = other == -torch.inf
            total = other.sub_(own).masked_fill_(masked, 0.0).mul_(q).sum()
        ctx.save_for_backward(student, teacher, p.sub_(q))
        ctx.temperature = temperature
        return (total + scales) / len(student)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, difference = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            return difference * (gradients[0] / (len(student) * ctx.temperature)), None, None
        with torch.enable_grad():  # of the teacher too, or to be differentiated once more
            value = _divergence_of(student, teacher, ctx.temperature)
        return *gradients_at(value, (student, teacher), ctx.needs_input_grad[:2], gradients[0]), None


def divergence(log_p: Float[Tensor, "batch classes"], log_q: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """KL(q || p), averaged over the batch. A class with q = 0 (-inf) adds 0 log 0 = 0, whatever p is."""
    if has_values(log_q) and log_q.detach().amin() > -torch.inf:  # no class is masked
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    log_p = log_p.masked_fill(log_q == -torch.inf, 0.0)
    return F.kl_div(log_p, log_q.clamp_min(torch.finfo(log_q.dtype).min), reduction="batchmean", log_target=True)
