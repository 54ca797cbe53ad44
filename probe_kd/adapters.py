"""What stands between a student's feature and its target: any layout to any layout, by a plan that can be printed.

The student is projected to the teacher's width and never the other way round: a learned map on the teacher's side can
make the loss zero by mapping everything to zero. What is done to the teacher's feature has no parameters.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.errors import AdapterError
from probe_kd.spec import FeatureSpec, InputSpec, Layout

Policy = Literal["auto", "always", "never"]
Tokens = Literal["drop", "cls", "pool"]
Normalize = Literal["none", "layer", "channel"]


class Adapter(nn.Module):
    """`adapter(student, teacher)` gives both in one shape, (batch, channels, height, width) or (batch, channels).

    Only `student_steps` has parameters. `str(adapter)` is the plan.
    """

    def __init__(self, student_steps: nn.Sequential, teacher_steps: nn.Sequential, plan: str) -> None:
        super().__init__()
        self.student_steps = student_steps
        self.teacher_steps = teacher_steps
        self.plan = plan

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
    resize: bool = True,
    bias: bool = True,
) -> Adapter:
    """The adapter from one feature to another, as both were traced.

    `policy`: `always` puts a learned 1x1 convolution (a linear layer for vectors) on the student even where the widths
    agree, since without it the student's own features pay for the match; `never` has none, the exact paper form, and
    needs equal widths; `auto` is `always` for features and `never` for outputs of equal width, whose classes already
    mean the same.
    `tokens`: `drop` compares the grids and drops class, register and distillation tokens; `cls` compares only the class
    token (the mean over positions where a model has none); `pool` compares the means over positions.
    `normalize`: what is done to the target: `layer` standardises each position over its channels, `channel` each
    channel over batch and positions. Without it, the few outlier channels of an un-normalised residual stream
    (ConvNeXt) are all that a squared error sees.

    Two grids are brought to the smaller in each direction: by average pooling where it divides, by antialiased
    interpolation where it does not. A grid against a vector is averaged. `resize=False` leaves both grids as they are
    and `bias=False` makes the projector linear: what a loss over Gram matrices (`fsp`) needs.

    Raises AdapterError for features that cannot be compared, and for `never` with unequal widths.
    """
    _check_choices(policy=(policy, Policy), tokens=(tokens, Tokens), normalize=(normalize, Normalize))
    for side, spec in (("student", student), ("teacher", teacher)):
        if spec.layout is Layout.OTHER:
            shape = "x".join(map(str, spec.shape))
            raise AdapterError(f"{side} tap '{spec.tap}' yields {shape}, which is no feature of single images")
    if tokens == "cls" and not (student.prefix_tokens or teacher.prefix_tokens):
        raise AdapterError(f"tokens 'cls': neither '{student.tap}' nor '{teacher.tap}' has a class token; use 'pool'")
    as_maps = student.spatial and teacher.spatial and tokens == "drop"
    ours, theirs = _Plan(student, tokens), _Plan(teacher, tokens)
    if as_maps:
        ours.to_map(_smaller_grid(student, teacher) if resize else student.grid)
        theirs.to_map(_smaller_grid(student, teacher) if resize else teacher.grid)
    else:
        ours.to_vector()
        theirs.to_vector()
    if _needs_projector(student, teacher, policy):
        ours.project(student.channels, teacher.channels, as_maps, bias)
    theirs.normalize(normalize)
    theirs_text = "" if len(theirs.steps) == 0 else f" | teacher {theirs}"
    return Adapter(nn.Sequential(*ours.steps), nn.Sequential(*theirs.steps), f"{ours}{theirs_text}")


def _check_choices(**choices: tuple[str, object]) -> None:
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise AdapterError(f"{name} {value!r}: expected one of {', '.join(map(repr, get_args(kind)))}")


def _needs_projector(student: FeatureSpec, teacher: FeatureSpec, policy: Policy) -> bool:
    agree = student.channels == teacher.channels
    if policy == "never" and not agree:
        raise AdapterError(
            f"policy 'never' for {student.tap} <- {teacher.tap}: the widths {student.channels} and {teacher.channels} "
            "differ; use policy 'auto', which projects the student to the teacher's width"
        )
    if policy == "auto" and student.tap.is_output and teacher.tap.is_output:
        return not agree
    return policy != "never"


def _smaller_grid(student: FeatureSpec, teacher: FeatureSpec) -> tuple[int, int]:
    assert student.grid is not None
    assert teacher.grid is not None
    return min(student.grid[0], teacher.grid[0]), min(student.grid[1], teacher.grid[1])


class _Plan:
    """The steps of one side, with the words for them."""

    def __init__(self, spec: FeatureSpec, tokens: Tokens) -> None:
        self.spec = spec
        self.tokens = tokens
        self.steps: list[nn.Module] = []
        self.words = [spec.describe()]

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

    def to_vector(self) -> None:
        if self.spec.layout is Layout.NC:
            return
        takes_class_token = self.spec.prefix_tokens > 0 and (self.tokens == "cls" or not self.spec.spatial)
        if takes_class_token:
            self.add(ClassToken(self.spec.layout), "class token")
        else:
            self.add(Mean(self.spec.layout, self.spec.prefix_tokens), "mean")

    def project(self, width: int, target: int, as_maps: bool, bias: bool) -> None:
        layer = nn.Conv2d(width, target, 1, bias=bias) if as_maps else nn.Linear(width, target, bias=bias)
        self.add(layer, f"{'conv1x1' if as_maps else 'linear'} {width}->{target}")

    def normalize(self, kind: Normalize) -> None:
        if kind != "none":
            self.add(Standardize(kind), f"{kind} norm")

    def __str__(self) -> str:
        return " -> ".join(self.words)


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
    """A map to a grid that is nowhere larger: exact average pooling where it divides, else antialiased bilinear."""

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
    augmented once, and only normalisation and size change. A grey image becomes three equal channels where they are
    expected.
    """

    def __init__(self, given: InputSpec, wanted: InputSpec) -> None:
        super().__init__()
        if given.size[0] not in (1, wanted.size[0]):
            raise AdapterError(f"images of {given.size[0]} channels for a model that expects {wanted.size[0]}")
        channels = wanted.size[0]
        given_mean, given_std, mean, std = (
            torch.tensor(values).expand(channels) for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        self.channels, self.size = channels, wanted.size[1:]
        self.same = torch.equal(given_mean, mean) and torch.equal(given_std, std)
        self.register_buffer("scale", (given_std / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).view(1, -1, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch channels h w"]:
        images = images.expand(-1, self.channels, -1, -1)
        if tuple(images.shape[2:]) != self.size:
            images = _interpolate(images, self.size)
        return images if self.same else images * self.scale + self.shift


def _interpolate(feature: Tensor, size: tuple[int, int]) -> Tensor:
    # In float32, since torch has no antialiased filter for half precision on the CPU: autocast would fail there.
    exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return F.interpolate(exact, size, mode="bilinear", antialias=True, align_corners=False).to(feature.dtype)
