"""What a model sees of an image: its own size and normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import InputSpec
from probe_kd.errors import AdapterError
from probe_kd.methods.steps import interpolate


class ImageView(nn.Module):
    """Convert images from the size and normalisation of `source` to those of `target`.

    Both models of a distillation see the same view of an image (Beyer et al. 2022, arXiv 2106.05237): it is augmented
    once, and only normalisation and size differ. If `source` has one channel, grey images are expanded to the channels
    of `target`. Raises AdapterError for images that do not have the channels of `source`.
    """

    def __init__(self, source: InputSpec, target: InputSpec) -> None:
        super().__init__()
        if source.size[0] not in (1, target.size[0]):
            raise AdapterError(f"images of {source.size[0]} channels for a model that expects {target.size[0]}")
        if not (source.complete and target.complete):
            raise AdapterError(f"a view needs the mean and std of both sides, and has {source} and {target}")
        channels = target.size[0]
        source_mean, source_std, mean, std = (
            torch.tensor(values).expand(channels) for values in (source.mean, source.std, target.mean, target.std)
        )
        self.source_channels, self.channels, self.size = source.size[0], channels, target.size[1:]
        self.same = torch.equal(source_mean, mean) and torch.equal(source_std, std)
        self.register_buffer("scale", (source_std / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((source_mean - mean) / std).view(1, -1, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch channels h w"]:
        if images.ndim != 4 or images.shape[1] != self.source_channels:
            raise AdapterError(
                f"the images are {'x'.join(map(str, images.shape))}, and a batch of images of {self.source_channels} "
                f"channels is expected; grey images have their own InputSpec((1, height, width), mean, std)"
            )
        images = images.expand(-1, self.channels, -1, -1)
        if tuple(images.shape[2:]) != self.size:
            images = interpolate(images, self.size)
        return images if self.same else images * self.scale + self.shift
