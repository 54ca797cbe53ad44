"""Recipes: what a YAML file may say, and the plan it stands for.

`load` reads a file into a Recipe; `plan` checks it against the models and the data. Both collect every problem before
they raise one RecipeError, each with its line. Nothing in a recipe is code: it is read as plain YAML, and a function
that it names as a model is imported only where the caller allows its package.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from torch import nn

from probe_kd.adapters import Activation, Normalize, Policy, Projector, Tokens, check_class_map
from probe_kd.data import DataOptions, Datasets, loader, open_datasets
from probe_kd.distiller import Block
from probe_kd.errors import (
    DataError,
    LossError,
    ProbeKDError,
    Problem,
    RecipeError,
    RunError,
    TraceError,
    WeightsError,
    nearest,
)
from probe_kd.losses import LOSSES
from probe_kd.matching import match
from probe_kd.models import build_on_meta, check_import, checkpoint_gradients, load_weights, packages, short
from probe_kd.objectives import Comparison, Objective
from probe_kd.plain import Path_, flaws, locate, plain, read_text, read_yaml
from probe_kd.sharing import Pattern, Sharing, graft, share_convolutions, share_trunk
from probe_kd.spec import InputSpec, Pair, Schedule, Tap, Trace
from probe_kd.surgery import in_pattern
from probe_kd.tracing import trace

# Columns of metrics.csv that are no losses.
RESERVED = (
    "subject",
    "stage",
    "epoch",
    "accuracy",
    "agreement",
    "ema_accuracy",
    "images_per_second",
    "lr",
    "held_out_loss",
)


def _name(text: str) -> str:
    """Names stand in tables, files and terminals: one that is a formula, a path or a colour there is none."""
    if not re.fullmatch(r"\w[\w .-]{0,63}", text):
        raise ValueError("expected at most 64 letters, digits, `_`, `-`, `.` and spaces, a letter or digit first")
    return text


Name = Annotated[str, AfterValidator(_name)]


# Which branch of a union is meant, so that one mistake is told once and not for every branch.
def _list_or_word(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "word"


def _mapping_or_word(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else "word"


def _mapping_list_or_word(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else _list_or_word(value)


Modules = Annotated[
    Annotated[Pattern, Tag("word")] | Annotated[list[str], Tag("list")] | Annotated[dict[str, str], Tag("mapping")],
    Discriminator(_mapping_list_or_word),
]
Cut = Annotated[
    Annotated[str, Tag("word")] | Annotated[dict[str, str], Field(min_length=1, max_length=1), Tag("mapping")],
    Discriminator(_mapping_or_word),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerOptions(_Section):
    """timm's `create_optimizer_v2`: `opt`, `lr`, `weight_decay`, `momentum`, and `opt_args` for what else one takes.

    `lr_scale` multiplies the learning rate of the student's parameters in a module, or whose names match a glob, as in
    `{layer1: 0.1}`; where several match, the last does.
    """

    opt: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = {}
    opt_args: dict[str, Any] = {}


class SchedulerOptions(_Section):
    """timm's `create_scheduler_v2`, stepped every update: `sched` and its arguments, counted in epochs."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=30, gt=0)
    decay_milestones: list[int] = [90, 180, 270]
    decay_rate: float = Field(default=0.1, gt=0)


class ScheduleOptions(_Section):
    """A number that moves from `start` to `end` over so many epochs of its stage, by default all of them."""

    start: float
    end: float
    epochs: float | None = Field(default=None, gt=0)
    shape: Literal["linear", "cosine"] = "linear"


def _kind_of_number(value: Any) -> str:
    return "schedule" if isinstance(value, Mapping | ScheduleOptions) else "number"


Scheduled = Annotated[
    Annotated[float, Tag("number")] | Annotated[ScheduleOptions, Tag("schedule")], Discriminator(_kind_of_number)
]


def _schedule(value: Any) -> Any:
    return Schedule(**value.model_dump()) if isinstance(value, ScheduleOptions) else value


