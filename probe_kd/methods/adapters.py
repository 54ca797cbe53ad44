"""What stands between a student's feature and its target: any layout to any layout, by a plan that can be printed.

The student is projected to the teacher's width and never the other way round: a learned map on the teacher's side can
make the loss zero by mapping everything to zero. What is done to the teacher's feature has no parameters.
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
    """What is asked of a frozen teacher and can be kept for the next time, for every image its own.

    `name` is that of a tap, or says what was made of some; `shape` is that of one image's.
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
    """The adapter from one feature to another, as both were traced.

    `policy`: `always` puts a learned 1x1 convolution (a linear layer for vectors) on the student even where the widths
    agree, since without it the student's own features pay for the match, and so does `auto`; `never` has none, the
    exact paper form, and needs equal widths; `fixed` maps the teacher to the student's width by a random
    semi-orthogonal matrix that is never trained.
    `tokens`: `drop` compares the grids and drops class, register and distillation tokens; `cls` compares only the class
    token (the mean over positions where a model has none); `pool` compares the means over positions.
    `normalize`: what is done to the target: `layer` standardises each position over its channels, `channel` each
    channel over batch and positions. Without it, the few outlier channels of an un-normalised residual stream
    (ConvNeXt) are all that a squared error sees.
    `projector`: `linear` is the 1x1 convolution; `valid` is the regressor of FitNets (Romero et al. 2015, sec. 2.2), a
    convolution without padding whose kernel is as large as takes the student's grid to the teacher's.
    `activation`: what the projector ends in. `tap` is the teacher tap's own nonlinearity, as in FitNets; `none` is a
    linear regressor, which reaches every target.

    Two grids are brought to the smaller in each direction: by average pooling where it divides, by antialiased
    interpolation where it does not. A grid against a vector is averaged.

    Raises AdapterError for features that cannot be compared, for `never` with unequal widths, and for an activation
    that cannot reach the target: a ReLU on a tap that is signed.
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
    """Both as maps at one grid, each with its own channels: what `attention` compares.

    Raises AdapterError for features without positions, or with a single one, whose share of the attention is all of it.
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
    """From two maps of each model, the two ends of a flow, to comparable matrices of their channels (`flow_matrix`).

    The adapter takes each side as a tuple. One map stands for both ends (`gram`). The grids of student and teacher need
    not agree; the widths do: with `auto` only where they differ, and with `always`, the student's matrix G becomes
    A1 G A2^T, which is what a 1x1 convolution without bias on each map would give (for a block that downsamples: after
    the pooling), in the order that multiplies less. `fixed` maps the teacher's matrix to the student's widths by random
    semi-orthogonal matrices that are never trained. `never` compares as it is, as in the paper.

    Raises AdapterError for features without positions, and for `never` with unequal widths.
    """
    _check_choices(policy=(policy, Policy))
    for student_plan, teacher_plan in zip(student, teacher, strict=True):
        _check_maps(student_plan, teacher_plan)
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
    """The logits of both, in the student's classes: `class_map[i]` is the teacher's index of the student's class i.

    Raises AdapterError where an output is no row of classes an image (a map, tokens), where the numbers of classes
    differ and no map is given, and for a map that does not fit.
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
    """AdapterError for an output that is not (batch, classes): which axis the classes are is not guessed."""
    if len(spec.shape) != 2:
        raise AdapterError(
            f"the {side}'s output is {' x '.join(map(str, spec.shape[1:]))} an image, and losses of outputs compare "
            "one row of classes an image; wrap the model in a module that returns that, or pair the layer by `hint`"
        )


def pooled(spec: FeatureSpec) -> nn.Module:
    """From a feature to one vector per image: its mean over positions, without class and register tokens.

    A feature without positions is the vector itself, or its class token. Raises AdapterError for one that is not of
    single images.
    """
    _check_features(spec, spec)
    plan = _Plan(spec, "pool")
    plan.to_vector()
    return nn.Sequential(*plan.steps)


def check_class_map(class_map: Sequence[int], student: int, teacher: int) -> None:
    """AdapterError for a class map that is not one teacher class for every class of the student."""
    wrong = [index for index in class_map if not 0 <= index < teacher]
    if wrong or len(class_map) != student:
        says = f"{wrong[0]} is none of the teacher's {teacher} classes" if wrong else f"it has {len(class_map)} entries"
        raise AdapterError(f"class_map: {says}; expected {student} indices, one for every class of the student")


def _adapter(student_plan: "_Plan", teacher_plan: "_Plan") -> Adapter:
    theirs_text = "" if len(teacher_plan.steps) == 0 else f" | teacher {teacher_plan}"
    steps = nn.Sequential(*student_plan.steps), nn.Sequential(*teacher_plan.steps)
    return Adapter(*steps, f"{student_plan}{theirs_text}", _target([teacher_plan.spec], teacher_plan))


def _target(teacher: Sequence[FeatureSpec], plan: "_Plan | _MatrixPlan") -> Target | None:
    """What these steps give of one image, if that is smaller than the teacher's features and depends on no other image.

    Logits are never made smaller: which of them a cache keeps, it has a rule for.
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


