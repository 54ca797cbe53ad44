"""Every key of a recipe: a pydantic model for each section, with defaults and bounds.

`reading.py` fills them from a YAML file. Whether they fit the models and the data, `planner.py` checks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from probe_kd.data.options import DataOptions, InputSize, null_as_none_word
from probe_kd.engine.spec import Schedule, Share, Tap, check_model_name
from probe_kd.errors import LossError, TapError
from probe_kd.methods.adapters import Activation, Grid, Normalize, Policy, Projector, Tokens
from probe_kd.methods.sharing import Pattern
from probe_kd.methods.teachers import Block
from probe_kd.recipe.form_errors import complaint

# Columns of metrics.csv that are not losses.
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
    """Check a name, which is shown in tables, files and terminals: no formula, path or escape code."""
    if not re.fullmatch(r"\w[\w .-]{0,63}", text):
        raise ValueError("expected at most 64 letters, digits, `_`, `-`, `.` and spaces, a letter or digit first")
    return text


Name = Annotated[str, AfterValidator(_name)]


def _tap(text: str) -> str:
    """Check that the text is a tap."""
    try:
        Tap.parse(text)
    except TapError as refusal:
        raise ValueError(str(refusal)) from None
    return text


TapText = Annotated[str, AfterValidator(_tap)]


def _teacher_name(name: str) -> str:
    """Check a name that taps begin with: `dino:blocks.11`."""
    if name in ("mean", "baseline"):
        raise ValueError(f"a teacher cannot be called `{name}`, which has a meaning of its own")
    if not 0 < len(name) <= 64:
        raise ValueError("a teacher's name has 1 to 64 letters")
    try:
        check_model_name(name)
    except TapError as refusal:
        raise ValueError(str(refusal)) from None
    return name


TeacherName = Annotated[str, AfterValidator(_teacher_name)]


# The branch of a union that a value belongs to, so that pydantic reports one error and not one for each branch.
def _list_or_word(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "word"


def _number_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) else "number"


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
    """Arguments of timm's `create_optimizer_v2`, with `opt_args` for those that only some optimizers take.

    `lr_scale` multiplies the learning rate of the student's parameters in a module, or of those whose names match a
    glob, as in `{layer1: 0.1}`. If several match, the last one applies.
    """

    opt: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = {}
    opt_args: dict[str, Any] = {}


class SchedulerOptions(_Section):
    """Arguments of timm's `create_scheduler_v2`, counted in epochs. The scheduler steps every update."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=30, gt=0)
    decay_milestones: list[Annotated[int, Field(ge=1)]] = [90, 180, 270]
    decay_rate: float = Field(default=0.1, gt=0)


class ScheduleOptions(_Section):
    """A number that moves from `start` to `end` over `epochs` epochs of its stage, by default all."""

    start: float
    end: float
    epochs: float | None = Field(default=None, gt=0)
    shape: Literal["linear", "cosine"] = "linear"


def _kind_of_number(value: Any) -> str:
    return "schedule" if isinstance(value, Mapping | ScheduleOptions) else "number"


Scheduled = Annotated[
    Annotated[float, Tag("number")] | Annotated[ScheduleOptions, Tag("schedule")], Discriminator(_kind_of_number)
]


class GradientShareOptions(_Section):
    """A weight that makes the norm of a loss's gradient a `share` of the task's, at the parameters that both reach.

    The task is the student's losses of labels, or without any, the first loss of outputs; `of` names another loss. The
    norms are averaged over the first `batches` batches of the stage, before its first step. With `follow`, one batch in
    every `batches` is measured during the stage too, and moves the weight.
    """

    share: float = Field(gt=0)
    of: Name | None = None
    batches: int = Field(default=10, ge=1)
    follow: bool = False

    @model_validator(mode="before")
    @classmethod
    def _is_no_schedule(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and set(value) & set(ScheduleOptions.model_fields):
            raise ValueError("a weight is a share or a schedule, not both; give `share` alone, or `start` and `end`")
        return value


def _kind_of_weight(value: Any) -> str:
    """The branch of a weight. Its tag is no key, or the place of an error would be taken for that of the key."""
    keys = set(value) if isinstance(value, Mapping) else set()
    is_share = isinstance(value, GradientShareOptions) or keys & set(GradientShareOptions.model_fields)
    return "relative" if is_share else _kind_of_number(value)


Weight = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ScheduleOptions, Tag("schedule")]
    | Annotated[GradientShareOptions, Tag("relative")],
    Discriminator(_kind_of_weight),
]


