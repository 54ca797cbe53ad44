"""Adapters: convert a student's feature and its target to one shape, whatever their layouts, by a printable plan.

The student is projected to the teacher's width and never the other way round: a learned map on the teacher's side can
make the loss zero by mapping everything to zero. The steps on the teacher's side have no trained parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap
from probe_kd.errors import AdapterError
from probe_kd.methods.adapter_plans import FeaturePlan, Grid, MatrixPlan, Tokens
from probe_kd.methods.normalisation import Normalize, Standardize, fitted_norms
from probe_kd.methods.projectors import Activation, Projector, semi_orthogonal
from probe_kd.methods.steps import Classes, ClassToken, Each, Mean, Resize, ToMap
from probe_kd.methods.views import ImageView

__all__ = [
    "Activation",
    "Adapter",
    "ClassToken",
    "Grid",
    "ImageView",
    "Mean",
    "Normalize",
    "Policy",
    "Projector",
    "Resize",
    "Standardize",
    "Target",
    "ToMap",
    "Tokens",
    "adapt",
    "adapt_all",
    "adapt_maps",
    "adapt_matrices",
    "adapt_outputs",
    "adapt_vectors",
    "check_class_map",
    "check_logits",
    "pooled",
    "semi_orthogonal",
]

Policy = Literal["auto", "always", "never", "fixed"]


@dataclass(frozen=True)
class Target:
    """The name and shape of a tensor that a frozen teacher computes for each image, and that a cache can store.

    `name` is the name of a teacher tap, or describes the steps that compute the tensor from one or more taps. `shape`
    is the shape for one image, without the batch axis. `teacher` is the name of the teacher, if it has one, with which
    `str(target)` begins. The stored tensors themselves are the Distiller's `cached_targets`.
    """

    name: str
    shape: tuple[int, ...]
    teacher: str = ""

    def __str__(self) -> str:
        return f"{self.teacher}:{self.name}" if self.teacher else self.name


class Adapter(nn.Module):
    """`adapter(student, teacher)` converts both features to one form: maps, vectors, or matrices of their channels.

    Only `student_steps` has parameters. `str(adapter)` describes the steps. `target` is what a cache stores: the
    output of `teacher_steps`, if it is smaller than their input. `fitted_steps` follow them on the teacher's side: they
    depend on statistics of the training images, which a cache must not.
    """

    def __init__(
        self,
        student_steps: nn.Module,
        teacher_steps: nn.Module,
        plan: str,
        target: Target | None = None,
        fitted_steps: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student_steps = student_steps
        self.teacher_steps = teacher_steps
        self.fitted_steps = fitted_steps or nn.Sequential()
        self.plan = plan
        self.target = target

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student_steps(student), self.fitted_steps(self.teacher_steps(teacher))

    @property
    def is_fitted(self) -> bool:
        """Whether the target's statistics are set, or it has none."""
        return all(norm.is_fitted for norm in fitted_norms(self))

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
    grid: Grid = "smaller",
) -> Adapter:
    """Return the adapter that converts a student's feature and a teacher's feature to one shape.

    `student` and `teacher` are two entries of the models' traces.

    - `policy`: where a projector is used. `auto` and `always` put a learned 1x1 convolution (a linear layer for
      vectors) on the student, even if the widths are equal: without it, the student has to change its own features to
      match. `never` uses no projector, the exact form of the papers, and needs equal widths. `fixed` maps the teacher
      to the student's width by a random semi-orthogonal matrix that is never trained.
    - `tokens`: `drop` compares the grids and drops class, register and distillation tokens. `cls` compares only the
      class tokens (the mean over positions if a model has none). `pool` compares the means over positions. `all` needs
      two adapters, which an Objective makes (`Objective.expanded`).
    - `normalize`: how the target is standardised. `layer` standardises each position over its channels, `channel` each
      channel over batch and positions, `none` nothing. Without it, a few outlier channels of an un-normalised residual
      stream (ConvNeXt) dominate a squared error. `fitted` and `phi_s` take statistics of the training images, which
      `Distiller.fit_targets` sets once (`FittedNorm`): each channel's mean and deviation, or a rotation in which all
      channels have one variance.
    - `projector`: `linear` is the 1x1 convolution. `valid` is the regressor of FitNets (Romero et al. 2015, sec. 2.2):
      a convolution without padding, whose kernel size takes the student's grid to the teacher's. `mlp` is two layers
      with a LayerNorm and a GELU between them (`Mlp`), `orthogonal` a matrix that is orthonormal by construction
      (`OrthogonalProjection`).
    - `activation`: the last step of the projector. `tap` is the nonlinearity of the teacher's tap, as in FitNets.
      `none` leaves the regressor linear, so that it can reach every target.

    - `grid`: where two grids differ, both are resized to the `smaller` height and width, or to the grid of the
      `student` or of the `teacher`. A grid shrinks by average pooling if the sizes divide, and by antialiased
      interpolation otherwise; it is raised by bilinear interpolation, after the projector.

    A grid that is compared with a vector is averaged over its positions.

    Raises AdapterError for features that cannot be compared, for `never` with unequal widths, and for an activation
    that cannot reach the target, such as a ReLU for a tap with negative values.
    """
    _check_choices(policy=(policy, Policy), tokens=(tokens, Tokens), normalize=(normalize, Normalize))
    _check_choices(projector=(projector, Projector), activation=(activation, Activation), grid=(grid, Grid))
    _check_features(student, teacher)
    _check_options(student, teacher, policy, tokens, projector, activation)
    as_maps = student.spatial and teacher.spatial and tokens == "drop"
    student_plan, teacher_plan = FeaturePlan(student, tokens), FeaturePlan(teacher, tokens)
    kernel = _valid_kernel(student, teacher, as_maps, grid) if projector == "valid" else (1, 1)
    if as_maps:
        common = _common_grid(student, teacher, grid)
        # A projector has fewer positions before a map is raised, and a linear one gives the same.
        raised = projector != "valid" and _is_raised(student, common)
        student_plan.to_map(student.grid if projector == "valid" or raised else common)
        teacher_plan.to_map(common)
    else:
        raised = False
        student_plan.to_vector()
        teacher_plan.to_vector()
    teacher_plan.normalize(normalize)
    if policy == "fixed":
        teacher_plan.project_fixed(teacher.channels, student.channels)
    elif _needs_projector(student, teacher, policy):
        student_plan.project(student.channels, teacher.channels, kernel if as_maps else None, projector)
        student_plan.activate(_activation(activation, teacher, normalize))
    if raised:
        assert student.grid is not None
        student_plan.resize(student.grid, common)
    return _adapter(student_plan, teacher_plan)


