"""A ConvNeXt that computes what it did, with outlier channels where a hint looks: a control of the study.

The residual streams of large ConvNeXts have a few channels of very large variance, and the small one of the study has
none. Here a copy of every stage's end has them, and nothing else reads that copy, so teacher and task are the same.
"""

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

SHARE, SCALE = 0.02, 30.0  # of the channels, one at least; they then hold nine tenths of the variance


class Magnified(nn.Module):
    """The first channels, `SCALE` times as large."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        scale = torch.ones(channels, 1, 1)
        scale[: max(1, round(SHARE * channels))] = SCALE
        self.register_buffer("scale", scale, persistent=False)  # its weights are the plain model's
        self.scale: Tensor

    def forward(self, map_: Tensor) -> Tensor:
        return map_ * self.scale


class WithOutliers(ConvNeXt):
    """timm's convnext_atto; `seen.N` is the end of stage N, magnified."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(conv_mlp=True, **kwargs)
        self.seen = nn.ModuleList(Magnified(about["num_chs"]) for about in self.feature_info)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, seen in zip(self.stages, self.seen, strict=True):
            x = stage(x)
            seen(x)
        features: Tensor = self.norm_pre(x)
        return features
