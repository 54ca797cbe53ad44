"""Losses of the relations between the images of a batch: each model has one vector an image, of its own width."""

from collections.abc import Sequence
from math import exp, factorial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.parts import IN_CACHE, SMALL, gradients_at, in_parts
from probe_kd.methods.losses.units import unit_features
from probe_kd.methods.precision import widened


@loss_function
def rkd(
    student: Float[Tensor, "batch c1"],
    teacher: Float[Tensor, "batch c2"],
    /,
    *,
    distance: float = 1.0,
    angle: float = 2.0,
) -> Float[Tensor, ""]:
    """Compute a (Huber loss of the distances of pairs) + b (Huber loss of the cosines of the angles of triplets).

    RKD, Park et al. 2019 (arXiv 1904.05068), with a = `distance` and b = `angle`. A distance is divided by
    the mean of the distances of all pairs of different images; the angle of (i, j, k) is that between z_i - z_j and
    z_k - z_j, and cos = 0 if one of these is zero. As in the authors' code, the mean is that of all n^2 pairs and n^3
    triplets of n images, of which those without two or three different images count 0. The paper has 25 and 50 for
    classification (`{weight: 25, distance: 1, angle: 2}`), the authors' examples of metric learning 1 and 2.

    Scale, offset and rotation of the vectors do not matter. Of two images, the loss is always 0. The products are taken
    in float64, because the difference of two similar vectors is lost in the rounding of their products in float32. The
    time grows with n^2 (c1 + c2) + n^3, the memory with n^2: the cosines are computed at some vertices at a time.
    """
    largest = _check_vectors("rkd", student, teacher)
    if min(distance, angle) < 0 or not (distance or angle):
        raise LossError(f"rkd: distance {distance}, angle {angle}; expected factors from 0 on, and one above it")
    images, dtype = len(student), student.dtype
    student, teacher = (_products(side) for side in (student, teacher))
    lengths = [_distances(side) for side in (student, teacher)]
    value = student.new_zeros(())
    if distance:
        own, other = (side / _or_one(side.sum() / (images * (images - 1))) for side in lengths)
        value = value + distance * F.smooth_l1_loss(own, other)
    if angle:
        sides = student, lengths[0], teacher, lengths[1]
        compute = _angles_in_parts if torch.compiler.is_compiling() else _Angles.apply
        value = value + angle / images**3 * compute(largest, *sides)
    return value.to(dtype)


