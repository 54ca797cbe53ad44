"""Adapters: convert a student's feature and its target to one shape, whatever their layouts, by a printable plan.

The student is projected to the teacher's width and never the other way round: a learned map on the teacher's side can
make the loss zero by mapping everything to zero. The steps on the teacher's side have no trained parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, InputSpec, Layout
from probe_kd.errors import AdapterError
from probe_kd.methods.losses.maps import positions, to_one_grid
from probe_kd.methods.losses.matrices import flow_matrix

Policy = Literal["auto", "always", "never", "fixed"]
Tokens = Literal["drop", "cls", "pool"]
Normalize = Literal["none", "layer", "channel"]
Projector = Literal["linear", "valid"]
Activation = Literal["none", "tap", "relu", "relu6", "gelu", "silu", "hardswish", "sigmoid", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Target:
    """The name and shape of a tensor that a frozen teacher computes for each image, and that a cache can store.

    `name` is the name of a teacher tap, or describes the steps that compute the tensor from one or more taps. `shape`
    is the shape for one image, without the batch axis. The stored tensors themselves are the Distiller's
    `cached_targets`.
    """

    name: str
    shape: tuple[int, ...]


class Adapter(nn.Module):
    """`adapter(student, teacher)` converts both features to one form: maps, vectors, or matrices of their channels.

    Only `student_steps` has parameters. `str(adapter)` describes the steps. `target` is what a cache stores: the
    output of `teacher_steps`, if it is smaller than their input.
    """

    def __init__(
        self, student_steps: nn.Module, teacher_steps: nn.Module, plan: str, target: Target | None = None
    ) -> None:
        super().__init__()
        self.student_steps = student_steps
        self.teacher_steps = teacher_steps
        self.plan = plan
        self.target = target

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student_steps(student), self.teacher_steps(teacher)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        return self.plan


def adapt(
    student: FeatureSpec,
    teacher: FeatureSpec,
    *,
    policy: Policy = "auto",
    tokens: Tokens = "drop",
    normalize: Normalize = "none",
    projector: Projector = "linear",
    activation: Activation = "none",
) -> Adapter:
    """Return the adapter that converts a student's feature and a teacher's feature to one shape.

    `student` and `teacher` are two entries of the models' traces.

    - `policy`: where a projector is used. `auto` and `always` put a learned 1x1 convolution (a linear layer for
      vectors) on the student, even if the widths are equal: without it, the student has to change its own features to
      match. `never` uses no projector, the exact form of the papers, and needs equal widths. `fixed` maps the teacher
      to the student's width by a random semi-orthogonal matrix that is never trained.
    - `tokens`: `drop` compares the grids and drops class, register and distillation tokens. `cls` compares only the
      class tokens (the mean over positions if a model has none). `pool` compares the means over positions.
    - `normalize`: how the target is standardised. `layer` standardises each position over its channels, `channel` each
      channel over batch and positions, `none` nothing. Without it, a few outlier channels of an un-normalised residual
      stream (ConvNeXt) dominate a squared error.
    - `projector`: `linear` is the 1x1 convolution. `valid` is the regressor of FitNets (Romero et al. 2015, sec. 2.2):
      a convolution without padding, whose kernel size takes the student's grid to the teacher's.
    - `activation`: the last step of the projector. `tap` is the nonlinearity of the teacher's tap, as in FitNets.
      `none` leaves the regressor linear, so that it can reach every target.

    Two grids are resized to the smaller height and the smaller width: by average pooling if the sizes divide, by
    antialiased interpolation otherwise. A grid that is compared with a vector is averaged over its positions.

    Raises AdapterError for features that cannot be compared, for `never` with unequal widths, and for an activation
    that cannot reach the target, such as a ReLU for a tap with negative values.
    """
    _check_choices(policy=(policy, Policy), tokens=(tokens, Tokens), normalize=(normalize, Normalize))
    _check_choices(projector=(projector, Projector), activation=(activation, Activation))
    _check_features(student, teacher)
    if policy in ("never", "fixed") and (projector != "linear" or activation != "none"):
        raise AdapterError(
            f"policy {policy!r} has no regressor, so `projector` and `activation` mean nothing; leave them out"
        )
    if tokens == "cls" and not (student.prefix_tokens or teacher.prefix_tokens):
        raise AdapterError(f"tokens 'cls': neither '{student.tap}' nor '{teacher.tap}' has a class token; use 'pool'")
    as_maps = student.spatial and teacher.spatial and tokens == "drop"
    student_plan, teacher_plan = _Plan(student, tokens), _Plan(teacher, tokens)
    kernel = _valid_kernel(student, teacher, as_maps) if projector == "valid" else (1, 1)
    if as_maps:
        grid = _smaller_grid(student, teacher)
        student_plan.to_map(student.grid if projector == "valid" else grid)
        teacher_plan.to_map(grid)
    else:
        student_plan.to_vector()
        teacher_plan.to_vector()
    teacher_plan.normalize(normalize)
    if policy == "fixed":
        teacher_plan.project_fixed(teacher.channels, student.channels)
    elif _needs_projector(student, teacher, policy):
        student_plan.project(student.channels, teacher.channels, kernel if as_maps else None)
        student_plan.activate(_activation(activation, teacher, normalize))
    return _adapter(student_plan, teacher_plan)


def adapt_maps(student: FeatureSpec, teacher: FeatureSpec) -> Adapter:
    """Return the adapter that converts both features to maps at one grid, each with its own channels.

    `attention` compares such maps. Raises AdapterError for features without positions, and for a grid with a single
    position, which always holds all of the attention.
    """
    _check_maps(student, teacher)
    if _smaller_grid(student, teacher) == (1, 1):
        raise AdapterError(f"{student.tap} <- {teacher.tap} have one position in common, and nothing to attend to")
    student_plan, teacher_plan = _Plan(student, "drop"), _Plan(teacher, "drop")
    for plan in (student_plan, teacher_plan):
        plan.to_map(_smaller_grid(student, teacher))
    return _adapter(student_plan, teacher_plan)


def adapt_matrices(
    student: Sequence[FeatureSpec], teacher: Sequence[FeatureSpec], *, policy: Policy = "auto"
) -> Adapter:
    """Return the adapter that converts the maps at both ends of a flow to a matrix of their channels (`flow_matrix`).

    The adapter takes the two maps of each model as a tuple. A tuple of one map stands for both ends (`gram`). The grids
    of student and teacher may differ. Their widths have to agree, and `policy` says how they are made to:

    - `auto` (if the widths differ) and `always` project the student's matrix G to A1 G A2^T. The same matrix results
      from a 1x1 convolution without bias on each map (for a block that downsamples: after the pooling). The adapter
      uses the order with fewer multiplications.
    - `fixed` maps the teacher's matrix to the student's widths by random semi-orthogonal matrices that are never
      trained.
    - `never` compares the matrices without a projection, as in the paper.

    Raises AdapterError for features without positions, and for `never` with unequal widths.
    """
    _check_choices(policy=(policy, Policy))
    for student_spec, teacher_spec in zip(student, teacher, strict=True):
        _check_maps(student_spec, teacher_spec)
    sides = [_MatrixPlan(student), _MatrixPlan(teacher)]
    widths = [[spec.channels for spec in side] for side in (student, teacher)]
    if policy == "never" and widths[0] != widths[1]:
        raise AdapterError(
            f"policy 'never' for {student[0].tap} <- {teacher[0].tap}: the widths {widths[0]} and {widths[1]} differ; "
            "use policy 'auto', which projects the student's matrix, or 'fixed'"
        )
    if policy == "fixed":
        sides[1].project(widths[1], widths[0], fixed=True)
    elif policy == "always" or widths[0] != widths[1]:
        sides[0].project(widths[0], widths[1], fixed=False)
    steps = nn.Sequential(*sides[0].steps), nn.Sequential(*sides[1].steps)
    return Adapter(*steps, f"{sides[0]} | teacher {sides[1]}", _target(teacher, sides[1]))


def adapt_outputs(student: FeatureSpec, teacher: FeatureSpec, class_map: Sequence[int] | None = None) -> Adapter:
    """Return the adapter that selects the student's classes from the teacher's logits.

    `class_map[i]` is the teacher's index of the student's class i. Raises AdapterError if an output is not one row of
    classes per image (a map, tokens), if the numbers of classes differ without a class map, and for a class map that
    does not fit.
    """
    for side, spec in (("student", student), ("teacher", teacher)):
        check_logits(spec, side)
    student_plan, teacher_plan = _Plan(student, "pool"), _Plan(teacher, "pool")
    if class_map is not None:
        check_class_map(class_map, student.channels, teacher.channels)
        teacher_plan.add(Classes(class_map), f"{len(class_map)} classes")
    elif student.channels != teacher.channels:
        raise AdapterError(
            f"the student has {student.channels} classes and the teacher {teacher.channels}; give a `class_map` with "
            "the teacher's index of each of the student's classes"
        )
    return _adapter(student_plan, teacher_plan)


def check_logits(spec: FeatureSpec, side: str) -> None:
    """Raise AdapterError for an output that is not (batch, classes): the axis of the classes is not guessed."""
    if len(spec.shape) != 2:
        raise AdapterError(
            f"the {side}'s output is {' x '.join(map(str, spec.shape[1:]))} an image, and losses of outputs compare "
            "one row of classes an image; wrap the model in a module that returns that, or pair the layer by `hint`"
        )


def pooled(spec: FeatureSpec) -> nn.Module:
    """Return a module that reduces a feature to one vector per image: the mean over positions, without prefix tokens.

    Of a feature without positions, the vector is the feature itself or its class token. Raises AdapterError for a
    tensor that does not hold one feature per image.
    """
    _check_features(spec, spec)
    plan = _Plan(spec, "pool")
    plan.to_vector()
    return nn.Sequential(*plan.steps)


def check_class_map(class_map: Sequence[int], student: int, teacher: int) -> None:
    """Raise AdapterError unless the class map has one of the teacher's classes for each class of the student."""
    out_of_range = [index for index in class_map if not 0 <= index < teacher]
    if out_of_range or len(class_map) != student:
        problem = (
            f"{out_of_range[0]} is none of the teacher's {teacher} classes"
            if out_of_range
            else f"it has {len(class_map)} entries"
        )
        raise AdapterError(f"class_map: {problem}; expected {student} indices, one for every class of the student")


