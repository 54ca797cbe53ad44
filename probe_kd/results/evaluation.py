"""Evaluate a run: accuracy and calibration of each model, and how closely the student matches its teacher.

A low distillation loss does not imply a better student (Stanton et al. 2021, arXiv 2106.05945), so `evaluate` measures
the models themselves. Sums are accumulated per batch in float64, so memory does not grow with images times features.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from probe_kd.data.datasets import class_names
from probe_kd.data.loading import loader, readable
from probe_kd.data.record import RECORD, DataRecord
from probe_kd.engine.models import build_model, device_of
from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import InputSpec, Layout, Pair, Tap, Trace
from probe_kd.engine.tracing import trace
from probe_kd.engine.weights import load_weights
from probe_kd.errors import DataError, RunError, for_all, nearest
from probe_kd.files.run_folder import RECIPE, check_inputs, check_own, runs_beside, why_no_run
from probe_kd.methods.adapters import Adapter, ImageView, pooled
from probe_kd.methods.ensembles import MeanOfTeachers
from probe_kd.methods.objectives import Comparison
from probe_kd.methods.precision import exact
from probe_kd.methods.predictions import average_precisions, class_logits, mean_average_precision
from probe_kd.methods.similarity import PairSums, Sums, added, cka_sums, linear_cka
from probe_kd.methods.targets import compared, make_adapters
from probe_kd.recipe.keys import Recipe, TeacherOptions
from probe_kd.recipe.planner import Plan, PlannedTeacher, plan
from probe_kd.recipe.reading import load
from probe_kd.recipe.sections.sharing import join
from probe_kd.recipe.writing import command_to_go_on, inputs_of
from probe_kd.training.devices import mixed_precision
from probe_kd.training.processes import own_accelerator, own_images
from probe_kd.training.state import weights_file

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassCalibrationError

Split = Literal["test", "val", "train", "held_out"]
BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Scores:
    """The metrics of one model over all images of a split.

    `top1`, `top5` (None for five classes or fewer) and `agreement` are fractions in 0..1, `nll` and `kl` are in nats
    per image, and `calibration_error` is the expected calibration error. `agreement` and `kl` compare with the teacher;
    both are None for a teacher, and in a run without one. With several teachers, they compare with the weighted mean of
    the probabilities of those that classify, and `agreements` has the agreement with each by name. `weights` is the
    file in the run's folder, or the other source of the weights. All metrics of a model that does not classify
    (`Plan.classifies`) are None, but for the agreement and KL of outputs that a loss compares without labels.
    With several labels an image, `map` is the mean average precision in 0..1, `average_precisions` are those of the
    classes (None for a class that no image has), and the other metrics are None.
    """

    role: str
    model: str
    weights: str
    top1: float | None = None
    nll: float | None = None
    calibration_error: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    map: float | None = None
    average_precisions: Mapping[str, float | None] | None = None
    agreements: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Similarity:
    """How similar a layer of the student and one of the teacher are; `note` gives the reason for a missing value.

    `cka` is the linear CKA of the student's layer in 0..1, and `cka_alone` that of the baseline's. `explained_variance`
    is the fraction of the teacher's variance that the adapter of this loss explains, at most 1, and `cosine` the mean
    cosine of both sides after it. Layers that no loss compares have an empty `stage`.
    """

    stage: str
    loss: str
    student: str
    teacher: str
    cka: float | None
    cka_alone: float | None
    explained_variance: float | None
    note: str
    cosine: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: `scores` of every model, the student first, and the similarity of each pair."""

    run: str
    split: str
    images: int
    scores: tuple[Scores, ...]
    pairs: tuple[Similarity, ...]
    notes: tuple[str, ...] = ()