def _not_negative(weight: float | ScheduleOptions | GradientShareOptions) -> Any:
    """Refuse a negative weight, which would reward the student for differing from the teacher or the labels."""
    if isinstance(weight, GradientShareOptions):
        return weight
    smallest = min(weight.start, weight.end) if isinstance(weight, ScheduleOptions) else weight
    if smallest < 0:
        got = f", got {smallest:g}" if isinstance(weight, ScheduleOptions) else ""
        raise ValueError(f"expected a number greater than or equal to 0{got}")
    return weight


def schedule(value: Any) -> Any:
    """A Schedule for ScheduleOptions, a Share for GradientShareOptions; any other value unchanged."""
    if isinstance(value, GradientShareOptions):
        return Share(**value.model_dump(exclude_none=True))
    return Schedule(**value.model_dump()) if isinstance(value, ScheduleOptions) else value


class AutoPairs(_Section):
    """`pairs: auto`, or with arguments for `match`."""

    level: Literal["stage", "block"] = "stage"
    num_pairs: int | None = Field(default=None, ge=1)


def _auto_as_mapping(value: Any) -> Any:
    return _read_auto(value, "`auto`, or a mapping of student layers to teacher layers")


def _auto_of_loss_as_mapping(value: Any) -> Any:
    return _read_auto(value, "`auto`, a mapping of student layers to teacher layers, or a list of student layers")


def _read_auto(value: Any, expected: str) -> Any:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{value!r}: expected {expected}")
        return {}
    return value


def _kind_of_pairs(value: Any) -> str:
    is_mapping = isinstance(value, Mapping) and not set(value) & set(AutoPairs.model_fields)
    return "mapping" if is_mapping else "auto"


