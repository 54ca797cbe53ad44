"""How an adapter standardises its target: by the batch, or by statistics that are fitted once on training images."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.errors import AdapterError
from probe_kd.methods.precision import exact_zeros
from probe_kd.methods.rotations import balancing_rotation

Normalize = Literal["none", "layer", "channel", "fitted", "phi_s"]
Fitted = Literal["fitted", "phi_s"]


class Standardize(nn.Module):
    """Standardise to mean 0 and variance 1, without parameters.

    `layer` standardises over the channels, `channel` each channel over all other axes.
    """

    def __init__(self, kind: Normalize, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps

    def forward(self, feature: Tensor) -> Tensor:
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        axes = [1] if self.kind == "layer" else [axis for axis in range(feature.ndim) if axis != 1]
        variance, mean = torch.var_mean(feature, axes, correction=0, keepdim=True)
        return (feature - mean) * (variance + self.eps).rsqrt()


@dataclass
class Moments:
    """Sums over vectors of one width in float64: their number, their sum, and the sum of their products.

    `products` is the matrix of all products of two channels if `joint` is set, otherwise the squares of each channel.
    """

    joint: bool
    count: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device, *, joint: bool) -> "Moments":
        shapes: tuple[tuple[int, ...], ...] = ((), (width,), (width, width) if joint else (width,))
        return cls(joint, *(exact_zeros(shape, device) for shape in shapes))

    def add(self, feature: Float[Tensor, "batch channels ..."]) -> None:
        """Add every vector of channels of a feature, one for each position."""
        with torch.autocast(feature.device.type, enabled=False):
            vectors = feature.detach().to(self.total.device, torch.float64).movedim(1, -1).flatten(0, -2)
            self.count += len(vectors)
            self.total += vectors.sum(0)
            self.products += vectors.T @ vectors if self.joint else vectors.square().sum(0)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Moments":
        return Moments(self.joint, function(self.count), function(self.total), function(self.products))

    @property
    def mean(self) -> Float[Tensor, " channels"]:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance of the channels, or their variances."""
        mean = self.mean
        return self.products / self.count - (torch.outer(mean, mean) if self.joint else mean.square())


class FittedNorm(nn.Module):
    """Standardise a target by statistics over the training images and their positions, which `fit` sets once.

    `fitted` subtracts each channel's mean and divides by its standard deviation. `phi_s` is PHI-S (Ranzinger et al.
    2024, arXiv 2410.01680): y = (1 / alpha) H U^T (x - mean), where the columns of U are the eigenvectors of the
    covariance, alpha^2 is the mean of its eigenvalues, and H is an orthonormal Hadamard matrix (`balancing_rotation`).
    Every channel then has variance 1, but by a rotation and one factor, which keep the shape of the distribution: a
    squared error is that of the features, over alpha^2.

    The statistics are buffers, so they are saved and loaded with the adapters. A feature that arrives before they are
    set raises AdapterError. `name` is the teacher's layer, for messages.
    """

    def __init__(self, kind: Fitted, width: int, name: str) -> None:
        super().__init__()
        self.kind, self.name = kind, name
        self.bypassed = False  # for a trial, in which only gradients' reach matters
        self.is_fitted = False  # as a Python value, because reading a buffer would wait for a GPU
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width) if kind == "fitted" else torch.eye(width))
        self.count: Tensor
        self.mean: Tensor
        self.scale: Tensor

    def empty_moments(self) -> Moments:
        return Moments.empty(len(self.mean), self.mean.device, joint=self.kind == "phi_s")

    @torch.no_grad()
    def fit(self, moments: Moments) -> None:
        """Set the statistics. Raises AdapterError if the target is not finite, or does not vary."""
        covariance = moments.covariance
        variances = covariance.diagonal() if moments.joint else covariance
        typical = float(variances.mean())
        if not bool(covariance.isfinite().all()):
            raise AdapterError(f"the teacher's feature '{self.name}' is not finite, so it has no statistics")
        if not typical > 1e-12 * float(moments.mean.square().mean()):
            raise AdapterError(
                f"the teacher's feature '{self.name}' does not vary over the {int(moments.count)} vectors that its "
                "statistics are fitted on; fit on more images, or take `normalize: none`"
            )
        scale = _rotation(covariance) if moments.joint else inverse_deviations(variances)
        self.count.fill_(int(moments.count))
        self.mean.copy_(moments.mean)
        self.scale.copy_(scale)
        self.is_fitted = True

    def forward(self, feature: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        if self.bypassed:
            return feature
        if not self.is_fitted:
            raise AdapterError(
                f"normalize '{self.kind}' of '{self.name}' has no statistics yet; call "
                "`distiller.fit_targets(batches)` with training images before the first step, or load the weights of "
                "an adapter that has them"
            )
        with torch.autocast(feature.device.type, enabled=False):
            exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
            mean, scale = self.mean.to(exact.dtype), self.scale.to(exact.dtype)
            axes = (1, -1, *(1 for _ in exact.shape[2:]))
            centred = exact - mean.view(axes)
            if self.kind == "fitted":
                return centred * scale.view(axes)
            return (centred.movedim(1, -1) @ scale.T).movedim(-1, 1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_fitted = self.count.device.type != "meta" and bool(self.count > 0)


def fitted_norms(adapters: nn.Module) -> list[FittedNorm]:
    """The normalisations in these adapters that are fitted on images."""
    return [module for module in adapters.modules() if isinstance(module, FittedNorm)]


@contextmanager
def without_statistics(adapters: nn.Module) -> Iterator[None]:
    """Leave out the normalisations that are fitted on images, for a step in which values do not matter."""
    norms = fitted_norms(adapters)
    for norm in norms:
        norm.bypassed = True
    try:
        yield
    finally:
        for norm in norms:
            norm.bypassed = False


def inverse_deviations(variances: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    """1 / the standard deviations, of which none counts as less than a hundredth of the typical one.

    A channel that is dead on these images, and is not on a later one, would have a huge target.
    """
    deviations = variances.clamp_min(0).sqrt()
    return 1 / deviations.clamp_min(1e-2 * float(variances.mean()) ** 0.5)


def _rotation(covariance: Float[Tensor, "channels channels"]) -> Float[Tensor, "channels channels"]:
    """(1 / alpha) H U^T, in float64."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance.cpu().numpy())
    rotation = balancing_rotation(eigenvalues.clip(min=0)) @ eigenvectors.T
    return torch.from_numpy(rotation / np.sqrt(eigenvalues.mean())).to(covariance.device)