def evaluate(
    run: str | Path,
    *,
    weights: str | Path | None = None,
    ema: bool = False,
    split: Split = "test",
    batch_size: int | None = None,
    device: str | None = None,
    root: str | Path | None = None,
    allow_import: Sequence[str] = (),
) -> Evaluation:
    """Measure every model of a finished run, in eval mode, on images without augmentation.

    `run` is a folder that `probe-kd train` wrote. `weights` replaces the student's weights; `ema` selects the moving
    averages of the student and the baseline. `split` is `test`, `val` (if it differs from the test images), `train`, or
    `held_out` (`data.holdout`). `batch_size` and the precision default to the recipe's, `device` to accelerate's
    choice. `root` is the new place of data that have moved. `allow_import` lists the packages whose functions the
    recipe may name as models. Classes are numbered as in the run's `data.json`, whatever folders the data now contain.

    For each model, over the student's classes: top-1 and (for more than five classes) top-5 accuracy as fractions in
    0..1, the negative log-likelihood in nats per image, and the expected calibration error (Guo et al. 2017,
    arXiv 1706.04599; 15 bins, l1). For the student and the baseline, against the teacher (with `share`, the teacher
    that trained with the student): the fraction of images with equal predictions, and KL(teacher || student) at
    temperature 1, in nats per image. Each model gets the images as in the measurements of its training, with its own
    normalisation and size. With several labels an image, instead the average precision of every class, and its mean.

    For each pair of layers: the linear CKA (`linear_cka`) of one vector per image, the mean of the feature over its
    positions without class tokens. If a loss compares the layers through an adapter, also the fraction of the variance
    of the target that the adapted student feature explains (`explained_variance`), with the adapter as its stage left
    it. Both use the final student, also for earlier stages. `normalize: channel` standardises the target per batch, as
    in training, so the fraction then depends on the batch size.

    Works in several processes (`accelerate launch`); each returns the whole result. Raises RunError if the folder is
    not a finished run, or for an option that the run does not support; RecipeError if the recipe no longer fits the
    data or the models; WeightsError for weights that do not fit; DataError for labels that are not classes, and for
    held-out images from other training images than the run's. Other differences of the images are reported in `notes`.
    """
    folder = Path(run)
    recipe, student = _recipe_of(folder), _weights_of_student(folder, weights, ema=ema)
    sets = () if root is None else (f"data.root={json.dumps(str(root))}",)
    source = load(recipe, sets=sets)
    _check_files(folder, source.recipe)
    record = DataRecord.read(folder)
    planned = plan(source, allow_import=allow_import, record=record)
    images, notes = _images(planned, split), planned.datasets.other_than(record, split)
    with own_accelerator() as accelerator:
        place = _place(accelerator, device)
        rows = list(_compared(planned, folder, place))
        entries = [entry.to(place) for entry in _entries(planned, folder, student, rows, ema=ema)]
        meter = _Meter(planned, entries, rows, accelerator)
        precision = mixed_precision(planned.recipe, place.type) or accelerator.mixed_precision
        for views, target in _batches(planned, images, entries, accelerator, batch_size):
            with torch.no_grad():
                features = {}
                for entry in entries:
                    with _autocast(precision, place):
                        features[entry.role] = entry.features(views[entry.images].to(place))
                meter.update(features, target.to(place))
        held_out = split == "test" and planned.datasets.test is planned.datasets.held_out  # there is no other
        return replace(meter.result(str(folder), "held_out" if held_out else split), notes=notes)


@torch.no_grad()
def vectors(
    planned: Plan, run: Path, of_student: Sequence[Tap], of_teacher: Sequence[Tap], *, images: int, seconds: float
) -> tuple[dict[Tap, Float[Tensor, "images _"]], dict[Tap, Float[Tensor, "images _"]]]:
    """One vector per test image for layers of a run's student and teacher, the same vectors that `evaluate` compares.

    Uses at most `images` test images, and stops after `seconds`. The images are drawn at random, the same for every run
    on that data. Layers that are not features of single images are left out. Runs in this process only, on torch's
    current accelerator. Raises RunError for a run without a teacher or without its weights, and DataError without
    images.
    """
    if not planned.teachers:
        raise RunError(f"the run in {run} has no teacher")
    _check_files(run, planned.recipe)
    file = _weights_of_student(run, None, ema=False)
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    student, inputs = _student(planned, file), (planned.student_input, _largest_input(planned))
    entries = [
        _entry("student", planned.trained.model, student, file.name, inputs, of_student).to(place),
        *(_teacher_entry(planned, teacher, run, of_teacher).to(place) for teacher in planned.teachers.values()),
    ]
    count = len(planned.datasets.test)  # type: ignore[arg-type]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:images].tolist()
    if not chosen:
        raise DataError("there are no test images")
    student_vectors, *vectors_of_teachers = _vectors(planned, entries, chosen, place, seconds)
    return student_vectors, {tap: vector for of_one in vectors_of_teachers for tap, vector in of_one.items()}