def adapt_maps(student: FeatureSpec, teacher: FeatureSpec, *, grid: Grid = "smaller") -> Adapter:
    """Return the adapter that converts both features to maps at one grid, each with its own channels.

    `attention` and `patch_similarity` compare such maps. `grid` is that of `adapt`. Raises AdapterError for features
    without positions, and for a grid with a single position, which always holds all of the attention.
    """
    _check_maps(student, teacher)
    _check_choices(grid=(grid, Grid))
    common = _common_grid(student, teacher, grid)
    if common == (1, 1):
        raise AdapterError(f"{student.tap} <- {teacher.tap} have one position in common, and nothing to attend to")
    student_plan, teacher_plan = FeaturePlan(student, "drop"), FeaturePlan(teacher, "drop")
    for plan in (student_plan, teacher_plan):
        plan.to_map(common)
    return _adapter(student_plan, teacher_plan)


def adapt_vectors(
    student: FeatureSpec,
    teacher: FeatureSpec,
    *,
    tokens: Tokens = "pool",
    class_map: Sequence[int] | None = None,
) -> Adapter:
    """Return the adapter that converts both features to one vector per image, each of its own width.

    Losses of the relations in a batch compare such vectors. `tokens`: `pool` (or `drop`) is the mean over positions,
    without prefix tokens; `cls` is the class token, and the mean of a model that has none; `flatten` is the vectors of
    all positions as one, without prefix tokens. `class_map` selects classes of the teacher's vector, as in
    `adapt_outputs`.

    Raises AdapterError for a feature that is none of single images, for `cls` if neither model has a class token, and
    for a class map that does not fit.
    """
    _check_choices(tokens=(tokens, Tokens))
    _check_features(student, teacher)
    if tokens == "cls" and not (student.prefix_tokens or teacher.prefix_tokens):
        raise AdapterError(f"tokens 'cls': neither '{student.tap}' nor '{teacher.tap}' has a class token; use 'pool'")
    plans = FeaturePlan(student, tokens), FeaturePlan(teacher, tokens)
    for plan in plans:
        if tokens == "flatten" and plan.spec.spatial:
            plan.flatten()
        else:
            plan.to_vector()
    if class_map is not None:
        check_class_map(class_map, len(class_map), plans[1].spec.channels)
        plans[1].add(Classes(class_map), f"{len(class_map)} classes")
    return _adapter(*plans)


