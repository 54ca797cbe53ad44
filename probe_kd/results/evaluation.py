"""Evaluation of a run: how right and how sure each of its models is, and how near the student came to its teacher.

The loss of a distillation does not say whether the student improves (Stanton et al. 2021, arXiv 2106.05945); this does.
Everything is summed up batch by batch, in float64, so memory does not grow with images times features.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchmetrics.classification import MulticlassCalibrationError

from probe_kd.data.loading import loader, readable
from probe_kd.data.record import RECORD, DataRecord
from probe_kd.engine.models import build_model
from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import InputSpec, Layout, Pair, Tap, Trace
from probe_kd.engine.tracing import trace
from probe_kd.engine.weights import load_weights
from probe_kd.errors import DataError, RunError, for_all, nearest, short
from probe_kd.files.run_folder import RECIPE, check_inputs, check_own, runs_beside, why_no_run
from probe_kd.methods.adapters import Adapter, ImageView, pooled
from probe_kd.methods.objectives import Comparison
from probe_kd.methods.targets import compared, make_adapters
from probe_kd.recipe.keys import Recipe, TeacherOptions
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.recipe.sections.sharing import join
from probe_kd.recipe.writing import command_to_go_on, inputs_of
from probe_kd.training.devices import mixed_precision
from probe_kd.training.processes import own_accelerator
from probe_kd.training.state import weights_file

Split = Literal["test", "val", "train", "held_out"]
Sums = dict[str, Tensor]
BINS = 15  # of the calibration error, as in Guo et al. 2017
_CONSTANT = 1e-12  # a variance below this share of the mean square is rounding: float32 features differ by 1e-7


@dataclass(frozen=True)
class Scores:
    """What one model answers, over all images of a split.

    `top1`, `top5` (None where there are no more than five classes) and `agreement` are shares in 0..1, `nll` and `kl`
    nats per image, `calibration_error` is the expected one. `agreement` and `kl` are against the teacher, and None for
    a teacher or without one. `weights` names the file in the run's folder, or what else the model was loaded from.
    """

    role: str
    model: str
    weights: str
    top1: float
    nll: float
    calibration_error: float
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Similarity:
    """How alike a layer of the student and one of the teacher are; `note` says why something is not known.

    `cka` is linear CKA in 0..1, `cka_alone` that of the baseline, and `explained_variance` the share of the
    teacher's side that the adapter of this loss explains, at most 1. Layers that no loss compares have no `stage`.
    """

    stage: str
    loss: str
    student: str
    teacher: str
    cka: float | None
    cka_alone: float | None
    explained_variance: float | None
    note: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: `scores` of every model, the student first, and what is known of each pair."""

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
    """Measure every model of a finished run, in eval mode, on images that are not augmented.

    `run` is the folder that `probe-kd train` wrote. `weights` are evaluated instead of the student's own, `ema` takes
    the moving averages of the students. `split` is `test`, `val` (where these are other images), `train`, or `held_out`
    (`data.holdout`). `batch_size` is the recipe's, `device` what accelerate chooses, and the precision the recipe's, if
    not given. `root` is where the data lie, if they have moved. `allow_import` names the packages whose functions the
    run's recipe may name as models. The classes are numbered as the run's `data.json` says, whatever folders the data
    now have.

    Of each model, in the student's classes: top-1 and (of more than five classes) top-5 accuracy as shares in 0..1, the
    negative log-likelihood in nats per image, and the expected calibration error (Guo et al. 2017, arXiv 1706.04599;
    15 bins, l1). Of each student against the teacher, the one that trained with it where they share: how often both
    give one answer, and KL(teacher || student) at temperature 1, in nats per image. Each model sees the images as it
    was measured in training: normalised for it, and at its size.

    Of each pair of layers: linear CKA (`linear_cka`) of one vector per image, the feature's mean over its positions
    without class tokens; and where a loss compares the two after an adapter, what share of the variance of the
    teacher's side the student's side explains (`explained_variance`), by the adapter as the end of its stage left it.
    Both are of the student as it finally is, also for stages before the last. With `normalize: channel` the target is
    standardised by the batch, as in training, so the share depends on its size.

    Works in several processes (`accelerate launch`), each of which returns the whole. Raises RunError for a folder that
    is no finished run, or a choice that it does not offer; RecipeError where its recipe no longer fits the data or the
    models; WeightsError for weights that do not fit; DataError for labels that are no classes, and for held-out images
    of other training images than those of the run. Other images of a split of their own are told in `notes`.
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
        compared = list(_compared(planned, folder, place))
        entries = [entry.to(place) for entry in _entries(planned, folder, student, compared, ema=ema)]
        meter = _Meter(entries, compared, planned.datasets.num_classes, accelerator)
        precision = mixed_precision(planned.recipe, place.type) or accelerator.mixed_precision
        for views, target in _batches(planned, images, entries, accelerator, batch_size):
            with torch.no_grad():
                features = {}
                for entry in entries:
                    with _autocast(precision, place):
                        features[entry.role] = entry.look(views[entry.images].to(place))
                meter.update(features, target.to(place))
        held_out = split == "test" and planned.datasets.test is planned.datasets.held_out  # there is no other
        return replace(meter.result(str(folder), "held_out" if held_out else split), notes=notes)


def cka_sums(student: Float[Tensor, "batch m"], teacher: Float[Tensor, "batch n"]) -> Sums:
    """What of a batch `linear_cka` needs. Those of all batches are added."""
    of_student, of_teacher = _exact(student), _exact(teacher)
    return {
        "images": of_student.new_tensor(len(of_student)),
        "student": of_student.sum(0),
        "teacher": of_teacher.sum(0),
        "within_student": of_student.T @ of_student,
        "within_teacher": of_teacher.T @ of_teacher,
        "between": of_student.T @ of_teacher,
    }


def linear_cka(sums: Mapping[str, Tensor]) -> float:
    """Linear centred kernel alignment of two features, from the `cka_sums` of all images.

    `||X^T Y||^2 / (||X^T X|| ||Y^T Y||)` in Frobenius norms, where the rows of X and Y are the images, and their mean
    over all images is taken out. Kornblith et al. 2019 (arXiv 1905.00414), eq. 5 and sec. 3 with linear kernels. It is
    exact over the whole set, not a mean over batches: 1 for features that are equal up to rotation and scale. NaN
    where one of the features is the same for every image.
    """
    of_student, of_teacher = sums["student"], sums["teacher"]
    within_ours, within_theirs, between = (
        sums[name] - torch.outer(left, right) / sums["images"]
        for name, left, right in (
            ("within_student", of_student, of_student),
            ("within_teacher", of_teacher, of_teacher),
            ("between", of_student, of_teacher),
        )
    )
    for centred, raw in ((within_ours, sums["within_student"]), (within_theirs, sums["within_teacher"])):
        if not centred.trace() > _CONSTANT * raw.trace():
            return float("nan")
    return float(between.norm() ** 2 / (within_ours.norm() * within_theirs.norm()))


def cka_table(
    of_student: Sequence[Float[Tensor, "images _"]], of_teacher: Sequence[Float[Tensor, "images _"]]
) -> list[list[float | None]]:
    """`linear_cka` of every student's feature (rows) with every teacher's (columns); None where it is not defined.

    Of few images it is had from matrices of images by images, one a feature: `||X^T Y||^2` is the sum of the products
    of `X X^T` and `Y Y^T`. So a table of 30 by 30 costs 60 such matrices, and not 900 of channels by channels.
    """
    grams = [[_gram(feature) for feature in side] for side in (of_student, of_teacher)]
    return [
        [None if a is None or b is None else float((a * b).sum() / (a.norm() * b.norm())) for b in grams[1]]
        for a in grams[0]
    ]


def _gram(feature: Float[Tensor, "images channels"]) -> Float[Tensor, "images images"] | None:
    raw = _exact(feature)
    centred = raw - raw.mean(0)
    return centred @ centred.T if centred.square().sum() > _CONSTANT * raw.square().sum() else None


@torch.no_grad()
def vectors(
    planned: Plan, run: Path, of_student: Sequence[Tap], of_teacher: Sequence[Tap], *, images: int, seconds: float
) -> tuple[dict[Tap, Float[Tensor, "images _"]], dict[Tap, Float[Tensor, "images _"]]]:
    """One vector per test image of layers of a run's student, and of its teacher: what `evaluate` compares.

    It looks at so many images, or at those that so many seconds suffice for; they are drawn at random, and the same for
    every run on that data. Layers that are no feature of single images are left out. This process does it alone, on
    torch's current accelerator. Raises RunError for a run without a teacher, or without its weights, and DataError
    without images.
    """
    options, known, given, wanted = (
        planned.recipe.teacher,
        planned.teacher,
        planned.student_input,
        planned.teacher_input,
    )
    if options is None or known is None or wanted is None:
        raise RunError(f"the run in {run} has no teacher")
    _check_files(run, planned.recipe)
    file = _weights_of_student(run, None, ema=False)
    trained = planned.recipe.share is not None or options.train is not None
    teacher, name = _teacher(known, options, run, "teacher", trained=trained)
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    sides = [
        _entry("student", planned.trained.model, _student(planned, file), file.name, (given, wanted), of_student).to(
            place
        ),
        _entry("teacher", known.model, teacher, name, (wanted, wanted), of_teacher).to(place),
    ]
    count = len(planned.datasets.test)  # type: ignore[arg-type]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:images].tolist()
    if not chosen:
        raise DataError("there are no test images")
    # Few at a time, so that the clock is looked at; and by no workers, which cost seconds to start.
    data = planned.recipe.data.model_copy(update={"batch_size": min(planned.recipe.data.batch_size, 64), "workers": 0})
    forms = list(dict.fromkeys(side.images for side in sides))
    test = Subset(planned.datasets.test, chosen)
    loaders = [readable(loader(test, data, form, training=False), "test") for form in forms]
    found: list[dict[Tap, list[Tensor]]] = [{tap: [] for tap in side.pools} for side in sides]
    end = time.monotonic() + seconds
    for batches in zip(*loaders, strict=True):
        seen = dict(zip(forms, (views for views, _ in batches), strict=True))
        for side, kept in zip(sides, found, strict=True):
            with _autocast(mixed_precision(planned.recipe, place.type) or "no", place):
                features = side.look(seen[side.images].to(place))
            for tap, pool in side.pools.items():
                kept[tap].append(pool(features[tap]).float().cpu())
        if time.monotonic() > end:
            break
    ours_, theirs_ = ({tap: torch.cat(parts) for tap, parts in kept.items()} for kept in found)
    return ours_, theirs_


def variance_sums(predicted: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]) -> Sums:
    """What of a batch `explained_variance` needs. Those of all batches are added."""
    wanted = _exact(target)
    missed = wanted - _exact(predicted)
    return {
        "images": wanted.new_tensor(len(wanted)),
        "wanted": wanted.sum(0),
        "wanted_squared": wanted.square().sum(),
        "missed": missed.sum(0),
        "missed_squared": missed.square().sum(),
    }


def explained_variance(sums: Mapping[str, Tensor]) -> float:
    """`1 - SSE / SST` from the `variance_sums` of all images: 1 where the target is met, 0 where its mean would do.

    Both sums of squares are about their means over the images, per channel and position, and are added over these. So
    a constant offset costs nothing, and less than 0 is worse than no prediction. NaN where the target is the same for
    every image.
    """
    total, left = (
        sums[f"{name}_squared"] - sums[name].square().sum() / sums["images"] for name in ("wanted", "missed")
    )
    if not total > _CONSTANT * sums["wanted_squared"]:
        return float("nan")
    return float(1 - left.clamp(min=0) / total)


def _exact(tensor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def _add(total: Sums, more: Sums) -> Sums:
    return {name: total[name] + value for name, value in more.items()} if total else more


def _recipe_of(folder: Path) -> Path:
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        return recipe
    near = nearest(folder.name, runs_beside(folder))
    raise RunError(f"{folder} is not the folder of a run ({why_no_run(folder)}){near}")


def _check_files(folder: Path, recipe: Recipe) -> None:
    """Raises RunError where what the figures of a run depend on is not what the run was made of."""
    check_own(folder, (RECIPE, RECORD))
    mend = "Figures would be of other models than the run's: put the former file back"
    check_inputs(folder, inputs_of(recipe, trained=True), mend)


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
        chosen: torch.device = accelerator.device
        return chosen
    if accelerator.num_processes > 1:
        raise RunError(f"device {device!r}: of several processes each has its own; leave it out")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except Exception as refusal:  # torch's errors for devices are of many kinds
        raise RunError(f"device {device!r} cannot be used here: {short(refusal)}") from None
    return place


def _images(planned: Plan, split: Split) -> Dataset[Any]:
    if split not in get_args(Split):
        raise RunError(f"split {split!r}: expected one of {', '.join(map(repr, get_args(Split)))}")
    found: Dataset[Any] | None = getattr(planned.datasets, split)
    if found is None and split == "val":
        raise RunError(f"this run has no validation images beside its test images: {planned.datasets.measured_on}")
    if found is None:
        raise RunError("this run held no training images out; `data: {holdout: 0.1}` in a recipe does")
    return found


@dataclass(frozen=True)
class _Evaluated:
    """One model that is measured.

    `images` is how they are loaded for it, `output` the tap of its answer, `pools` what makes one vector of an image of
    each feature that is compared, and `classes` are the answers that count, where not all do.
    """

    role: str
    name: str
    weights: str
    probe: Probe
    view: ImageView
    images: InputSpec
    output: Tap
    pools: Mapping[Tap, nn.Module]
    classes: tuple[int, ...] | None = None

    def to(self, place: torch.device) -> Self:
        self.probe.model.to(place)
        self.view.to(place)
        return self

    def look(self, images: Tensor) -> dict[Tap, Tensor]:
        return {tap: feature.float() for tap, feature in self.probe(self.view(images)).items()}

    def logits(self, features: Mapping[Tap, Tensor]) -> Float[Tensor, "batch classes"]:
        logits = features[self.output]
        return logits if self.classes is None else logits[:, list(self.classes)]

    @property
    def learns(self) -> bool:
        """Whether it is a student, to be held against the teacher."""
        return not self.role.startswith("teacher")


@dataclass
class _Compared:
    """One row of the table of pairs, with its sums. Where it has no adapter, `why` says the reason."""

    pair: Pair
    stage: str = ""
    loss: str = ""
    comparison: Comparison | None = None
    of_matrices: bool = False
    adapter: Adapter | None = None
    why: str = "no loss compares it"
    sums: Sums = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.comparison.pairs if self.comparison else (self.pair,)

    def update(self, of_student: Mapping[Tap, Tensor], of_teacher: Mapping[Tap, Tensor], kept: int) -> None:
        if self.adapter is None or self.comparison is None:
            return
        mine = self.comparison.features("student", of_student, matrices=self.of_matrices)
        predicted, wanted = self.adapter(
            mine, self.comparison.features("teacher", of_teacher, matrices=self.of_matrices)
        )
        self.sums = _add(self.sums, variance_sums(predicted[:kept], wanted[:kept]))


def _compared(planned: Plan, folder: Path, place: torch.device) -> Iterator[_Compared]:
    """Every comparison of layers in every stage, and the pairs of the recipe that are in none."""
    used = set[Pair]()
    for index, (stage, objectives) in enumerate(zip(planned.recipe.stages, planned.objectives, strict=True)):
        if planned.teacher is None or not any(objective.resolved.reads_layers for objective in objectives):
            continue
        adapters = make_adapters(objectives, planned.trained, planned.teacher, planned.class_map).to(place).eval()
        file = folder / f"adapters-{index}.safetensors"
        if adapters.state_dict() and file.is_file():
            load_weights(adapters, file)
        for objective, comparison, adapter in compared(objectives, adapters):
            if not objective.resolved.reads_layers:
                continue
            used |= set(comparison.pairs)
            why, matrices = "", objective.resolved.reads_matrices
            if objective.resolved.reads == "maps":
                why = "each side keeps its own channels"
            elif adapter.parameter_count and not file.is_file():
                why = f"the run has no {file.name}"
            row = _Compared(comparison.pairs[-1], stage.name, objective.name, comparison, matrices, adapter, why)
            yield replace(row, adapter=None) if why else row
    yield from (_Compared(pair) for pair in planned.pairs if pair not in used)


def _entries(
    planned: Plan, folder: Path, student: Path, compared: Sequence[_Compared], *, ema: bool
) -> Iterator[_Evaluated]:
    """The student first, then what there is of the baseline, the teacher, and the teacher baseline."""
    pairs = [pair for item in compared for pair in (item.pair, *item.pairs)]
    of_student, of_teacher = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
    given, wanted = planned.student_input, planned.teacher_input
    shown = student.name if student.parent == folder else str(student)
    other = wanted or given
    yield _entry("student", planned.trained.model, _student(planned, student), shown, (given, other), of_student)
    alone, average = weights_file(folder, "baseline"), weights_file(folder, "baseline", "-ema")
    alone = average if ema and average.is_file() else alone
    if alone.is_file():
        plain = replace(given, size=planned.student.input_size)  # a graft sees what its teacher sees
        model = _loaded(_built(planned.student), alone)
        taps = [] if planned.grown else of_student
        yield _entry("baseline", planned.student.model, model, alone.name, (plain, other), taps)
    options, known = planned.recipe.teacher, planned.teacher
    if options is None or known is None or wanted is None:
        return
    trained = planned.recipe.share is not None or options.train is not None
    model, shown = _teacher(known, options, folder, "teacher", trained=trained)
    teacher = _entry("teacher", known.model, model, shown, (wanted, wanted), of_teacher)
    yield replace(teacher, classes=planned.class_map)
    if planned.recipe.share:
        given_weights = options.pretrained or options.checkpoint is not None
        model, shown = _teacher(known, options, folder, "teacher baseline", trained=not given_weights)
        yield _entry("teacher baseline", known.model, model, shown, (wanted, wanted), [])


def _entry(
    role: str, name: str, model: nn.Module, weights: str, sees: tuple[InputSpec, InputSpec], taps: Sequence[Tap]
) -> _Evaluated:
    own, other = sees
    # Traced anew, in eval mode: a model may answer otherwise than in training, and overwrite other features.
    seen = trace(model.eval(), own.size)
    specs = {spec.tap: spec for spec in (seen.output, *(seen[tap] for tap in taps))}
    pools = {tap: pooled(seen[tap]) for tap in dict.fromkeys(taps) if seen[tap].layout is not Layout.OTHER}
    probe = Probe(model, specs.values())
    return _Evaluated(role, name, weights, probe, ImageView(own, own), own.covering(other), seen.output.tap, pools)


def _built(known: Trace, *, pretrained: bool = False) -> nn.Module:
    return build_model(known.model, known.model_kwargs, pretrained=pretrained)


def _loaded(model: nn.Module, path: str | Path) -> nn.Module:
    load_weights(model, path)
    return model


def _student(planned: Plan, path: Path) -> nn.Module:
    """As it was trained. What it shared with a teacher, but for a graft's layers, it has as its own by now."""
    student, share = _built(planned.student), planned.recipe.share
    if share is not None and share.form == "graft" and planned.teacher is not None:
        student, _ = join(share, student, _built(planned.teacher), planned.student, planned.teacher)
    return _loaded(student, path)


