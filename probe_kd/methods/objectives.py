"""One term of the loss: a loss function, the features that it compares, their adapters, and its weight."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import isfinite, prod
from typing import Any, Literal

import torch
from torch import Tensor

from probe_kd.engine.spec import Pair, Schedule, Tap, Trace, Traces, value_at
from probe_kd.errors import AdapterError, LossError, TapError, nearest
from probe_kd.methods.adapters import (
    Activation,
    Adapter,
    Grid,
    Normalize,
    Policy,
    Projector,
    Tokens,
    adapt,
    adapt_maps,
    adapt_matrices,
    adapt_outputs,
)
from probe_kd.methods.ensembles import adapt_mean
from probe_kd.methods.losses.table import LOSSES, Loss
from probe_kd.methods.outputs import output_spec, tensor_at

MEAN = Tap("mean")  # the name of the mean of several teachers' outputs
# The adapter options that apply to a loss, by what it reads. The others would have no effect there.
_ADAPTABLE = {
    "features": {"policy", "tokens", "normalize", "projector", "activation", "grid"},
    "maps": {"grid"},
    "grams": {"policy"},
    "flows": {"policy"},
}


_ADAPTER = ("policy", "tokens", "normalize", "projector", "activation", "grid")
_PARTS = {"cls": "class token", "pool": "mean", "drop": "grid"}  # what `tokens: all` compares
_BESIDE = ("weight", *_ADAPTER, "of", "between", "student", "teacher")
_SHAPES: dict[str, tuple[int, ...]] = {  # of one image, to try a loss on
    "labels": (3,),
    "outputs": (3,),
    "features": (3, 2, 2),
    "maps": (3, 2, 2),
    "grams": (3, 3),
    "flows": (3, 3),
}


@dataclass(frozen=True)
class Comparison:
    """The input of one adapter: a pair of taps, the two ends of a flow, or one output with those of several teachers.

    `weight` is its weight in the objective.
    """

    pairs: tuple[Pair, ...]
    weight: float
    label: str

    def __str__(self) -> str:
        return self.label

    def features(self, side: Literal["student", "teacher"], features: Mapping[Tap, Tensor], *, matrices: bool) -> Any:
        """Select one model's input of the adapter: a tuple of all taps for `matrices`, otherwise the one feature."""
        values = tuple(features[getattr(pair, side)] for pair in self.pairs)
        return values if matrices or (side == "teacher" and self.is_mean) else values[0]

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of the teachers that are compared with; a single teacher may have an empty name."""
        return tuple(dict.fromkeys(pair.teacher.model for pair in self.pairs))

    @property
    def is_mean(self) -> bool:
        """Whether the student is compared with the mean of several teachers' probabilities."""
        return len(self.pairs) > 1 and len(self.teachers) == len(self.pairs)


