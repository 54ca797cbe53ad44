"""Losses of a pair of maps at one grid, each with its own channels."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.parts import SMALL, in_parts
from probe_kd.methods.losses.units import unit, unit_features


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
    its temperature t. The channels of the two models may differ, and need no projector. There is no factor t^2. The
    cosines are computed in parts that are no larger than the features.
    """
    _check_maps("patch_similarity", student, teacher)
    if not temperature > 0:
        raise LossError(f"patch_similarity: temperature {temperature}; it has to be positive")

    def part(own: Tensor, other: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax((rows.mT / temperature) @ rows, dim=2) for rows in (own, other))
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)

    rows = [unit(map_.flatten(2)) for map_ in (student, teacher)]
    images, positions = len(student), rows[0].shape[2]
    largest = max(student.numel(), teacher.numel(), SMALL)
    return in_parts(part, rows, (), numbers=positions**2, largest=largest) / (images * positions)


@loss_function
def nst(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
) -> Float[Tensor, ""]:
    """Compute the squared maximum mean discrepancy between the channels of two maps, with the kernel k(x, y) = (x y)^2.

    Neuron selectivity transfer, Huang and Wang 2017 (arXiv 1707.01219), with the polynomial kernel of degree 2 and
    constant 0, the best of three kernels there: mean of k(s_i, s_j) + mean of k(t_i, t_j) - 2 mean of k(s_i, t_j). The
    samples s_i and t_j are the channels of one image, each a vector over the positions, scaled to length 1. The batch
    is averaged. RepDistiller's weight is 50. Channels of zeros stay zeros.

    It is computed as the distance of the matrices S S^T / c1 and T T^T / c2 over the positions, which is the same, or
    from products of channels, whichever is smaller; either is smaller than the features.
    """
    _check_maps("nst", student, teacher)
    student_rows, teacher_rows = (unit_features(map_.flatten(2), 2).mT for map_ in (student, teacher))
    return _distance_of_products(student_rows, teacher_rows, (student.shape[1], teacher.shape[1]))


@loss_function
def gram_tokens(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
) -> Float[Tensor, ""]:
    """Compute the mean square of S S^T - T T^T, where a row of S and T is the vector of a position, of length 1.

    The Gram loss of DINOv3, Simeoni et al. 2025 (arXiv 2508.10104), where the equation has the sum over the matrix and
    the authors' code the mean. Their configuration of the 7B model has a weight that ends at 2. Entry (i, j) is the
    cosine of positions i and j of one image, so each model keeps its width. Vectors of zeros stay zeros.

    It is computed from products of positions or, where these are more than the channels of both, of channels. Either is
    smaller than the features.
    """
    _check_maps("gram_tokens", student, teacher)
    student_rows, teacher_rows = (unit_features(map_.flatten(2), 1).mT for map_ in (student, teacher))
    return _distance_of_products(student_rows, teacher_rows) / student_rows.shape[1] ** 2


def _distance_of_products(
    student: Float[Tensor, "batch positions c1"],
    teacher: Float[Tensor, "batch positions c2"],
    divisors: tuple[int, int] = (1, 1),
) -> Float[Tensor, ""]:
    """The mean of ||S S^T / a - T T^T / b||_F^2 over the batch, for the two divisors a and b.

    With a = b = 1, that is ||S^T S||^2 + ||T^T T||^2 - 2 ||S^T T||^2.
    """
    own, other = 1 / divisors[0], 1 / divisors[1]
    if student.shape[1] <= student.shape[2] + teacher.shape[2]:
        difference = torch.baddbmm(teacher @ teacher.mT, student, student.mT, beta=-other, alpha=own)
        return difference.square().sum() / len(student)
    pairs = ((own**2, student, student), (other**2, teacher, teacher), (-2 * own * other, student, teacher))
    terms = [factor * (first.mT @ second).square().sum() for factor, first, second in pairs]
    return (terms[0] + terms[1] + terms[2]) / len(student)


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
