"""The figures of all candidate layers of a student and a teacher, in one pass of each over some images."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from probe_kd.engine.matching import blocks, stages
from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import FeatureSpec, InputSpec, Side, Tap, Trace
from probe_kd.engine.tracing import trace
from probe_kd.errors import DataError, MatchError
from probe_kd.methods.adapter_plans import FeaturePlan
from probe_kd.methods.inputs import AsTraced, check_images, input_of_traced, resolve_inputs, trace_teachers
from probe_kd.methods.layer_figures import (
    LayerStatistics,
    Vectors,
    cka,
    hsic_sums,
    input_sums,
    joint_sums,
    layer_statistics,
    layer_sums,
    linearly_explained,
    target_sums,
)
from probe_kd.methods.similarity import Sums, added
from probe_kd.methods.views import ImageView

MOST_LAYERS = 16  # of a model
MOST_POSITIONS = 16  # of a map, drawn once
MOST_INPUTS, MOST_TARGETS = 512, 256  # channels of a student's and of a teacher's layer, drawn once
FEWEST_IMAGES = 4  # in a batch: the unbiased estimator of HSIC needs so many

Grid = tuple[int, int]


@dataclass(frozen=True)
class LayerFigures:
    """One candidate layer and its statistics. `is_input` means that it yields the images themselves."""

    spec: FeatureSpec
    statistics: LayerStatistics
    is_input: bool = False

    @property
    def tap(self) -> Tap:
        return self.spec.tap


@dataclass(frozen=True)
class PairFigures:
    """How alike a student's and a teacher's layer are; None for a figure that is not defined.

    `cka` is linear CKA, and `explained` the share of the teacher's feature that a linear map from the student's
    explains on images that it was not fitted on.
    """

    cka: float | None
    explained: float | None


@dataclass(frozen=True)
class FeatureFigures:
    """The candidate layers of a student and a teacher in forward order, with the figures of every pair.

    `pairs` has a row for each layer of the student and a column for each of the teacher. `within_student` and
    `within_teacher` have the CKA of every two layers of one model. All are of `images` images.
    """

    images: int
    student: tuple[LayerFigures, ...]
    teacher: tuple[LayerFigures, ...]
    pairs: tuple[tuple[PairFigures, ...], ...]
    within_student: tuple[tuple[float | None, ...], ...]
    within_teacher: tuple[tuple[float | None, ...], ...]

    @property
    def by_side(self) -> dict[Side, tuple[LayerFigures, ...]]:
        """The layers of both models, the student's first."""
        return {"student": self.student, "teacher": self.teacher}

    def of(self, student: str | Tap, teacher: str | Tap) -> PairFigures:
        """The figures of a pair. Raises MatchError for a layer that is no candidate."""
        row, column = self.indices(student, teacher)
        return self.pairs[row][column]

    def indices(self, student: str | Tap, teacher: str | Tap) -> tuple[int, int]:
        """The row and column of a pair. Raises MatchError for a layer that is no candidate."""
        return _index(self.student, student), _index(self.teacher, teacher)


def _index(layers: Sequence[LayerFigures], tap: str | Tap) -> int:
    taps = [layer.tap for layer in layers]
    if Tap.parse(tap) not in taps:
        raise MatchError(f"'{tap}' was not measured; the candidates: {', '.join(map(str, taps))}")
    return taps.index(Tap.parse(tap))


def measure_features(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor | Sequence[Any]],
    *,
    student_input: InputSpec | None = None,
    teacher_input: InputSpec | None = None,
    student_trace: Trace | None = None,
    teacher_trace: Trace | None = None,
    seed: int = 0,
) -> FeatureFigures:
    """Measure the layers of a student and a teacher, and every pair of them, in one pass of each over some images.

    `batches` are image tensors (batch, channels, height, width), or sequences that begin with one, normalised for the
    student, as in a `Distiller`; `student_input` and `teacher_input` are as there. A few hundred images are enough, in
    random order and in batches of 4 at least, better 64. Labels are not read.

    The candidates are the blocks and stage ends of each model, at most 16. Of a layer, 16 positions are read, and for
    the linear map 512 channels of the student's and 256 of the teacher's, which `seed` draws once. Only sums over the
    images are kept, in float64: at most 2 MB for a pair and 4 MB for a layer of the student at each grid at which it is
    compared, so about 1 GB for 16 layers of 512 channels each, beside all candidate features of one batch.

    The teacher runs in eval mode. So does the student, except that its batch norms use the statistics of the batch, as
    in a first step of training. Neither is changed.

    Raises DataError if there are too few images, MatchError for a model without layers, and LossError for images that
    do not fit.
    """
    sides = _sides(student, teacher, student_input, teacher_input, student_trace, teacher_trace)
    meter = _Meter(sides[0].layers, sides[1].layers, seed)
    with torch.no_grad(), _as_before_training(student), _evaluating(teacher):
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            check_images(images, sides[0].channels)
            if len(images) >= FEWEST_IMAGES:
                meter.add(*(side.run(images) for side in sides))
    return meter.figures()


