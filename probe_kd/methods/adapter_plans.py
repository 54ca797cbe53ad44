"""The steps of an adapter for one model, and the words that describe them."""

from collections.abc import Sequence
from math import prod
from typing import Literal

from torch import nn

from probe_kd.engine.spec import FeatureSpec, Layout
from probe_kd.methods.normalisation import FittedNorm, Normalize, Standardize
from probe_kd.methods.projectors import (
    ACTIVATIONS,
    Ends,
    EndsProjection,
    FixedProjection,
    FlowMatrix,
    MatrixProjection,
    Mlp,
    OrthogonalProjection,
    Projector,
    make_factors,
)
from probe_kd.methods.steps import ClassToken, Mean, Resize, ToMap

Tokens = Literal["drop", "cls", "pool", "all", "flatten"]
Grid = Literal["smaller", "student", "teacher"]


class FeaturePlan:
    """The steps for one model's feature, and their descriptions.

    `fitted_steps` follow `steps`. They begin with a normalisation by fitted statistics, so a cache holds what comes
    before them.
    """

    def __init__(self, spec: FeatureSpec, tokens: Tokens) -> None:
        self.spec = spec
        self.tokens = tokens
        self.steps: list[nn.Module] = []
        self.fitted_steps: list[nn.Module] = []
        self.words = [spec.describe()]
        self.shape = tuple(spec.shape[1:])  # of one image, after `steps`

    def add(self, step: nn.Module, words: str) -> None:
        (self.fitted_steps or self.steps).append(step)
        self.words.append(words)

    @property
    def words_of_steps(self) -> str:
        """The description without the fitted steps."""
        return " -> ".join(self.words[: len(self.words) - len(self.fitted_steps)])

    def to_map(self, target_grid: tuple[int, int] | None) -> None:
        source_grid = self.spec.grid
        assert source_grid is not None
        assert target_grid is not None
        if self.spec.layout is not Layout.NCHW:
            self.add(ToMap.of(self.spec), "map")
        self.resize(source_grid, target_grid)

    def resize(self, source_grid: tuple[int, int], target_grid: tuple[int, int]) -> None:
        if source_grid != target_grid:
            self.add(Resize(source_grid, target_grid), f"{target_grid[0]}x{target_grid[1]}")
        self.shape = (self.spec.channels, *target_grid)

    def to_vector(self) -> None:
        if self.spec.layout is Layout.NC:
            return
        takes_class_token = self.spec.prefix_tokens > 0 and (self.tokens == "cls" or not self.spec.spatial)
        if takes_class_token:
            self.add(ClassToken(self.spec.layout), "class token")
        else:
            self.add(Mean.of(self.spec), "mean")
        self.shape = (self.spec.channels,)

    def flatten(self) -> None:
        """The vectors of all positions as one."""
        self.to_map(self.spec.grid)
        self.add(nn.Flatten(), "flat")
        self.shape = (prod(self.shape),)

    def project(self, width: int, target: int, kernel: tuple[int, int] | None, projector: Projector) -> None:
        if projector == "mlp":
            return self.add(Mlp(width, target), f"mlp {width}->{max(width, target)}->{target}")
        if projector == "orthogonal":
            return self.add(OrthogonalProjection(width, target), f"orthogonal {width}->{target}")
        layer = nn.Linear(width, target) if kernel is None else nn.Conv2d(width, target, kernel)
        name = "linear" if kernel is None else f"conv{kernel[0]}x{kernel[1]}"
        return self.add(layer, f"{name} {width}->{target}")

    def project_fixed(self, width: int, target: int) -> None:
        self.add(FixedProjection(width, target), f"fixed {width}->{target}")
        if not self.fitted_steps:
            self.shape = (target, *self.shape[1:])

    def activate(self, name: str) -> None:
        if name:
            self.add(ACTIVATIONS[name](), name)

    def normalize(self, kind: Normalize) -> None:
        if kind in ("layer", "channel"):
            self.add(Standardize(kind), f"{kind} norm")
        elif kind == "fitted" or kind == "phi_s":
            self.fitted_steps.append(FittedNorm(kind, self.spec.channels, str(self.spec.tap)))
            self.words.append({"fitted": "fitted norm", "phi_s": "PHI-S norm"}[kind])

    def __str__(self) -> str:
        return " -> ".join(self.words)


class MatrixPlan:
    """The steps from the two maps of one model to their matrix, and their descriptions."""

    def __init__(self, ends: Sequence[FeatureSpec]) -> None:
        to_map = []
        for spec in ends:
            plan = FeaturePlan(spec, "drop")
            plan.to_map(spec.grid)
            to_map.append(nn.Sequential(*plan.steps))
        self.steps: list[nn.Module] = [Ends(*to_map), FlowMatrix()]
        self.positions = prod(min(sides) for sides in zip(*(spec.grid or () for spec in ends), strict=True))
        self.shape = ends[0].channels, ends[-1].channels
        self.fitted_steps: list[nn.Module] = []
        self.words = [" . ".join(dict.fromkeys(spec.describe() for spec in ends)), self._matrix()]

    def project(self, widths: Sequence[int], targets: Sequence[int], *, fixed: bool) -> None:
        """Project to other widths: the matrix, or both maps if these have so few positions that it multiplies less."""
        (m, n), (p, q), hw = self.shape, (targets[0], targets[-1]), self.positions
        as_maps = hw * (p * m + q * n + p * q) < hw * m * n + p * m * n + p * n * q
        self.shape = p, q
        factors = make_factors(widths, targets, fixed=fixed)
        sides = ", ".join(f"{width}->{target}" for width, target in zip(widths, targets, strict=True))
        words = f"{'fixed' if fixed else 'project'} {sides}"
        if as_maps:
            self.steps.insert(1, EndsProjection(factors))
            self.words[1:] = [words, self._matrix()]
        else:
            self.steps.append(MatrixProjection(factors))
            self.words.append(words)

    @property
    def words_of_steps(self) -> str:
        return str(self)

    def _matrix(self) -> str:
        return f"matrix {self.shape[0]}x{self.shape[1]}"

    def __str__(self) -> str:
        return " -> ".join(self.words)