@dataclass(frozen=True)
class Objective:
    """One term of the loss: a loss function, the pairs it compares, and its weight.

    `loss` is a name in `LOSSES`, or a `Loss`. `name` is the key in the Distiller's result, by default the name of
    the loss.

    `pairs` are needed by losses that read layers (hint, fsp, gram, attention). They may be `Pair`s, (student,
    teacher) tuples, or a mapping of student layers to teacher layers. The term is the sum over the pairs, each
    times the weight of the pair.

    `options` are the keyword arguments of the loss function. `policy`, `tokens`, `normalize`, `projector`,
    `activation` and `grid` are those of `adapt`. `weight` and any option may be a Schedule.

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
    weight: float | Schedule = field(default=1.0, kw_only=True)
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
            loss_names = ", ".join(LOSSES)
            raise LossError(f"there is no loss {self.loss!r}{nearest(self.loss, LOSSES)}; the losses: {loss_names}")
        loss_name = self.loss if isinstance(self.loss, str) else self.loss.function.__name__
        object.__setattr__(self, "resolved", LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)
        object.__setattr__(self, "name", self.name or loss_name)
        object.__setattr__(self, "pairs", tuple(_as_pairs(self.pairs)))
        object.__setattr__(self, "between", tuple(tuple(map(Tap.parse, ends)) for ends in self.between))
        object.__setattr__(self, "teacher_taps", tuple(map(Tap.parse, _as_list(self.teacher))))
        object.__setattr__(self, "outputs", Pair(Tap.parse(self.student), self.teacher_taps[0]))
        object.__setattr__(self, "student", self.outputs.student)
        object.__setattr__(self, "teacher", self.teacher_taps if len(self.teacher_taps) > 1 else self.teacher_taps[0])
        self._check(loss_name)
        object.__setattr__(self, "comparisons", tuple(self._comparisons()))

    def _check(self, loss_name: str) -> None:
        loss = self.resolved
        if self.name in ("loss", "output"):
            raise LossError(f"an objective cannot be named {self.name!r}: the result has that key already")
        loss.check_options(loss_name, self.options, _BESIDE)
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
        self._check_outputs(loss_name)
        if self.between and loss.reads != "flows":
            raise LossError(
                f"{loss_name!r} compares no two layers of one model, so `between` means nothing; leave it out"
            )
        for pair in self.pairs:
            for key in set(pair.adapter) - set(_ADAPTER):
                raise LossError(f"pair {pair} has no choice {key!r}{nearest(key, _ADAPTER)}; it has {_ADAPTER}")
        defaults = {attribute.name: attribute.default for attribute in self.__dataclass_fields__.values()}
        for key in _ADAPTER:
            if getattr(self, key) != defaults[key] and key not in self.adaptable:
                alternative = (
                    "; `relative: true` takes out the scale" if key == "normalize" and "flows" in loss.reads else ""
                )
                raise LossError(
                    f"`{key}` means nothing for {loss_name!r}, which compares {loss.reads}; leave it out{alternative}"
                )

    def _check_outputs(self, loss_name: str) -> None:
        """Raise LossError for a tap of an output that the loss does not read."""
        loss = self.resolved
        read = () if loss.reads_layers else (self.of,) if loss.reads == "labels" else ("student", "teacher")
        for side in ("student", "teacher"):
            tap = getattr(self.outputs, side)
            if tap == Tap("") or side in read:
                continue
            if loss.reads_layers:
                raise LossError(
                    f"{loss_name!r} compares pairs of layers, and no `{side}` output; name {tap} in `pairs`"
                )
            raise LossError(f"{loss_name!r} reads labels and one output, of the {self.of}; `{side}` means nothing here")

    def check_batch(self, size: int) -> None:
        """Raise LossError if the loss compares the images of a batch, and a batch of `size` is too small for it."""
        if size < 2:
            self._try(self.name, batch=size)

    def _try(self, loss_name: str, batch: int = 2) -> None:
        """Call the loss on a few numbers, so that option values which it does not take raise LossError now.

        Options that are a `Schedule` are tried at their first and at their last value.
        """
        for epoch in (0, 1):
            weight, options = (
                value_at(self.weight, epoch, 1),
                {key: value_at(value, epoch, 1) for key, value in self.options.items()},
            )
            if not isinstance(weight, int | float) or not isfinite(weight):
                raise LossError(f"weight {weight!r} of {loss_name!r}: expected a finite number")
            self.resolved.check_values(loss_name, options)
            if not isinstance(self.loss, str):
                continue
            shape = (batch, *self._shape_to_try(options))
            numbers = torch.arange(prod(shape), dtype=torch.float32, device="cpu").sin().reshape(shape)
            target = numbers.cos()
            if self.resolved.reads == "labels":
                target = target.abs() if self.resolved.multilabel else torch.arange(batch, device="cpu") % shape[1]
            try:
                self.resolved.function(numbers, target, **options)
            except LossError:
                raise
            except Exception as refusal:  # torch raises errors of many types
                values = ", ".join(f"{key}={value!r}" for key, value in options.items())
                raise LossError(f"{loss_name!r} does not take {values}: {' '.join(str(refusal).split())}") from None

    def _shape_to_try(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of one image's output or feature. An output has as many classes as an option has numbers."""
        lengths = [len(value) for value in options.values() if isinstance(value, list | tuple) and value]
        reads = self.resolved.reads
        if self.is_dense:
            return _SHAPES["maps"]
        return (lengths[0],) if lengths and reads in ("labels", "outputs") else _SHAPES[reads]

    def _comparisons(self) -> Iterator[Comparison]:
        reads = self.resolved.reads
        if reads == "outputs":
            yield self._of_outputs()
        elif self.between:
            yield from chain.from_iterable(self._between(*ends) for ends in self.between)
        elif reads == "flows":
            for pair in self.pairs:
                before = Pair(*(replace(tap, port="input", items=()) for tap in (pair.student, pair.teacher)))
                yield Comparison((before, pair), self._weight_of(pair), f"{pair}, from input to output")
        elif reads != "labels":
            names = [str(pair) for pair in self.pairs]
            for pair, name in zip(self.pairs, names, strict=True):
                part = (
                    f", {_PARTS[pair.adapter['tokens']]}" if names.count(name) > 1 and "tokens" in pair.adapter else ""
                )
                yield Comparison((pair,), self._weight_of(pair), name + part)

    def expanded(self, student: Trace, teacher: Trace | Traces) -> "Objective":
        """The same objective, with each pair of `tokens="all"` as one pair for every part that is compared.

        A pair of a layer that does not exist stays as it is: its adapter raises TapError.
        """
        pairs = [part for pair in self.pairs for part in self._parts(pair, student, teacher)]
        return self if pairs == list(self.pairs) else replace(self, pairs=pairs)

    def _parts(self, pair: Pair, student: Trace, teacher: Trace | Traces) -> Iterator[Pair]:
        if "tokens" not in self.adaptable or pair.adapter.get("tokens", self.tokens) != "all":
            yield pair
            return
        try:
            specs = student[pair.student], teacher[pair.teacher]
        except TapError:
            yield pair
            return
        vector = "cls" if any(spec.prefix_tokens for spec in specs) else "pool"
        for tokens in (vector, "drop") if all(spec.spatial for spec in specs) else (vector,):
            yield replace(pair, adapter={**pair.adapter, "tokens": tokens})

    def _of_outputs(self) -> Comparison:
        weights = [self.teacher_weights.get(tap.model, 1.0) for tap in self.teacher_taps]
        if len(self.teacher_taps) == 1:
            return Comparison((self.outputs,), weights[0], str(self.outputs))
        shares = zip(self.teacher_taps, weights, strict=True)
        pairs = tuple(Pair(self.outputs.student, tap, weight=weight) for tap, weight in shares)
        names = ", ".join(tap.label for tap in self.teacher_taps)
        return Comparison(pairs, 1.0, f"{self.outputs.student.label} <- mean of {names}")

    def _weight_of(self, pair: Pair) -> float:
        return pair.weight * self.teacher_weights.get(pair.teacher.model, 1.0)

    def _between(self, *ends: str | Tap) -> Iterator[Comparison]:
        """The flow between two layers of the student; one for each teacher that both learn from."""
        pair_of = {(pair.student, pair.teacher.model): pair for pair in self.pairs}
        if len(ends) != 2:
            raise LossError(f"`between` takes two layers of the student at a time, got {len(ends)}")
        teachers = dict.fromkeys(pair.teacher.model for pair in self.pairs)
        for end in ends:
            legal = list(dict.fromkeys(str(pair.student) for pair in self.pairs))
            if str(end) not in legal:
                raise LossError(f"`between` names '{end}', which is in no pair{nearest(str(end), legal)}; {legal} are")
        flows = [
            [pair_of[Tap.parse(end), name] for end in ends]
            for name in teachers
            if all((Tap.parse(end), name) in pair_of for end in ends)
        ]
        if not flows:
            raise LossError(f"`between` names '{ends[0]}' and '{ends[1]}', which learn from no teacher in common")
        for first, second in flows:
            yield Comparison((first, second), first.weight * self._weight_of(second), f"{first} to {second}")

    @property
    def adaptable(self) -> set[str]:
        """The adapter options that have an effect for this loss, here or in a pair."""
        return {"grid"} if self.is_dense else _ADAPTABLE.get(self.resolved.reads, set())

    @property
    def is_dense(self) -> bool:
        """Whether the loss compares maps of logits, as of segmentation."""
        return self.resolved.reads == "outputs" and self.options.get("dense") is True

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

    def adapter(
        self,
        comparison: Comparison,
        student: Trace,
        teacher: Trace | Traces,
        class_map: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ) -> Adapter:
        """Make the adapter of one comparison. `class_map` may be a mapping from the names of teachers.

        Raises AdapterError for features that cannot be compared, TapError for a layer that does not exist, and
        TraceError for an output of several tensors.
        """
        if self.resolved.reads == "outputs":
            class_maps = class_map if isinstance(class_map, Mapping) else {} if class_map is None else {"": class_map}
            read = tensor_at if self.is_dense else output_spec
            student_output = read(student, self.outputs.student, "student")
            teacher_outputs = [read(teacher, tap, "teacher") for tap in self.teacher_taps]
            if self.is_dense and comparison.is_mean:
                raise AdapterError("`dense` compares with one teacher; name it as `teacher` of the loss")
            if comparison.is_mean:
                weights, multilabel = [pair.weight for pair in comparison.pairs], self.resolved.multilabel
                return adapt_mean(student_output, teacher_outputs, weights, class_maps, multilabel=multilabel)
            own_map = class_maps.get(self.outputs.teacher.model)
            return adapt_outputs(student_output, teacher_outputs[0], own_map, dense=self.is_dense, grid=self.grid)
        student_specs = [student[pair.student] for pair in comparison.pairs]
        teacher_specs = [teacher[pair.teacher] for pair in comparison.pairs]
        # A pair's own options come first; with two pairs, those of the second, the end of the flow.
        choices: dict[str, Any] = {key: comparison.pairs[-1].adapter.get(key, getattr(self, key)) for key in _ADAPTER}
        match self.resolved.reads:
            case "maps":
                return adapt_maps(student_specs[0], teacher_specs[0], grid=choices["grid"])
            case "grams" | "flows":
                return adapt_matrices(student_specs, teacher_specs, policy=choices["policy"])
        return adapt(student_specs[0], teacher_specs[0], **choices)


def _as_list(taps: str | Tap | Sequence[str | Tap]) -> Sequence[str | Tap]:
    if isinstance(taps, str | Tap) or not isinstance(taps, Sequence):
        return [taps]
    if not taps:
        raise LossError("`teacher` is an empty list; expected taps, as in ['dino:', 'siglip:'], or 'mean'")
    return taps


def _as_pairs(pairs: Any) -> Iterator[Pair]:
    """Convert Pairs, tuples of two names, or a mapping as in recipes. Raises LossError for anything else."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise LossError(
            f"pairs {pairs!r}: expected what `match(trace(student), trace(teacher))` gives, or pairs of names"
        )
    for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
        if not isinstance(pair, Pair) and (isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2):
            raise LossError(f"pair {pair!r}: expected a Pair, or (student layer, teacher layer)")
        yield pair if isinstance(pair, Pair) else Pair(*pair)