def _adapter(student_plan: "_Plan", teacher_plan: "_Plan") -> Adapter:
    teacher_text = "" if len(teacher_plan.steps) == 0 else f" | teacher {teacher_plan}"
    steps = nn.Sequential(*student_plan.steps), nn.Sequential(*teacher_plan.steps)
    return Adapter(*steps, f"{student_plan}{teacher_text}", _target([teacher_plan.spec], teacher_plan))


def _target(teacher: Sequence[FeatureSpec], plan: "_Plan | _MatrixPlan") -> Target | None:
    """The output of the teacher's steps as a Target, if it is smaller than their input and each image has its own.

    None for logits: the cache has its own rule for which logits it stores.
    """
    of_batch = any(isinstance(step, Standardize) and step.kind == "channel" for step in plan.steps)
    if of_batch or any(spec.tap.is_output for spec in teacher):
        return None
    if prod(plan.shape) >= sum(prod(spec.shape[1:]) for spec in {spec.tap: spec for spec in teacher}.values()):
        return None
    return Target(f"{' . '.join(str(spec.tap) for spec in teacher)}: {plan}", plan.shape)


def _check_choices(**choices: tuple[str, object]) -> None:
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise AdapterError(f"{name} {value!r}: expected one of {', '.join(map(repr, get_args(kind)))}")