class LossOptions(BaseModel):
    """One loss: its name in `LOSSES`, its weight, what is done before it, and the loss function's own arguments.

    `weight`, and a number among the arguments, may be a schedule: `{start: 4, end: 1, epochs: 400}`.
    """

    # What is no field here is the loss function's own, and checked against it.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    loss: str
    weight: Scheduled = 1.0
    policy: Policy = "auto"
    tokens: Tokens = "drop"
    normalize: Normalize = "none"
    projector: Projector = "linear"
    activation: Activation = "none"
    of: Literal["student", "teacher"] = "student"
    between: list[tuple[str, str]] = []

    @property
    def options(self) -> dict[str, Any]:
        """The loss function's own. Raises LossError for a mapping that is no schedule."""
        return {key: self._read(key, value) for key, value in (self.model_extra or {}).items()}

    @staticmethod
    def _read(key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return _schedule(ScheduleOptions.model_validate(value))
        except ValidationError as refusal:
            first = refusal.errors()[0]
            raise LossError(f"`{'.'.join(map(str, (key, *first['loc'])))}`: {_complaint(first)}") from None


class StageOptions(_Section):
    """One phase of training: losses, epochs, optimizer, scheduler.

    What no loss of the stage reaches takes no part in it. `keep: best` ends the stage with the epoch whose losses,
    weighted and summed, were least on held-out training images (`data.holdout`). `grad_accum_steps` batches make one
    update of the weights.
    """

    name: Name = "train"
    epochs: int = Field(ge=1)
    losses: dict[Name, LossOptions] = {}
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    clip_grad: float | None = Field(default=None, gt=0)
    grad_accum_steps: int = Field(default=1, ge=1)
    keep: Literal["last", "best"] = "last"


class TeacherTraining(_Section):
    """How to train a teacher that has no weights yet, on the labels alone."""

    epochs: int = Field(ge=1)
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ModelOptions(_Section):
    """A model: what `probe-kd inspect` takes as its name, with `model_kwargs` for timm's `create_model`.

    `package.module:function` needs `--allow-import package` on the command line. `grad_checkpointing` is timm's: less
    memory in training for more time; a container whose children it runs one by one cannot be tapped then.
    """

    model: str
    pretrained: bool = False
    grad_checkpointing: bool = False
    checkpoint: str | None = None
    model_kwargs: dict[str, Any] = {}


class TeacherOptions(ModelOptions):
    """The teacher has weights (`pretrained`, `checkpoint`) or is trained first (`train`).

    For a function of your own, `pretrained` says that it loads its weights itself.

    `input_size`, `mean` and `std` are for a teacher that does not expect what timm's config says and the data gives.
    `class_map` is its index of each of the student's classes, where they are not the same: a list, or a JSON file.
    `cache` is a folder for what it gives: an image that it has seen in the same view, in this run or another, it is not
    asked about again. `cache_top_k` keeps so many of its logits, and spreads what probability is left evenly.
    """

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_map: (
        Annotated[Annotated[list[int], Tag("list")] | Annotated[str, Tag("word")], Discriminator(_list_or_word)] | None
    ) = None
    train: TeacherTraining | None = None
    cache: str | None = None
    cache_top_k: int | None = Field(default=None, ge=1)


class ShareOptions(_Section):
    """Teacher and student train together (Rocket Launching), and this is what they have in common.

    `form: weights`: the convolutions and linear layers in `modules`: `interval`, `bottom`, names, or student name:
    teacher name. `form: trunk`: all layers up to `at`, which run once; `form: graft`: the student's layers up to `at`
    are replaced by the teacher's; `at` is one layer, or student layer: teacher layer. `form: none`: nothing.
    `block` is the gradient block: what a loss between the two may move.
    """

    form: Literal["weights", "trunk", "graft", "none"] = "weights"
    modules: Modules | None = None
    at: Cut | None = None
    block: Block = "output"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        wanted = {"weights": "modules", "trunk": "at", "graft": "at"}.get(self.form)
        for key in ("modules", "at"):
            if key != wanted and getattr(self, key) is not None:
                raise ValueError(f"form `{self.form}` has no `{key}`" + (f"; it has `{wanted}`" if wanted else ""))
        if self.form != "weights" and wanted and getattr(self, wanted) is None:
            raise ValueError(f"form `{self.form}` needs `{wanted}`: the last layer that both have in common")
        return self

    @property
    def cut(self) -> tuple[Tap, Tap]:
        """Raises TapError."""
        ours, theirs = (self.at, self.at) if isinstance(self.at, str) else next(iter((self.at or {"": ""}).items()))
        return Tap.parse(ours), Tap.parse(theirs)


class AutoPairs(_Section):
    """`pairs: auto`, or with arguments for `match`."""

    level: Literal["stage", "block"] = "stage"
    num_pairs: int | None = Field(default=None, ge=1)


def _read_auto(value: Any) -> Any:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{value!r}: expected `auto`, or a mapping of student layers to teacher layers")
        return {}
    return value


def _kind_of_pairs(value: Any) -> str:
    is_mapping = isinstance(value, Mapping) and not (value and set(value) <= set(AutoPairs.model_fields))
    return "mapping" if is_mapping else "auto"


Pairs = Annotated[
    Annotated[AutoPairs, BeforeValidator(_read_auto), Tag("auto")] | Annotated[dict[str, str], Tag("mapping")],
    Discriminator(_kind_of_pairs),
]


class CompileOptions(_Section):
    """`torch.compile` of the whole `step` (both models, adapters and losses), or of one model.

    `backend` and `mode` are torch's. It is compiled anew in every stage, since a stage reads other layers.
    """

    target: Literal["step", "student", "teacher"] = "step"
    backend: str = "inductor"
    mode: str | None = None


class AverageOptions(_Section):
    """timm's ModelEmaV3 of the student: `decay`, and `warmup`, which lets it follow faster at the beginning."""

    decay: float = Field(default=0.9998, ge=0, lt=1)
    warmup: bool = False


class Recipe(_Section):
    """A whole recipe.

    `pairs` maps student taps to teacher taps, or is `auto`. `baseline` also trains the student alone: the same weights
    to begin with, the same images, and only the losses that read labels. `share` trains both together; the teacher is
    trained alone first, to compare. `precision` is accelerate's, whose own configuration decides where it is not given.
    `model_ema` also keeps a moving average of the student, begun anew in every stage. A checkpoint is written after
    every epoch, and every `recovery_interval` batches in between; the newest `checkpoint_hist` are kept. `trackers` are
    those of accelerate: `tensorboard`, `wandb`.
    """

    student: ModelOptions
    teacher: TeacherOptions | None = None
    data: DataOptions
    pairs: Pairs = {}
    share: ShareOptions | None = None
    stages: list[StageOptions] = Field(min_length=1)
    baseline: bool = False
    precision: Literal["no", "bf16", "fp16"] | None = None
    channels_last: bool = False
    torchcompile: CompileOptions | None = None
    model_ema: AverageOptions | None = None
    recovery_interval: int = Field(default=0, ge=0)
    checkpoint_hist: int = Field(default=2, ge=1)
    trackers: list[str] = []
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Source:
    """A recipe with the text it came from, which knows the line of every key."""

    recipe: Recipe
    name: str
    text: str
    tree: Any

    def problem(self, where: Path_, message: str) -> Problem:
        _, line, column = locate(self.tree, where)
        return Problem(message, line, column)


def load(path: str | Path, seed: int | None = None) -> Source:
    """Read a recipe file; `seed` replaces its own.

    Raises RecipeError with every problem of form: YAML, keys, types, bounds.
    """
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as refusal:
        raise RecipeError(str(path), [Problem(f"cannot read the recipe: {_reason(refusal)}{_beside(path)}")]) from None
    source = parse(text, str(path))
    return source if seed is None else replace(source, recipe=source.recipe.model_copy(update={"seed": seed}))


def _beside(path: str | Path) -> str:
    """The recipe that may have been meant."""
    name = Path(path).name
    try:
        return nearest(name, [file.name for file in Path(path).absolute().parent.glob("*.y*ml") if file.name != name])
    except (OSError, ValueError):  # a path that no system takes
        return ""


def parse(text: str, name: str = "recipe") -> Source:
    """`load` from text. Nothing that the recipe names is imported or built."""
    tree = read_yaml(text.removeprefix("\ufeff"), name)
    found = [Problem(message, *locate(tree, where)[1:]) for where, message in flaws(tree)]
    if found:
        raise RecipeError(name, found, text)
    given = plain(tree)
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as refusal:
        found = [_form_problem(tree, error) for error in refusal.errors()]
    else:
        found = [Problem(message, *locate(tree, where)[1:]) for where, message in _misread(given, recipe)]
    if found:
        raise RecipeError(name, list(dict.fromkeys(found)), text)
    return Source(recipe, name, text, tree)


def _misread(given: Any, taken: Any, where: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Where pydantic takes true for the number 1, or a number for true."""
    if isinstance(given, dict):
        fields = taken if isinstance(taken, dict) else {**vars(taken), **(taken.model_extra or {})}
        for key, value in given.items():
            yield from _misread(value, fields[key], (*where, key))
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from _misread(value, taken[index], (*where, index))
    elif isinstance(given, bool | int | float) and isinstance(given, bool) != isinstance(taken, bool):
        wanted = "a number" if isinstance(given, bool) else "true or false"
        yield where, f"`{'.'.join(map(str, where))}`: expected {wanted}, got {str(given).lower()}"


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(recipe.model_dump(mode="json", exclude_none=True), stream)
    return stream.getvalue()


def write_recipe(student: Trace, teacher: Trace, pairs: Sequence[Pair], path: Path) -> None:
    """A complete recipe for these pairs, with the reasons, that runs as it stands. Raises RecipeError."""
    pair_lines = [f"  {_quoted(pair.student)}: {_quoted(pair.teacher)}  # {pair.reason}" for pair in pairs]
    text = _TEMPLATE.format(
        path="".join(
            [str(path), *(f" --allow-import {package}" for package in packages([student.model, teacher.model]))]
        ),
        student=_model_lines(student),
        teacher=_model_lines(teacher),
        input_size=list(student.input_size),
        teacher_size=""
        if teacher.input_size == student.input_size
        else f"\n  input_size: {list(teacher.input_size)}  # the teacher sees the same images at its own size",
        pairs="\n".join(pair_lines),
    )
    parse(text, str(path))  # what we write is what we read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as refusal:
        raise RecipeError(str(path), [Problem(f"cannot write the recipe: {_reason(refusal)}")]) from None


_TEMPLATE = """\
# probe-kd train {path}
# It runs as it is, on scikit-learn's digits. Put your own data and your own teacher's weights in.
student:
{student}
teacher:
{teacher}{teacher_size}
  # pretrained: true            # timm's weights, where they were trained on your classes; or
  # checkpoint: teacher.safetensors
  train:                        # without weights, it is trained first, on the labels
    epochs: 5
    optimizer: {{opt: adamw, lr: 1.0e-3, weight_decay: 0.05}}
data:
  dataset: sklearn/digits       # torch/cifar100, hfds/...; or only `root`, a folder of folders
  # root: data
  input_size: {input_size}
  batch_size: 64
  crop_pct: 1.0
  scale: [0.7, 1.0]             # random resized crops, as timm makes them
  hflip: 0.0                    # a mirrored digit is no digit; 0.5 for photographs
  color_jitter: 0.0
pairs:                          # student layer: teacher layer
{pairs}
baseline: true                  # also train the student alone, to compare
stages:
  - name: distil
    epochs: 10
    losses:                     # their weighted sum is minimised
      task: {{loss: cross_entropy, weight: 1.0}}
      soft: {{loss: soft_targets, temperature: 4.0, weight: 1.0}}
      hint: {{loss: hint, normalize: layer, weight: 1.0}}
    optimizer: {{opt: adamw, lr: 1.0e-3, weight_decay: 0.05}}
    scheduler: {{sched: cosine, warmup_epochs: 1}}
seed: 0
"""


def _model_lines(trace_: Trace) -> str:
    kwargs = json.dumps(dict(trace_.model_kwargs))  # JSON is YAML
    return f"  model: {trace_.model}" + (f"\n  model_kwargs: {kwargs}" if trace_.model_kwargs else "")


def _quoted(tap: Tap) -> str:
    return json.dumps(str(tap)) if re.search(r"[#@\[\]]", str(tap)) or not str(tap) else str(tap)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


# What pydantic asks for, in the words of a recipe.
_WANTED = {
    **dict.fromkeys(("model_type", "dict_type"), "a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "string_type": "text",
    "finite_number": "a finite number",
}


def _form_problem(tree: Any, error: Any) -> Problem:
    steps, line, column = locate(tree, error["loc"])
    last = error["loc"][-1] if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        legal = _legal_keys(steps[:-1])
        hint = nearest(str(last), legal) or f"; the keys here: {', '.join(legal)}"
        return Problem(f"unknown key `{last}`{hint}", line, column)
    if error["type"] == "missing" and isinstance(last, str):
        return Problem(f"`{'.'.join(map(str, (*steps, last)))}` is missing", line, column)
    return Problem(f"`{'.'.join(map(str, steps))}`: {_complaint(error)}", line, column)


def _complaint(error: Any) -> str:
    """What one error of pydantic's says, without its names for things."""
    given, kind, context = error["input"], error["type"], error.get("ctx", {})
    got = "" if isinstance(given, dict | list) else f", got {given!r}"
    if kind in _WANTED:
        return f"expected {_WANTED[kind]}{got or (', got a mapping' if isinstance(given, dict) else ', got a list')}"
    if kind == "literal_error":
        legal = context["expected"]
        near = nearest(str(given), legal.split("'")[1::2])
        return f"expected {legal}{got}{near}"
    if kind == "missing":
        return "a value is missing"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        return (
            f"expected {bound} {context.get('min_length', context.get('max_length'))}, got {context['actual_length']}"
        )
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected a number")
    return f"{message[:1].lower()}{message[1:]}{got}"


def _legal_keys(where: Path_) -> list[str]:
    section: Any = Recipe
    for step in where:
        field = section.model_fields.get(step) if hasattr(section, "model_fields") else None
        section = _section_of(field.annotation) if field else section
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def _section_of(annotation: Any) -> Any:
    """The pydantic model inside an annotation such as `list[StageOptions]` or `TeacherOptions | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_section_of(part) for part in getattr(annotation, "__args__", ())]
    return next((part for part in inner if part is not None), None)


@dataclass(frozen=True)
class Planned:
    """What one loss compares in one stage, and what brings the two together first."""

    stage: str
    objective: Objective
    comparison: Comparison
    adapter: str


@dataclass(frozen=True)
class Plan:
    """A recipe that has been checked against models and data: all that training needs, and nothing left to guess."""

    recipe: Recipe
    datasets: Datasets
    student: Trace
    teacher: Trace | None
    student_input: InputSpec
    teacher_input: InputSpec | None
    pairs: tuple[Pair, ...]
    objectives: tuple[tuple[Objective, ...], ...]  # of each stage
    comparisons: tuple[Planned, ...]
    class_map: tuple[int, ...] | None = None
    sharing: Sharing | None = None
    grown: Trace | None = None  # of the student as it is trained, where that is a graft

    @property
    def trained(self) -> Trace:
        """The student as it is trained."""
        return self.grown or self.student

    @property
    def resolved(self) -> Recipe:
        """The recipe with what was found written out: the pairs, and the arguments that the models are built with."""
        recipe = self.recipe
        student = recipe.student.model_copy(update={"model_kwargs": dict(self.student.model_kwargs)})
        found: dict[str, Any] = {"student": student}
        if recipe.teacher is not None and self.teacher is not None:
            kwargs = dict(self.teacher.model_kwargs)
            found["teacher"] = recipe.teacher.model_copy(update={"model_kwargs": kwargs})
        if self.pairs:
            body = "body." if self.grown else ""
            found["pairs"] = {str(pair.student).removeprefix(body): str(pair.teacher) for pair in self.pairs}
        return recipe.model_copy(update=found)


def plan(source: Source, *, allow_import: Sequence[str] = ()) -> Plan:
    """Check a recipe against its models and data.

    Functions of your own that it names as models are imported and called only where `allow_import` names their package
    or module. Raises RecipeError with all problems that do not hide each other.
    """
    return _Planner(source, allow_import).plan()


class _Planner:
    def __init__(self, source: Source, allow_import: Sequence[str]) -> None:
        self.source = source
        self.allow_import = allow_import
        self.recipe = source.recipe
        self.problems: list[Problem] = []

    @contextmanager
    def at(self, *where: str | int) -> Iterator[None]:
        """Turn an error inside into a problem of this place of the recipe, and go on."""
        try:
            yield
        except ProbeKDError as refusal:
            self.problems.append(self.source.problem(where, str(refusal)))

    def stop_if_problems(self) -> None:
        if self.problems:
            raise RecipeError(self.source.name, self.problems, self.source.text)

    def plan(self) -> Plan:
        recipe = self.recipe
        datasets: Datasets | None = None
        with self.at("data", "dataset" if recipe.data.dataset else "root"):
            datasets = open_datasets(recipe.data)
        classes = datasets.num_classes if datasets else None
        student = self._trace("student", recipe.student, recipe.data.input_size, classes, training=True)
        teacher = self._trace_teacher(classes)
        self._check_teacher(teacher, classes)
        if student is not None and classes is not None and student.output.channels != classes:
            message = f"the student's classifier has {student.output.channels} classes and the data {classes}"
            self.problems.append(self.source.problem(("student", "model_kwargs"), message))
        self._check_checkpoint("student", student)
        self._check_checkpoint("teacher", teacher)
        self._check_baseline()
        self._check_stages(student)
        class_map = self._class_map(student, teacher)
        grown, sharing = self._join(student, teacher)
        pairs = self._pairs(student, teacher, grown)
        body = "body." if grown else ""
        objectives = [self._objectives(index, pairs, body) for index in range(len(recipe.stages))]
        found = () if pairs is None else self._comparisons(objectives, grown or student, teacher, class_map)
        comparisons = tuple(found)
        for side, trace_, read in (
            ("data", student, self._student_input),
            ("teacher", teacher, self._teacher_input),
        ):
            with self.at(side):
                if trace_ is not None:
                    read(trace_)
        self._check_inputs(student, teacher)
        with self.at("data"):
            _try_images(recipe.data)
        self.stop_if_problems()
        assert datasets is not None
        assert student is not None
        return Plan(
            recipe=recipe,
            datasets=datasets,
            student=student,
            teacher=teacher,
            student_input=self._input_of_student(student, teacher),
            teacher_input=self._teacher_input(teacher) if teacher else None,
            pairs=pairs or (),
            objectives=tuple(tuple(stage) for stage in objectives),
            comparisons=comparisons,
            class_map=class_map,
            sharing=sharing,
            grown=grown,
        )

    def _trace(
        self, key: str, model: ModelOptions, size: tuple[int, int, int], classes: int | None, *, training: bool
    ) -> Trace | None:
        kwargs = dict(model.model_kwargs)
        if classes is not None and not (key == "teacher" and model.pretrained):
            kwargs.setdefault("num_classes", classes)  # a pretrained teacher keeps the head it was trained with
        if size[0] != 3:
            kwargs.setdefault("in_chans", size[0])
        with self.at(key, "model"):
            check_import(model.model, self.allow_import)
            found = trace(model.model, size, training=training, model_kwargs=kwargs)
            if model.grad_checkpointing:
                found = _trace_checkpointing(found)
            _check_output(found, key)
            return found
        return None

    def _trace_teacher(self, classes: int | None) -> Trace | None:
        teacher = self.recipe.teacher
        if teacher is None:
            return None
        return self._trace(
            "teacher",
            teacher,
            teacher.input_size or self.recipe.data.input_size,
            classes if teacher.class_map is None or teacher.train else None,
            training=self.recipe.share is not None,
        )

    def _check_teacher(self, trace_: Trace | None, classes: int | None) -> None:
        teacher = self.recipe.teacher
        if teacher is None:
            return
        self._check_cache(teacher)
        if self.recipe.share and teacher.train:
            message = "with `share` the stages train the teacher too, alone and with the student; leave `train` out"
            self.problems.append(self.source.problem(("teacher", "train"), message))
        if not (teacher.pretrained or teacher.checkpoint or teacher.train or self.recipe.share):
            message = (
                "the teacher has random weights; give `pretrained: true`, a `checkpoint`, or `train: {epochs: ...}`"
            )
            self.problems.append(self.source.problem(("teacher", "model"), message))
        if trace_ is None or classes is None:
            return
        if trace_.output.channels != classes and teacher.class_map is None:
            message = (
                f"the teacher's classifier has {trace_.output.channels} classes and the data {classes}; give a "
                "`class_map` with its index of each of the data's classes, fine-tune it on these data, or `train` it"
            )
            self.problems.append(self.source.problem(("teacher", "model"), message))

    def _check_cache(self, teacher: TeacherOptions) -> None:
        whys = []
        if teacher.cache and self.recipe.share:
            whys.append(("cache", "the teacher trains too, so what it gave before is not what it gives now"))
        if teacher.cache and self.recipe.data.mixes:
            whys.append(("cache", "mixup and cutmix make a new image of every two, which no cache has seen"))
        if teacher.cache_top_k and not teacher.cache:
            whys.append(("cache_top_k", "it says what a cache keeps; give the folder as `cache` too"))
        if teacher.cache_top_k:
            for stage in self.recipe.stages:
                for name, loss in stage.losses.items():
                    reads = LOSSES[loss.loss].reads if loss.loss in LOSSES else ""
                    if reads == "outputs" and loss.loss != "soft_targets":
                        whys.append(
                            ("cache_top_k", f"loss `{name}` ({loss.loss}) needs all logits; only soft_targets does not")
                        )
        for key, why in whys:
            self.problems.append(self.source.problem(("teacher", key), f"`{key}`: {why}"))

    def _check_checkpoint(self, key: str, trace_: Trace | None) -> None:
        model: ModelOptions | None = getattr(self.recipe, key)
        if model is None or model.checkpoint is None:
            return
        path = Path(model.checkpoint)
        if not path.is_file():
            near = nearest(path.name, [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else [])
            message = f"there is no checkpoint {model.checkpoint!r}{near}"
            self.problems.append(self.source.problem((key, "checkpoint"), message))
        elif trace_ is not None:
            with self.at(key, "checkpoint"):
                load_weights(build_on_meta(trace_.model, trace_.model_kwargs), path)

    def _class_map(self, student: Trace | None, teacher: Trace | None) -> tuple[int, ...] | None:
        options = self.recipe.teacher
        given = options.class_map if options else None
        if given is None or options is None:
            return None
        if options.train or self.recipe.share:
            message = "a teacher that is trained here has the data's classes; leave `class_map` out"
            self.problems.append(self.source.problem(("teacher", "class_map"), message))
            return None
        with self.at("teacher", "class_map"):
            found = _read_class_map(given) if isinstance(given, str) else given
            if student is not None and teacher is not None:
                check_class_map(found, student.output.channels, teacher.output.channels)
            return tuple(found)
        return None

    def _check_optimizers(self) -> None:
        """timm's names, which only timm knows."""
        from timm.optim import list_optimizers

        known = list_optimizers()
        places: list[tuple[Path_, Any]] = [(("stages", index), stage) for index, stage in enumerate(self.recipe.stages)]
        if self.recipe.teacher and self.recipe.teacher.train:
            places.append((("teacher", "train"), self.recipe.teacher.train))
        for where, stage in places:
            if stage.optimizer.opt.lower() not in known:
                message = f"timm has no optimizer {stage.optimizer.opt!r}{nearest(stage.optimizer.opt, known)}"
                self.problems.append(self.source.problem((*where, "optimizer", "opt"), message))
            else:
                with self.at(*where, "optimizer", *(["opt_args"] if stage.optimizer.opt_args else [])):
                    _try_optimizer(stage.optimizer)
            if stage.scheduler.warmup_epochs > stage.epochs:
                message = f"warmup_epochs {stage.scheduler.warmup_epochs:g} are more than the {stage.epochs} epochs"
                self.problems.append(self.source.problem((*where, "scheduler", "warmup_epochs"), message))

    def _check_trackers(self) -> None:
        if not self.recipe.trackers:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known, there = list(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
        for index, name in enumerate(self.recipe.trackers):
            if name not in known:
                message = f"accelerate has no tracker {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            elif name not in there:
                message = f"tracker {name!r} is not installed here; `pip install {name}`"
            else:
                continue
            self.problems.append(self.source.problem(("trackers", index), message))

    def _check_compile(self) -> None:
        import torch._dynamo

        options = self.recipe.torchcompile
        if options is None:
            return
        known = torch._dynamo.list_backends(exclude_tags=())
        if options.backend not in known:
            message = f"torch.compile has no backend {options.backend!r}{nearest(options.backend, known)}"
            self.problems.append(self.source.problem(("torchcompile", "backend"), message))
        modes = list(torch._inductor.list_mode_options())
        if options.mode is not None and options.mode not in modes:
            message = (
                f"torch.compile has no mode {options.mode!r}{nearest(options.mode, modes)}; it has {', '.join(modes)}"
            )
            self.problems.append(self.source.problem(("torchcompile", "mode"), message))
        share = self.recipe.share
        if share is not None and (share.form in ("trunk", "graft") or share.block in ("params", "trunk")):
            message = (
                f"with `share: {{form: {share.form}, block: {share.block}}}` layers give what they gave before, or are "
                "constants for a while, which compiled code does not notice; leave `torchcompile` out"
            )
            self.problems.append(self.source.problem(("torchcompile",), message))
        if options.target == "teacher" and self.recipe.teacher is None:
            self.problems.append(self.source.problem(("torchcompile", "target"), "there is no teacher to compile"))

    def _check_stages(self, student: Trace | None) -> None:
        self._check_optimizers()
        self._check_compile()
        self._check_trackers()
        for index, stage in enumerate(self.recipe.stages):
            if stage.keep == "best" and not self.recipe.data.holdout:
                message = "`keep: best` chooses by held-out training images; give `data: {holdout: 0.1}`"
                self.problems.append(self.source.problem(("stages", index, "keep"), message))
            names = _parameter_names(student) if student and stage.optimizer.lr_scale else []
            for pattern in stage.optimizer.lr_scale if names else ():
                if not any(in_pattern(name, pattern) for name in names):
                    message = f"no parameter of the student matches {pattern!r}{nearest(pattern, _modules_of(names))}"
                    self.problems.append(
                        self.source.problem(("stages", index, "optimizer", "lr_scale", pattern), message)
                    )

    def _join(self, student: Trace | None, teacher: Trace | None) -> tuple[Trace | None, Sharing | None]:
        """What is shared, tried on models without weights; and the trace of a graft."""
        share = self.recipe.share
        if share is None:
            return None, None
        if self.recipe.teacher is None:
            self.problems.append(self.source.problem(("share",), "there is no `teacher:` to share with"))
        if student is None or teacher is None:
            return None, None
        with self.at("share"):
            models = [build_on_meta(side.model, side.model_kwargs) for side in (student, teacher)]
            joined, sharing = join(share, models[0], models[1], student, teacher)
            grown = trace(joined, teacher.input_size, training=True) if share.form == "graft" else None
            return grown and replace(grown, model=f"{student.model} on {teacher.model}"), sharing
        return None, None

    def _check_inputs(self, student: Trace | None, teacher: Trace | None) -> None:
        share = self.recipe.share
        if share is None or share.form != "trunk" or student is None or teacher is None or self.problems:
            return
        ours, theirs = self._student_input(student), self._teacher_input(teacher)
        if ours != theirs:
            message = (
                f"a shared trunk sees one image, and the student expects {ours} and the teacher {theirs}; give `mean` "
                "and `std` of `data`, and `mean`, `std` and `input_size` of `teacher`, so that they agree"
            )
            self.problems.append(self.source.problem(("share",), message))

    def _check_baseline(self) -> None:
        losses = [loss.loss for stage in self.recipe.stages for loss in stage.losses.values()]
        if self.recipe.baseline and not any(loss in LOSSES and LOSSES[loss].reads == "labels" for loss in losses):
            message = "the student alone has no loss to train on: no stage has one that reads labels (`cross_entropy`)"
            self.problems.append(self.source.problem(("baseline",), message))

    def _input_of_student(self, student: Trace, teacher: Trace | None) -> InputSpec:
        """A graft begins with the teacher's layers, so it sees what the teacher sees."""
        grafted = self.recipe.share is not None and self.recipe.share.form == "graft"
        return self._teacher_input(teacher) if grafted and teacher else self._student_input(student)

    def _student_input(self, student: Trace) -> InputSpec:
        data = self.recipe.data
        return _input_spec(student, data.input_size, data.mean, data.std)

    def _teacher_input(self, teacher: Trace) -> InputSpec:
        options = self.recipe.teacher
        assert options is not None
        return _input_spec(teacher, teacher.input_size, options.mean, options.std)

    def _pairs(self, student: Trace | None, teacher: Trace | None, grown: Trace | None) -> tuple[Pair, ...] | None:
        """None where they cannot be known: then a loss without pairs is not its own mistake."""
        wanted = self.recipe.pairs
        if not wanted:
            return ()
        if student is None or teacher is None:
            return None
        if isinstance(wanted, AutoPairs):
            with self.at("pairs"):
                found = match(student, teacher, level=wanted.level, num_pairs=wanted.num_pairs)
                return found if grown is None else _above_the_cut(found, grown)
            return None
        pairs: list[Pair] = []
        for ours, theirs in wanted.items():
            with self.at("pairs", ours):
                pair = Pair(Tap.parse(ours), Tap.parse(theirs))
                if grown is not None:
                    pair = _in_body(pair)
                for trace_, tap in ((grown or student, pair.student), (teacher, pair.teacher)):
                    trace_[tap]
                pairs.append(pair)
        return tuple(pairs) if len(pairs) == len(wanted) else None

    def _objectives(self, index: int, pairs: Sequence[Pair] | None, body: str) -> list[Objective]:
        stage = self.recipe.stages[index]
        found: list[Objective] = []
        if not stage.losses:
            message = f"stage `{stage.name}` has no losses; give at least `losses: {{task: {{loss: cross_entropy}}}}`"
            self.problems.append(self.source.problem(("stages", index), message))
        for name, options in stage.losses.items():
            if name in RESERVED:
                message = f"a loss cannot be called `{name}`: the metrics have a column of that name"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
            with self.at("stages", index, "losses", name):
                found.append(_objective(name, options, [_UNKNOWN] if pairs is None else pairs, body))
            last = found[-1] if found and found[-1].name == name else None
            if last and last.needs_teacher and self.recipe.teacher is None:
                message = f"loss `{name}` needs a teacher, and the recipe has no `teacher:`"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
            elif last and last.of == "teacher" and self.recipe.share is None:
                message = f"loss `{name}` is `of: teacher`, which learns only where both train together; give `share`"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
        if self.recipe.share and found and not any(objective.of == "teacher" for objective in found):
            message = (
                f"stage `{stage.name}` trains the teacher too, and has no loss for it; add "
                "`booster: {loss: cross_entropy, of: teacher}`"
            )
            self.problems.append(self.source.problem(("stages", index, "losses"), message))
        return found

    def _comparisons(
        self,
        stages: list[list[Objective]],
        student: Trace | None,
        teacher: Trace | None,
        class_map: Sequence[int] | None,
    ) -> Iterator[Planned]:
        if student is None or teacher is None:
            return
        for index, objectives in enumerate(stages):
            for objective in objectives:
                # Without memory: only what it would be is wanted here, and the widths are the recipe's.
                with self.at("stages", index, "losses", objective.name), torch.device("meta"):
                    for comparison in objective.comparisons:
                        adapter = objective.adapter(comparison, student, teacher, class_map)
                        yield Planned(self.recipe.stages[index].name, objective, comparison, str(adapter))


_UNKNOWN = Pair(Tap(""), Tap(""))  # stands for pairs that could not be read


def _objective(name: str, options: LossOptions, pairs: Sequence[Pair], body: str) -> Objective:
    return Objective(
        options.loss,
        name,
        weight=_schedule(options.weight),
        pairs=pairs,
        options=options.options,
        policy=options.policy,
        tokens=options.tokens,
        normalize=options.normalize,
        projector=options.projector,
        activation=options.activation,
        of=options.of,
        between=[[body + end for end in ends] for ends in options.between],
    )


def join(
    share: ShareOptions, student: nn.Module, teacher: nn.Module, seen: Trace, known: Trace
) -> tuple[nn.Module, Sharing | None]:
    """Let two models have in common what the recipe says. Returns the student to train; the given one is changed.

    Raises TapError where they cannot.
    """
    if share.form == "none":
        return student, None
    if share.form == "weights":
        return student, share_convolutions(student, teacher, share.modules or "interval")
    ours, theirs = share.cut
    if share.form == "trunk":
        return student, share_trunk(student, teacher, ours, theirs, seen, known)
    return graft(student, teacher, ours, theirs, seen, known)


def _in_body(pair: Pair) -> Pair:
    return replace(pair, student=replace(pair.student, module=f"body.{pair.student.module}"))


def _above_the_cut(pairs: Sequence[Pair], grown: Trace) -> tuple[Pair, ...]:
    """Of the pairs of the plain student, those whose layers are still there in the graft."""
    moved = [_in_body(pair) for pair in pairs]
    kinds = {name: module.kind for name, module in grown.modules.items()}
    return tuple(pair for pair in moved if kinds.get(pair.student.module, "Idle") != "Idle")


def _trace_checkpointing(found: Trace) -> Trace:
    """The trace of a model that runs its layers as gradient checkpointing does. Raises TraceError where it cannot."""
    model = build_on_meta(found.model, found.model_kwargs)
    checkpoint_gradients(model, found.model)
    seen = trace(model, found.input_size, training=found.training)
    return replace(seen, model=found.model, model_kwargs=found.model_kwargs)


def _parameter_names(trace_: Trace) -> list[str]:
    return [name for name, _ in build_on_meta(trace_.model, trace_.model_kwargs).named_parameters()]


def _modules_of(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([name.rpartition(".")[0] for name in names] + list(names)))


def _check_output(trace_: Trace, key: str) -> None:
    """The losses read one tensor. Raises TraceError."""
    outputs = [spec.tap for spec in trace_.specs if spec.tap.is_output]
    if outputs != [Tap("")]:
        given = f"gives several tensors ({', '.join(map(str, outputs))})" if outputs else "gives no tensor"
        raise TraceError(
            f"the {key} {trace_.model} {given}; a loss reads one: wrap it in a module that returns the logits"
        )


def _try_optimizer(options: OptimizerOptions) -> None:
    """One update of a few numbers, so that what an optimizer does not take is told before training."""
    from timm.optim import create_optimizer_v2

    weights = nn.Parameter(torch.ones(2, 2, device="cpu"))
    weights.grad = torch.ones_like(weights)
    rates = {"lr": options.lr, "weight_decay": options.weight_decay, "momentum": options.momentum}
    try:
        create_optimizer_v2([weights], opt=options.opt, **rates, **options.opt_args).step()
    except Exception as refusal:  # timm's, torch's and other libraries' optimizers have their own words
        given = ", ".join(f"{key}={value!r}" for key, value in options.opt_args.items())
        raise RunError(f"optimizer `{options.opt}` does not take {given or 'these values'}: {short(refusal)}") from None


def _try_images(options: DataOptions) -> None:
    """The transforms of training on one grey image, since timm reads `aa` and others when it makes them."""
    size = (options.input_size[0], 32, 32)
    images: Any = [(Image.new("L" if size[0] == 1 else "RGB", (32, 32), 128), 0)]
    try:
        next(iter(loader(images, options.model_copy(update={"workers": 0}), InputSpec(size), training=True)))
    except Exception as refusal:  # timm's and torchvision's have their own words
        raise DataError(f"the images cannot be transformed as `data` says: {short(refusal)}") from None


def _read_class_map(path: str) -> list[int]:
    try:
        found = json.loads(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as refusal:
        raise WeightsError(f"cannot read the class map {path!r}: {_reason(refusal)}") from None
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise WeightsError(f"the class map {path!r} is not a JSON list of whole numbers")
    return found


def _input_spec(
    trace_: Trace, size: tuple[int, int, int], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> InputSpec:
    """The recipe's numbers, else those of timm's config for this model."""
    own = InputSpec.of(build_on_meta(trace_.model, trace_.model_kwargs), size)
    return InputSpec(size, mean or own.mean, std or own.std)