def _recipe_of(folder: Path) -> Path:
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        return recipe
    near = nearest(folder.name, runs_beside(folder))
    raise RunError(f"{folder} is not the folder of a run ({why_no_run(folder)}){near}")


def _check_files(folder: Path, recipe: Recipe) -> None:
    """Raise RunError if a file that the figures depend on has changed since the run."""
    check_own(folder, (RECIPE, RECORD))
    advice = "Figures would be of other models than the run's: put the former file back"
    check_inputs(folder, inputs_of(recipe, trained=True), advice)


def _weights_of_student(folder: Path, weights: str | Path | None, *, ema: bool) -> Path:
    if weights is not None and ema:
        raise RunError("`weights` and `ema` are two choices of the student's weights; give one of the two")
    if weights is not None:
        return Path(weights)
    if not (folder / "student.safetensors").is_file():
        raise _unfinished(folder, "student.safetensors")
    if not ema:
        return folder / "student.safetensors"
    average = folder / "student-ema.safetensors"
    if not average.is_file():
        raise RunError(f"{folder} has no {average.name}: its recipe kept no moving average of the student")
    return average


def _unfinished(folder: Path, name: str) -> RunError:
    if (folder / "summary.json").is_file():
        return RunError(
            f"{folder / name} is gone, which the run wrote: put it back from a copy, or begin anew by --overwrite"
        )
    return RunError(f"the run in {folder} is not finished: it has no {name}; go on with it: {command_to_go_on(folder)}")


def _place(accelerator: Accelerator, device: str | None) -> torch.device:
    if device is None:
        default: torch.device = accelerator.device
        return default
    if accelerator.num_processes > 1:
        raise RunError(f"device {device!r}: of several processes each has its own; leave it out")
    return device_of(device)


def _images(planned: Plan, split: Split) -> Dataset[Any]:
    if split not in get_args(Split):
        raise RunError(f"split {split!r}: expected one of {', '.join(map(repr, get_args(Split)))}")
    images: Dataset[Any] | None = getattr(planned.datasets, split)
    if images is None and split == "val":
        raise RunError(f"this run has no validation images beside its test images: {planned.datasets.measured_on}")
    if images is None:
        raise RunError("this run held no training images out; `data: {holdout: 0.1}` in a recipe does")
    return images


@dataclass(frozen=True)
class _Evaluated:
    """One model that is measured.

    `images` is the form of the images that it loads, and `output` the tap of its logits. `pools` maps each compared
    feature to the module that pools it to one vector per image. `classes` selects logits, if not all of them count.
    `output` is None for a model that does not classify.
    `teacher` is the name of one of several teachers, with which the taps of its features begin.
    """

    role: str
    name: str
    weights: str
    probe: Probe
    view: ImageView
    images: InputSpec
    output: Tap | None
    pools: Mapping[Tap, nn.Module]
    classes: tuple[int, ...] | None = None
    teacher: str = ""

    def to(self, place: torch.device) -> Self:
        self.probe.model.to(place)
        self.view.to(place)
        return self

    def features(self, images: Tensor) -> dict[Tap, Tensor]:
        features = self.probe(self.view(images))
        return {replace(tap, model=self.teacher): feature.float() for tap, feature in features.items()}

    def logits(self, features: Mapping[Tap, Tensor]) -> Float[Tensor, "batch classes"]:
        assert self.output is not None
        logits = features[self.output]
        return logits if self.classes is None else logits[:, list(self.classes)]

    @property
    def is_student(self) -> bool:
        """Whether it is compared with the teacher."""
        return not self.role.startswith("teacher")


