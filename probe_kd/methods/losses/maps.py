"""Losses of a pair of maps at one grid, each with its own channels."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.common import loss_function, unit


@loss_function
def attention(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
    *,
    form: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """Compute the distance of two attention maps Q = sum over channels of A^2, each divided by its norm.

    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2. `form="paper"` is the norm ||Q_S - Q_T||_2, with weight
    beta/2 in the paper. `form="code"` is the mean over positions of the squared difference, as in the authors' code,
    with weight beta (1000 by default). The channels of the two models may differ, but not their grids.
    """
    _check_maps("attention", student, teacher)
    student_map, teacher_map = (unit(map_.square().mean(1).flatten(1)) for map_ in (student, teacher))
    if form == "code":
        return (student_map - teacher_map).square().mean()
    if form != "paper":
        raise LossError(f"attention: form {form!r}; expected 'paper' or 'code'")
    distance: Tensor = torch.linalg.vector_norm(student_map - teacher_map, dim=1)
    return distance.mean()


@loss_function
def patch_similarity(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
    *,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Compute KL(softmax(G_T / t) || softmax(G_S / t)) of each position, averaged over positions and batch.

    G = F F^T are the cosines between the vectors of all positions of one image (rows of F, scaled to length 1), so each
    row of the softmax says which positions a position resembles. It is the form of LightlyTrain's distillation, with
    its temperature t. The channels of the two models may differ, and need no projector. There is no factor t^2.
    """
    _check_maps("patch_similarity", student, teacher)
    if not temperature > 0:
        raise LossError(f"patch_similarity: temperature {temperature}; it has to be positive")
    log_p, log_q = (_log_similarity(map_, temperature) for map_ in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _log_similarity(
    map_: Float[Tensor, "batch channels height width"], temperature: float
) -> Float[Tensor, "rows positions"]:
    rows = unit(map_.flatten(2)).mT
    return F.log_softmax(rows @ rows.mT / temperature, dim=-1).flatten(0, 1)


def _check_maps(loss: str, student: Tensor, teacher: Tensor) -> None:
    batch_and_height_agree = student.ndim == teacher.ndim == 4 and student.shape[::2] == teacher.shape[::2]
    if not batch_and_height_agree or student.shape[3] != teacher.shape[3] or not student.numel() * teacher.numel():
        raise LossError(
            f"{loss}: expected two maps (batch, channels, height, width) of one batch and grid, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )


def to_one_grid(*maps: Float[Tensor, "batch _ _ _"]) -> list[Tensor]:
    """Max-pool each map to the smallest height and width among them."""
    size = tuple(min(map_.shape[axis] for map_ in maps) for axis in (2, 3))
    return [map_ if tuple(map_.shape[2:]) == size else F.adaptive_max_pool2d(map_, size) for map_ in maps]


def positions(map_: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions channels"]:
    """Return a view of the map as one row of channels per position.

    A map in channels-last memory gets its gradient in channels-last memory. A product of matrices would return the
    other order, which every layer of the backward would then have to convert.
    """
    rows = map_.permute(0, 2, 3, 1).flatten(1, 2)
    if not rows.is_contiguous():
        return rows
    # To one matrix and back: both are views, but in the backward, a gradient in another order is copied by the view.
    return rows.flatten(0, 1).view(rows.shape)