def _teacher(known: Trace, options: TeacherOptions, folder: Path, role: str, *, trained: bool) -> tuple[nn.Module, str]:
    """With the weights that the run wrote, where it trains it, else those that it was given; and their name."""
    file = weights_file(folder, role)
    if file.is_file():
        return _loaded(_built(known), file), file.name
    if trained:
        raise _unfinished(folder, file.name)
    model = _built(known, pretrained=options.pretrained)
    if options.checkpoint:
        load_weights(model, options.checkpoint)
    return model, options.checkpoint or "pretrained"


def _batches(
    planned: Plan, images: Dataset[Any], entries: Sequence[_Evaluated], accelerator: Accelerator, size: int | None
) -> Iterator[tuple[dict[InputSpec, Tensor], Tensor]]:
    """The same images in every form that a model wants them in, with their labels."""
    data = planned.recipe.data
    options = data.model_copy(update={"batch_size": size or data.batch_size})
    forms = list(dict.fromkeys(entry.images for entry in entries))
    prepared = (loader(images, options, form, training=False).prepare(accelerator) for form in forms)
    loaders = [readable(batches, "evaluation") for batches in prepared]
    for batches in zip(*loaders, strict=True):
        yield dict(zip(forms, (seen for seen, _ in batches), strict=True)), batches[0][1]