def _sides(
    student: nn.Module,
    teacher: nn.Module,
    student_input: InputSpec | None,
    teacher_input: InputSpec | None,
    student_trace: Trace | None,
    teacher_trace: Trace | None,
) -> "tuple[_Side, _Side]":
    """Both models, with inputs and traces that are not given as a `Distiller` finds them."""
    student_trace = student_trace or trace(student, student_input.size if student_input else None, training=True)
    given = {} if teacher_input is None else {"": teacher_input}
    resizes, student_input = student_input is not None, student_input or InputSpec(student_trace.input_size)
    student_input, inputs = resolve_inputs(student, {"": teacher}, student_input, given)
    traces = trace_teachers(
        {"": teacher}, inputs, {"": teacher_trace} if teacher_trace else {}, student_input, training=False
    )
    teacher_input = inputs.get("") or input_of_traced(teacher, student_input, traces.by_model[""])
    own_view = ImageView(student_input, student_input) if resizes else AsTraced(student_input.size)
    return (
        _Side(student, own_view, candidates(student_trace), student_input.size[0]),
        _Side(teacher, ImageView(student_input, teacher_input), candidates(traces.by_model[""]), teacher_input.size[0]),
    )


def candidates(traced: Trace) -> list[FeatureSpec]:
    """The blocks and stage ends of a model, one for each tensor, in forward order; all stage ends, and 16 at most."""
    ends = stages(traced)
    chosen = {spec.tensor: spec for spec in sorted(ends, key=lambda spec: len(str(spec.tap)))}
    others = [spec for spec in blocks(traced) if spec.tensor not in chosen]
    room = max(0, MOST_LAYERS - len(chosen))
    if len(others) > room:
        others = [others[round((index + 0.5) * len(others) / room - 0.5)] for index in range(room)]
    return sorted([*chosen.values(), *others], key=lambda spec: spec.order)


