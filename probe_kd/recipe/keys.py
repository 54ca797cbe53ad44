"""Every key of a recipe: a pydantic model for each section, with defaults and bounds.

`reading.py` fills them from a YAML file. Whether they fit the models and the data, `planner.py` checks.
"""

import re
from collections.abc import Mapping
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
    model_validator,
)

from probe_kd.data.options import DataOptions, InputSize
from probe_kd.engine.spec import Schedule, Tap
from probe_kd.errors import LossError
from probe_kd.methods.adapters import Activation, Normalize, Policy, Projector, Tokens
from probe_kd.methods.sharing import Pattern
from probe_kd.methods.teachers import Block
from probe_kd.recipe.form_errors import complaint

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
            raise LossError(f"`{'.'.join(map(str, (key, *first['loc'])))}`: {complaint(first)}") from None


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
