"""Losses of a pair of features that an adapter has converted to one shape."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

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
