"""Losses of a pair of features that an adapter has converted to one shape."""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.common import Reduction, check_same_shape, loss_function, squared_error


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