def _check_features(student: FeatureSpec, teacher: FeatureSpec) -> None:
    for side, spec in (("student", student), ("teacher", teacher)):
        if spec.layout is Layout.OTHER:
            shape = "x".join(map(str, spec.shape))
            raise AdapterError(f"{side} tap '{spec.tap}' yields {shape}, which is no feature of single images")


def _check_maps(student: FeatureSpec, teacher: FeatureSpec) -> None:
    _check_features(student, teacher)
    for side, spec in (("student", student), ("teacher", teacher)):
        if not spec.spatial:
            raise AdapterError(f"{side} tap '{spec.tap}' yields {spec.describe()}, which has no positions to compare")


def _needs_projector(student: FeatureSpec, teacher: FeatureSpec, policy: Policy) -> bool:
    if policy == "never" and student.channels != teacher.channels:
        raise AdapterError(
            f"policy 'never' for {student.tap} <- {teacher.tap}: the widths {student.channels} and {teacher.channels} "
            "differ; use policy 'auto', which projects the student to the teacher's width"
        )
    return policy != "never"


def _activation(activation: Activation, teacher: FeatureSpec, normalize: Normalize) -> str:
    """The name of the projector's last step, empty for none."""
    if activation == "none" or (activation == "tap" and not teacher.activation):
        return ""
    if normalize != "none":
        raise AdapterError(
            f"activation '{activation}' cannot reach a target that is standardised (normalize '{normalize}'), which "
            "has both signs; use activation 'none'"
        )
    if activation not in ("tap", teacher.activation):
        ends = f"ends in {teacher.activation}" if teacher.activation else "ends in no activation, so it has both signs"
        raise AdapterError(
            f"activation '{activation}' on a regressor for teacher tap '{teacher.tap}', which {ends}; use 'tap' or "
            "'none'"
        )
    return teacher.activation


