"""Figures of single layers and of pairs of layers, each from sums in float64 that are added batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probe_kd.methods.normalisation import inverse_deviations
from probe_kd.methods.precision import exact
from probe_kd.methods.similarity import Sums

Vectors = Float[Tensor, "batch positions channels"]

CONSTANT = 1e-12  # a variance below this share of the energy is rounding: float32 features differ by 1e-7
OUTLIER = 100.0  # times the energy of the median channel: ten times its size
PENALTY = 0.1  # of the linear map, for every vector, where each channel has variance 1
SMALL_VARIANCE = 1e-4  # of the mean channel's: less counts as this much, as in `normalize: fitted`


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer holds, over images and positions. A figure that is not defined is None.

    - `energy` is the mean square of a value.
    - `constant` is the share of the energy that is the same for all images: that of the mean over the images, at each
      position and channel. The variance is the unbiased one, so that few images do not add to it.
    - `outliers` is the number of channels with more than 100 times the energy of the median channel that is not zero,
      and `outlier_share` the share of the energy that they hold.
    - `effective_rank` is exp(entropy) of the singular values, as shares of their sum, of the features without their
      mean over the images (Roy and Vetterli 2007): n for n directions of equal size.
    - `scaled_rank` is the same after `normalize: fitted`, which gives all channels one variance: a channel of large
      variance then hides no other.
    - `leading` is the share of the variance in its first principal direction.
    - `finite` is false if a value is NaN or infinite; all other figures are then None.
    """

    finite: bool
    energy: float | None = None
    constant: float | None = None
    outliers: int | None = None
    outlier_share: float | None = None
    effective_rank: float | None = None
    scaled_rank: float | None = None
    leading: float | None = None


def layer_sums(vectors: Vectors, channels: Tensor) -> Sums:
    """The sums over one batch that `layer_statistics` needs. `channels` are those of which the rank is measured."""
    values = exact(vectors)
    some = values[..., channels.to(values.device)]
    return {
        "images": values.new_tensor(len(values)),
        "total": values.sum(0),
        "squares": values.square().sum((0, 1)),
        "some_total": some.sum(0),
        "some_products": _product(some, some),
    }


def layer_statistics(sums: Sums) -> LayerStatistics:
    """The statistics of a layer, from the `layer_sums` of all images, of which there are at least two."""
    if not all(bool(value.isfinite().all()) for value in sums.values()):
        return LayerStatistics(finite=False)
    images, squares = sums["images"], sums["squares"]
    energy = float(squares.sum() / (images * sums["total"].numel()))
    if not energy:
        return LayerStatistics(finite=True, energy=0.0)
    large = squares > OUTLIER * squares[squares > 0].median()
    outliers, share = int(large.sum()), float(squares[large].sum() / squares.sum())
    scatter = squares.sum() - sums["total"].square().sum() / images  # about the mean over the images
    varying = float(scatter * images / (images - 1) / squares.sum())
    if not varying > CONSTANT:
        return LayerStatistics(True, energy, 1.0, outliers, share)
    return LayerStatistics(True, energy, min(1.0, max(0.0, 1 - varying)), outliers, share, *_ranks(_scatter(sums)))


def _ranks(scatter: Float[Tensor, "channels channels"]) -> tuple[float, float, float]:
    """The effective rank, that of channels at one variance, and the share of the first direction."""
    scale = inverse_deviations(scatter.diagonal())
    singular = _singular_values(scatter)
    scaled = _singular_values(scatter * torch.outer(scale, scale))
    return effective_rank(singular), effective_rank(scaled), float(singular.max() ** 2 / singular.square().sum())


def _scatter(sums: Sums) -> Float[Tensor, "channels channels"]:
    """The products of the channels, summed over images and positions, without the mean over the images at each."""
    total = sums["some_total"]
    return (sums["some_products"] - total.T @ total / sums["images"]).cpu()


def _singular_values(scatter: Float[Tensor, "channels channels"]) -> Float[Tensor, " channels"]:
    values: Tensor = torch.linalg.eigvalsh(scatter)
    return values.clamp(min=0).sqrt()


def effective_rank(singular_values: Float[Tensor, " n"]) -> float:
    """exp(entropy) of the singular values as shares of their sum (Roy and Vetterli 2007). NaN if all are zero."""
    shares = singular_values / singular_values.sum()
    return float(torch.special.entr(shares).sum().exp())