def _activation(wanted: Activation, teacher: FeatureSpec, normalize: Normalize) -> str:
    """The activation that the projector ends in, empty for none."""
    if wanted == "none" or (wanted == "tap" and not teacher.activation):
        return ""
    if normalize != "none":
        raise AdapterError(
            f"activation '{wanted}' cannot reach a target that is standardised (normalize '{normalize}'), which has "
            "both signs; use activation 'none'"
        )
    if wanted not in ("tap", teacher.activation):
        ends = f"ends in {teacher.activation}" if teacher.activation else "ends in no activation, so it has both signs"
        raise AdapterError(
            f"activation '{wanted}' on a regressor for teacher tap '{teacher.tap}', which {ends}; use 'tap' or 'none'"
        )
    return teacher.activation


def _valid_kernel(student: FeatureSpec, teacher: FeatureSpec, as_maps: bool) -> tuple[int, int]:
    if not as_maps or student.grid is None or teacher.grid is None:
        raise AdapterError(
            f"projector 'valid' needs two maps, and {student.tap} <- {teacher.tap} are none; use 'linear'"
        )
    height, width = (
        student_plan - teacher_plan + 1 for student_plan, teacher_plan in zip(student.grid, teacher.grid, strict=True)
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
    """A random matrix that keeps lengths as far as its shape allows; the same one for the same shape, always."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    larger, smaller = max(rows, columns), min(rows, columns)
    drawn = torch.randn(larger, smaller, generator=generator, dtype=torch.float64, device="cpu")
    orthogonal: Tensor = torch.linalg.qr(drawn).Q.float()
    return (orthogonal if rows >= columns else orthogonal.T).contiguous()


class _Plan:
    """The steps of one side, with the words for them."""

    def __init__(self, spec: FeatureSpec, tokens: Tokens) -> None:
        self.spec = spec
        self.tokens = tokens
        self.steps: list[nn.Module] = []
        self.words = [spec.describe()]
        self.shape = tuple(spec.shape[1:])  # of one image

    def add(self, step: nn.Module, words: str) -> None:
        self.steps.append(step)
        self.words.append(words)

    def to_map(self, grid: tuple[int, int] | None) -> None:
        own = self.spec.grid
        assert own is not None
        assert grid is not None
        if self.spec.layout is not Layout.NCHW:
            self.add(ToMap(self.spec.layout, own, self.spec.prefix_tokens), "map")
        if own != grid:
            self.add(Resize(own, grid), f"{grid[0]}x{grid[1]}")
        self.shape = (self.spec.channels, *grid)

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
    """The steps from the two maps of one side to their matrix, with the words for them."""

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
        """To other widths: as a matrix, or as two maps where these have few positions, whichever multiplies less."""
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
    """The two ends of a flow, or one that stands for both, as maps."""

    def __init__(self, *to_map: nn.Module) -> None:
        super().__init__()
        self.to_map = nn.ModuleList(to_map)

    def forward(self, ends: Sequence[Tensor]) -> list[Tensor]:
        return [to_map(end) for to_map, end in zip(self.to_map, ends, strict=True)]


class FlowMatrix(nn.Module):
    """The matrix of two maps, or of one map with itself; always in float32 at least."""

    def forward(self, ends: Sequence[Tensor]) -> Float[Tensor, "batch m n"]:
        return flow_matrix(ends[0], ends[-1])


def _factors(widths: Sequence[int], targets: Sequence[int], *, fixed: bool) -> list[Tensor]:
    if fixed:
        return [semi_orthogonal(target, width) for width, target in zip(widths, targets, strict=True)]
    return [nn.Linear(width, target, bias=False).weight for width, target in zip(widths, targets, strict=True)]


class _Factors(nn.Module):
    """A1 and A2; with one width, both are the same A. Those that are fixed are buffers."""

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
    """A1 G A2^T."""

    def forward(self, matrix: Float[Tensor, "batch m n"]) -> Float[Tensor, "batch p q"]:
        with torch.autocast(matrix.device.type, enabled=False):
            first, second = (self.factors[end].to(matrix.dtype) for end in (0, -1))
            projected: Tensor = first @ matrix @ second.T
            return projected


class EndsProjection(_Factors):
    """A1 F1 and A2 F2, whose matrix is A1 G A2^T: with few positions that is less than the products with G."""

    def forward(self, ends: Sequence[Float[Tensor, "batch _ _ _"]]) -> list[Tensor]:
        with torch.autocast(ends[0].device.type, enabled=False):
            return [_projected(end, factor) for end, factor in zip(to_one_grid(*ends), self.factors, strict=True)]


def _projected(map_: Tensor, factor: Tensor) -> Tensor:
    wide = torch.promote_types(map_.dtype, torch.float32)
    rows = F.linear(positions(map_.to(wide)), factor.to(wide))
    return rearrange(rows, "b (h w) c -> b c h w", h=map_.shape[2])


class FixedProjection(nn.Module):
    """A map or a vector to another width, by a semi-orthogonal matrix that is never trained."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.register_buffer("factor", semi_orthogonal(target, width))
        self.factor: Tensor

    def forward(self, feature: Tensor) -> Tensor:
        return einsum(feature, self.factor.to(feature.dtype), "b c ..., d c -> b d ...")


class Classes(nn.Module):
    """Some classes of the logits, in an order of their own."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices), persistent=False)
        self.indices: Tensor

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch some"]:
        return logits.index_select(1, self.indices)


class ToMap(nn.Module):
    """Tokens or a channels-last map to (batch, channels, height, width), without prefix tokens."""

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
    """A map to another grid: exact average pooling where it divides, else antialiased bilinear interpolation."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.target = target
        self.divides = source[0] % target[0] == 0 and source[1] % target[1] == 0

    def forward(self, feature: Float[Tensor, "batch channels height width"]) -> Tensor:
        if self.divides:
            return F.adaptive_avg_pool2d(feature, self.target)
        return _interpolate(feature, self.target)


class Mean(nn.Module):
    """The mean over positions, prefix tokens left out."""

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
    """The first token."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, feature: Tensor) -> Float[Tensor, "batch channels"]:
        return feature[:, 0] if self.layout is Layout.NLC else feature[:, :, 0]


class Standardize(nn.Module):
    """Zero mean and unit variance, without parameters: over the channels, or per channel over all else."""

    def __init__(self, kind: Normalize, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps

    def forward(self, feature: Tensor) -> Tensor:
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        axes = [1] if self.kind == "layer" else [axis for axis in range(feature.ndim) if axis != 1]
        variance, mean = torch.var_mean(feature, axes, correction=0, keepdim=True)
        return (feature - mean) * (variance + self.eps).rsqrt()


class ImageView(nn.Module):
    """Images normalised and sized for one model, as another model expects them.

    Both models of a distillation see the very same view of an image (Beyer et al. 2022, arXiv 2106.05237): it is
    augmented once, and only normalisation and size change. A grey image becomes three equal channels where `given` says
    that it is grey, and is refused where it does not.
    """

    def __init__(self, given: InputSpec, wanted: InputSpec) -> None:
        super().__init__()
        if given.size[0] not in (1, wanted.size[0]):
            raise AdapterError(f"images of {given.size[0]} channels for a model that expects {wanted.size[0]}")
        if not (given.complete and wanted.complete):
            raise AdapterError(f"a view needs the mean and std of both sides, and has {given} and {wanted}")
        channels = wanted.size[0]
        given_mean, given_std, mean, std = (
            torch.tensor(values).expand(channels) for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        self.given_channels, self.channels, self.size = given.size[0], channels, wanted.size[1:]
        self.same = torch.equal(given_mean, mean) and torch.equal(given_std, std)
        self.register_buffer("scale", (given_std / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).view(1, -1, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch channels h w"]:
        if images.ndim != 4 or images.shape[1] != self.given_channels:
            raise AdapterError(
                f"the images are {'x'.join(map(str, images.shape))}, and a batch of images of {self.given_channels} "
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