def _valid_kernel(student: FeatureSpec, teacher: FeatureSpec, as_maps: bool) -> tuple[int, int]:
    if not as_maps or student.grid is None or teacher.grid is None:
        raise AdapterError(
            f"projector 'valid' needs two maps, and {student.tap} <- {teacher.tap} are none; use 'linear'"
        )
    height, width = (
        student_size - teacher_size + 1 for student_size, teacher_size in zip(student.grid, teacher.grid, strict=True)
    )
    if height < 1 or width < 1:
        raise AdapterError(
            f"projector 'valid' for {student.tap} <- {teacher.tap}: the student's grid {student.grid} is smaller than "
            f"the teacher's {teacher.grid}; use 'linear', which brings both to the smaller"
        )
    return height, width


def _smaller_grid(student: FeatureSpec, teacher: FeatureSpec) -> tuple[int, int]:
    assert student.grid is not None
    assert teacher.grid is not None
    return min(student.grid[0], teacher.grid[0]), min(student.grid[1], teacher.grid[1])


def semi_orthogonal(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """A random matrix with orthonormal rows or columns, whichever are fewer. Each shape always has the same matrix."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    larger, smaller = max(rows, columns), min(rows, columns)
    random_matrix = torch.randn(larger, smaller, generator=generator, dtype=torch.float64, device="cpu")
    orthogonal: Tensor = torch.linalg.qr(random_matrix).Q.float()
    return (orthogonal if rows >= columns else orthogonal.T).contiguous()


class _Plan:
    """The steps for one model's feature, and their descriptions."""

    def __init__(self, spec: FeatureSpec, tokens: Tokens) -> None:
        self.spec = spec
        self.tokens = tokens
        self.steps: list[nn.Module] = []
        self.words = [spec.describe()]
        self.shape = tuple(spec.shape[1:])  # of one image

    def add(self, step: nn.Module, words: str) -> None:
        self.steps.append(step)
        self.words.append(words)

    def to_map(self, target_grid: tuple[int, int] | None) -> None:
        source_grid = self.spec.grid
        assert source_grid is not None
        assert target_grid is not None
        if self.spec.layout is not Layout.NCHW:
            self.add(ToMap(self.spec.layout, source_grid, self.spec.prefix_tokens), "map")
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
            self.add(Mean(self.spec.layout, self.spec.prefix_tokens), "mean")
        self.shape = (self.spec.channels,)

    def project(self, width: int, target: int, kernel: tuple[int, int] | None) -> None:
        layer = nn.Linear(width, target) if kernel is None else nn.Conv2d(width, target, kernel)
        name = "linear" if kernel is None else f"conv{kernel[0]}x{kernel[1]}"
        self.add(layer, f"{name} {width}->{target}")

    def project_fixed(self, width: int, target: int) -> None:
        self.add(FixedProjection(width, target), f"fixed {width}->{target}")
        self.shape = (target, *self.shape[1:])

    def activate(self, name: str) -> None:
        if name:
            self.add(_ACTIVATIONS[name](), name)

    def normalize(self, kind: Normalize) -> None:
        if kind != "none":
            self.add(Standardize(kind), f"{kind} norm")

    def __str__(self) -> str:
        return " -> ".join(self.words)


class _MatrixPlan:
    """The steps from the two maps of one model to their matrix, and their descriptions."""

    def __init__(self, ends: Sequence[FeatureSpec]) -> None:
        to_map = []
        for spec in ends:
            plan = _Plan(spec, "drop")
            plan.to_map(spec.grid)
            to_map.append(nn.Sequential(*plan.steps))
        self.steps: list[nn.Module] = [Ends(*to_map), FlowMatrix()]
        self.positions = prod(min(sides) for sides in zip(*(spec.grid or () for spec in ends), strict=True))
        self.shape = ends[0].channels, ends[-1].channels
        self.words = [" . ".join(dict.fromkeys(spec.describe() for spec in ends)), self._matrix()]

    def project(self, widths: Sequence[int], targets: Sequence[int], *, fixed: bool) -> None:
        """Project to other widths: the matrix, or both maps if these have so few positions that it multiplies less."""
        (m, n), (p, q), hw = self.shape, (targets[0], targets[-1]), self.positions
        as_maps = hw * (p * m + q * n + p * q) < hw * m * n + p * m * n + p * n * q
        self.shape = p, q
        factors = _factors(widths, targets, fixed=fixed)
        sides = ", ".join(f"{width}->{target}" for width, target in zip(widths, targets, strict=True))
        words = f"{'fixed' if fixed else 'project'} {sides}"
        if as_maps:
            self.steps.insert(1, EndsProjection(factors))
            self.words[1:] = [words, self._matrix()]
        else:
            self.steps.append(MatrixProjection(factors))
            self.words.append(words)

    def _matrix(self) -> str:
        return f"matrix {self.shape[0]}x{self.shape[1]}"

    def __str__(self) -> str:
        return " -> ".join(self.words)


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


def _factors(widths: Sequence[int], targets: Sequence[int], *, fixed: bool) -> list[Tensor]:
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


class FixedProjection(nn.Module):
    """Map a feature to another width by a semi-orthogonal matrix that is never trained."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.register_buffer("factor", semi_orthogonal(target, width))
        self.factor: Tensor

    def forward(self, feature: Tensor) -> Tensor:
        return einsum(feature, self.factor.to(feature.dtype), "b c ..., d c -> b d ...")


class Classes(nn.Module):
    """Select classes of the logits, in the order of `indices`."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices), persistent=False)
        self.indices: Tensor

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch some"]:
        return logits.index_select(1, self.indices)


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
    """Resize a map: by average pooling if the sizes divide, by antialiased bilinear interpolation otherwise."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.target = target
        self.divides = source[0] % target[0] == 0 and source[1] % target[1] == 0

    def forward(self, feature: Float[Tensor, "batch channels height width"]) -> Tensor:
        if self.divides:
            return F.adaptive_avg_pool2d(feature, self.target)
        return _interpolate(feature, self.target)


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
            images = _interpolate(images, self.size)
        return images if self.same else images * self.scale + self.shift


def _interpolate(feature: Tensor, size: tuple[int, int]) -> Tensor:
    # In float32, since torch has no antialiased filter for half precision on the CPU: autocast would fail there.
    exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return F.interpolate(exact, size, mode="bilinear", antialias=True, align_corners=False).to(feature.dtype)