_NOT_ADAPTED = {  # losses that bring the two models to no common shape
    "maps": "each side keeps its own channels",
    "vectors": "each side keeps its own channels",
    "all_pairs": "all pairs are compared at once",
}


@dataclass
class _Compared:
    """One row of the table of pairs, with its sums. `why` is the reason for a missing adapter."""

    pair: Pair
    stage: str = ""
    loss: str = ""
    comparison: Comparison | None = None
    of_matrices: bool = False
    adapter: Adapter | None = None
    why: str = "no loss compares it"
    sums: PairSums = field(default_factory=PairSums)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.comparison.pairs if self.comparison else (self.pair,)

    def update(self, of_student: Mapping[Tap, Tensor], of_teacher: Mapping[Tap, Tensor], count: int) -> None:
        """Add the first `count` images of a batch."""
        if self.adapter is None or self.comparison is None:
            return
        student_features = self.comparison.features("student", of_student, several=self.of_matrices)
        teacher_features = self.comparison.features("teacher", of_teacher, several=self.of_matrices)
        predicted, target = self.adapter(student_features, teacher_features)
        self.sums.add(predicted[:count], target[:count], of_matrices=self.of_matrices)


def _compared(planned: Plan, folder: Path, place: torch.device) -> Iterator[_Compared]:
    """Every comparison of layers in every stage, and the pairs that are in none."""
    used = set[tuple[Tap, Tap]]()
    for index, (stage, objectives) in enumerate(zip(planned.recipe.stages, planned.objectives, strict=True)):
        traces = planned.traces
        if traces is None or not any(objective.resolved.reads_layers for objective in objectives):
            continue
        adapters = make_adapters(objectives, planned.trained, traces, planned.class_maps).to(place).eval()
        file = folder / f"adapters-{index}.safetensors"
        if adapters.state_dict() and file.is_file():
            load_weights(adapters, file)
        for objective, comparison, adapter in compared(objectives, adapters):
            if not objective.resolved.reads_layers:
                continue
            used |= {(pair.student, pair.teacher) for pair in comparison.pairs}
            why, matrices = "", objective.resolved.reads_matrices
            if objective.resolved.reads in _NOT_ADAPTED:
                why = _NOT_ADAPTED[objective.resolved.reads]
            elif not objective.resolved.predicts:
                why = "its loss does not compare values"
            elif (adapter.parameter_count or not adapter.is_fitted) and not file.is_file():
                why = f"the run has no {file.name}"
            row = _Compared(comparison.pairs[-1], stage.name, objective.name, comparison, matrices, adapter, why)
            yield replace(row, adapter=None) if why else row
    yield from (_Compared(pair) for pair in planned.every_pair if (pair.student, pair.teacher) not in used)


def _entries(
    planned: Plan, folder: Path, student: Path, rows: Sequence[_Compared], *, ema: bool
) -> Iterator[_Evaluated]:
    """The student, then the baseline, the teacher, and the teacher baseline, as far as the run has them."""
    pairs = [pair for row in rows for pair in (row.pair, *row.pairs)]
    of_student, of_teacher = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
    student_input = planned.student_input
    name = student.name if student.parent == folder else str(student)
    inputs = (student_input, _largest_input(planned))
    output, plain_output = (
        tap if planned.classifies("student") or planned.agrees_without_labels else None
        for tap in (planned.trained_output, planned.output_of("student"))
    )
    yield _entry("student", planned.trained.model, _student(planned, student), name, inputs, of_student, output)
    baseline, average = weights_file(folder, "baseline"), weights_file(folder, "baseline", "-ema")
    baseline = average if ema and average.is_file() else baseline
    if baseline.is_file():
        # A graft takes the teacher's size, and its baseline its own.
        inputs = (replace(student_input, size=planned.student.input_size), inputs[1])
        model = _loaded(_built(planned.student), baseline)
        taps = [] if planned.grown else of_student
        yield _entry("baseline", planned.student.model, model, baseline.name, inputs, taps, plain_output)
    yield from _teacher_entries(planned, folder, of_teacher)