class _Side:
    """A model on its device, the view that it has of an image, and its candidates."""

    def __init__(self, model: nn.Module, view: nn.Module, layers: Sequence[FeatureSpec], channels: int) -> None:
        self.channels = channels
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.layers, self.view = layers, view.to(self.device)
        self.probe = Probe(model, layers)

    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The images as the model sees them, and its candidate features."""
        seen: Tensor = self.view(images.to(self.device))
        features = self.probe(seen)
        return seen, [features[spec.tap] for spec in self.layers]


class _Meter:
    """All sums over the images so far."""

    def __init__(self, student: Sequence[FeatureSpec], teacher: Sequence[FeatureSpec], seed: int) -> None:
        self.student, self.teacher, self.images = student, teacher, 0
        self.drawn = _Drawn(seed)
        self.of_layers: list[Sums] = [{} for _ in (*student, *teacher)]
        self.is_input = [True for _ in (*student, *teacher)]
        self.hsic: Sums = {}
        # Of each half of the images. Inputs and targets are keyed by their layer and the grid at which it is compared.
        self.halves: tuple[dict[Any, Sums], dict[Any, Sums]] = ({}, {})

    def add(self, *sides: tuple[Tensor, list[Tensor]]) -> None:
        """Add a batch: what the student and the teacher see of the images, and their features."""
        views: list[Tensor] = []
        for seen, features in sides:
            for feature in features:
                index = len(views)
                spec = (*self.student, *self.teacher)[index]
                view = self._view(spec, feature, _grid(spec))
                sums = layer_sums(view, self.drawn.first(view.shape[-1], MOST_INPUTS))
                self.of_layers[index] = added(self.of_layers[index], sums)
                self.is_input[index] &= _is_same(spec, feature, seen)
                views.append(view)
        self.images += len(views[0])
        self.hsic = added(self.hsic, hsic_sums([view.to(views[0].device) for view in views]))
        self._add_pairs([feature for _, features in sides for feature in features])

    def _add_pairs(self, features: Sequence[Tensor]) -> None:
        inputs: dict[tuple[int, Grid], Tensor] = {}
        targets: dict[tuple[int, Grid], Tensor] = {}
        for row, column, grid in self._compared():
            if (row, grid) not in inputs:
                view = self._view(self.student[row], features[row], grid)
                inputs[row, grid] = view[..., self.drawn.first(view.shape[-1], MOST_INPUTS)]
            if (column, grid) not in targets:
                view = self._view(self.teacher[column], features[len(self.student) + column], grid)
                drawn = view[..., self.drawn.first(view.shape[-1], MOST_TARGETS)]
                targets[column, grid] = drawn.to(inputs[row, grid].device)
        for half, sums in enumerate(self.halves):
            parts = slice(half, None, 2)
            for place, view in inputs.items():
                _add(sums, ("student", *place), input_sums(view[parts]))
            for place, view in targets.items():
                _add(sums, ("teacher", *place), target_sums(view[parts]))
            for row, column, grid in self._compared():
                _add(sums, (row, column), joint_sums(inputs[row, grid][parts], targets[column, grid][parts]))

    def _compared(self) -> Iterator[tuple[int, int, Grid]]:
        """Every pair, with the grid at which a hint would compare it: the smaller height and width."""
        for row, student in enumerate(self.student):
            for column, teacher in enumerate(self.teacher):
                (height, width), (other_height, other_width) = _grid(student), _grid(teacher)
                yield row, column, (min(height, other_height), min(width, other_width))

    def _view(self, spec: FeatureSpec, feature: Tensor, grid: Grid) -> Vectors:
        """The vectors of a feature at some positions of a grid."""
        map_ = _as_map(spec, feature, grid).flatten(2)
        return map_[..., self.drawn.first(map_.shape[-1], MOST_POSITIONS)].transpose(1, 2)

    def figures(self) -> FeatureFigures:
        if self.images < 2 * FEWEST_IMAGES:
            raise DataError(
                f"{self.images} images to measure features on; give a few hundred, in batches of {FEWEST_IMAGES} at "
                "least"
            )
        layers = [
            LayerFigures(spec, layer_statistics(sums), is_input)
            for spec, sums, is_input in zip([*self.student, *self.teacher], self.of_layers, self.is_input, strict=True)
        ]
        split = len(self.student)
        table = [[_or_none(value) for value in row] for row in cka(self.hsic).tolist()]
        explained = {(row, column): self._explained(row, column, grid) for row, column, grid in self._compared()}
        return FeatureFigures(
            self.images,
            tuple(layers[:split]),
            tuple(layers[split:]),
            tuple(
                tuple(PairFigures(value, explained[row, column]) for column, value in enumerate(values[split:]))
                for row, values in enumerate(table[:split])
            ),
            tuple(tuple(values[:split]) for values in table[:split]),
            tuple(tuple(values[split:]) for values in table[split:]),
        )

    def _explained(self, row: int, column: int, grid: Grid) -> float | None:
        halves = [
            {**sums["student", row, grid], **sums["teacher", column, grid], **sums[row, column]} for sums in self.halves
        ]
        if not all(bool(value.isfinite().all()) for sums in halves for value in sums.values()):
            return None
        return _or_none(linearly_explained(halves))


def _as_map(spec: FeatureSpec, feature: Tensor, grid: Grid) -> Float[Tensor, "batch channels height width"]:
    plan = FeaturePlan(spec, "drop")
    plan.to_map(grid)
    map_: Tensor = nn.Sequential(*plan.steps)(feature)
    return map_


def _is_same(spec: FeatureSpec, feature: Tensor, images: Tensor) -> bool:
    """Whether a feature is the images that the model sees."""
    if (spec.channels, spec.grid) != (images.shape[1], tuple(images.shape[2:])):
        return False
    return torch.equal(_as_map(spec, feature, _grid(spec)), images)


def _add(sums: dict[Any, Sums], place: Any, more: Sums) -> None:
    sums[place] = added(sums.get(place, {}), more)


class _Drawn:
    """Positions and channels that are read, drawn once for each number of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.orders: dict[int, Tensor] = {}

    def first(self, count: int, most: int) -> Tensor:
        """At most `most` of `count` indices, in increasing order."""
        if count not in self.orders:
            generator = torch.Generator().manual_seed(self.seed)
            self.orders[count] = torch.randperm(count, generator=generator)
        return self.orders[count][:most].sort().values


def _grid(spec: FeatureSpec) -> Grid:
    assert spec.grid is not None  # blocks and stage ends have one
    return spec.grid


def _or_none(value: float) -> float | None:
    return value if isfinite(value) else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's former mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _as_before_training(model: nn.Module) -> Iterator[None]:
    """Eval mode, with batch norms that use the statistics of the batch and do not keep them.

    The running statistics of an untrained model are 0 and 1, and let its features explode or vanish.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    with _evaluating(model):
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield
        finally:
            for norm, tracks in zip(norms, tracked, strict=True):
                norm.track_running_stats = tracks
