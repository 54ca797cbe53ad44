"""Recipes: what a YAML file may say, and every mistake of form in it at once, each with its line.

`load` reads a file into a Recipe, which `planner.plan` checks against models and data. Nothing in a recipe is code: it
is read as plain YAML, and a function that it names as a model is imported only where the caller allows its package.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from shlex import quote
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, Union, get_args, get_origin

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
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from probe_kd.data.datasets import DataOptions, InputSize
from probe_kd.engine.models import files_of, packages
from probe_kd.engine.spec import Schedule, Tap
from probe_kd.errors import CONTROL, LossError, Problem, RecipeError, nearest, nearest_truth
from probe_kd.files.atomic import read_text, reason
from probe_kd.methods.adapters import Activation, Normalize, Policy, Projector, Tokens
from probe_kd.methods.sharing import Pattern
from probe_kd.methods.teachers import Block
from probe_kd.recipe.yaml_tree import (
    MAX_LEVELS,
    Node,
    Path_,
    flaws,
    locate,
    merged,
    node_of,
    read_yaml,
    replaced,
)

# Columns of metrics.csv that are no losses.
RESERVED = (
    "role",
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
    return "mapping" if isinstance(value, Mapping | BaseModel) else "word"


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
    decay_milestones: list[Annotated[int, Field(ge=1)]] = [90, 180, 270]
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


def _no_reward(weight: float | ScheduleOptions) -> float | ScheduleOptions:
    """What a loss of negative weight asks for is to be as unlike the teacher, or as wrong, as can be."""
    least = min(weight.start, weight.end) if isinstance(weight, ScheduleOptions) else weight
    if least < 0:
        got = f", got {least:g}" if isinstance(weight, ScheduleOptions) else ""
        raise ValueError(f"expected a number greater than or equal to 0{got}")
    return weight


def schedule(value: Any) -> Any:
    return Schedule(**value.model_dump()) if isinstance(value, ScheduleOptions) else value


class LossOptions(BaseModel):
    """One loss: its name in `LOSSES`, its weight, what is done before it, and the loss function's own arguments.

    `weight`, and a number among the arguments, may be a schedule: `{start: 4, end: 1, epochs: 400}`.
    """

    # What is no field here is the loss function's own, and checked against it.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    loss: str
    weight: Annotated[Scheduled, AfterValidator(_no_reward)] = 1.0
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
            return schedule(ScheduleOptions.model_validate(value, strict=True))
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


FINE_TUNING_LR = 1e-4  # a tenth of the default of one that is trained from scratch


class TeacherTraining(_Section):
    """How to train a teacher first, on the labels alone.

    One that has weights already is fine-tuned, by default at a learning rate of 1e-4 and not of 1e-3.
    """

    epochs: int = Field(ge=1)
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ModelOptions(_Section):
    """A model: what `probe-kd inspect` takes as its name, with `model_kwargs` for timm's `create_model`.

    `package.module:function` needs `--allow-import package` on the command line. `grad_checkpointing` is timm's: less
    memory in training for more time; a container whose children it runs one by one cannot be tapped then.
    `new_classifier` leaves the classifier of the weights out, so that a new one begins. A teacher with `train` gets one
    unasked where its weights have other classes.
    """

    model: str
    pretrained: bool = False
    grad_checkpointing: bool = False
    checkpoint: str | None = None
    new_classifier: bool = False
    model_kwargs: dict[str, Any] = {}


class TeacherOptions(ModelOptions):
    """The teacher has weights (`pretrained`, `checkpoint`) or is trained first (`train`).

    For a function of your own, `pretrained` says that it loads its weights itself.

    `input_size`, `mean` and `std` are for a teacher that does not expect what timm's config says and the data gives.
    `class_map` is its index of each of the student's classes, where they are not the same: a list, or a JSON file.
    `same_init` lets its first weights follow from the recipe's seed as the student's do, so that two models of one
    architecture begin with the same ones.
    `cache` is a folder for what it gives: an image that it has seen in the same view, in this run or another, it is not
    asked about again. `cache_top_k` keeps so many of its logits, and spreads what probability is left evenly.
    """

    input_size: InputSize | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_map: (
        Annotated[Annotated[list[int], Tag("list")] | Annotated[str, Tag("word")], Discriminator(_list_or_word)] | None
    ) = None
    train: TeacherTraining | None = None
    same_init: bool = False
    cache: str | None = None
    cache_top_k: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fine_tunes_gently(self) -> Self:
        """A teacher that has weights already is trained on at a smaller rate, unless the recipe gives one."""
        if self.train is None or not (self.pretrained or self.checkpoint):
            return self
        optimizer = self.train.optimizer
        if "lr" not in optimizer.model_fields_set:
            train = self.train.model_copy(update={"optimizer": optimizer.model_copy(update={"lr": FINE_TUNING_LR})})
            object.__setattr__(self, "train", train)  # the model is frozen for everybody else
        return self


def classifier_of(options: ModelOptions) -> Literal["same", "new where other", "new"]:
    """What becomes of the classifier that a model's weights have."""
    if options.new_classifier:
        return "new"
    return "new where other" if isinstance(options, TeacherOptions) and options.train else "same"


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
        student_cut, teacher_cut = (
            (self.at, self.at) if isinstance(self.at, str) else next(iter((self.at or {"": ""}).items()))
        )
        return Tap.parse(student_cut), Tap.parse(teacher_cut)


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
    is_mapping = isinstance(value, Mapping) and not set(value) & set(AutoPairs.model_fields)
    return "mapping" if is_mapping else "auto"