def _largest_input(planned: Plan) -> InputSpec:
    """The student's input, in the size of the largest model."""
    largest = planned.student_input
    for teacher in planned.teachers.values():
        largest = largest.covering(teacher.input)
    return largest


def _teacher_entries(planned: Plan, folder: Path, taps: Sequence[Tap]) -> Iterator[_Evaluated]:
    for teacher in planned.teachers.values():
        entry = _teacher_entry(planned, teacher, folder, taps)
        yield entry
        if planned.recipe.share:
            has_weights = teacher.options.pretrained or teacher.options.checkpoint is not None
            model, name = _teacher(teacher.trace, teacher.options, folder, "teacher baseline", trained=not has_weights)
            inputs = teacher.input, teacher.input
            yield _entry("teacher baseline", teacher.trace.model, model, name, inputs, [], entry.output)


def _teacher_entry(planned: Plan, teacher: PlannedTeacher, folder: Path, taps: Sequence[Tap]) -> _Evaluated:
    """A teacher with the taps that are its own."""
    trained = planned.recipe.share is not None or teacher.options.train is not None
    model, name = _teacher(teacher.trace, teacher.options, folder, teacher.role, trained=trained)
    own_taps = [tap.local for tap in taps if tap.model == teacher.name]
    is_compared = planned.agrees_without_labels and teacher.name in planned.compared_outputs
    is_read = planned.classifies(teacher.role) or is_compared
    output = planned.output_of(teacher.role) if is_read else None
    inputs = teacher.input, teacher.input
    entry = _entry(teacher.role, teacher.trace.model, model, name, inputs, own_taps, output)
    pools = {replace(tap, model=teacher.name): pool for tap, pool in entry.pools.items()}
    named_output = None if entry.output is None else replace(entry.output, model=teacher.name)
    return replace(entry, classes=teacher.class_map, teacher=teacher.name, pools=pools, output=named_output)


def _entry(
    role: str,
    name: str,
    model: nn.Module,
    weights: str,
    inputs: tuple[InputSpec, InputSpec],
    taps: Sequence[Tap],
    output: Tap | None = None,
) -> _Evaluated:
    """`inputs` are those of this model and of the other one; `output` is the tap of its logits, if it classifies."""
    own, other = inputs
    # Traced again in eval mode, in which outputs and overwritten features may differ from training mode.
    traced = trace(model.eval(), own.size)
    specs = [replace(traced[tap], tap=tap) for tap in dict.fromkeys([*taps, *([] if output is None else [output])])]
    pools = {tap: pooled(traced[tap]) for tap in dict.fromkeys(taps) if traced[tap].layout is not Layout.OTHER}
    probe = Probe(model, specs)
    return _Evaluated(role, name, weights, probe, ImageView(own, own), own.covering(other), output, pools)


def _built(traced: Trace, *, pretrained: bool = False) -> nn.Module:
    return build_model(traced.model, traced.model_kwargs, pretrained=pretrained)


def _loaded(model: nn.Module, path: str | Path) -> nn.Module:
    load_weights(model, path)
    return model


def _student(planned: Plan, path: Path) -> nn.Module:
    """The student as it was trained. The file holds shared weights too; a graft needs the teacher."""
    student, share = _built(planned.student), planned.recipe.share
    if share is not None and share.form == "graft" and planned.teacher is not None:
        student, _ = join(share, student, _built(planned.teacher), planned.student, planned.teacher)
    return _loaded(student, path)


