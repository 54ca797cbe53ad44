"""The loss that compares all pairs at once, with parameters of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec
from probe_kd.errors import LossError
from probe_kd.methods.losses.checks import check_batch_norm


class ReviewKD(nn.Module):
    """Compare each of the teacher's features with what the student's feature and all deeper ones make of it.

    ReviewKD, Chen et al. 2021 (arXiv 2104.09044), eq. 8, sec. 3.3 and 3.4. From the deepest pair to the shallowest, the
    student's feature is fused with the residual of the deeper ones by attention (`Fusion`), and `pyramid_distance`
    compares the result with the teacher's. The value is the sum over the pairs. The features in between have `width`
    channels, 512 in the paper, but at most those of the student's deepest feature. The paper's weights are 0.6 to 8 for
    CIFAR-100, after a warm-up over 20 epochs, and 1 for ImageNet; its features are taken before the last ReLU of a
    stage, and the pooled vector is one of them.

    Grids and widths may differ: the student's fused map is brought to the teacher's grid. A vector is a map of one
    position.

    Shapes: two tuples of features (batch, channels, height, width) or (batch, channels).
    """

    def __init__(self, student: Sequence[FeatureSpec], teacher: Sequence[FeatureSpec], *, width: int = 512) -> None:
        super().__init__()
        if width < 1:
            raise LossError(f"review: width {width}; expected a number of channels, from 1 on")
        self.order = sorted(range(len(student)), key=lambda place: (student[place].order, place), reverse=True)
        width = min(width, student[self.order[0]].channels)
        self.fusions = nn.ModuleList(
            Fusion(student[place], teacher[place], width, fuses=place != self.order[0]) for place in self.order
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
        residual: Tensor | None = None
        distances = []
        for place, fusion in zip(self.order, self.fusions, strict=True):
            target = _as_map(teacher[place])
            output, residual = fusion(_as_map(student[place]), residual, target.shape[2:])
            distances.append(pyramid_distance(output, target))
        return torch.stack(distances).sum()


class Fusion(nn.Module):
    """Attention-based fusion: a feature of the student and the residual of the deeper ones, weighted at each position.

    Both are brought to `width` channels and to the student's grid. A 1x1 convolution of both with a sigmoid gives the
    two weights. Returns the student's side of the comparison, in the teacher's width and grid, and the next residual.
    """

    def __init__(self, student: FeatureSpec, teacher: FeatureSpec, width: int, *, fuses: bool) -> None:
        super().__init__()
        kernel = 3 if max(teacher.grid or (1,)) > 1 else 1  # around one position there is nothing
        self.reduce = _convolution(student.channels, width, 1)
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        self.expand = _convolution(width, teacher.channels, kernel)

    def forward(
        self, feature: Float[Tensor, "batch c1 h1 w1"], residual: Tensor | None, grid: Sequence[int]
    ) -> tuple[Float[Tensor, "batch c2 h2 w2"], Float[Tensor, "batch width h1 w1"]]:
        if self.training:
            check_batch_norm("review", feature)
        fused = self.reduce(feature)
        if self.attention is not None:
            assert residual is not None
            residual = _resized(residual, fused.shape[2:])
            own, deeper = self.attention(torch.cat([fused, residual], dim=1)).split(1, dim=1)
            fused = own * fused + deeper * residual
        return self.expand(_resized(fused, grid)), fused


def pyramid_distance(
    student: Float[Tensor, "batch channels height width"], teacher: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, ""]:
    """The hierarchical context loss: the mean squared errors of two maps and of their averages over grids of 4, 2, 1.

    Each level has half the weight of the one before, and the weights are divided by their sum. Levels that are not
    coarser than the map are left out. Chen et al. 2021, sec. 3.4; the weights are those of the authors' code.
    """
    levels = [side for side in (4, 2, 1) if side < min(student.shape[2:])]
    weights = [0.5**level for level in range(len(levels) + 1)]
    value = F.mse_loss(student, teacher)
    for side, weight in zip(levels, weights[1:], strict=True):
        pooled = (F.adaptive_avg_pool2d(map_, side) for map_ in (student, teacher))
        value = value + weight * F.mse_loss(next(pooled), next(pooled))
    return value / sum(weights)


def _convolution(channels: int, width: int, kernel: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=1)  # as in the authors' code
    return nn.Sequential(layer, nn.BatchNorm2d(width))


def _as_map(feature: Tensor) -> Float[Tensor, "batch channels height width"]:
    return feature if feature.ndim == 4 else feature[:, :, None, None]


def _resized(map_: Float[Tensor, "batch channels _ _"], grid: Sequence[int]) -> Float[Tensor, "batch channels _ _"]:
    """Average where the map shrinks; where it grows by a whole factor, repeat each position."""
    return map_ if list(map_.shape[2:]) == list(grid) else F.adaptive_avg_pool2d(map_, (grid[0], grid[1]))
