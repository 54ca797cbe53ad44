"""The steps of an adapter without parameters: convert features to maps and vectors, resize, select."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import Layout
from probe_kd.errors import AdapterError


class ToMap(nn.Module):
    """Convert tokens or a channels-last map to (batch, channels, height, width), without prefix tokens."""

    def __init__(self, layout: Layout, grid: tuple[int, int], prefix_tokens: int) -> None:
        super().__init__()
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels height width"]:
        if self.layout is Layout.NHWC:
            return rearrange(feature, "b h w c -> b c h w")
        height, width = self.grid
        length = feature.shape[1 if self.layout is Layout.NLC else 2]
        if length != self.prefix_tokens + height * width:
            raise AdapterError(
                f"{length} tokens, where the trace saw {height}x{width} and {self.prefix_tokens} prefix tokens; "
                "trace the model with the input size that it is given now"
            )
        if self.layout is Layout.NLC:
            return rearrange(feature[:, self.prefix_tokens :], "b (h w) c -> b c h w", h=height, w=width)
        return rearrange(feature[:, :, self.prefix_tokens :], "b c (h w) -> b c h w", h=height, w=width)


class Resize(nn.Module):
    """Resize a map: by average pooling if the sizes divide, by bilinear interpolation otherwise.

    The interpolation is antialiased if a side shrinks.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.target = target
        self.shrinks = any(size > target_size for size, target_size in zip(source, target, strict=True))
        self.divides = source[0] % target[0] == 0 and source[1] % target[1] == 0

    def forward(self, feature: Float[Tensor, "batch channels height width"]) -> Tensor:
        if self.divides:
            return F.adaptive_avg_pool2d(feature, self.target)
        return interpolate(feature, self.target, antialias=self.shrinks)


class Mean(nn.Module):
    """Average over the positions, without prefix tokens."""

    def __init__(self, layout: Layout, prefix_tokens: int) -> None:
        super().__init__()
        self.layout, self.prefix_tokens = layout, prefix_tokens

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels"]:
        if self.layout is Layout.NCHW:
            return feature.mean((2, 3))
        if self.layout is Layout.NHWC:
            return feature.mean((1, 2))
        if self.layout is Layout.NLC:
            return feature[:, self.prefix_tokens :].mean(1)
        return feature[:, :, self.prefix_tokens :].mean(2)


class ClassToken(nn.Module):
    """Select the first token."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels"]:
        return feature[:, 0] if self.layout is Layout.NLC else feature[:, :, 0]


class Each(nn.ModuleList):
    """Apply a module of its own to each of several features."""

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(steps(feature) for steps, feature in zip(self, features, strict=True))


class Classes(nn.Module):
    """Select classes of the logits, in the order of `indices`."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices), persistent=False)
        self.indices: Tensor

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch some"]:
        return logits.index_select(1, self.indices)


def interpolate(feature: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    # In float32, since torch has no antialiased filter for half precision on the CPU: autocast would fail there.
    exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return F.interpolate(exact, size, mode="bilinear", antialias=antialias, align_corners=False).to(feature.dtype)
