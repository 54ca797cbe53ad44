"""One term of the loss: a loss function, the features that it compares, their adapters, and its weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from typing import Any, Literal

from probe_kd.engine.spec import Pair, Schedule, Share, Tap, value_at
from probe_kd.errors import LossError, nearest
from probe_kd.methods.adapters import Activation, Grid, Normalize, Policy, Projector, Tokens
from probe_kd.methods.comparisons import Comparison, as_pairs, of_layers, of_outputs
from probe_kd.methods.losses.table import LOSSES, Loss
from probe_kd.methods.losses.trying import try_loss

__all__ = ["ADAPTER_OPTIONS", "MEAN", "Comparison", "Objective"]

MEAN = Tap("mean")  # the name of the mean of several teachers' outputs
# The adapter options that apply to a loss, by what it reads. The others would have no effect there.
_ADAPTABLE = {
    "features": {"policy", "tokens", "normalize", "projector", "activation", "grid"},
    "vectors": {"tokens"},
    "maps": {"grid"},
    "grams": {"policy"},
    "flows": {"policy"},
}
ADAPTER_OPTIONS = ("policy", "tokens", "normalize", "projector", "activation", "grid")
_BESIDE = ("weight", *ADAPTER_OPTIONS, "of", "between", "student", "teacher")


@dataclass(frozen=True)
class Objective:
    """One term of the loss: a loss function, the pairs it compares, and its weight.

    `loss` is a name in `LOSSES`, or a `Loss`. `name` is the key in the Distiller's result, by default the name of
    the loss.

    `pairs` are needed by losses that read layers (hint, fsp, gram, attention). They may be `Pair`s, (student,
    teacher) tuples, or a mapping of student layers to teacher layers. The term is the sum over the pairs, each
    times the weight of the pair.

    `options` are the keyword arguments of the loss function. `policy`, `tokens`, `normalize`, `projector`,
    `activation` and `grid` are those of `adapt`. `weight` and any option may be a Schedule, and `weight` a Share.

    `tokens="all"` compares every part of a pair, as two terms with an adapter each: the class tokens with each other
    (where only one model has one, with the other's mean over positions; where none has one, the means), and the
    grids. Of a pair with a vector on one side, the vectors are compared, as by `cls`.

    `fsp` compares the input and the output of each paired module. With `between`, which names two pairs by their
    student layers, their outputs are the two ends instead. In joint training, `of="teacher"` makes a loss on labels
    train the teacher.

    `student` and `teacher` are the taps that a loss of outputs or labels reads: by default the output of the model, and
    otherwise any tap that yields one vector per image. `[logits]` is an item of an output that is a tuple, a dict or a
    dataclass, `head_dist` one of two heads (DeiT, Touvron et al. 2021, arXiv 2012.12877).

    With several teachers, the taps of a teacher begin with its name, as in `Pair("blocks.11", "dino:blocks.11")`.
    `teacher="mean"`, the default if several classify, compares with the mean of their probabilities, and a list of taps
    with the mean of those (`MeanOfTeachers`). `teacher_weights` are the weights of the teachers by name: each
    multiplies the comparisons with that teacher, and is its share of the mean.

    Raises LossError for an unknown loss or option, or missing pairs, and TapError for text that is not a tap.
    """

    loss: str | Loss
    name: str = ""
    weight: float | Schedule | Share = field(default=1.0, kw_only=True)
    pairs: Sequence[Pair] = field(default=(), kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    policy: Policy = field(default="auto", kw_only=True)
    tokens: Tokens = field(default="drop", kw_only=True)
    normalize: Normalize = field(default="none", kw_only=True)
    projector: Projector = field(default="linear", kw_only=True)
    activation: Activation = field(default="none", kw_only=True)
    grid: Grid = field(default="smaller", kw_only=True)
    of: Literal["student", "teacher"] = field(default="student", kw_only=True)
    between: Sequence[Sequence[str | Tap]] = field(default=(), kw_only=True)
    student: str | Tap = field(default="", kw_only=True)
    teacher: str | Tap | Sequence[str | Tap] = field(default="", kw_only=True)
    teacher_weights: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    outputs: Pair = field(init=False, repr=False, compare=False)
    teacher_taps: tuple[Tap, ...] = field(init=False, repr=False, compare=False)
    resolved: Loss = field(init=False, repr=False, compare=False)
    comparisons: tuple[Comparison, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            names_module = any(mark in self.loss for mark in ":.")
            custom = "; one of your own is written `package.module:name`" if names_module else ""
            raise LossError(
                f"there is no loss {self.loss!r}{nearest(self.loss, LOSSES)}{custom}; the losses: {', '.join(LOSSES)}"
            )
        object.__setattr__(self, "resolved", LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)
        object.__setattr__(self, "name", self.name or self.loss_name)
        object.__setattr__(self, "pairs", tuple(as_pairs(self.pairs)))
        object.__setattr__(self, "between", tuple(tuple(map(Tap.parse, ends)) for ends in self.between))
        object.__setattr__(self, "teacher_taps", tuple(map(Tap.parse, _as_list(self.teacher))))
        object.__setattr__(self, "outputs", Pair(Tap.parse(self.student), self.teacher_taps[0]))
        object.__setattr__(self, "student", self.outputs.student)
        object.__setattr__(self, "teacher", self.teacher_taps if len(self.teacher_taps) > 1 else self.teacher_taps[0])
        self._check()
        object.__setattr__(self, "comparisons", tuple(self._comparisons()))

    @property
    def loss_name(self) -> str:
        """The name of the loss itself, which may be that of a custom function."""
        return self.loss if isinstance(self.loss, str) else self.loss.name

    def _check(self) -> None:
        loss, loss_name = self.resolved, self.loss_name
        if self.name in ("loss", "output"):
            raise LossError(f"an objective cannot be named {self.name!r}: the result has that key already")
        loss.check_call(loss_name)
        loss.check_options(loss_name, self.options, _BESIDE)
        for key, value in self.options.items():
            if isinstance(value, Share):
                raise LossError(
                    f"option {key!r} of {loss_name!r} is a Share, which only `weight` may be; give a number"
                )
        self._try(loss_name)
        if loss.reads_layers and not self.pairs:
            raise LossError(
                f"{loss_name!r} compares layers, and there are no pairs; name them, or let match find them "
                "(`pairs: auto`)"
            )
        if self.of not in ("student", "teacher"):
            raise LossError(
                f"of {self.of!r}: expected 'student' or 'teacher'{nearest(self.of, ('student', 'teacher'))}"
            )
        if self.of == "teacher" and loss.reads != "labels":
            raise LossError(f"{loss_name!r} compares both models, so it is not `of` one of them; leave `of` out")
        _check_outputs(loss, loss_name, self.of, self.outputs)
        if self.between and loss.reads != "flows":
            raise LossError(
                f"{loss_name!r} compares no two layers of one model, so `between` means nothing; leave it out"
            )
        self._check_adapter_options(loss_name)

    def _check_adapter_options(self, loss_name: str) -> None:
        for pair in self.pairs:
            for key in set(pair.adapter) - set(ADAPTER_OPTIONS):
                legal = f"{nearest(key, ADAPTER_OPTIONS)}; it has {ADAPTER_OPTIONS}"
                raise LossError(f"pair {pair} has no choice {key!r}{legal}")
        defaults = {attribute.name: attribute.default for attribute in self.__dataclass_fields__.values()}
        for key in ADAPTER_OPTIONS:
            if getattr(self, key) != defaults[key] and key not in self.adaptable:
                takes_scale = key == "normalize" and "flows" in self.resolved.reads
                alternative = "; `relative: true` takes out the scale" if takes_scale else ""
                raise LossError(
                    f"`{key}` means nothing for {loss_name!r}, which compares {self.resolved.reads}; leave it out"
                    f"{alternative}"
                )

    def check_batch(self, size: int) -> None:
        """Raise LossError if the loss compares the images of a batch, and a batch of `size` is too small for it."""
        if size < 2:
            self._try(self.name, batch=size)

    def _try(self, loss_name: str, batch: int = 2) -> None:
        """Raise LossError for option values that the loss does not take.

        Options that are a `Schedule` are tried at their first and at their last value.
        """
        for epoch in (0, 1):
            weight = value_at(self.weight, epoch, 1)
            options = {key: value_at(value, epoch, 1) for key, value in self.options.items()}
            if not isinstance(weight, int | float) or not isfinite(weight):
                raise LossError(f"weight {weight!r} of {loss_name!r}: expected a finite number")
            self.resolved.check_values(loss_name, options)
            if isinstance(self.loss, str):
                try_loss(self.resolved, loss_name, options, batch=batch, dense=self.is_dense)
        if self.resolved.builds_module:
            changing = [name for name, value in self.options.items() if isinstance(value, Schedule)]
            if changing:
                raise LossError(
                    f"`{changing[0]}` of {loss_name!r} cannot change: the loss is a module, which is built once"
                )

    def _comparisons(self) -> Iterator[Comparison]:
        if self.resolved.reads == "outputs":
            yield of_outputs(self.outputs.student, self.teacher_taps, self.teacher_weights)
        elif self.resolved.reads_layers:
            yield from of_layers(self.resolved, self.pairs, self.between, self.teacher_weights)

    @property
    def adaptable(self) -> set[str]:
        """The adapter options that have an effect for this loss, here or in a pair."""
        return {"grid"} if self.is_dense else _ADAPTABLE.get(self.resolved.reads, set())

    @property
    def is_dense(self) -> bool:
        """Whether the loss compares maps of logits, as of segmentation."""
        return self.resolved.reads == "outputs" and self.options.get("dense") is True

    @property
    def reads_labels(self) -> bool:
        """Whether a step needs the target."""
        return self.resolved.reads == "labels" or "labels" in self.resolved.also

    @property
    def needs_teacher(self) -> bool:
        return bool(self.comparisons) or self.of == "teacher"

    @property
    def taps(self) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
        """The taps of the student and the taps of the teacher that this objective reads."""
        pairs = list(chain.from_iterable(comparison.pairs for comparison in self.comparisons))
        of_labels = {self.of} if self.resolved.reads == "labels" else set()
        students = [pair.student for pair in pairs] + [self.outputs.student] * ("student" in of_labels)
        teachers = [pair.teacher for pair in pairs] + [self.outputs.teacher] * ("teacher" in of_labels)
        return tuple(dict.fromkeys(students)), tuple(dict.fromkeys(teachers))


def _check_outputs(loss: Loss, loss_name: str, of: str, outputs: Pair) -> None:
    """Raise LossError for a tap of an output that the loss does not read."""
    read = () if loss.reads_layers else (of,) if loss.reads == "labels" else ("student", "teacher")
    for side in ("student", "teacher"):
        tap = getattr(outputs, side)
        if tap == Tap("") or side in read:
            continue
        if loss.reads_layers:
            raise LossError(f"{loss_name!r} compares pairs of layers, and no `{side}` output; name {tap} in `pairs`")
        raise LossError(f"{loss_name!r} reads labels and one output, of the {of}; `{side}` means nothing here")


def _as_list(taps: str | Tap | Sequence[str | Tap]) -> Sequence[str | Tap]:
    if isinstance(taps, str | Tap) or not isinstance(taps, Sequence):
        return [taps]
    if not taps:
        raise LossError("`teacher` is an empty list; expected taps, as in ['dino:', 'siglip:'], or 'mean'")
    return taps
