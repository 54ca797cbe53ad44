"""The steps of an adapter without parameters: convert features to maps and vectors, resize, select."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout
from probe_kd.errors import AdapterError


class ToMap(nn.Module):
    """Convert tokens, a channels-last map or the maps of a video to (batch, channels, height, width).

    Tokens before and after the grid are left out, and the frames of a video are averaged.
    """

    def __init__(
        self, layout: Layout, grid: tuple[int, int], prefix_tokens: int = 0, *, suffix_tokens: int = 0, frames: int = 1
    ) -> None:
        super().__init__()
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens
        self.suffix_tokens, self.frames = suffix_tokens, frames

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self:
        """Return the step for a feature with positions."""
        assert spec.grid is not None
        others = {"suffix_tokens": spec.suffix_tokens, "frames": spec.frames}
        return cls(spec.layout, spec.grid, spec.prefix_tokens, **others)

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels height width"]:
        if self.layout is Layout.NHWC:
            return rearrange(feature, "b h w c -> b c h w")
        if self.layout in (Layout.NCDHW, Layout.NDHWC):
            return feature.mean(2) if self.layout is Layout.NCDHW else rearrange(feature.mean(1), "b h w c -> b c h w")
        positions = self._positions(feature if self.layout is Layout.NLC else feature.transpose(1, 2))
        height, width = self.grid
        if self.frames > 1:
            positions = rearrange(positions, "b (t l) c -> b t l c", t=self.frames).mean(1)
        return rearrange(positions, "b (h w) c -> b c h w", h=height, w=width)

    def _positions(self, tokens: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch positions channels"]:
        height, width = self.grid
        length, positions = tokens.shape[1], self.frames * height * width
        if length != self.prefix_tokens + positions + self.suffix_tokens:
            others = f"{self.prefix_tokens} prefix tokens" + f" and {self.suffix_tokens} after" * (
                self.suffix_tokens > 0
            )
            raise AdapterError(
                f"{length} tokens, where the trace saw {height}x{width} and {others}; trace the model with the input "
                "size that it is given now"
            )
        return tokens[:, self.prefix_tokens : self.prefix_tokens + positions]


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
    """Average over the positions, without the tokens before and after the grid."""

    def __init__(self, layout: Layout, prefix_tokens: int = 0, suffix_tokens: int = 0) -> None:
        super().__init__()
        self.layout, self.prefix_tokens, self.suffix_tokens = layout, prefix_tokens, suffix_tokens

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self:
        return cls(spec.layout, spec.prefix_tokens, spec.suffix_tokens)

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels"]:
        axis = _CHANNEL_AXES[self.layout]
        if feature.ndim > 3:
            return feature.mean([dim for dim in range(1, feature.ndim) if dim != axis % feature.ndim])
        length = 1 if axis == -1 else 2
        kept = feature.shape[length] - self.prefix_tokens - self.suffix_tokens
        return feature.narrow(length, self.prefix_tokens, kept).mean(length)


_CHANNEL_AXES = {
    **dict.fromkeys((Layout.NCHW, Layout.NCL, Layout.NCDHW), 1),
    **dict.fromkeys((Layout.NHWC, Layout.NLC, Layout.NDHWC), -1),
}


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