def _teacher(
    traced: Trace, options: TeacherOptions, folder: Path, role: str, *, trained: bool
) -> tuple[nn.Module, str]:
    """The teacher with the weights that the run wrote, or else those of the recipe, and the name of these weights."""
    file = weights_file(folder, role)
    if file.is_file():
        return _loaded(_built(traced), file), file.name
    if trained:
        raise _unfinished(folder, file.name)
    model = _built(traced, pretrained=options.pretrained)
    if options.checkpoint:
        load_weights(model, options.checkpoint)
    return model, options.checkpoint or "pretrained"


def _batches(
    planned: Plan, images: Dataset[Any], entries: Sequence[_Evaluated], accelerator: Accelerator, size: int | None
) -> Iterator[tuple[dict[InputSpec, Tensor], Tensor]]:
    """The same images in the form of every model, with their labels."""
    data = planned.recipe.data
    options = data.model_copy(update={"batch_size": size or data.batch_size})
    specs = list(dict.fromkeys(entry.images for entry in entries))
    prepared = (loader(images, options, spec, training=False).prepare(accelerator) for spec in specs)
    loaders = [readable(batches, "evaluation") for batches in prepared]
    for batches in zip(*loaders, strict=True):
        yield dict(zip(specs, (view for view, _ in batches), strict=True)), batches[0][1]


def _vectors(
    planned: Plan, entries: Sequence[_Evaluated], chosen: Sequence[int], place: torch.device, seconds: float
) -> list[dict[Tap, Float[Tensor, "images _"]]]:
    """The pooled features of each model on these test images, or on the first of them that `seconds` suffice for."""
    # Small batches, so that the time limit is checked often; no workers, which take seconds to start.
    data = planned.recipe.data.model_copy(update={"batch_size": min(planned.recipe.data.batch_size, 64), "workers": 0})
    specs = list(dict.fromkeys(entry.images for entry in entries))
    test = Subset(planned.datasets.test, chosen)
    loaders = [readable(loader(test, data, spec, training=False), "test") for spec in specs]
    parts: list[dict[Tap, list[Tensor]]] = [{tap: [] for tap in entry.pools} for entry in entries]
    end = time.monotonic() + seconds
    for batches in zip(*loaders, strict=True):
        views = dict(zip(specs, (view for view, _ in batches), strict=True))
        for entry, entry_parts in zip(entries, parts, strict=True):
            with _autocast(mixed_precision(planned.recipe, place.type) or "no", place):
                features = entry.features(views[entry.images].to(place))
            for tap, pool in entry.pools.items():
                entry_parts[tap].append(pool(features[tap]).float().cpu())
        if time.monotonic() > end:
            break
    return [{tap: torch.cat(tensors) for tap, tensors in entry_parts.items()} for entry_parts in parts]