def centred_gram(vectors: Vectors) -> Float[Tensor, " batch*batch"]:
    """The U-centred matrix of inner products of the images of a batch, flat; zero on its diagonal.

    The inner product of two of these, over n (n - 3), is the unbiased estimator of HSIC with linear kernels (Song et
    al. 2012, eq. 5; in this form Szekely and Rizzo 2014). Needs four images.
    """
    flat = exact(vectors).flatten(1)
    flat = flat - flat.mean(0)  # changes nothing but the rounding
    gram = flat @ flat.T
    gram.fill_diagonal_(0)
    count = len(gram)
    rows = gram.sum(1) / (count - 2)
    gram = gram - rows[:, None] - rows + gram.sum() / ((count - 1) * (count - 2))
    gram.fill_diagonal_(0)
    return gram.flatten()


def hsic_sums(features: Sequence[Vectors]) -> Sums:
    """The sums over one batch that `cka` needs: of every two of these features, HSIC times the number of images."""
    grams = torch.stack([centred_gram(feature) for feature in features])
    count = len(features[0])
    return {"images": grams.new_tensor(count), "hsic": grams @ grams.T / (count - 3)}


def cka(sums: Sums) -> Float[Tensor, "layers layers"]:
    """Linear CKA of every two features, from the `hsic_sums` of all batches. NaN where a feature does not vary.

    The minibatch estimator of Nguyen et al. 2021 (arXiv 2010.15327, eq. 2): the unbiased HSIC of each batch is averaged
    over the batches, so that the number of images and of batches adds no bias, and features may have more channels than
    there are images. Of unrelated features it is 0 in the mean, and may be a little below.
    """
    hsic = sums["hsic"]
    own = hsic.diagonal()
    own = torch.where(own > 0, own, torch.nan)
    return hsic / torch.outer(own, own).sqrt()


def input_sums(inputs: Vectors) -> Sums:
    """The sums over some images of the inputs of a linear map."""
    values = exact(inputs)
    return {
        "count": values.new_tensor(values.shape[0] * values.shape[1]),
        "inputs": values.sum((0, 1)),
        "within": _product(values, values),
    }


def target_sums(targets: Vectors) -> Sums:
    """The sums over some images of the targets of a linear map."""
    values = exact(targets)
    return {"targets": values.sum((0, 1)), "squares": values.square().sum((0, 1))}


def joint_sums(inputs: Vectors, targets: Vectors) -> Sums:
    """The sums over some images of the products of inputs and targets."""
    return {"between": _product(exact(inputs), exact(targets))}


def _product(left: Vectors, right: Vectors) -> Float[Tensor, "left right"]:
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def linearly_explained(halves: Sequence[Sums], penalty: float = PENALTY) -> float:
    """The share of a target's variance that a ridge regression on other images explains. NaN if it does not vary.

    `halves` are the `input_sums`, `target_sums` and `joint_sums` of one half of the images, and of the other.
    Fitted on one half of the images and measured on the other, and the other way round; the mean of both. Inputs are
    standardised by the half that is fitted on, and the penalty is `penalty` times the number of vectors. The share is
    the mean over the target's channels, each of one weight, so that a channel of large variance does not rule it; those
    with little variance weigh less. Negative where it is worse than the mean over the images.
    """
    one, other = halves
    return (_explained(one, other, penalty) + _explained(other, one, penalty)) / 2


def _explained(fitted: Sums, measured: Sums, penalty: float) -> float:
    count, mean = fitted["count"], fitted["inputs"] / fitted["count"]
    scatter = fitted["within"] - count * torch.outer(mean, mean)
    variances = scatter.diagonal() / count
    energies = fitted["within"].diagonal() / count
    scale = torch.where(variances > CONSTANT * energies, variances, torch.inf).rsqrt()
    target_mean = fitted["targets"] / count
    covariance = (fitted["between"] - count * torch.outer(mean, target_mean)) * scale[:, None]
    system = scatter * torch.outer(scale, scale)
    system.diagonal().add_(penalty * count)
    weights = torch.linalg.solve(system, covariance) * scale[:, None]
    residual, total = _squared_errors(measured, weights, target_mean - mean @ weights)
    floor = SMALL_VARIANCE * total.mean()
    importance = 1 / total.clamp(min=float(floor))
    return float(1 - (residual * importance).sum() / (total * importance).sum()) if floor > 0 else float("nan")


def _squared_errors(
    sums: Sums, weights: Float[Tensor, "inputs targets"], offset: Float[Tensor, " targets"]
) -> tuple[Tensor, Tensor]:
    """Of each target, the sum of squared errors of a linear map, and that about the mean."""
    count, target_mean = sums["count"], sums["targets"] / sums["count"]
    mean = sums["inputs"] / count
    within = sums["within"] - count * torch.outer(mean, mean)
    between = sums["between"] - count * torch.outer(mean, target_mean)
    total = (sums["squares"] - count * target_mean.square()).clamp(min=0)
    wrong_mean = target_mean - mean @ weights - offset
    residual = total - 2 * (weights * between).sum(0) + (weights * (within @ weights)).sum(0)
    return residual.clamp(min=0) + count * wrong_mean.square(), total
