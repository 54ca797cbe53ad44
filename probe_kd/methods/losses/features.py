"""Losses of a pair of features that an adapter has converted to one shape."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.checks import Reduction, check_same_shape
from probe_kd.methods.losses.distances import in_float64, squared_error
from probe_kd.methods.losses.units import unit_deviation, unit_features


@partial(loss_function, promote=False)
def hint(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    /,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Compute the squared error ||u_h - r(v_g)||^2 between the teacher's hint and the student's adapted feature.

    FitNets, Romero et al. 2015 (arXiv 1412.6550), eq. 3. The paper has a factor 1/2 before the sum: use weight 0.5
    with `reduction="sum"`. The mean is the default, since the sum grows with the size of the map.
    """
    check_same_shape(student, teacher, "hint")
    return squared_error(student, teacher, reduction)


@loss_function
def token_match(
    student: Float[Tensor, "batch channels ..."],
    teacher: Float[Tensor, "batch channels ..."],
    /,
    *,
    cosine: float = 0.9,
    smooth_l1: float = 0.1,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute a (1 - cos(u, v)) + b smooth_l1(u - v), averaged over all positions and, in the second part, channels.

    Theia, Shang et al. 2024 (arXiv 2407.20179), with a = 0.9 and b = 0.1; UNIC, Sariyildiz et al. 2024 (arXiv
    2408.05088), with 0.5 and 0.5. u is the student's adapted vector of channels at a position, v the teacher's, which
    both papers standardise by statistics of the training images (`normalize: fitted`). `cosine` is a, `smooth_l1` is b,
    and `beta` is the difference below which the second part is quadratic: d^2 / (2 beta), and |d| - beta / 2 above. In
    the cosine, a vector counts as no shorter than 1e-4, so that one of zeros has the cosine 0 and a bounded gradient.
    """
    check_same_shape(student, teacher, "token_match")
    if student.ndim < 2:
        raise LossError(f"token_match: expected (batch, channels, ...), got {tuple(student.shape)}")
    if not beta > 0:
        raise LossError(f"token_match: beta {beta}; it has to be positive")
    if min(cosine, smooth_l1) < 0 or not (cosine or smooth_l1):
        raise LossError(
            f"token_match: cosine {cosine}, smooth_l1 {smooth_l1}; expected factors from 0 on, and one above it"
        )
    angles = 1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-4)
    return cosine * angles.mean() + smooth_l1 * F.smooth_l1_loss(student, teacher, beta=beta)


@loss_function
def smooth_l1(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    /,
    *,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute the mean of d^2 / (2 beta) where |d| < beta, and of |d| - beta / 2 elsewhere, d = student - teacher.

    It is the distance of VkD, Miles et al. 2024 (arXiv 2403.06213), which a recipe writes as `{loss: smooth_l1,
    tokens: pool, projector: orthogonal, normalize: layer}`: the mean over the student's positions through a projector
    with orthonormal rows or columns, against the teacher's, standardised over its channels. `beta` is 1 there.
    """
    check_same_shape(student, teacher, "smooth_l1")
    if not beta > 0:
        raise LossError(f"smooth_l1: beta {beta}; it has to be positive")
    # The number that torch gives still holds the memory of all distances.
    return F.smooth_l1_loss(student, teacher, beta=beta).clone()


@loss_function
def pkd(
    student: Float[Tensor, "batch channels ..."],
    teacher: Float[Tensor, "batch channels ..."],
    /,
) -> Float[Tensor, ""]:
    """Compute 1 - r, averaged over the channels, where r is Pearson's correlation over the batch and all positions.

    PKD, Cao et al. 2022 (arXiv 2207.02039): half of the mean squared difference of both features, each channel
    standardised over the batch and the positions, which is 1 - r. Its weight is 6 for two-stage detectors in MMRazor's
    configurations. A channel may have any scale and offset. The standardised values of a constant channel are zeros, so
    that it counts 1/2, and 0 if it is constant on both sides.
    """
    check_same_shape(student, teacher, "pkd")
    if student.ndim < 2:
        raise LossError(f"pkd: expected (batch, channels, ...), got {tuple(student.shape)}")
    if student.numel() == student.shape[1]:
        raise LossError(
            "pkd compares how each channel varies over the images and positions of a batch, and this one has a single "
            "image and position; give larger batches, or pair layers with positions"
        )
    over = (0, *range(2, student.ndim))
    own, other = unit_deviation(student, over), unit_deviation(teacher, over)
    return F.mse_loss(own, other, reduction="sum") / (2 * student.shape[1])


@loss_function
def cwd(
    student: Float[Tensor, "batch channels positions ..."],
    teacher: Float[Tensor, "batch channels positions ..."],
    /,
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)) over the positions, averaged over the channels.

    Channel-wise distillation, Shu et al. 2021 (arXiv 2011.13256): each channel of a map is a distribution over the
    positions. The batch is averaged. T is 4 in the paper. An offset of a whole channel does not matter.
    """
    check_same_shape(student, teacher, "cwd")
    if student.ndim < 3:
        raise LossError(
            f"cwd: expected (batch, channels, positions ...), got {tuple(student.shape)}: a vector has no positions to "
            "attend to; pair layers with positions, and leave `tokens` at `drop`"
        )
    if not 0 < temperature < torch.inf:
        raise LossError(f"cwd: temperature {temperature}; it has to be positive, and finite")
    dtype = student.dtype
    rows = (side.flatten(2).flatten(0, 1) for side in in_float64(temperature, student, teacher))
    log_p, log_q = (F.log_softmax(row / temperature, dim=1) for row in rows)
    return (temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)).to(dtype)


@loss_function
def ickd(
    student: Float[Tensor, "batch channels positions ..."],
    teacher: Float[Tensor, "batch channels positions ..."],
    /,
) -> Float[Tensor, ""]:
    """Compute ||g_S - g_T||^2 of each row g of the channels' Gram matrices, scaled to length 1; averaged over the rows.

    Inter-channel correlation, Liu et al. 2021 (ICCV), ICKD-C: G = F F^T holds the inner products of the channels of one
    image. The rows are scaled to length 1 as in the authors' code, which has a weight of 2.5 for CIFAR-100; without
    that, and over all entries, it is `gram`. A row of zeros counts 1, and 0 if it is zero in both. The batch is
    averaged.

    Where the channels are more than the positions, 2 - 2 cos(g_S, g_T), which is the same, is computed from products of
    positions. Either kind of matrix is no larger than the features.
    """
    check_same_shape(student, teacher, "ickd")
    if student.ndim < 3:
        raise LossError(
            f"ickd: expected (batch, channels, positions ...), got {tuple(student.shape)}: a vector has no positions "
            "over which its channels correlate; pair layers with positions, and leave `tokens` at `drop`"
        )
    student, teacher = student.flatten(2), teacher.flatten(2)
    if student.shape[1] <= student.shape[2]:
        student_rows, teacher_rows = (unit_features(side @ side.mT, 2) for side in (student, teacher))
        return (student_rows - teacher_rows).square().sum() / student_rows.shape[:2].numel()
    squares, products = _row_products(student, teacher)
    student_lengths, teacher_lengths = (square.masked_fill(square < 1e-30, 1.0).sqrt() for square in squares)
    ones = sum((square.detach() >= 1e-30).to(products.dtype) for square in squares)
    return (ones - 2 * products / (student_lengths * teacher_lengths)).mean()


def _row_products(
    student: Float[Tensor, "batch channels positions"], teacher: Float[Tensor, "batch channels positions"]
) -> tuple[list[Float[Tensor, "batch channels"]], Float[Tensor, "batch channels"]]:
    """g_S g_S, g_T g_T and g_S g_T for the rows g of two Gram matrices F F^T, up to the scale of each row.

    They are f (F^T F) f, from products of positions, where f is the row of F, here of length 1. The products of
    positions are divided by their size, so that no square overflows. Those below 1e-30 count as zeros, and so does a
    row shorter than 1e-15.
    """
    rows = [unit_features(side, 2) for side in (student, teacher)]
    own, other, between = student.mT @ student, teacher.mT @ teacher, student.mT @ teacher
    factors = [_one_over_size(matrix) for matrix in (own, other)]
    scaled = own * factors[0], other * factors[1], between * factors[0].sqrt() * factors[1].sqrt()
    sides = (rows[0], rows[0]), (rows[1], rows[1]), (rows[0], rows[1])
    products = [((left @ matrix) * right).sum(2) for (left, right), matrix in zip(sides, scaled, strict=True)]
    return products[:2], products[2]


def _one_over_size(matrix: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch 1 1"]:
    size = matrix.detach().abs().amax((1, 2), keepdim=True)
    return torch.where(size < 1e-30, 0.0, 1 / size)
