"""Losses of a pair of maps at one grid, each with its own channels."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.common import loss_function, power_of_two


@loss_function
def attention(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
    *,
    form: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """The distance of two attention maps Q = sum over channels of A^2, each divided by its norm.

    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2. `paper`: ||Q_S - Q_T||_2, the norm itself, whose weight is
    beta/2. `code`: the authors' published code, the mean over positions of the squared difference, whose weight is beta
    (1000 with its defaults). The two networks' channels need not agree, their grids must.
    """
    same = student.ndim == teacher.ndim == 4 and student.shape[::2] == teacher.shape[::2]
    if not same or student.shape[3] != teacher.shape[3] or not student.numel() * teacher.numel():
        raise LossError(
            f"attention: expected two maps (batch, channels, height, width) of one batch and grid, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    student_map, teacher_map = (_unit(map_.square().mean(1).flatten(1)) for map_ in (student, teacher))
    if form == "code":
        return (student_map - teacher_map).square().mean()
    if form != "paper":
        raise LossError(f"attention: form {form!r}; expected 'paper' or 'code'")
    distance: Tensor = torch.linalg.vector_norm(student_map - teacher_map, dim=1)
    return distance.mean()


def _unit(rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Rows of length 1, of numbers whose own squares would be too large or too small; zeros stay."""
    return F.normalize(rows / power_of_two(rows.abs().amax(1, keepdim=True)), dim=1)


def to_one_grid(*maps: Float[Tensor, "batch _ _ _"]) -> list[Tensor]:
    """Each map max-pooled to the least height and width among them."""
    size = tuple(min(map_.shape[axis] for map_ in maps) for axis in (2, 3))
    return [map_ if tuple(map_.shape[2:]) == size else F.adaptive_max_pool2d(map_, size) for map_ in maps]


def positions(map_: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions channels"]:
    """The map as rows of channels, which is a view of it.

    Where channels come last in memory they do so in the gradient: a product of matrices would give the other order, and
    each layer on the way back then pays for the conversion.
    """
    rows = map_.permute(0, 2, 3, 1).flatten(1, 2)
    if not rows.is_contiguous():
        return rows
    # To one matrix and back: two views, but a gradient in another order has to be copied to be viewed so.
    return rows.flatten(0, 1).view(rows.shape)