def adapt_all(student: Sequence[FeatureSpec], teacher: Sequence[FeatureSpec]) -> Adapter:
    """Return the adapter that converts the features of all pairs to maps, or to vectors where they have no positions.

    It takes and returns a tuple of features of each model. Each keeps its own grid and width.

    Raises AdapterError for a feature that is none of single images.
    """
    plans: list[list[FeaturePlan]] = [[], []]
    for student_spec, teacher_spec in zip(student, teacher, strict=True):
        _check_features(student_spec, teacher_spec)
        for side, spec in zip(plans, (student_spec, teacher_spec), strict=True):
            side.append(FeaturePlan(spec, "drop"))
            if spec.spatial:
                side[-1].to_map(spec.grid)
            else:
                side[-1].to_vector()
    student_steps, teacher_steps = (Each(nn.Sequential(*plan.steps) for plan in side) for side in plans)
    student_text, teacher_text = (", ".join(map(str, side)) for side in plans)
    return Adapter(student_steps, teacher_steps, f"{student_text} | teacher {teacher_text}")


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
    sides = [MatrixPlan(student), MatrixPlan(teacher)]
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


def adapt_outputs(
    student: FeatureSpec,
    teacher: FeatureSpec,
    class_map: Sequence[int] | None = None,
    *,
    dense: bool = False,
    grid: Grid = "smaller",
) -> Adapter:
    """Return the adapter that selects the student's classes from the teacher's logits.

    `class_map[i]` is the teacher's index of the student's class i. It does not apply to two named taps of equal width
    that are no classes, such as embeddings. Raises AdapterError if an output is not one row of classes per image (a
    map, tokens), if the numbers of classes differ without a class map, and for a class map that does not fit.

    `dense` takes maps of logits instead, (batch, classes, height, width), and brings them to one `grid`, as in `adapt`.
    """
    for side, spec in (("student", student), ("teacher", teacher)):
        (check_dense_logits if dense else check_logits)(spec, side)
    student_plan, teacher_plan = FeaturePlan(student, "pool"), FeaturePlan(teacher, "pool")
    if dense:
        for plan in (student_plan, teacher_plan):
            plan.to_map(_common_grid(student, teacher, grid))
    named = student.tap != Tap("") or teacher.tap.local != Tap("")
    if class_map is not None and not (named and len(class_map) != student.channels == teacher.channels):
        check_class_map(class_map, student.channels, teacher.channels)
        teacher_plan.add(Classes(class_map), f"{len(class_map)} classes")
    elif student.channels != teacher.channels:
        raise AdapterError(
            f"the student has {student.channels} classes and the teacher {teacher.channels}; give a `class_map` with "
            "the teacher's index of each of the student's classes"
        )
    teacher_text = f" | teacher {teacher_plan}" if teacher_plan.steps else ""
    steps = nn.Sequential(*student_plan.steps), nn.Sequential(*teacher_plan.steps)
    return Adapter(*steps, f"{student_plan}{teacher_text}")  # the cache has its own rule for which logits it stores


def check_logits(spec: FeatureSpec, side: str) -> None:
    """Raise AdapterError for an output that is not (batch, classes): the axis of the classes is not guessed."""
    if len(spec.shape) != 2:
        raise AdapterError(
            f"the {side}'s output is {' x '.join(map(str, spec.shape[1:]))} an image, and losses of outputs compare "
            "one row of classes an image; wrap the model in a module that returns that, or pair the layer by `hint`"
        )


def check_dense_logits(spec: FeatureSpec, side: str) -> None:
    """Raise AdapterError for an output that is not (batch, classes, height, width)."""
    if spec.layout is not Layout.NCHW:
        raise AdapterError(
            f"the {side}'s output is {' x '.join(map(str, spec.shape[1:]))} an image, and `dense` compares maps of "
            "logits, (classes, height, width) an image; leave `dense` out for one row of classes"
        )


