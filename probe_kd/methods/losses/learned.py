"""Losses with parameters of their own, which are trained with the student and are not part of it."""

from math import expm1, isfinite, log, prod
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec
from probe_kd.errors import LossError
from probe_kd.methods.losses.checks import Reduction, check_batch_norm, check_reduction, check_same_shape
from probe_kd.methods.losses.distances import squared_error
from probe_kd.methods.losses.state import drawn
from probe_kd.methods.losses.units import unit


class VID(nn.Module):
    """Compute log sigma_c + (F_t - mu(F_s))^2 / (2 sigma_c^2), with a learned variance sigma_c^2 for each channel c.

    Variational Information Distillation, Ahn et al. 2019 (arXiv 1904.05835), eq. 4 to 6: a lower bound of the mutual
    information. mu is the projector (in the paper three 1x1 convolutions; see `projector: mlp`). The variance is
    softplus(alpha_c) + `eps`, which begins at `initial_variance`; 5 and 1e-5 are the authors'. `reduction="mean"` is
    that of their code, over channels and positions; the paper sums. The value is below zero for small variances.

    Shapes: two features (batch, channels, ...) of one shape.
    """

    def __init__(
        self,
        student: FeatureSpec,
        teacher: FeatureSpec,
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if not (isfinite(initial_variance) and initial_variance > eps > 0):
            raise LossError(
                f"vid: initial_variance {initial_variance} and eps {eps}; expected two numbers above 0, and the "
                "variance above `eps`, its smallest value"
            )
        self.eps, self.reduction = eps, reduction
        start = initial_variance - eps  # the inverse of softplus, written so that it does not overflow
        self.alpha = nn.Parameter(torch.full((teacher.channels,), start + log(-expm1(-start))))

    def forward(
        self, student: Float[Tensor, "batch channels ..."], teacher: Float[Tensor, "batch channels ..."]
    ) -> Float[Tensor, ""]:
        check_same_shape(student, teacher, "vid")
        variance = F.softplus(self.alpha) + self.eps
        others = [axis for axis in range(student.ndim) if axis != 1]
        # The mean of each channel first: what a variance divides is then no map.
        distances: Tensor = ((student - teacher).square().mean(others) / variance + variance.log()) / 2
        return distances.mean() if self.reduction == "mean" else distances.sum() * student[0, 0].numel()


class MGD(nn.Module):
    """Compute ||G(masked F_s) - F_t||^2, where G are two convolutions with a ReLU between them that fill in the gaps.

    Masked Generative Distillation, Yang et al. 2022 (arXiv 2205.01529), eq. 2 to 4. `mask` says what is hidden, with
    probability `ratio`:

    - `channels`: whole channels, as in the authors' code for classification (0.15, weight 7e-5 with `reduction="sum"`)
    - `positions`: all channels of a position, eq. 2 (0.65 and 2e-5, or 0.45 and 5e-7, for detection)
    - `tokens`: ViTKD, Yang et al. 2022 (arXiv 2209.02432), eq. 5: a share of exactly `ratio` of each image's positions
      is replaced by a learned vector, and only these are compared (0.5, weight 6e-6 with `reduction="sum"`)

    Vectors have no neighbours, so G are two linear layers, and only channels can be hidden. In evaluation mode, every
    call hides the same places.

    Shapes: two features (batch, channels, height, width) or (batch, channels) of one shape.
    """

    def __init__(
        self,
        student: FeatureSpec,
        teacher: FeatureSpec,
        *,
        mask: Literal["channels", "positions", "tokens"] = "channels",
        ratio: float = 0.15,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if mask not in ("channels", "positions", "tokens") or not 0 < ratio < 1:
            raise LossError(
                f"mgd: mask {mask!r} with ratio {ratio}; expected 'channels', 'positions' or 'tokens', and a share "
                "between 0 and 1"
            )
        self.mask, self.ratio, self.reduction = mask, ratio, reduction
        width, several = teacher.channels, prod(teacher.grid or (1,)) > 1
        if mask != "channels" and not several:
            raise LossError(
                f"mgd: {student.tap} <- {teacher.tap} are compared at one position, so mask {mask!r} would hide all "
                "of it; use 'channels'"
            )
        kernel = 3 if several else 1
        layers = (nn.Conv2d(width, width, kernel, padding=kernel // 2) for _ in range(2))
        self.generator = nn.Sequential(next(layers), nn.ReLU(), next(layers))
        self.token = nn.Parameter(torch.zeros(width, 1, 1)) if mask == "tokens" else None

    def forward(
        self, student: Float[Tensor, "batch channels ..."], teacher: Float[Tensor, "batch channels ..."]
    ) -> Float[Tensor, ""]:
        check_same_shape(student, teacher, "mgd")
        student, teacher = (side if side.ndim == 4 else side[:, :, None, None] for side in (student, teacher))
        hidden = self._hidden(student)
        generated: Tensor = self.generator(torch.where(hidden, 0.0 if self.token is None else self.token, student))
        if self.mask != "tokens":
            return squared_error(generated, teacher, self.reduction)
        value = squared_error(generated * hidden, teacher * hidden, self.reduction)
        return value / hidden.float().mean() if self.reduction == "mean" else value

    def _hidden(self, feature: Float[Tensor, "batch channels height width"]) -> Bool[Tensor, "batch _ _ _"]:
        batch, channels, height, width = feature.shape
        shape = (batch, channels, 1, 1) if self.mask == "channels" else (batch, 1, height, width)
        noise = drawn(torch.rand, shape, feature.device, training=self.training)
        if self.mask != "tokens":
            return noise < self.ratio
        visible = int(height * width * (1 - self.ratio))
        return (noise.flatten(1).argsort(1).argsort(1) >= visible).view(shape)


class SRRL(nn.Module):
    """Compute a ||v_s - v_t||^2 + b ||W v_s - W v_t||^2 of two vectors, with the teacher's frozen classifier W.

    Softmax regression representation learning, Yang et al. 2021 (ICLR, "Knowledge distillation via softmax regression
    representation learning"), eq. 2 and 4. Both are means, over the channels and over the classes. `features` is a and
    `logits` is b: 1 and 1 in the authors' code for ImageNet; `features: 0` leaves only the second part. v_s is the
    student's feature after the connector, averaged over the positions. The connector is the projector, a batch
    normalisation, and a ReLU if the teacher's feature is the output of one. Read the teacher where its classifier
    reads: at the last map of a CNN, and with `tokens: cls` at the last normalisation of a transformer.

    Shapes: two features (batch, channels, ...) of one shape. The core fills in `classifier`, a frozen copy.
    """

    def __init__(
        self,
        student: FeatureSpec,
        teacher: FeatureSpec,
        *,
        classifier: nn.Module,
        features: float = 1.0,
        logits: float = 1.0,
    ) -> None:
        super().__init__()
        if not (isfinite(features) and isfinite(logits) and features >= 0 < logits):
            raise LossError(
                f"srrl: features {features}, logits {logits}; expected factors from 0 on, and `logits` above it"
            )
        self.features, self.logits = features, logits
        self.norm = nn.BatchNorm1d(teacher.channels)
        self.activation = nn.ReLU(inplace=True) if teacher.activation == "relu" else nn.Identity()
        self.classifier = classifier
        _check_classifier(classifier, teacher)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(
        self, student: Float[Tensor, "batch channels ..."], teacher: Float[Tensor, "batch channels ..."]
    ) -> Float[Tensor, ""]:
        check_same_shape(student, teacher, "srrl")
        if self.training:
            check_batch_norm("srrl", student)
        student, teacher = (side.reshape(*side.shape[:2], -1) for side in (student, teacher))
        student, teacher = self.activation(self.norm(student)).mean(2), teacher.mean(2)
        value = self.logits * F.mse_loss(self.classifier(student), self.classifier(teacher))
        return value + self.features * F.mse_loss(student, teacher) if self.features else value


def _check_classifier(classifier: nn.Module, teacher: FeatureSpec) -> None:
    """Raise LossError unless the classifier takes vectors of the teacher's width."""
    like = next(classifier.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            logits = classifier.forward(torch.zeros(2, teacher.channels, dtype=like.dtype, device=like.device))
    except (RuntimeError, TypeError, ValueError, IndexError):  # whatever a layer raises for another shape
        logits = None
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise LossError(
            f"srrl: the teacher's classifier does not take vectors of {teacher.channels} numbers, as {teacher.tap} is "
            "compared; pair the teacher's last layer before its classifier, and leave out `policy: fixed`"
        )


class RSD(nn.Module):
    """Compute the sum of (1 - R_ii)^2 + kappa sum over j != i of R_ij^2, where R_ij correlates v_t,i with h(v_s)_j.

    Redundancy suppression distillation, Zhang et al. 2025 (arXiv 2507.21844). R are the correlations over the images
    of the batch. The head h keeps the student's own vector free from the loss: a linear layer to `expansion` times the
    width, batch normalisation, GELU, and a linear layer to the teacher's width. `kappa` 0.01, `expansion` 2 and the
    weight 0.1 are those of the authors' code, which sums over the channels i; `reduction="mean"` averages over them.
    A channel of the teacher that is constant in a batch has R = 0.

    Shapes: (batch, c1) and (batch, c2), with at least two images.
    """

    def __init__(
        self,
        student: FeatureSpec,
        teacher: FeatureSpec,
        *,
        kappa: float = 0.01,
        expansion: int = 2,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if expansion < 1 or not (isfinite(kappa) and kappa >= 0):
            raise LossError(f"rsd: kappa {kappa}, expansion {expansion}; expected a factor from 0 on, and from 1 on")
        self.kappa, self.reduction = kappa, reduction
        hidden = expansion * student.channels
        self.head = nn.Sequential(
            nn.Linear(student.channels, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, teacher.channels, bias=False),
        )

    def forward(self, student: Float[Tensor, "batch c1"], teacher: Float[Tensor, "batch c2"]) -> Float[Tensor, ""]:
        check_batch_norm("rsd", student)
        head: Tensor = self.head(student)
        deviation, mean = torch.std_mean(head, 0, correction=0)
        z_s = (head - mean) / (deviation + 1e-5)  # as the authors do, so that a constant has a bounded gradient
        z_t = unit((teacher - teacher.mean(0)).mT)
        correlations = z_t @ z_s / len(student) ** 0.5
        diagonal = correlations.diagonal()
        others = correlations.square().sum() - diagonal.square().sum()
        value: Tensor = (1 - diagonal).square().sum() + self.kappa * others
        return value / len(diagonal) if self.reduction == "mean" else value
