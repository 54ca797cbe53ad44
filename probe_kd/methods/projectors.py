"""Projectors: bring a feature, or the matrix of two, to another width."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.methods.losses.maps import positions, to_one_grid
from probe_kd.methods.losses.matrices import flow_matrix

Projector = Literal["linear", "valid", "mlp", "orthogonal"]
Activation = Literal["none", "tap", "relu", "relu6", "gelu", "silu", "hardswish", "sigmoid", "tanh"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def semi_orthogonal(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """A random matrix with orthonormal rows or columns, whichever are fewer. Each shape always has the same matrix."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    larger, smaller = max(rows, columns), min(rows, columns)
    random_matrix = torch.randn(larger, smaller, generator=generator, dtype=torch.float64, device="cpu")
    orthogonal: Tensor = torch.linalg.qr(random_matrix).Q.float()
    return (orthogonal if rows >= columns else orthogonal.T).contiguous()


class Mlp(nn.Module):
    """Project a feature by two linear layers with a LayerNorm and a GELU between them, at every position.

    This is the head of AM-RADIO (Ranzinger et al. 2024, arXiv 2312.06709). The hidden width is the larger of both.
    """

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        hidden = max(width, target)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, target)
        )

    def forward(self, feature: Float[Tensor, "batch width ..."]) -> Float[Tensor, "batch target ..."]:
        projected: Tensor = self.layers(feature.movedim(1, -1))
        return _channels_first(projected)


def _channels_first(rows: Float[Tensor, "batch ... channels"]) -> Float[Tensor, "batch channels ..."]:
    """Move the channels to axis 1, in memory too: compiled losses of two orders of axes fail in their backward."""
    return rows.movedim(-1, 1).contiguous()


class OrthogonalProjection(nn.Module):
    """Project a feature by a trained matrix P whose rows or columns, whichever are fewer, are always orthonormal.

    VkD (Miles et al. 2024, arXiv 2403.06213): P keeps the distances between the student's features (or drops some
    directions of them), so the student has to change its own features to match, and the projector cannot learn this
    instead. The paper makes P by a matrix exponential; here it is Q of the QR decomposition of a free matrix, with the
    signs that make R's diagonal positive, which takes fewer multiplications. P does not depend on the scale of that
    matrix, so weight decay does not change P. There is no bias.
    """

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.is_tall = target >= width
        self.weight = nn.Parameter(torch.empty(max(width, target), min(width, target)))
        nn.init.orthogonal_(self.weight)

    @property
    def matrix(self) -> Float[Tensor, "target width"]:
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
            columns, triangular = torch.linalg.qr(weight)
            orthogonal: Tensor = columns * torch.where(triangular.diagonal() < 0, -1.0, 1.0)
        return orthogonal if self.is_tall else orthogonal.T

    def forward(self, feature: Float[Tensor, "batch width ..."]) -> Float[Tensor, "batch target ..."]:
        projected = F.linear(feature.movedim(1, -1), self.matrix.to(feature.dtype))
        return _channels_first(projected)


class FixedProjection(nn.Module):
    """Map a feature to another width by a semi-orthogonal matrix that is never trained."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.register_buffer("factor", semi_orthogonal(target, width))
        self.factor: Tensor

    def forward(self, feature: Tensor) -> Tensor:
        return einsum(feature, self.factor.to(feature.dtype), "b c ..., d c -> b d ...")


class Ends(nn.Module):
    """Convert the features at the two ends of a flow to maps. One feature may stand for both ends."""

    def __init__(self, *to_map: nn.Module) -> None:
        super().__init__()
        self.to_map = nn.ModuleList(to_map)

    def forward(self, ends: Sequence[Tensor]) -> list[Tensor]:
        return [to_map(end) for to_map, end in zip(self.to_map, ends, strict=True)]


class FlowMatrix(nn.Module):
    """Compute the matrix of two maps, or of one map with itself, in float32 at least."""

    def forward(self, ends: Sequence[Tensor]) -> Float[Tensor, "batch m n"]:
        return flow_matrix(ends[0], ends[-1])


def make_factors(widths: Sequence[int], targets: Sequence[int], *, fixed: bool) -> list[Tensor]:
    if fixed:
        return [semi_orthogonal(target, width) for width, target in zip(widths, targets, strict=True)]
    return [nn.Linear(width, target, bias=False).weight for width, target in zip(widths, targets, strict=True)]


class _Factors(nn.Module):
    """The factors A1 and A2, or one factor that is both. Trained factors are parameters, fixed ones are buffers."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        super().__init__()
        for index, factor in enumerate(factors):
            if isinstance(factor, nn.Parameter):
                self.register_parameter(f"factor{index}", factor)
            else:
                self.register_buffer(f"factor{index}", factor)
        self.ends = len(factors)

    @property
    def factors(self) -> list[Tensor]:
        return [getattr(self, f"factor{index}") for index in range(self.ends)]


class MatrixProjection(_Factors):
    """Project a matrix: A1 G A2^T."""

    def forward(self, matrix: Float[Tensor, "batch m n"]) -> Float[Tensor, "batch p q"]:
        with torch.autocast(matrix.device.type, enabled=False):
            first, second = (self.factors[end].to(matrix.dtype) for end in (0, -1))
            projected: Tensor = first @ matrix @ second.T
            return projected


class EndsProjection(_Factors):
    """Project two maps: A1 F1 and A2 F2, whose matrix is A1 G A2^T. With few positions it multiplies less."""

    def forward(self, ends: Sequence[Float[Tensor, "batch _ _ _"]]) -> list[Tensor]:
        with torch.autocast(ends[0].device.type, enabled=False):
            return [_projected(end, factor) for end, factor in zip(to_one_grid(*ends), self.factors, strict=True)]


def _projected(map_: Tensor, factor: Tensor) -> Tensor:
    wide = torch.promote_types(map_.dtype, torch.float32)
    rows = F.linear(positions(map_.to(wide)), factor.to(wide))
    return rearrange(rows, "b (h w) c -> b c h w", h=map_.shape[2])