def _autocast(precision: str, place: torch.device) -> AbstractContextManager[Any]:
    """Autocast as accelerate uses it in training, but float32 for float16 on a CPU."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if kind is None or (kind is torch.float16 and place.type == "cpu"):
        return nullcontext()
    return torch.autocast(place.type, kind)


def calibration_error(classes: int) -> "MulticlassCalibrationError":
    """The metric of a model, to which logits come that all processes have gathered: it must not gather them again."""
    from torchmetrics.classification import MulticlassCalibrationError  # 3 s, with all that it can do

    return MulticlassCalibrationError(classes, n_bins=BINS, norm="l1", validate_args=False, sync_on_compute=False)


class _Meter:
    """All sums over the images so far."""

    def __init__(
        self, planned: Plan, entries: Sequence[_Evaluated], rows: Sequence[_Compared], accelerator: Accelerator
    ) -> None:
        self.entries, self.rows, self.datasets, self.accelerator = entries, rows, planned.datasets, accelerator
        self.classes = planned.datasets.num_classes
        self.multilabel: dict[str, list[tuple[Tensor, Tensor]]] = {}  # logits and labels by role
        self.images = 0
        self.scored = [entry for entry in entries if entry.output is not None]
        self.teachers = [entry for entry in self.scored if entry.role == "teacher" or entry.teacher]
        weights = {name: teacher.weight for name, teacher in (planned.recipe.teachers or {}).items()}
        self.weights = [weights.get(entry.teacher, 1.0) for entry in self.teachers]
        self.sums: dict[str, Sums] = {entry.role: {} for entry in self.scored}
        calibrated = self.sums if planned.datasets.labels == "class" else ()
        self.calibration = {role: calibration_error(self.classes) for role in calibrated}
        self.pools = {entry.role: entry.pools for entry in entries}
        self.teacher_pools = {
            tap: pool for entry in entries if not entry.is_student for tap, pool in entry.pools.items()
        }
        self.cka_sums: dict[tuple[str, Pair], Sums] = {
            (entry.role, row.pair): {}
            for row in rows
            for entry in entries
            if entry.is_student and row.pair.student in entry.pools and row.pair.teacher in self.teacher_pools
        }

    def update(self, features: Mapping[str, Mapping[Tap, Tensor]], target: Int[Tensor, " batch"]) -> None:
        logits = {entry.role: entry.logits(features[entry.role]) for entry in self.scored}
        logits, all_targets = self.accelerator.gather_for_metrics((logits, target))
        self.images += len(all_targets)
        if self.datasets.labels == "multilabel":
            self._keep_logits(logits, all_targets)
        elif logits:
            self._add_logits(logits, all_targets)
        count = own_images(self.accelerator, len(target))
        # The features of the teacher, or of all; a teacher baseline is compared with nothing.
        roles = [entry.role for entry in self.entries if entry.role == "teacher" or entry.teacher]
        of_teachers = {tap: feature for role in roles for tap, feature in features[role].items()}
        for row in self.rows:
            row.update(features["student"], of_teachers, count)
        for (role, pair), sums in self.cka_sums.items():
            of_student = self.pools[role][pair.student](features[role][pair.student])
            of_teacher = self.teacher_pools[pair.teacher](of_teachers[pair.teacher])
            self.cka_sums[role, pair] = added(sums, cka_sums(of_student[:count], of_teacher[:count]))

    def _keep_logits(self, logits: Mapping[str, Tensor], target: Tensor) -> None:
        for entry in self.entries:
            if entry.role in logits:
                if bool(logits[entry.role].isnan().any()):
                    raise for_all(RunError(_no_numbers(entry)))
                self.multilabel.setdefault(entry.role, []).append((logits[entry.role].cpu(), target.cpu()))

    def _add_logits(self, logits: Mapping[str, Tensor], target: Tensor) -> None:
        wrong = target[(target < 0) | (target >= self.classes)]
        if self.datasets.labels == "class" and len(wrong):
            raise DataError(f"label {int(wrong[0])} of an image is none of the {self.classes} classes")
        of_teachers = {entry.teacher: exact(class_logits(logits[entry.role])) for entry in self.teachers}
        for entry in self.scored:
            role, of_student = entry.role, exact(class_logits(logits[entry.role]))
            if not bool(of_student.amax(1).isfinite().all()):  # a class may be ruled out by -inf
                raise for_all(RunError(_no_numbers(entry)))
            labels = target.to(of_student.device) if self.datasets.labels == "class" else None
            sums = _logit_sums(of_student, labels)
            if entry.is_student and of_teachers:
                sums |= _sums_beside(of_student, self._mean(list(of_teachers.values())))
            if entry.is_student and len(of_teachers) > 1:
                sums |= {f"with {name}": _agreeing(of_student, of_one) for name, of_one in of_teachers.items()}
            self.sums[role] = added(self.sums[role], sums)
            if labels is None:
                continue
            # As probabilities: logits that happen to lie in 0..1 would be taken for such.
            self.calibration[role].to(of_student.device).update(of_student.softmax(1), target.to(of_student.device))

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        """The teacher's logits, or the logarithm of the mean probabilities of several teachers."""
        if len(logits) == 1:
            return logits[0]
        mean: Tensor = MeanOfTeachers([nn.Identity() for _ in logits], self.weights).to(logits[0].device)(logits)
        return mean

    def result(self, run: str, split: str) -> Evaluation:
        if not self.images:
            raise DataError(f"there are no images in the split {split!r}")
        scores = tuple(self._scores(entry) for entry in self.entries)
        cka = {key: _defined(linear_cka(self.accelerator.reduce(sums, "sum"))) for key, sums in self.cka_sums.items()}
        rows = tuple(self._similarity(row, cka) for row in self.rows)
        return Evaluation(run, split, self.images, scores, rows)

    def _scores(self, entry: _Evaluated) -> Scores:
        if entry.role not in self.sums:
            return Scores(entry.role, entry.name, entry.weights)
        if self.datasets.labels == "multilabel":
            precisions = average_precisions(*map(torch.cat, zip(*self.multilabel[entry.role], strict=True)))
            by_class = dict(zip(class_names(self.datasets), precisions, strict=True))
            mean = mean_average_precision(precisions)
            return Scores(entry.role, entry.name, entry.weights, map=mean, average_precisions=by_class)
        sums = self.sums[entry.role]
        values = {name: float(total / sums["images"]) for name, total in sums.items() if name != "images"}
        agreements = {
            teacher.teacher: values.pop(f"with {teacher.teacher}")
            for teacher in self.teachers
            if f"with {teacher.teacher}" in values
        }
        calibration = self.calibration.get(entry.role)
        error = float(calibration.compute()) if calibration is not None else None
        means: dict[str, Any] = {**values, "agreements": agreements}
        return Scores(entry.role, entry.name, entry.weights, calibration_error=error, **means)

    def _similarity(self, row: _Compared, cka: Mapping[tuple[str, Pair], float | None]) -> Similarity:
        of_student, of_baseline = (cka.get((role, row.pair)) for role in ("student", "baseline"))
        explained, cosine = row.sums.scores(self.accelerator.reduce)
        notes = [row.why] * bool(row.why)
        if row.sums.variance and explained is None:
            notes.append("the teacher's side is the same for every image")
        elif row.sums.variance and row.of_matrices:
            notes.append(f"explains the matrix of {row.comparison}")
        if of_student is None and ("student", row.pair) in cka:
            notes.append("one of both features is the same for every image")
        elif of_student is None:
            notes.append("one of both is no feature of single images")
        student, teacher = row.pair.student.label, row.pair.teacher.label
        values = of_student, of_baseline, explained, "; ".join(notes), cosine
        return Similarity(row.stage, row.loss, student, teacher, *values)