class _Angles(torch.autograd.Function):
    """The sum of the Huber losses of all cosines. Its gradient is known after one pass over the vertices."""

    @staticmethod
    def forward(ctx: Any, largest: int, *sides: Tensor) -> Tensor:
        images = len(sides[0])
        inverses = [torch.where(lengths == 0, 0.0, 1 / lengths) for lengths in sides[1::2]]
        gradients = [
            torch.zeros_like(side) if needs else None
            for side, needs in zip(sides, ctx.needs_input_grad[1:], strict=True)
        ]
        total = sides[0].new_zeros(())
        size = max(1, (IN_CACHE if sides[0].is_cpu else largest) // images**2)
        for start in range(0, images, size):
            some = slice(start, start + size)
            own, other = (_angles_at(*side, some) for side in zip(sides[::2], inverses, strict=True))
            difference = own[0] - other[0]
            slopes = difference.clamp(-1, 1)
            total += torch.dot(slopes.flatten(), difference.sub_(slopes, alpha=0.5).flatten())
            _add_gradients(gradients[:2], slopes, *own, inverses[0], some)
            _add_gradients(gradients[2:], slopes.neg_(), *other, inverses[1], some)
        ctx.save_for_backward(*sides, *gradients)
        ctx.largest = largest
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sides, known = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if torch.is_grad_enabled():  # to be differentiated once more
            value = _angles_in_parts(ctx.largest, *sides)
            return None, *gradients_at(value, sides, ctx.needs_input_grad[1:], gradients[0])
        return None, *(None if of_side is None else gradients[0] * of_side for of_side in known)


def _angles_at(
    products: Float[Tensor, "batch batch"], inverses: Float[Tensor, "batch batch"], some: slice
) -> tuple[Float[Tensor, "vertices batch batch"], Float[Tensor, "vertices batch batch"]]:
    """The cosines at some vertices, and by what z_i - z_j times z_k - z_j is multiplied for them."""
    rows = products[some]
    cosines = products - rows[:, :, None]
    cosines -= rows[:, None] - products.diagonal()[some, None, None]
    factors = inverses[some, :, None] * inverses[some, None]
    return cosines.mul_(factors), factors


def _add_gradients(
    gradients: Sequence[Tensor | None], slopes: Tensor, cosines: Tensor, factors: Tensor, inverses: Tensor, some: slice
) -> None:
    """Add the gradients at the products and the distances, in place of the cosines and the factors."""
    of_products, of_distances = gradients
    if of_products is not None:
        factors.mul_(slopes)
        of_rows = factors.sum(2)
        of_products += factors.sum(0)
        of_products[some] -= 2 * of_rows
        of_products.diagonal()[some] += of_rows.sum(1)
    if of_distances is not None:
        of_distances[some] -= 2 * cosines.mul_(slopes).sum(2) * inverses[some]


def _angles_in_parts(largest: int, *sides: Tensor) -> Tensor:
    images = len(sides[0])
    vertices = torch.arange(images, device=sides[0].device)
    return in_parts(_angles, (vertices,), sides, numbers=images**2, largest=largest)


def _angles(
    vertices: Int[Tensor, " vertices"],
    student: Float[Tensor, "batch batch"],
    student_distances: Float[Tensor, "batch batch"],
    teacher: Float[Tensor, "batch batch"],
    teacher_distances: Float[Tensor, "batch batch"],
) -> Float[Tensor, ""]:
    """The sum of the Huber losses of all cosines at these vertices."""
    own, other = _cosines(student, student_distances, vertices), _cosines(teacher, teacher_distances, vertices)
    return F.smooth_l1_loss(own, other, reduction="sum")


def _products(vectors: Float[Tensor, "batch c"]) -> Float[Tensor, "batch batch"]:
    """The inner products of the vectors less their mean."""
    exact = widened(vectors)
    centred = exact - exact.mean(0)
    return centred @ centred.mT


def _distances(products: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    """The distance of each pair, and exactly zero for vectors that are equal within rounding."""
    squares = products.diagonal()
    both = squares[:, None] + squares
    difference = both - 2 * products
    equal = (difference <= 64 * torch.finfo(both.dtype).eps * both).fill_diagonal_(True)
    return difference.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0)


def _cosines(
    products: Float[Tensor, "batch batch"], distances: Float[Tensor, "batch batch"], vertices: Int[Tensor, " vertices"]
) -> Float[Tensor, "vertices batch batch"]:
    """The cosine between z_i - z_j and z_k - z_j for each vertex j and all i and k."""
    at_vertex = products[vertices]
    square = products.diagonal()[vertices, None, None]
    between = products - at_vertex[:, :, None] - at_vertex[:, None, :] + square
    lengths = _or_one(distances[vertices])
    absent = distances[vertices] == 0
    cosines = between / (lengths[:, :, None] * lengths[:, None, :])
    return cosines.masked_fill(absent[:, :, None] | absent[:, None, :], 0.0)


@loss_function
def sp(
    student: Float[Tensor, "batch c1"],
    teacher: Float[Tensor, "batch c2"],
    /,
) -> Float[Tensor, ""]:
    """Compute ||G_S - G_T||_F^2 / n^2, where G = Z Z^T of n images' vectors Z, each row scaled to length 1.

    SP, Tung and Mori 2019 (arXiv 1907.09682). The paper's vectors are whole maps (`tokens: flatten`), and
    its weight is 3000. The scale of all vectors of a model does not matter. Rows of zeros stay zeros. Time and memory
    grow with n^2: the matrix is computed in parts where it is larger than the vectors.
    """
    largest = _check_vectors("sp", student, teacher)

    def part(own: Tensor, other: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        sides = unit_features(own @ student.mT, 1), unit_features(other @ teacher.mT, 1)
        return F.mse_loss(*sides, reduction="sum")

    sides = student, teacher
    return in_parts(part, sides, sides, numbers=len(student), largest=largest) / len(student) ** 2


@loss_function
def pkt(
    student: Float[Tensor, "batch c1"],
    teacher: Float[Tensor, "batch c2"],
    /,
    *,
    form: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """Compute KL(p_i || q_i), averaged over the images i: how similar the others are to it, as two distributions.

    PKT, Passalis and Tefas 2018 (arXiv 1803.10837), with its cosine kernel K = (cos + 1) / 2: p_i(j) is the teacher's
    K(i, j), divided by the sum over all j other than i, and q_i(j) the student's. `form="code"` includes j = i, as the
    authors' code does. Its loss is the mean over all pairs, so that its weights are n times as large for n images: the
    30000 of RepDistiller for 64 images is about 470 here. Vectors of zeros have the cosine 0, and K is at least 1e-7.
    The scale of each vector does not matter. Of two images, the loss of the paper's form is always 0. Distributions are
    compared in float64, as they are nearly equal. Time and memory grow with n^2: the matrix is computed in parts where
    it is larger than the vectors.
    """
    largest = _check_vectors("pkt", student, teacher)
    if form not in ("paper", "code"):
        raise LossError(f"pkt: form {form!r}; expected 'paper' or 'code'")
    images, dtype = len(student), student.dtype
    student, teacher = (unit_features(side, 1) for side in (student, teacher))

    left_out = torch.eye(images, dtype=torch.bool, device=student.device) & (form == "paper")

    def part(own: Tensor, other: Tensor, left_out: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = _log_shares(own @ student.mT, left_out), _log_shares(other @ teacher.mT, left_out)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).masked_fill(left_out, 0.0).sum()

    sides = student, teacher
    total = in_parts(part, (*sides, left_out), sides, numbers=images, largest=largest)
    return total.to(dtype) / images


def _log_shares(cosines: Float[Tensor, "rows batch"], left_out: Tensor) -> Float[Tensor, "rows batch"]:
    """The logarithm of K divided by its sum over a row."""
    kernel = ((widened(cosines) + 1) / 2).clamp_min(1e-7)
    return kernel.log() - kernel.masked_fill(left_out, 0.0).sum(1, keepdim=True).log()


@loss_function
def cc(
    student: Float[Tensor, "batch c1"],
    teacher: Float[Tensor, "batch c2"],
    /,
    *,
    gamma: float = 0.4,
    order: int = 2,
) -> Float[Tensor, ""]:
    """Compute the mean over all pairs of images of (C_S - C_T)^2, C the correlation of their vectors by a kernel.

    Correlation congruence, Peng et al. 2019 (arXiv 1904.01802): the Gaussian kernel exp(-gamma ||x - y||^2) of vectors
    of length 1 by its Taylor series, exp(-2 gamma) times the sum of (2 gamma)^p / p! (x y)^p for p from 0 to `order`,
    here with gamma = 0.4 and order 2 as in the paper. The paper reads both models through a linear layer of one width.
    The kernel compares the images within a model, so here each model keeps its width, and nothing is projected. The
    scale of each vector does not matter. Time and memory grow with n^2 for n images: the matrix is computed in parts
    where it is larger than the vectors.
    """
    largest = _check_vectors("cc", student, teacher)
    if not gamma > 0 or order < 1:
        raise LossError(f"cc: gamma {gamma}, order {order}; expected a gamma above 0 and an order from 1 on")
    student, teacher = (unit_features(side, 1) for side in (student, teacher))

    def part(own: Tensor, other: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        sides = _taylor(own @ student.mT, gamma, order), _taylor(other @ teacher.mT, gamma, order)
        return F.mse_loss(*sides, reduction="sum")

    sides = student, teacher
    return in_parts(part, sides, sides, numbers=len(student), largest=largest) / len(student) ** 2


def _taylor(cosines: Float[Tensor, "rows batch"], gamma: float, order: int) -> Float[Tensor, "rows batch"]:
    """The sum of exp(-2 gamma) (2 gamma)^p / p! cos^p for p from 1 to `order`; p = 0 gives the same in both models."""
    factors = [exp(-2 * gamma) * (2 * gamma) ** power / factorial(power) for power in range(1, order + 1)]
    total = torch.full_like(cosines, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * cosines + factor
    return total * cosines


def _check_vectors(loss: str, student: Tensor, teacher: Tensor) -> int:
    """Return how many numbers a part of a matrix may hold. Raises LossError for other than vectors of some images."""
    if not student.ndim == teacher.ndim == 2 or len(student) != len(teacher) or not student.numel() * teacher.numel():
        raise LossError(
            f"{loss}: expected one vector an image of both models, (batch, c1) and (batch, c2), got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    if not teacher.is_floating_point():
        raise LossError(f"{loss}: the teacher's side {tuple(teacher.shape)} is {teacher.dtype}; expected real numbers")
    if len(student) < 2:
        raise LossError(
            f"{loss} compares the images of a batch with each other, and this one has a single image; give larger "
            "batches"
        )
    return max(student.numel(), teacher.numel(), SMALL)


def _or_one(numbers: Tensor) -> Tensor:
    return numbers.masked_fill(numbers == 0, 1.0)
