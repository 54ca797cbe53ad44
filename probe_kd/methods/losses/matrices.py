"""Losses of matrices that are computed from one map or from two: FSP and Gram."""

import torch
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function, outside_autocast, promoted
from probe_kd.methods.losses.checks import Reduction, check_reduction, check_same_shape
from probe_kd.methods.losses.distances import squared_error
from probe_kd.methods.losses.maps import positions, to_one_grid


@loss_function
def fsp(
    student: Float[Tensor, "batch m n"],
    teacher: Float[Tensor, "batch m n"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """Compute ||G(student) - G(teacher)||_F^2 of two FSP matrices, which `flow_matrix` computes.

    FSP, Yim et al. 2017 (CVPR), eq. 2. The paper's form grows with the fourth power of the activations, and the matrix
    after a ReLU is mostly constant. `relative` divides the loss by the variance of the teacher's matrices over the
    batch, sum over the matrix of Var(G_ij). The loss of a student that predicts the mean matrix is then 1, and 1 minus
    the loss is the share of the variance that is explained. `relative` needs at least two images. If the teacher's
    matrices do not vary, the loss is divided by the mean of their squared norms instead.
    """
    return _matrices("fsp", student, teacher, relative, reduction)


@loss_function
def gram(
    student: Float[Tensor, "batch channels channels"],
    teacher: Float[Tensor, "batch channels channels"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Compute ||G(student) - G(teacher)||_F^2 of the Gram matrices of one map of each model.

    This is the style loss of Gatys et al. 2016 (CVPR), eq. 4, between two networks. The paper has a factor 1/4 before
    the mean. `relative` is as in `fsp`.
    """
    return _matrices("gram", student, teacher, relative, reduction)


def _matrices(loss: str, student: Tensor, teacher: Tensor, relative: bool, reduction: Reduction) -> Tensor:
    check_same_shape(student, teacher, loss)
    if student.ndim != 3:
        raise LossError(f"{loss}: matrices {tuple(student.shape)}; expected (batch, m, n), as `flow_matrix` makes them")
    if not relative:
        return squared_error(student, teacher, reduction)
    check_reduction(reduction)  # a share of the variance is the same in either
    if relative is not True:
        raise LossError(f"{loss}: relative {relative!r}: expected true or false")
    if len(teacher) < 2:
        raise LossError(f"{loss}: `relative` divides by the variance over a batch, and this one has a single image")
    variance, square = teacher.var(0).sum(), teacher.square().sum() / len(teacher)
    rounding = (4 * torch.finfo(teacher.dtype).eps) ** 2 * square
    divisor = torch.where(variance > rounding, variance, torch.where(square > 0, square, 1.0))
    return squared_error(student, teacher, "sum") / divisor


@outside_autocast
def flow_matrix(
    first: Float[Tensor, "batch m h1 w1"], second: Float[Tensor, "batch n h2 w2"], /
) -> Float[Tensor, "batch m n"]:
    """Compute the FSP matrix G = sum over positions of F1 F2^T / (h w) of two maps (Yim et al. 2017, eq. 1).

    If the grids differ, as in a block that downsamples, the larger is max-pooled to the smaller, as in the paper.
    """
    if not first.ndim == second.ndim == 4 or len(first) != len(second) or not first.numel() * second.numel():
        raise LossError(
            "flow_matrix: expected two maps (batch, channels, height, width) of one batch, the input and the output of "
            f"a block, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    # Of one map as both ends, as for a Gram matrix, one copy in float32 is enough.
    first, second = (promoted(first),) * 2 if first is second else (promoted(first), promoted(second))
    first, second = (positions(map_) for map_ in to_one_grid(first, second))
    return (first.transpose(1, 2) @ second).div_(first.shape[1])  # in place: no second matrix
