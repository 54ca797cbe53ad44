"""How an adapter standardises its target."""

from typing import Literal

import torch
from torch import Tensor, nn

Normalize = Literal["none", "layer", "channel"]


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
