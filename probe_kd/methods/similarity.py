"""How alike two features are, over all images: linear CKA, explained variance, cosine.

Each is computed from sums in float64 that are added batch by batch, so memory does not grow with images times features,
and the sums of several processes are those of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

import torch
from jaxtyping import Float
from torch import Tensor

from probe_kd.methods.precision import exact

Sums = dict[str, Tensor]
_CONSTANT = 1e-12  # a variance below this share of the mean square is rounding: float32 features differ by 1e-7


def cka_sums(student: Float[Tensor, "batch m"], teacher: Float[Tensor, "batch n"]) -> Sums:
    """The sums over one batch that `linear_cka` needs. Add them over all batches."""
    of_student, of_teacher = exact(student), exact(teacher)
    return {
        "images": of_student.new_tensor(len(of_student)),
        "student": of_student.sum(0),
        "teacher": of_teacher.sum(0),
        "within_student": of_student.T @ of_student,
        "within_teacher": of_teacher.T @ of_teacher,
        "between": of_student.T @ of_teacher,
    }


def linear_cka(sums: Mapping[str, Tensor]) -> float:
    """Linear centred kernel alignment of two features, from the `cka_sums` of all images.

    `||X^T Y||^2 / (||X^T X|| ||Y^T Y||)` in Frobenius norms, where the rows of X and Y are the images, and their mean
    over all images is taken out. Kornblith et al. 2019 (arXiv 1905.00414), eq. 5 and sec. 3 with linear kernels. It is
    exact over the whole set, not a mean over batches: 1 for features that are equal up to rotation and scale. NaN
    where one of the features is the same for every image.
    """
    of_student, of_teacher = sums["student"], sums["teacher"]
    within_student, within_teacher, between = (
        sums[name] - torch.outer(left, right) / sums["images"]
        for name, left, right in (
            ("within_student", of_student, of_student),
            ("within_teacher", of_teacher, of_teacher),
            ("between", of_student, of_teacher),
        )
    )
    for centred, raw in ((within_student, sums["within_student"]), (within_teacher, sums["within_teacher"])):
        if not centred.trace() > _CONSTANT * raw.trace():
            return float("nan")
    return float(between.norm() ** 2 / (within_student.norm() * within_teacher.norm()))


def cka_table(
    of_student: Sequence[Float[Tensor, "images _"]], of_teacher: Sequence[Float[Tensor, "images _"]]
) -> list[list[float | None]]:
    """`linear_cka` of every student's feature (rows) with every teacher's (columns); None where it is not defined.

    Needs one matrix (images by images) per feature, because `||X^T Y||^2` is the sum of the elementwise product of
    `X X^T` and `Y Y^T`. A table of 30 by 30 thus takes 60 matrices, instead of 900 of channels by channels.
    """
    grams = [[_gram(feature) for feature in side] for side in (of_student, of_teacher)]
    return [
        [None if a is None or b is None else float((a * b).sum() / (a.norm() * b.norm())) for b in grams[1]]
        for a in grams[0]
    ]


def _gram(feature: Float[Tensor, "images channels"]) -> Float[Tensor, "images images"] | None:
    raw = exact(feature)
    centred = raw - raw.mean(0)
    return centred @ centred.T if centred.square().sum() > _CONSTANT * raw.square().sum() else None


def variance_sums(predicted: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]) -> Sums:
    """The sums over one batch that `explained_variance` needs. Add them over all batches."""
    exact_target = exact(target)
    error = exact_target - exact(predicted)
    return {
        "images": exact_target.new_tensor(len(exact_target)),
        "target": exact_target.sum(0),
        "target_squared": exact_target.square().sum(),
        "error": error.sum(0),
        "error_squared": error.square().sum(),
    }


def explained_variance(sums: Mapping[str, Tensor]) -> float:
    """`1 - SSE / SST` from the `variance_sums` of all images: 1 for exact predictions, 0 if no better than the mean.

    Both sums of squares are about their means over the images, per channel and position, and are added over these. A
    constant offset therefore costs nothing; a negative value is worse than predicting the mean. NaN if the target is
    the same for every image.
    """
    total, residual = (
        sums[f"{name}_squared"] - sums[name].square().sum() / sums["images"] for name in ("target", "error")
    )
    if not total > _CONSTANT * sums["target_squared"]:
        return float("nan")
    return float(1 - residual.clamp(min=0) / total)


def added(total: Sums, more: Sums) -> Sums:
    """The sums of one more batch added to those before, which are empty at first."""
    return {name: total[name] + value for name, value in more.items()} if total else more


def cosine_sums(predicted: Float[Tensor, "batch channels ..."], target: Float[Tensor, "batch channels ..."]) -> Sums:
    """The sums over one batch that `mean_cosine` needs. Add them over all batches."""
    cosines = torch.cosine_similarity(exact(predicted), exact(target), dim=1, eps=1e-300)
    of_images = cosines.mean(tuple(range(1, cosines.ndim))) if cosines.ndim > 1 else cosines
    return {"images": of_images.new_tensor(len(of_images)), "cosine": of_images.sum()}


def mean_cosine(sums: Mapping[str, Tensor]) -> float:
    """The mean cosine of two features, from the `cosine_sums` of all images: 1 where they differ only in scale.

    Of maps, the cosine at each position is over the channels, and the mean over positions and images. Unlike the
    explained variance it does not see a wrong scale, and it does see the offset that all images have in common. The
    cosine with a vector of zeros is 0.
    """
    return float(sums["cosine"] / sums["images"])


@dataclass
class PairSums:
    """The sums of one pair of features over the images so far, from which both of its scores follow."""

    variance: Sums = field(default_factory=dict)
    cosine: Sums = field(default_factory=dict)

    def add(self, predicted: Tensor, target: Tensor, *, of_matrices: bool = False) -> None:
        """Add a batch. Matrices of channels have no cosine per position."""
        predicted, target = exact(predicted), exact(target)  # once for both
        self.variance = added(self.variance, variance_sums(predicted, target))
        if not of_matrices:
            self.cosine = added(self.cosine, cosine_sums(predicted, target))

    def scores(self, reduce: Callable[[Sums, str], Sums]) -> tuple[float | None, float | None]:
        """The explained variance and the mean cosine; None for one without images, and for one that is no number.

        `reduce(sums, "sum")` adds over all processes.
        """
        explained = explained_variance(reduce(self.variance, "sum")) if self.variance else nan
        cosine = mean_cosine(reduce(self.cosine, "sum")) if self.cosine else nan
        return explained if isfinite(explained) else None, cosine if isfinite(cosine) else None