def _no_numbers(entry: _Evaluated) -> str:
    return (
        f"the outputs of {entry.role} ({entry.weights}) are no numbers, so there is nothing to measure; its weights "
        "are damaged, or the recipe's `precision` is too narrow for it"
    )


def _logit_sums(logits: Tensor, target: Tensor | None) -> Sums:
    """The sums over a batch of logits that the scores of every model need; without labels, their number alone."""
    sums = {"images": logits.new_tensor(len(logits))}
    if target is not None:
        loss = F.nll_loss(logits.log_softmax(1), target, reduction="sum")
        sums |= {"top1": (logits.argmax(1) == target).sum(), "nll": loss}
    if target is not None and logits.shape[1] > 5:
        sums["top5"] = (logits.topk(5, 1).indices == target[:, None]).sum()
    return sums


def _sums_beside(of_student: Tensor, of_teacher: Tensor) -> Sums:
    """The sums over a batch that compare the logits of a student with the teacher's."""
    log, log_of_teacher = of_student.log_softmax(1), of_teacher.log_softmax(1)
    divergence = F.kl_div(log, log_of_teacher, reduction="sum", log_target=True)
    return {"agreement": _agreeing(of_student, of_teacher), "kl": divergence}


def _agreeing(of_student: Tensor, of_teacher: Tensor) -> Tensor:
    """The number of images with equal predictions."""
    return (of_student.argmax(1) == of_teacher.argmax(1)).sum()


def _defined(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else value