class PairOptions(_Section):
    """One pair in its long form.

    `teacher` is the layer that the student's learns from. `weight` multiplies the pair's share of every loss; a pair of
    weight 0 is in no loss, and only measured by `probe-kd eval`. `policy`, `tokens`, `normalize`, `projector` and
    `activation` go before those of a loss, where it has such a choice.
    """

    teacher: str
    weight: float = Field(default=1.0, ge=0)
    policy: Policy | None = None
    tokens: Tokens | None = None
    normalize: Normalize | None = None
    projector: Projector | None = None
    activation: Activation | None = None

    @property
    def adapter(self) -> dict[str, str]:
        return self.model_dump(exclude={"teacher", "weight"}, exclude_none=True)


_Pair = Annotated[
    Annotated[str, Tag("word")] | Annotated[PairOptions, Tag("mapping")],
    Discriminator(_mapping_or_word),
]
Pairs = Annotated[
    Annotated[AutoPairs, BeforeValidator(_read_auto), Tag("auto")] | Annotated[dict[str, _Pair], Tag("mapping")],
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

    `pairs` maps student taps to teacher taps, or is `auto`. A tap may be a pattern, `glob:blocks.[0-3]` or
    `re:layer[12]`, if both sides of a pair find equally many. `baseline` also trains the student without a
    teacher: the same weights to begin with, the same images, and only the losses that read labels. `share` trains both
    together; the
    teacher is trained alone first, to compare. `precision` is accelerate's; where neither it nor accelerate's own
    configuration is given, it is `bf16` on a GPU that computes in it, and `no` elsewhere. `matmul_precision` is that of
    `torch.set_float32_matmul_precision`; where it is not given, `high` on a GPU in bf16 or fp16. `channels_last` is how
    models and images lie in memory: where it is not given, they do if all models are timm's, on the CPU and on a GPU
    in bf16 or fp16, since convolutions are then faster (benchmarks/modes.py, gpu.py); one of your own may not bear it.
    `model_ema` also keeps a moving average of the student, begun anew in every stage. A checkpoint is
    written after every epoch, and every `recovery_interval` batches in between; the newest `checkpoint_hist` are kept.
    The test images are looked at every `val_interval` epochs, and after the last of a stage.
    `trackers` are those of accelerate: `tensorboard`, `wandb`.
    """

    student: ModelOptions
    teacher: TeacherOptions | None = None
    data: DataOptions
    pairs: Pairs = {}
    share: ShareOptions | None = None
    stages: list[StageOptions] = Field(min_length=1)
    baseline: bool = False
    precision: Literal["no", "bf16", "fp16"] | None = None
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    channels_last: bool | None = None
    torchcompile: CompileOptions | None = None
    model_ema: AverageOptions | None = None
    recovery_interval: int = Field(default=0, ge=0)
    val_interval: int = Field(default=1, ge=1)
    checkpoint_hist: int = Field(default=2, ge=1)
    trackers: list[str] = []
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Source:
    """A recipe with the files and options that it came from, which know the place of every key.

    `form` are its mistakes of form, where it was read with `tolerant`: then `recipe` is what is left without them, and
    `broken` has the places that are not as they were written.
    """

    recipe: Recipe
    name: str
    node: Node
    texts: Mapping[str, str]
    form: tuple[Problem, ...] = ()
    broken: tuple[Path_, ...] = ()

    def problem(self, where: Path_, message: str) -> Problem:
        return locate(self.node, where)[1].problem(message)

    def error(self, problems: Sequence[Problem]) -> RecipeError:
        return RecipeError(self.name, list(dict.fromkeys(problems)), self.texts)


def load(path: str | Path, seed: int | None = None, sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """Read a recipe file, and those that it extends.

    `sets` change it, each as `stages.0.epochs=5`, with a value in YAML; `seed` replaces its own.

    Raises RecipeError with every problem of form: YAML, keys, types, bounds. With `tolerant`, they are in `form` of
    what is returned, as long as a recipe is left without them, so that `plan` can tell what else is wrong beside them.
    """
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as refusal:
        raise RecipeError(str(path), [Problem(f"cannot read the recipe: {reason(refusal)}{_beside(path)}")]) from None
    source = parse(text, str(path), sets, tolerant=tolerant)
    return source if seed is None else replace(source, recipe=source.recipe.model_copy(update={"seed": seed}))


def _beside(path: str | Path) -> str:
    """The recipe that may have been meant."""
    name = Path(path).name
    try:
        return nearest(name, [file.name for file in Path(path).absolute().parent.glob("*.y*ml") if file.name != name])
    except (OSError, ValueError):  # a path that no system takes
        return ""


def parse(text: str, name: str = "recipe", sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """`load` from text; what it extends lies beside the file `name`. Nothing that it names is imported or built."""
    reading = _Reading(name)
    node = reading.file(text.removeprefix("\ufeff"), name, ())
    for option in sets:
        node = reading.option(node, option)
    recipe, form, broken = reading.recipe(node, tolerant=tolerant)
    return Source(recipe, name, node, reading.texts, tuple(form), tuple(broken))


class _Reading:
    """The files and options of one recipe while they are read: their texts, and what is wrong with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.texts: dict[str, str] = {}
        self.problems: list[Problem] = []

    def stop(self, *problems: Problem) -> NoReturn:
        raise RecipeError(self.name, list(dict.fromkeys([*self.problems, *problems])), self.texts)

    def noted(self, tree: Any, name: str, text: str, under: Path_ = ()) -> Node:
        """What was read, with its places; it stands at `under` in the recipe."""
        self.texts[name] = text
        node = node_of(tree, name)
        for where, message in flaws(tree, under):
            self.problems.append(locate(node, where[len(under) :])[1].problem(message))
        return node

    def file(self, text: str, name: str, chain: Sequence[str]) -> Node:
        """A file on top of what it extends; `chain` are the files that extend it."""
        node = self.noted(read_yaml(text, name), name, text)
        if not isinstance(node.value, dict):
            self.stop(node.problem("expected a mapping with `student`, `data` and `stages`"))
        values = dict(node.value)
        base = values.pop("extends", None)
        node = replace(node, value=values)
        return node if base is None else merged(self._base(base, [*chain, name]), node)

    def _base(self, base: Node, chain: Sequence[str]) -> Node:
        if not isinstance(base.value, str):
            self.stop(base.problem("`extends`: expected the path of a recipe, from this one's folder"))
        path = Path(chain[-1]).parent / base.value
        try:
            if os.path.realpath(path) in map(os.path.realpath, chain):
                self.stop(base.problem(f"`extends` goes round: {' -> '.join([*chain, str(path)])}"))
            if len(chain) == MAX_FILES:
                self.stop(base.problem(f"more than {MAX_FILES} files extend each other: {' -> '.join(chain)}"))
            text = read_text(path)
        except (OSError, ValueError) as refusal:
            self.stop(base.problem(f"cannot read {str(path)!r}: {reason(refusal)}{_beside(path)}"))
        self._check_is_recipe(base, text, str(path))
        return self.file(text, str(path), chain)

    def _check_is_recipe(self, base: Node, text: str, name: str) -> None:
        """Of a file that is none, nothing is shown: a recipe from somebody could name any that its reader may read."""
        try:
            keys = list(map(str, read_yaml(text, name)))
        except (RecipeError, TypeError):  # TypeError: it holds a number, or nothing
            keys = []
        legal = ["extends", *Recipe.model_fields]
        meant = [key for key in keys if key in legal or nearest(key, legal)]
        if not keys or meant != keys or not {*keys} & {*legal}:
            where = quote(name)
            self.stop(base.problem(f"`extends`: {name!r} is no recipe; `probe-kd check {where}` says more of one"))

    def option(self, node: Node, option: str) -> Node:
        """The recipe with one value set, as `stages.0.epochs=5` says."""
        found = re.fullmatch(rf"({_STEP}(?:\.{_STEP})*)=(.*)", option, re.DOTALL)
        if found is None:
            self.stop(Problem("expected KEY=VALUE, as in `stages.0.epochs=5`", source=f"--set {option}"))
        path, name = found[1], f"--set {found[1]}"
        before = " " * (len(path) + 1)  # so that columns are those of the whole option
        steps = [step.strip('"') for step in re.findall(_STEP, path)]
        if len(steps) > MAX_LEVELS or CONTROL.search(path):
            expected = f"a path of at most {MAX_LEVELS} keys, in one line of text"
            self.stop(Problem(f"expected {expected}, got {ascii(path)[:80]}", source="--set"))
        value = self.noted(read_yaml(before + found[2], name, option), name, option, tuple(steps))
        if steps[0] == "extends":
            self.stop(value.problem("a file says itself what it extends, before anything is set"))
        try:
            return replaced(node, steps, value)
        except KeyError as refusal:
            self.problems.append(value.problem(refusal.args[0]))
            return node

    def recipe(self, node: Node, *, tolerant: bool) -> tuple[Recipe, list[Problem], list[Path_]]:
        """Strictly: text is no number, and neither is true. With the mistakes of form, where they are tolerated."""
        values = node.plain
        recipe, errors = _validated(values)
        found = [_form_problem(node, error) for error in errors if not _is_echo(error, errors)]
        flawed = {(problem.source, problem.line, problem.column) for problem in self.problems}
        form = [it for it in found if (it.source, it.line, it.column) not in flawed]
        if not (errors or self.problems):
            assert recipe is not None
            return recipe, [], []
        broken: list[Path_] = []
        if tolerant and not self.problems:
            recipe, broken = _without(node, values, errors)
        if recipe is None or self.problems:
            self.stop(*form or [Problem("this is no recipe")] * (not self.problems))
        return recipe, form, broken


def _validated(values: Any) -> tuple[Recipe | None, list[Any]]:
    """The recipe, or pydantic's errors. As JSON, since only there a list is a tuple as well."""
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as refusal:
        # Half characters are no JSON, and flaws already.
        errors = [error for error in refusal.errors() if error["type"] != "json_invalid"]
        return None, errors or [{"type": "none", "loc": (), "msg": "this is no recipe", "input": None}]


def _without(node: Node, values: Any, errors: Sequence[Any]) -> tuple[Recipe | None, list[Path_]]:
    """The recipe without what is wrong in it, None where none is left, and the places that were changed."""
    broken: list[Path_] = []
    done: list[Path_] = []
    for _ in range(3):  # what is left after a mistake may be another
        for error in reversed(errors):
            steps, _ = locate(node, error["loc"])
            if any(steps[: len(place)] == place for place in done):  # it went with what was around it
                continue
            done.append(steps)
            if not _mend(values, steps, error):  # of what is missing, the section is left out
                return None, broken
            legal = _fields_at(error["loc"][:-1]) if error["type"] == "extra_forbidden" else {}
            meant = [(*steps[:-1], key) for key in legal if f"'{key}'" in nearest(str(steps[-1]), legal)]
            broken += [steps, *meant]
        recipe, errors = _validated(values)
        if recipe is not None:
            return recipe, broken
    return None, broken


# A number out of bounds becomes the bound, or the next whole number inside.
_BOUNDS = {
    "greater_than_equal": ("ge", 0),
    "greater_than": ("gt", 1),
    "less_than_equal": ("le", 0),
    "less_than": ("lt", -1),
}


def _mend(values: Any, steps: Path_, error: Any) -> bool:
    """Put something legal in the place of a mistake, or nothing. False where that would change what else is meant."""
    *way, last = steps or ("",)
    for step in way:
        values = values[step]
    if not steps or isinstance(values, list) or last not in values:  # without an item, the others have other places
        return False
    key, beside = _BOUNDS.get(error["type"], ("", 0))
    if key:
        values[last] = error["ctx"][key] + beside
    else:
        del values[last]
    return True


MAX_FILES = 8  # that extend each other
_STEP = r'(?:"[^"]*"|[^=".]+)'  # of a path: a key, in quotes where it has dots


def inputs_of(recipe: Recipe, *, trained: bool = False) -> list[str]:
    """The files that a run of this recipe reads besides its images; once it is `trained`, those its models still need.

    A teacher that is not trained first is read again whenever it is measured, and a student's weights are the run's.
    """
    teacher, found = recipe.teacher, list[str | Path]()
    for model in filter(None, (recipe.student, teacher)):
        whole = not trained or (isinstance(model, TeacherOptions) and model.train is None)
        found += [model.checkpoint] if model.checkpoint and whole else []
        found += files_of(model.model, pretrained=model.pretrained and whole)
    found += [teacher.class_map] if teacher and isinstance(teacher.class_map, str) else []
    return list(dict.fromkeys(map(str, found)))


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return _as_yaml(recipe.model_dump(mode="json", exclude_none=True))


def command_to_go_on(folder: Path) -> str:
    """The command that goes on with the run in a folder, whose own recipe has all that `--set` and `--seed` changed."""
    try:
        found = load(folder / "recipe.yaml").recipe
        allowed = packages(model.model for model in (found.student, found.teacher) if model is not None)
    except RecipeError:  # which the command tells
        allowed = []
    options = "".join(f" --allow-import {package}" for package in allowed)
    return f"probe-kd train {quote(str(folder / 'recipe.yaml'))} --out {quote(str(folder))}{options} --resume"


def rewritten(text: str) -> str:
    """A recipe's YAML in the form that `dump` writes, without comments, and with the defaults as they were."""
    return _as_yaml(YAML(typ="safe").load(text))


def _as_yaml(values: Any) -> str:
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(values, stream)
    return stream.getvalue()


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


def _form_problem(node: Node, error: Any) -> Problem:
    steps, here = locate(node, error["loc"])
    last = error["loc"][-1] if error["loc"] else ""
    where, by_option = ".".join(map(str, steps)), here.source.startswith("--set")
    if error["type"] == "extra_forbidden":
        legal = list(_fields_at(error["loc"][:-1]))
        hint = nearest(str(last), legal) or f"; the keys here: {', '.join(legal)}"
        return here.problem((f"there is no `{where}`" if by_option else f"unknown key `{last}`") + hint)
    if error["type"] == "missing" and isinstance(last, str):
        field = _fields_at(error["loc"][:-1]).get(last)
        wanted = f"; expected {_wanted(field.annotation)}" if field else ""
        beside = locate(node, steps[:-1])[1].value
        meant = nearest(str(steps[-1]), {*beside} - {steps[-1]}) if by_option and isinstance(beside, dict) else ""
        return here.problem(f"`{'.'.join(map(str, (*steps, last)))}` is missing{meant or wanted}")
    return here.problem(f"`{where}`: {_complaint(error)}")


def _is_echo(error: Any, errors: Sequence[Any]) -> bool:
    """Whether a key is missing only because it is written wrong, which is told."""
    *section, key = error["loc"] or ("",)
    others = [other["loc"] for other in errors if other["type"] == "extra_forbidden"]
    written = [str(loc[-1]) for loc in others if list(loc[:-1]) == section]
    legal = list(_fields_at(section)) if error["type"] == "missing" and written else []
    return any(f"did you mean {key!r}" in nearest(name, legal) for name in written if key in legal)


def _complaint(error: Any) -> str:
    """What one error of pydantic's says, without its names for things."""
    given, kind, context = error["input"], error["type"], error.get("ctx", {})
    word = json.dumps(given) if isinstance(given, bool | None) else repr(given)
    got = "" if isinstance(given, dict | list) else f", got {word}"
    if kind in _WANTED:
        got = got or (", got a mapping" if isinstance(given, dict) else ", got a list")
        return f"expected {_WANTED[kind]}{got}{nearest_truth(given) if kind.startswith('bool') else ''}"
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


def _fields_at(where: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """The keys of a section, by pydantic's steps to it."""
    here: Any = Recipe
    for step in where:
        here = _below(here, step)
    here = _below(here, None)
    return here.model_fields if isinstance(here, type) and issubclass(here, BaseModel) else {}


def _below(kind: Any, step: str | int | None) -> Any:
    """The type of what is under a key, an index or a branch's tag; without a step, that of a section itself."""
    origin, inner = get_origin(kind), [it for it in get_args(kind) if it is not type(None)]
    if origin in (Union, UnionType):
        tagged = [it for it in inner if any(isinstance(tag, Tag) and tag.tag == step for tag in get_args(it)[1:])]
        return tagged[0] if tagged else _below(inner[0], step)
    if origin is Annotated:
        return _below(inner[0], step)
    if step is None:
        return kind
    if origin in (dict, list, tuple):
        return inner[-1]
    return kind.model_fields[step].annotation if step in getattr(kind, "model_fields", ()) else kind


def _wanted(kind: Any) -> str:
    kind = _below(kind, None)
    words = {int: "a whole number", float: "a number", str: "text"}
    return "a list" if get_origin(kind) in (list, tuple) else words.get(kind, "a mapping")