def _autocast(precision: str, place: torch.device) -> AbstractContextManager[Any]:
    """As accelerate has it in training; in full where a CPU evaluates what a GPU trained in float16."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if kind is None or (kind is torch.float16 and place.type == "cpu"):
        return nullcontext()
    return torch.autocast(place.type, kind)


class _Meter:
    """All sums over the images so far."""

    def __init__(
        self, entries: Sequence[_Evaluated], compared: Sequence[_Compared], classes: int, accelerator: Accelerator
    ) -> None:
        self.entries, self.compared, self.classes, self.accelerator = entries, compared, classes, accelerator
        self.answers: dict[str, Sums] = {entry.role: {} for entry in entries}
        # It would gather again what is gathered, so it is told not to.
        options: dict[str, Any] = {"n_bins": BINS, "norm": "l1", "validate_args": False, "sync_on_compute": False}
        self.calibration = {role: MulticlassCalibrationError(classes, **options) for role in self.answers}
        self.pools = {entry.role: entry.pools for entry in entries}
        self.alike: dict[tuple[str, Pair], Sums] = {
            (entry.role, item.pair): {}
            for item in compared
            for entry in entries
            if entry.learns and item.pair.student in entry.pools and item.pair.teacher in self.pools.get("teacher", {})
        }

    def update(self, features: Mapping[str, Mapping[Tap, Tensor]], target: Int[Tensor, " batch"]) -> None:
        logits = {entry.role: entry.logits(features[entry.role]) for entry in self.entries}
        self._answer(*self.accelerator.gather_for_metrics((logits, target)))
        kept = self._kept(target)
        for item in self.compared:
            item.update(features["student"], features["teacher"], kept)
        for (role, pair), sums in self.alike.items():
            of_student = self.pools[role][pair.student](features[role][pair.student])
            of_teacher = self.pools["teacher"][pair.teacher](features["teacher"][pair.teacher])
            self.alike[role, pair] = _add(sums, cka_sums(of_student[:kept], of_teacher[:kept]))

    def _answer(self, logits: Mapping[str, Tensor], target: Tensor) -> None:
        wrong = target[(target < 0) | (target >= self.classes)]
        if len(wrong):
            raise DataError(f"label {int(wrong[0])} of an image is none of the {self.classes} classes")
        for entry in self.entries:
            role, of_student = entry.role, _exact(logits[entry.role])
            if not bool(of_student.amax(1).isfinite().all()):  # a class may be ruled out by -inf
                raise for_all(
                    RunError(
                        f"the outputs of {role} ({entry.weights}) are no numbers, so there is nothing to measure; "
                        "its weights are damaged, or the recipe's `precision` is too narrow for it"
                    )
                )
            of_teacher = _exact(logits["teacher"]) if entry.learns and "teacher" in logits else None
            self.answers[role] = _add(
                self.answers[role], _answer_sums(of_student, target.to(of_student.device), of_teacher)
            )
            # As probabilities: logits that happen to lie in 0..1 would be taken for such.
            self.calibration[role].to(of_student.device).update(of_student.softmax(1), target.to(of_student.device))

    def _kept(self, target: Tensor) -> int:
        """How many images of this process count: the last batch is filled up with some that were there before."""
        if self.accelerator.num_processes == 1:
            return len(target)
        first, end = (len(target) * (self.accelerator.process_index + more) for more in (0, 1))
        places = self.accelerator.gather_for_metrics(torch.arange(first, end, device=target.device))
        return int(((places >= first) & (places < end)).sum())

    def result(self, run: str, split: str) -> Evaluation:
        images = {int(sums["images"]) for sums in self.answers.values() if sums}
        if not images:
            raise DataError(f"there are no images in the split {split!r}")
        scores = tuple(self._scores(entry) for entry in self.entries)
        alike = {key: _defined(linear_cka(self.accelerator.reduce(sums, "sum"))) for key, sums in self.alike.items()}
        rows = tuple(self._similarity(item, alike) for item in self.compared)
        return Evaluation(run, split, images.pop(), scores, rows)

    def _scores(self, entry: _Evaluated) -> Scores:
        sums = self.answers[entry.role]
        means = {name: float(total / sums["images"]) for name, total in sums.items() if name != "images"}
        error = float(self.calibration[entry.role].compute())
        return Scores(entry.role, entry.name, entry.weights, calibration_error=error, **means)

    def _similarity(self, item: _Compared, alike: Mapping[tuple[str, Pair], float | None]) -> Similarity:
        own, alone = (alike.get((role, item.pair)) for role in ("student", "baseline"))
        explained = _defined(explained_variance(self.accelerator.reduce(item.sums, "sum"))) if item.sums else None
        notes = [item.why] * bool(item.why)
        if item.sums and explained is None:
            notes.append("the teacher's side is the same for every image")
        elif item.sums and item.of_matrices:
            notes.append(f"explains the matrix of {item.comparison}")
        if own is None and ("student", item.pair) in alike:
            notes.append("one of both features is the same for every image")
        elif own is None:
            notes.append("one of both is no feature of single images")
        student, teacher = (str(tap) or "output" for tap in (item.pair.student, item.pair.teacher))
        return Similarity(item.stage, item.loss, student, teacher, own, alone, explained, "; ".join(notes))


def _answer_sums(of_student: Tensor, target: Tensor, of_teacher: Tensor | None) -> Sums:
    """What of a batch of logits the scores need; `of_teacher` are the teacher's."""
    log = of_student.log_softmax(1)
    sums = {
        "images": of_student.new_tensor(len(of_student)),
        "top1": (of_student.argmax(1) == target).sum(),
        "nll": F.nll_loss(log, target, reduction="sum"),
    }
    if of_student.shape[1] > 5:
        sums["top5"] = (of_student.topk(5, 1).indices == target[:, None]).sum()
    if of_teacher is not None:
        sums["agreement"] = (of_student.argmax(1) == of_teacher.argmax(1)).sum()
        sums["kl"] = F.kl_div(log, of_teacher.log_softmax(1), reduction="sum", log_target=True)
    return sums


def _defined(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else value