def pooled(spec: FeatureSpec) -> nn.Module:
    """Return a module that reduces a feature to one vector per image: the mean over positions, without prefix tokens.

    Of a feature without positions, the vector is the feature itself or its class token. Raises AdapterError for a
    tensor that does not hold one feature per image.
    """
    _check_features(spec, spec)
    plan = FeaturePlan(spec, "pool")
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


def _adapter(student_plan: FeaturePlan, teacher_plan: FeaturePlan) -> Adapter:
    has_steps = bool(teacher_plan.steps or teacher_plan.fitted_steps)
    teacher_text = "" if not has_steps else f" | teacher {teacher_plan}"
    steps = nn.Sequential(*student_plan.steps), nn.Sequential(*teacher_plan.steps)
    fitted_steps = nn.Sequential(*teacher_plan.fitted_steps)
    return Adapter(*steps, f"{student_plan}{teacher_text}", _target([teacher_plan.spec], teacher_plan), fitted_steps)


def _target(teacher: Sequence[FeatureSpec], plan: FeaturePlan | MatrixPlan) -> Target | None:
    """The output of the teacher's steps as a Target, if it is smaller than their input and each image has its own.

    None for logits: the cache has its own rule for which logits it stores.
    """
    of_batch = any(isinstance(step, Standardize) and step.kind == "channel" for step in plan.steps)
    if of_batch or any(spec.tap.is_output for spec in teacher):
        return None
    if prod(plan.shape) >= sum(prod(spec.shape[1:]) for spec in {spec.tap: spec for spec in teacher}.values()):
        return None
    names = " . ".join(str(spec.tap.local) for spec in teacher)
    return Target(f"{names}: {plan.words_of_steps}", plan.shape, teacher[0].tap.model)


def _check_choices(**choices: tuple[str, object]) -> None:
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise AdapterError(f"{name} {value!r}: expected one of {', '.join(map(repr, get_args(kind)))}")


def _check_options(
    student: FeatureSpec,
    teacher: FeatureSpec,
    policy: Policy,
    tokens: Tokens,
    projector: Projector,
    activation: Activation,
) -> None:
    if tokens == "flatten":
        raise AdapterError(
            f"tokens 'flatten' of {student.tap} <- {teacher.tap} is for losses of vectors; use 'drop', which compares "
            "the grids"
        )
    if tokens == "all":
        raise AdapterError(
            f"tokens 'all' of {student.tap} <- {teacher.tap} needs an adapter for class tokens and one for grids, "
            "which an Objective makes; give `adapt` one of 'drop', 'cls' and 'pool'"
        )
    if policy in ("never", "fixed") and (projector != "linear" or activation != "none"):
        raise AdapterError(
            f"policy {policy!r} has no regressor, so `projector` and `activation` mean nothing; leave them out"
        )
    if tokens == "cls" and not (student.prefix_tokens or teacher.prefix_tokens):
        raise AdapterError(f"tokens 'cls': neither '{student.tap}' nor '{teacher.tap}' has a class token; use 'pool'")


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


def _valid_kernel(student: FeatureSpec, teacher: FeatureSpec, as_maps: bool, grid: Grid) -> tuple[int, int]:
    if grid != "smaller":
        raise AdapterError(
            f"projector 'valid' takes the student's grid to the teacher's by its kernel, so grid '{grid}' means "
            "nothing; leave it out, or use projector 'linear'"
        )
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


def _common_grid(student: FeatureSpec, teacher: FeatureSpec, grid: Grid) -> tuple[int, int]:
    """The grid on which two features with positions are compared."""
    assert student.grid is not None
    assert teacher.grid is not None
    smaller = min(student.grid[0], teacher.grid[0]), min(student.grid[1], teacher.grid[1])
    return {"smaller": smaller, "student": student.grid, "teacher": teacher.grid}[grid]


def _is_raised(spec: FeatureSpec, grid: tuple[int, int]) -> bool:
    """Whether a side of the feature's own grid is smaller."""
    assert spec.grid is not None
    return any(own < size for own, size in zip(spec.grid, grid, strict=True))