def _kind_of_pairs_of_loss(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else _kind_of_pairs(value)


class PairOptions(_Section):
    """One pair in its long form.

    `teacher` is the layer that the student's layer learns from. `weight` multiplies the pair's share of every loss. A
    pair of weight 0 is in no loss, and only `probe-kd eval` measures it. `policy`, `tokens`, `normalize`, `projector`,
    `activation` and `grid` override those of a loss that has them.
    """

    teacher: str
    weight: float = Field(default=1.0, ge=0)
    policy: Policy | None = None
    tokens: Tokens | None = None
    normalize: Normalize | None = None
    projector: Projector | None = None
    activation: Activation | None = None
    grid: Grid | None = None

    @property
    def adapter(self) -> dict[str, str]:
        return self.model_dump(exclude={"teacher", "weight"}, exclude_none=True)


_OnePair = Annotated[
    Annotated[str, Tag("word")] | Annotated[PairOptions, Tag("mapping")],
    Discriminator(_mapping_or_word),
]


def _mapping_several_or_word(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else _mapping_or_word(value)


_Pair = Annotated[
    Annotated[str, Tag("word")]
    | Annotated[PairOptions, Tag("mapping")]
    | Annotated[list[_OnePair], Field(min_length=1), Tag("list")],
    Discriminator(_mapping_several_or_word),
]
Pairs = Annotated[
    Annotated[AutoPairs, BeforeValidator(_auto_as_mapping), Tag("auto")] | Annotated[dict[str, _Pair], Tag("mapping")],
    Discriminator(_kind_of_pairs),
]
PairsOfLoss = Annotated[
    Annotated[AutoPairs, BeforeValidator(_auto_of_loss_as_mapping), Tag("auto")]
    | Annotated[dict[str, _Pair], Field(min_length=1), Tag("mapping")]
    | Annotated[list[str], Field(min_length=1), Tag("list")],
    Discriminator(_kind_of_pairs_of_loss),
]


class LossOptions(BaseModel):
    """One loss: its name, its weight, how features are adapted, and the arguments of the loss function.

    `loss` is a name in the table of losses, or `package.module:name` of a custom function, `nn.Module` class or `Loss`,
    which is imported if the command allows it. `reads` says what a custom loss reads, as in `features`, or in
    `[outputs, labels]`; not set: its own attribute `reads` does.

    `student` and `teacher` are the taps that a loss of outputs or labels reads, by default the `output` of the model.

    `weight` and any number among the arguments may be a schedule: `{start: 4, end: 1, epochs: 400}`. `weight` may also
    be a share of the task's gradient: `{share: 0.3}`.

    `pairs` are pairs of the loss's own, in the forms of the recipe's `pairs`, or a list of student layers, which
    selects among those.
    """

    # Other keys are arguments of the loss function, and are checked against its signature.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    loss: str
    reads: (
        Annotated[
            Annotated[list[str], Field(min_length=1), Tag("list")] | Annotated[str, Tag("word")],
            Discriminator(_list_or_word),
        ]
        | None
    ) = None
    weight: Annotated[Weight, AfterValidator(_not_negative)] = 1.0
    policy: Policy = "auto"
    tokens: Tokens = "drop"
    normalize: Normalize = "none"
    projector: Projector = "linear"
    activation: Activation = "none"
    grid: Grid = "smaller"
    of: Literal["student", "teacher"] = "student"
    pairs: PairsOfLoss | None = None
    between: list[tuple[str, str]] = []
    student: TapText | None = None
    teacher: TapText | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the loss function. Raises LossError for a mapping that is not a schedule."""
        return {key: self._read(key, value) for key, value in (self.model_extra or {}).items()}

    @staticmethod
    def _read(key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return schedule(ScheduleOptions.model_validate(value, strict=True))
        except ValidationError as refusal:
            first = refusal.errors()[0]
            raise LossError(f"`{'.'.join(map(str, (key, *first['loc'])))}`: {complaint(first)}") from None


class StageOptions(_Section):
    """One phase of training: losses, epochs, optimizer, scheduler.

    A stage trains only the parameters that its losses reach, and none of the student's layers in `freeze`: names,
    globs, or `backbone` for all but the classifier. Batch norms in frozen layers keep their statistics. With `keep:
    best`, it ends with the weights of the epoch whose weighted sum of losses was lowest on held-out training images
    (`data.holdout`). The gradients of `grad_accum_steps` batches are accumulated for one update of the weights.
    """

    name: Name = "train"
    epochs: int = Field(ge=1)
    losses: dict[Name, LossOptions] = {}
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    clip_grad: float | None = Field(default=None, gt=0)
    grad_accum_steps: int = Field(default=1, ge=1)
    keep: Literal["last", "best"] = "last"
    freeze: (
        Annotated[
            Annotated[list[str], Field(min_length=1), Tag("list")] | Annotated[str, Tag("word")],
            Discriminator(_list_or_word),
        ]
        | None
    ) = None
    teacher_dropping: float | None = Field(default=None, gt=0, le=1)


FINE_TUNING_LR = 1e-4  # a tenth of the default for training from scratch


class TeacherTraining(_Section):
    """How to train the teacher on the labels before the first stage.

    A teacher with weights is fine-tuned, at a default learning rate of 1e-4 instead of 1e-3.
    """

    epochs: int = Field(ge=1)
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ModelOptions(_Section):
    """A model: its name as `probe-kd inspect` takes it, and `model_kwargs` for timm's `create_model`.

    `package.module:function` needs `--allow-import package` on the command line. `grad_checkpointing` is timm's: it
    takes less memory and more time in training, and layers inside of a checkpointed container cannot be read.
    `new_classifier` replaces the classifier of the weights by a new one. A teacher with `train` gets a new classifier
    anyway if its weights have other classes. `output` is the tap that yields the model's output, one vector per image:
    losses of outputs and labels read it unless they name another, and accuracy is measured on it. `[logits]` is an item
    of a tuple, dict or dataclass, `head_dist` the output of a module. `embedding` is the tap whose mean over positions
    is the vector of an image for `evaluate`; not set: what the classifier reads, or the output of a model without one.
    """

    model: str
    pretrained: bool = False
    grad_checkpointing: bool = False
    checkpoint: str | None = None
    new_classifier: bool = False
    model_kwargs: dict[str, Any] = {}
    output: TapText = ""
    embedding: TapText | None = None


class TeacherOptions(ModelOptions):
    """The teacher has weights (`pretrained`, `checkpoint`) or is trained first (`train`).

    For your own function, `pretrained` says that the function loads the weights itself.

    `input_size`, `mean` and `std` are needed if the teacher expects other inputs than the data's size and timm's config
    for it. `class_map` has the teacher's index of each of the student's classes, if the two differ, as a list or a JSON
    file. `same_init` draws the initial weights from the same seed as the student's, so that two models of one
    architecture start equal. `cache` is a folder for the teacher's outputs, so that it does not run twice on the same
    view of an image, in this run or another. `cache_top_k` stores only the largest so many logits, and spreads the rest
    of the probability evenly. `shard` divides its parameters among the processes of a run, once it is frozen.
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
    shard: bool = False

    @model_validator(mode="after")
    def _lower_lr_to_fine_tune(self) -> Self:
        """Lower the default learning rate for a teacher that has weights."""
        if self.train is None or not (self.pretrained or self.checkpoint):
            return self
        optimizer = self.train.optimizer
        if "lr" not in optimizer.model_fields_set:
            train = self.train.model_copy(update={"optimizer": optimizer.model_copy(update={"lr": FINE_TUNING_LR})})
            object.__setattr__(self, "train", train)  # the model is frozen
        return self


class NamedTeacherOptions(TeacherOptions):
    """One of several teachers: the keys of `teacher`, and its weight.

    `weight` multiplies its pairs in every loss, and is its share of the mean of several classifiers.
    """

    weight: float = Field(default=1.0, gt=0)


def classifier_of(options: ModelOptions) -> Literal["same", "new where other", "new"]:
    """Whether a model takes the classifier of its weights: always, only with the right classes, or never."""
    if options.new_classifier:
        return "new"
    return "new where other" if isinstance(options, TeacherOptions) and options.train else "same"


class ShareOptions(_Section):
    """Joint training of student and teacher (Rocket Launching), and the layers that they share.

    `form: weights` shares the convolutions and linear layers in `modules`: `interval`, `bottom`, names, or student
    name: teacher name. `form: trunk` shares all layers up to `at`, which run once. `form: graft` replaces the student's
    layers up to `at` by the teacher's. `at` is one layer, or student layer: teacher layer. `form: none` shares nothing.
    `block` is the gradient block: which parameters a loss between student and teacher may change.
    """

    form: Literal["weights", "trunk", "graft", "none"] = "weights"
    modules: Modules | None = None
    at: Cut | None = None
    block: Block = "output"

    @model_validator(mode="after")
    def _has_keys_of_its_form(self) -> Self:
        needed = {"weights": "modules", "trunk": "at", "graft": "at"}.get(self.form)
        for key in ("modules", "at"):
            if key != needed and getattr(self, key) is not None:
                raise ValueError(f"form `{self.form}` has no `{key}`" + (f"; it has `{needed}`" if needed else ""))
        if self.form != "weights" and needed and getattr(self, needed) is None:
            raise ValueError(f"form `{self.form}` needs `{needed}`: the last layer that both have in common")
        return self

    @property
    def cut(self) -> tuple[Tap, Tap]:
        """The last shared tap of the student and of the teacher. Raises TapError."""
        student_cut, teacher_cut = (
            (self.at, self.at) if isinstance(self.at, str) else next(iter((self.at or {"": ""}).items()))
        )
        return Tap.parse(student_cut), Tap.parse(teacher_cut)


class CompileOptions(_Section):
    """`torch.compile` of the whole `step` (both models, adapters and losses), or of one model.

    `backend` and `mode` are torch's. Every stage compiles again, because it reads other layers.
    """

    target: Literal["step", "student", "teacher"] = "step"
    backend: str = "inductor"
    mode: str | None = None


class AverageOptions(_Section):
    """Arguments of timm's ModelEmaV3 for the student. `warmup` uses a smaller `decay` in the first updates."""

    decay: float = Field(default=0.9998, ge=0, lt=1)
    warmup: bool = False


class LabelledSet(_Section):
    """A labelled data set beside the run's images. Its keys are those of `data`. The run does not train on its labels.

    The vectors of a frozen model are classified: those of the training images are the neighbours, or what a probe is
    fitted to. While the student trains, the images of `holdout`, else of `val_split`, are classified, and at the end
    those of `test_split`; where only one is given it serves both. `every` is the number of epochs between two
    measurements of the student; not set: `val_interval`, 0: only at the end.
    """

    dataset: str = ""
    root: str | None = None
    train_split: str = "train"
    val_split: Annotated[str | None, BeforeValidator(null_as_none_word)] = "validation"
    test_split: str | None = None
    holdout: float = Field(default=0.0, ge=0, lt=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    num_classes: int | None = Field(default=None, ge=1)
    on_error: Literal["raise", "skip"] = "raise"
    download: bool = False
    every: int | None = Field(default=None, ge=0)

    @property
    def is_named(self) -> bool:
        return bool(self.dataset or self.root)

    @property
    def label(self) -> str:
        """What it is called in a file that may be published."""
        return self.dataset or "a folder of images"

    def data(self, data: DataOptions) -> DataOptions:
        """The options by which its images are read: in the size and by the transforms of the run's images."""
        own = {key: getattr(self, key) for key in LabelledSet.model_fields if key != "every"}
        shared = ("input_size", "mean", "std", "interpolation", "crop_pct", "batch_size", "workers")
        return DataOptions.model_validate(own | {key: getattr(data, key) for key in shared})


class KnnOptions(LabelledSet):
    """k-NN: each image has the class for which its `k` nearest training images vote.

    Neighbours are the nearest by cosine, and vote with the weight `exp(cosine / temperature)`.
    """

    k: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)


class LinearOptions(LabelledSet):
    """A linear probe: scikit-learn's logistic regression on standardised vectors.

    `C` is the inverse strength of its penalty. `auto` tries five strengths on a fifth of the training images.
    """

    C: Annotated[
        Annotated[Literal["auto"], Tag("word")] | Annotated[float, Field(gt=0), Tag("number")],
        Discriminator(_number_or_word),
    ] = "auto"


class EvaluateOptions(_Section):
    """What is measured beside the accuracy.

    `knn` and `linear` classify the images of a labelled set by the vectors of the student, the teacher, the baseline
    and the untrained student; one that names no data has those of the other. `pairs` are the explained variance and
    the cosine of every pair; not set: where the student's classes are not measured.
    """

    knn: KnnOptions | None = None
    linear: LinearOptions | None = None
    pairs: bool | None = None

    @property
    def probes(self) -> dict[str, LabelledSet]:
        """The probes by the names of their measures, each with its data."""
        probes: dict[str, LabelledSet] = {
            name: probe for name in ("knn", "linear") if (probe := getattr(self, name)) is not None
        }
        named = [probe for probe in probes.values() if probe.is_named]
        if not named:
            return probes
        keys = [key for key in LabelledSet.model_fields if key != "every"]
        data = {key: getattr(named[0], key) for key in keys}
        return {name: probe if probe.is_named else probe.model_copy(update=data) for name, probe in probes.items()}


def _number(value: Any) -> int | float:
    """Check that a bound is a number, and keep whether it was written as a whole one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


_Bound = Annotated[Any, AfterValidator(_number), WithJsonSchema({"type": "number"})]


def _rising(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
    low, high = bounds
    if not low < high:
        hint = f"; did you mean [{high:g}, {low:g}]?" if high < low else ", and these are equal, so that nothing varies"
        raise ValueError(f"[{low:g}, {high:g}]: expected [least, most]{hint}")
    return bounds


def _above_zero(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
    if bounds[0] <= 0:
        raise ValueError(f"[{bounds[0]:g}, {bounds[1]:g}]: a logarithmic range begins above 0; or take `range`")
    return bounds


class TuneOptions(_Section):
    """What one value of the recipe may be in `probe-kd tune`: one of `log`, `range`, `values` and `from`.

    `log: [0.01, 10]` and `range: [0, 1]` are the least and the greatest number, drawn evenly by the logarithm or by the
    value; in a `range` of whole numbers only whole ones are drawn. `values` lists what may stand there, in YAML.
    `from: match` is for `pairs`: the pairs that `match` finds, with `num_pairs: [least, most]` of them, and with each
    `level` of a list. `from: features` finds pairs and their `normalize` by the features of both models, as
    `match --by features` does, for each number of pairs; the teacher has to have its weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    log: Annotated[tuple[_Bound, _Bound], AfterValidator(_rising), AfterValidator(_above_zero)] | None = None
    range: Annotated[tuple[_Bound, _Bound], AfterValidator(_rising)] | None = None
    values: list[Any] | None = Field(default=None, min_length=2)
    source: Literal["match", "features"] | None = Field(default=None, alias="from")
    num_pairs: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    level: list[Literal["stage", "block"]] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one_form(self) -> Self:
        given = {"log": self.log, "range": self.range, "values": self.values, "from": self.source}
        forms = [name for name, value in given.items() if value is not None]
        if len(forms) != 1:
            written = " and ".join(f"`{name}`" for name in forms) or "none"
            raise ValueError(f"give one of `log`, `range`, `values` and `from`; here is {written}")
        if self.source is None and (self.num_pairs or self.level):
            raise ValueError("`num_pairs` and `level` are of `from: match`, which finds pairs")
        if self.source == "features" and self.level:
            raise ValueError("`level` is of `from: match`; `from: features` chooses among blocks and ends of stages")
        if self.num_pairs and self.num_pairs[0] > self.num_pairs[1]:
            low, high = self.num_pairs
            raise ValueError(f"num_pairs [{low}, {high}]: expected [least, most]; did you mean [{high}, {low}]?")
        return self


class Recipe(_Section):
    """A whole recipe.

    `pairs` maps student taps to teacher taps, or is `auto`. A tap may be a pattern, `glob:blocks.[0-3]` or
    `re:layer[12]`, if both sides of a pair match equally many layers. `teachers` are several teachers by name,
    instead of `teacher`; taps then begin with the name of a teacher, and a student layer may learn from a list of
    theirs. `baseline` also trains the student without a teacher, from the same initial weights, on the same images,
    with the losses that read only labels. `share` trains both models jointly; before that, the teacher is trained
    alone, for comparison. `precision` is accelerate's. Not set: accelerate's own configuration, else `bf16` on a
    GPU that supports it, and `no` elsewhere. `matmul_precision` is that of `torch.set_float32_matmul_precision`.
    Not set: `high` on a GPU in bf16 or fp16. `channels_last` is the memory format of models and images. Not set:
    yes if all models are timm's, except in float32 on a GPU, because convolutions are then faster
    (benchmarks/modes.py, gpu.py); your own model may not support it. `model_ema` also keeps a moving average of the
    student, which restarts in every stage. A checkpoint is written after every epoch, and every `recovery_interval`
    batches in between; the newest `checkpoint_hist` are kept. The student is evaluated every `val_interval` epochs,
    and after the last epoch of a stage. `trackers` are those of accelerate: `tensorboard`, `wandb`. `tune` is read by
    `probe-kd tune` alone: what it may vary, by the path of each value.
    """

    student: ModelOptions
    teacher: TeacherOptions | None = None
    teachers: dict[TeacherName, NamedTeacherOptions] | None = Field(default=None, min_length=1)
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
    evaluate: EvaluateOptions | None = None
    recovery_interval: int = Field(default=0, ge=0)
    val_interval: int = Field(default=1, ge=1)
    checkpoint_hist: int = Field(default=2, ge=1)
    trackers: list[str] = []
    seed: int = Field(default=0, ge=0, lt=2**32)
    tune: dict[str, TuneOptions] | None = Field(default=None, min_length=1)

    @property
    def probes(self) -> dict[str, LabelledSet]:
        """The k-NN and the linear probe, by the names of their measures, each with its data."""
        return self.evaluate.probes if self.evaluate else {}

    @property
    def loss_names(self) -> set[str]:
        """The names of the losses of all stages."""
        return {name for stage in self.stages for name in stage.losses}

    @property
    def paired_layers(self) -> set[str]:
        """The student's layers in the pairs of the recipe and of its losses, as they are written."""
        of_losses = [loss.pairs for stage in self.stages for loss in stage.losses.values()]
        return {name for pairs in (self.pairs, *of_losses) if isinstance(pairs, dict) for name in pairs}

    @property
    def teachers_by_name(self) -> dict[str, TeacherOptions]:
        """The teachers by name; that of `teacher` has an empty name."""
        return {**self.teachers} if self.teachers else {"": self.teacher} if self.teacher else {}

    def with_only(self, name: str) -> Self:
        """The recipe with one of its teachers as `teacher`."""
        return self.model_copy(update={"teacher": self.teachers_by_name[name], "teachers": None})


def all_pairs(value: str | PairOptions | Sequence[str | PairOptions]) -> list[PairOptions]:
    """The pairs of one line of `pairs`, in their long form."""
    values = [value] if isinstance(value, str | PairOptions) else value
    return [item if isinstance(item, PairOptions) else PairOptions(teacher=item) for item in values]
