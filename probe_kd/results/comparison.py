"""Compare runs: the results of each model over seeds, the differences of the recipes, the similarity of the layers.

`compare` reads the folders of the runs and builds no model, so a hundred runs take little longer than one. Only the
similarity of layers needs both models and images: a run measures it at its end and writes it to `layers.json`.
"""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probe_kd.data.record import DataRecord
from probe_kd.engine.matching import blocks, stages
from probe_kd.engine.spec import Tap, Trace
from probe_kd.errors import MatchError, RunError, nearest, short
from probe_kd.files.atomic import put, whole_text
from probe_kd.files.run_folder import RECIPE, Manifest, check_own, record, runs_beside, why_no_run
from probe_kd.measures import MEASURES, OF_PAIRS, headline_of, not_losses
from probe_kd.methods.similarity import cka_table
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.recipe.writing import command_to_go_on
from probe_kd.results.evaluation import vectors
from probe_kd.training.checkpoints import FOLDER as CHECKPOINTS
from probe_kd.training.state import PairScore, Result, Row, current_role

LAYERS = "layers.json"
# With `share`, the teacher is the one that trained with the student.
ROLES = ("untrained student", "baseline", "student", "teacher", "teacher baseline")
IMAGES, SECONDS = 512, 10.0  # limits for measuring the similarity of layers
MOST_LAYERS = 24  # of a model; with more blocks, its stage ends are used
UNCOMPARED = {"role", "stage", "epoch", "images_per_second"}


@dataclass(frozen=True)
class Spread:
    """A value over seeds. `deviation` is the sample standard deviation (n - 1), None for a single value."""

    mean: float
    low: float
    high: float
    deviation: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class ModelSummary:
    """The results of one model in the runs of one recipe.

    `accuracy`, `ema_accuracy` (of the moving average) and `agreement` with the teacher are fractions of the test images
    in 0..1, and None where they mean nothing; `measures` and `ema_measures` are the others by name. `seconds` is the
    training time. If no run has finished the model, `unfinished` is its last epoch so far, the values are those of that
    epoch, and its size is None.
    """

    role: str
    model: str
    accuracy: Spread | None
    agreement: Spread | None
    ema_accuracy: Spread | None
    parameters: int | None
    macs: int | None
    seconds: Spread | None
    unfinished: str = ""
    measures: Mapping[str, Spread] = field(default_factory=dict)
    ema_measures: Mapping[str, Spread] = field(default_factory=dict)

    def of(self, measure: str) -> Spread | None:
        """The values of a measure; None if it was not taken."""
        own = {"accuracy": self.accuracy, "agreement": self.agreement}
        return own[measure] if measure in own else self.measures.get(measure)

    def ema_of(self, measure: str) -> Spread | None:
        return self.ema_accuracy if measure == "accuracy" else self.ema_measures.get(measure)

    @property
    def seeds(self) -> int:
        """In how many runs the model was measured."""
        return _most([self.accuracy, self.agreement, *self.measures.values()])

    @property
    def seeds_of_average(self) -> int:
        """In how many runs the moving average was measured."""
        return _most([self.ema_accuracy, *self.ema_measures.values()])


def _most(spreads: Iterable[Spread | None]) -> int:
    """The largest number of values."""
    return max((len(spread.values) for spread in spreads if spread), default=0)


@dataclass(frozen=True)
class Curve:
    """One measure of one model by epoch, over seeds: `points` are (epoch from 1, mean, least, greatest)."""

    role: str
    measure: str
    points: tuple[tuple[int, float, float, float], ...]


@dataclass(frozen=True)
class ClassChange:
    """One class: its test images in all runs, and the accuracy on them of the baseline (`alone`) and the student."""

    name: str
    images: int
    alone: float
    student: float

    @property
    def change(self) -> float:
        return self.student - self.alone


@dataclass(frozen=True)
class LayerSimilarity:
    """Linear CKA between layers of the student (rows) and of the teacher (columns), each in forward order.

    Computed from one vector per image, the mean over positions, of `images` test images; None if a layer has the same
    output for every image. `pairs` are the (student, teacher) layers that the recipe pairs.
    """

    images: int
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    cka: tuple[tuple[float | None, ...], ...]
    pairs: tuple[tuple[str, str], ...]

    def of(self, pair: tuple[str, str]) -> float | None:
        student_layer, teacher_layer = pair
        if student_layer not in self.student or teacher_layer not in self.teacher:
            return None
        return self.cka[self.student.index(student_layer)][self.teacher.index(teacher_layer)]


@dataclass(frozen=True)
class PairSummary:
    """The scores of one pair of layers in one loss over seeds; None where the loss compares no features."""

    stage: str
    loss: str
    student: str
    teacher: str
    explained_variance: Spread | None
    cosine: Spread | None


@dataclass(frozen=True)
class Group:
    """Runs with the same recipe except for the seed.

    `headline` is the measure that the runs are about, empty if they take none. `gain` is the student's headline minus
    that of the model named in `gain_over`, per run: the baseline, or the student as it was before training. `losses`
    are the names of the losses, and `pair_scores` how much of the teacher's features the student's explain.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    summaries: tuple[ModelSummary, ...]
    gain: Spread | None
    curves: tuple[Curve, ...] = ()
    classes: tuple[ClassChange, ...] = ()
    similarity: LayerSimilarity | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    recipe: str = ""
    headline: str = "accuracy"
    gain_over: str = "baseline"
    losses: tuple[str, ...] = ()
    pair_scores: tuple[PairSummary, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A key of the recipes, such as `stages.0.epochs`, with its value in every group; empty if not set."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class RunComparison:
    """The result of `compare`: groups of runs, the differences of their recipes, and notes."""

    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


@dataclass
class _Run:
    """The contents of a run's folder. `rows` are the epochs, `results` those of the finished models."""

    folder: Path
    recipe: dict[str, Any]
    text: str
    results: dict[str, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    similarity: LayerSimilarity | None = None
    notes: list[str] = field(default_factory=list)
    losses: tuple[str, ...] = ()
    headline: str | None = None  # of an unfinished run, what its epochs measure

    @property
    def seed(self) -> int:
        return int(self.recipe["seed"])

    @property
    def setting(self) -> str:
        """The recipe without its seed."""
        return json.dumps({key: value for key, value in self.recipe.items() if key != "seed"}, sort_keys=True)

    def last(self, role: str) -> Row | None:
        """The last epoch that was measured."""
        return next((row for row in reversed(self.rows) if row["role"] == role and self._measured(row)), None)

    def _measured(self, row: Row) -> list[str]:
        other_columns = not_losses(self.losses)
        return [name for name in MEASURES if name in row and name in other_columns]

    @property
    def measures(self) -> set[str]:
        """The measures that any model or epoch has."""
        of_results = (name for result in self.results.values() for name in MEASURES if result.value(name) is not None)
        return {*of_results, *(name for row in self.rows for name in self._measured(row))}


def compare(runs: Sequence[str | Path], *, layers: bool = False, allow_import: Sequence[str] = ()) -> RunComparison:
    """Compare the runs in these folders, as written by `probe-kd train`.

    Runs whose resolved recipes are equal except for `seed` form one group. With `layers`, measure the similarity of the
    layers of student and teacher in runs that have not done so. Only this builds models; `allow_import` lists the
    packages of custom functions. Of an unfinished run, the epochs so far are compared.

    Raises RunError for a folder that is not a run, or has damaged files or no measurements; RecipeError for a
    recipe that this version cannot read.
    """
    folders = list(dict.fromkeys(Path(os.path.normpath(run)) for run in runs))
    if not folders:
        raise RunError("no run to show; name the folder that `probe-kd train` wrote, as in runs/quickstart")
    all_runs = [_read(folder) for folder in folders]
    notes = [note for run in all_runs for note in run.notes]
    groups: dict[str, list[_Run]] = {}
    for run in all_runs:
        members = groups.setdefault(run.setting, [])
        same_seed = next((other for other in members if other.seed == run.seed), None)
        if same_seed is None:
            members.append(run)
        else:  # counted twice, it would make the spread look smaller than it is
            notes.append(f"{run.folder} is left out: its recipe and seed ({run.seed}) are those of {same_seed.folder}")
    if not any(run.results or run.rows for run in all_runs):
        raise RunError(f"nothing is measured yet in {', '.join(str(run.folder) for run in all_runs)}: no epoch is done")
    for run in all_runs if layers else ():
        run.similarity = run.similarity or _measured_now(run, allow_import, notes)
    names = _names(list(groups.values()))
    compared = tuple(_group(name, members) for name, members in zip(names, groups.values(), strict=True))
    for group in compared:
        finished = {summary.role: summary.of(group.headline) for summary in group.summaries if not summary.unfinished}
        means = {role: spread.mean for role, spread in finished.items() if spread is not None}
        notes += [f"{group.name}: {doubt}" for doubt in doubts(means, group.headline, group.gain_over)]
    return RunComparison(
        compared,
        tuple(_differences([members[0].recipe for members in groups.values()])),
        tuple(notes),
    )


def measure_layers(planned: Plan, run: Path) -> LayerSimilarity:
    """Measure the similarity of the student's and the teacher's layers in a finished run, within IMAGES and SECONDS.

    The layers are the blocks of each model, or its stage ends if it has many blocks, and the paired layers. The result
    is written to the run's folder, for `compare`. Raises RunError for a run without a teacher, and the errors of models
    and images.
    """
    if not planned.teachers:
        raise RunError(f"the run in {run} has no teacher")
    student_layers = _layers(planned.trained, [pair.student for pair in planned.every_pair])
    teacher_layers: list[Tap] = []
    for name, planned_teacher in planned.teachers.items():
        paired = [pair.teacher.local for pair in planned.every_pair if pair.teacher.model == name]
        teacher_layers += [replace(tap, model=name) for tap in _layers(planned_teacher.trace, paired)]
    student, teacher = vectors(planned, run, student_layers, teacher_layers, images=IMAGES, seconds=SECONDS)
    cells = cka_table(list(student.values()), list(teacher.values()))
    similarity = LayerSimilarity(
        images=len(next(iter(student.values()), ())),
        student=tuple(map(_layer_name, student)),
        teacher=tuple(map(_layer_name, teacher)),
        cka=tuple(map(tuple, cells)),
        pairs=tuple((_layer_name(pair.student), _layer_name(pair.teacher)) for pair in planned.every_pair),
    )
    aside = run / f"{LAYERS}.partial"
    aside.write_text(json.dumps(asdict(similarity), indent=1) + "\n", encoding="utf-8")
    put(aside, run / LAYERS)
    if Manifest.read(run) is not None:  # a new manifest of this file alone would disown the files of an older run
        record(run, [LAYERS])
    return similarity


def _layers(trace: Trace, paired: Collection[Tap]) -> list[Tap]:
    """One tap for each tensor, in forward order. A model without stages has only the paired taps."""
    specs = blocks(trace)
    if not 1 < len(specs) <= MOST_LAYERS:
        try:
            specs = stages(trace)
        except MatchError:
            specs = []
    chosen = {trace[tap].tensor: trace[tap] for tap in paired}
    for spec in sorted(specs, key=lambda spec: len(str(spec.tap))):  # `layer2` rather than its last block
        chosen.setdefault(spec.tensor, spec)
    return [spec.tap for spec in sorted(chosen.values(), key=lambda spec: spec.order)]


def _layer_name(tap: Tap) -> str:
    return tap.label


def _measured_now(run: _Run, allow_import: Sequence[str], notes: list[str]) -> LayerSimilarity | None:
    has_teacher = "teacher" in run.recipe or "teachers" in run.recipe
    if "student" not in run.results or not has_teacher:
        why = "its student is not trained yet" if has_teacher else "it has no teacher"
        notes.append(f"{run.folder}: layers are not compared, since {why}")
        return None
    record = DataRecord.read(run.folder)
    planned = plan(load(run.folder / "recipe.yaml"), allow_import=allow_import, record=record)
    notes += [f"{run.folder}: {remark}" for remark in planned.datasets.other_than(record, "test")]
    return measure_layers(planned, run.folder)


def _read(folder: Path) -> _Run:
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        near = nearest(folder.name, runs_beside(folder))
        raise RunError(f"{folder} is not the folder of a run ({why_no_run(folder)}){near}")
    source = load(recipe)
    optional = [name for name in ("metrics.csv", LAYERS) if (folder / name).is_file()]
    check_own(folder, (RECIPE, "summary.json", *optional))
    run = _Run(folder, source.recipe.model_dump(mode="json", exclude_none=True), whole_text(recipe))
    run.losses = tuple(sorted(source.recipe.loss_names))
    run.rows = read_metrics(folder / "metrics.csv")
    summary = folder / "summary.json"
    if summary.is_file():
        values = _json(summary)
        run.results = _results(values, summary)
        classes = values.get("classes", [])
        run.classes = [_printable(str(name)) for name in classes] if isinstance(classes, list) else []
        run.headline = _headline(values, summary)
        run.notes += [f"{folder} has no metrics.csv, so no curves"] * (not run.rows)
    else:
        journals = [path for path in (folder / CHECKPOINTS).glob("*/journal.json") if path.parent.name.isdigit()]
        newest = max(journals, default=None, key=lambda path: int(path.parent.name))
        if newest is not None:
            values = _json(newest)
            run.results = _results({"results": list(dict(values.get("results", {})).values())}, newest)
        run.notes.append(_progress(run))
    if (folder / LAYERS).is_file():
        run.similarity = _similarity(folder / LAYERS)
    return run


def _progress(run: _Run) -> str:
    """The state of a run that has not ended."""
    begun = {row["role"]: row for row in run.rows if row["role"] not in run.results}
    parts = [f"{role} is done" for role in run.results]
    parts += [f"{role} is at epoch {row['epoch']} of stage {row['stage']!r}" for role, row in begun.items()]
    state = ", ".join(parts) or "no epoch is done"
    return f"{run.folder} has not ended: {state}; go on with it: {command_to_go_on(run.folder)}"


def doubts(values: Mapping[str, float], measure: str = "accuracy", other: str = "baseline") -> list[str]:
    """Remarks on values of a measure, by role, that show that distillation cannot have helped."""
    teacher, baseline = (values.get(role) for role in ("teacher", other))
    if teacher is None or baseline is None or teacher >= baseline:
        return []
    text = MEASURES[measure].text
    return [
        f"The teacher ({text(teacher)}) is worse than the {other} ({text(baseline)}), so there is "
        "little to learn from it: train it longer, or give it other weights, another learning rate or the right mean "
        "and std."
    ]


def read_metrics(path: Path) -> list[Row]:
    """The epochs in a metrics.csv; empty if there is no file. Raises RunError, with the line, for a damaged file."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    try:
        reader = csv.DictReader(whole_text(path).splitlines(keepends=True), strict=True)
        first, *others = reader.fieldnames or [""]
        # An earlier version called the first column `subject`, which may be a loss by now.
        reader.fieldnames = ["role" if first == "subject" else first, *others]
        missing = {"role", "stage", "epoch"} - set(reader.fieldnames)
        if missing:
            raise ValueError(f"it has no column {sorted(missing)[0]!r}")
        rows.extend(_epoch(line) for line in reader)
    except (OSError, ValueError, csv.Error) as refusal:  # UnicodeDecodeError is a ValueError
        why = refusal.strerror if isinstance(refusal, OSError) else f"line {len(rows) + 2}: {short(refusal)}"
        raise RunError(
            f"{path} is damaged ({why}); the run writes it anew while it goes on, and a finished one has to be taken "
            "from a copy, or left out"
        ) from None
    return rows


def _epoch(line: Mapping[str | None, Any]) -> Row:
    if None in line or None in line.values():
        raise ValueError(f"expected {len([key for key in line if key is not None])} fields, as in the first line")
    row: Row = {}
    for key, text in line.items():
        if key in ("role", "stage"):
            row[key] = _printable(current_role(text))
        elif text:
            try:
                row[str(key)] = int(text) if key == "epoch" else float(text)
            except ValueError:
                raise ValueError(f"{key} is {text[:40]!r}, and no number") from None
    if "epoch" not in row or not math.isfinite(row.get("accuracy", 0.0)):  # not every epoch needs to be measured
        raise ValueError("it has no epoch, or its accuracy is no number")
    return row


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(whole_text(path))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as refusal:
        raise _damaged(path, refusal) from None
    return content


def _damaged(path: Path, why: Exception) -> RunError:
    return RunError(f"{path} is damaged ({short(why)}); take it from a copy, or leave this run out")


def _results(summary: Mapping[str, Any], path: Path) -> dict[str, Result]:
    try:
        results = TypeAdapter(list[Result]).validate_python(summary.get("results"))
    except ValidationError as refusal:
        first = refusal.errors()[0]
        place = ".".join(map(str, ("results", *first["loc"])))
        raise _damaged(path, ValueError(f"{place}: {first['msg']}")) from None
    for result in results:
        figures = (result.accuracy, result.agreement, result.seconds, *result.measures.values())
        if not all(math.isfinite(value or 0.0) for value in figures):
            raise _damaged(path, ValueError(f"a figure of {result.role!r} is no number"))
        result.role, result.model = _printable(current_role(result.role)), _printable(result.model)
    return {result.role: result for result in results}


def _headline(summary: Mapping[str, Any], path: Path) -> str:
    """What a finished run is about; a run of an earlier version was about its accuracy."""
    headline = summary.get("headline", "accuracy")
    if headline is not None and headline not in MEASURES:
        raise _damaged(path, ValueError(f"there is no measure {str(headline)[:40]!r}"))
    return str(headline or "")


def _similarity(path: Path) -> LayerSimilarity:
    try:
        similarity: LayerSimilarity = TypeAdapter(LayerSimilarity).validate_python(_json(path))
    except ValidationError as refusal:
        raise _damaged(path, ValueError(refusal.errors()[0]["msg"])) from None
    if {len(similarity.student)} != {len(similarity.cka)} or {len(row) for row in similarity.cka} - {
        len(similarity.teacher)
    }:
        raise _damaged(path, ValueError("`cka` is not student layers by teacher layers"))
    return similarity


def _printable(text: str) -> str:
    """`text` with `?` for every character that a terminal would not show."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _names(groups: Sequence[Sequence[_Run]]) -> list[str]:
    """What the folder names of each group have in common, or the whole folders if these names are not unique."""
    names = []
    for members in groups:
        shared = _beginning([run.folder.name or str(run.folder.absolute()) for run in members])
        plain = re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", shared) if len(members) > 1 else shared
        names.append(_printable(plain or _first_of([run.folder.name for run in members])))
    if len(set(names)) == len(names):
        return names
    return [_printable(_first_of([str(run.folder) for run in members])) for members in groups]


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _beginning(names: Sequence[str]) -> str:
    """The longest common prefix."""
    shared = next((place for place, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), None)
    return min(names, key=len)[:shared]


def _group(name: str, members: Sequence[_Run]) -> Group:
    roles = _roles(members)
    summaries = [_summary_of(role, members) for role in roles]
    headline = members[0].headline
    if headline is None:
        headline = headline_of({name for run in members for name in run.measures})
    gain_over = "baseline" if "baseline" in roles else "untrained student"
    return Group(
        name=name,
        runs=tuple(_printable(str(run.folder)) for run in members),
        seeds=tuple(run.seed for run in members),
        summaries=tuple(summaries),
        gain=_spread(_gains(members, headline, gain_over)),
        curves=tuple(_curves(members)),
        classes=tuple(_classes(members)),
        similarity=_mean_similarity([run.similarity for run in members if run.similarity]),
        pairs=tuple(dict.fromkeys(chain.from_iterable(map(_pairs, _paired_in(members[0].recipe))))),
        recipe=members[0].text,
        headline=headline,
        gain_over=gain_over,
        losses=members[0].losses,
        pair_scores=tuple(_pair_scores(members)),
    )


def _pair_scores(members: Sequence[_Run]) -> Iterator[PairSummary]:
    """The pairs of the student, over the runs that have finished it."""
    of_runs = [run.results["student"].pairs for run in members if "student" in run.results]
    places = dict.fromkeys(_place_of(pair) for pairs in of_runs for pair in pairs)
    for place in places:
        scores = [pair for pairs in of_runs for pair in pairs if _place_of(pair) == place]
        explained, cosine = (_spread([getattr(score, name) for score in scores]) for name in OF_PAIRS)
        stage, loss, student, teacher = map(_printable, place)
        yield PairSummary(stage, loss, student, teacher, explained, cosine)


def _place_of(pair: PairScore) -> tuple[str, str, str, str]:
    return pair.stage, pair.loss, pair.student, pair.teacher


def _roles(members: Sequence[_Run]) -> list[str]:
    """The roles of the models that any of the runs has: the student's, then the teachers'."""
    found = dict.fromkeys(role for run in members for role in (*run.results, *(row["role"] for row in run.rows)))
    return [role for role in ROLES if role in found] + [role for role in found if role not in ROLES]


def _gains(members: Sequence[_Run], headline: str, over: str) -> Iterator[float]:
    for run in members:
        if {"student", over} <= run.results.keys():
            student, other = (run.results[role].value(headline) for role in ("student", over))
            if student is not None and other is not None:
                yield student - other


def _paired_in(recipe: Mapping[str, Any]) -> Iterator[Any]:
    """The `pairs` of a resolved recipe, and those of its losses."""
    yield recipe.get("pairs")
    for stage in recipe.get("stages") or ():
        for loss in stage.get("losses", {}).values():
            yield loss.get("pairs")


def _pairs(pairs: Any) -> Iterator[tuple[str, str]]:
    """The resolved pairs of a run; an edited recipe may say `auto` instead."""
    for student_layer, value in pairs.items() if isinstance(pairs, Mapping) else ():
        for pair in value if isinstance(value, list) else [value]:
            teacher_layer = pair.get("teacher") if isinstance(pair, Mapping) else pair
            if isinstance(teacher_layer, str):
                yield _printable(student_layer) or "output", _printable(teacher_layer) or "output"


def _summary_of(role: str, members: Sequence[_Run]) -> ModelSummary:
    """Over the runs that have finished the model; if none has, from the last epochs so far."""
    finished = [run.results[role] for run in members if role in run.results]
    if not finished:
        rows = [row for row in (run.last(role) for run in members) if row]
        where = f"epoch {min(row['epoch'] for row in rows)} of stage {rows[0]['stage']!r}"
        side = _section_of(members[0].recipe, role)
        name, spreads = _printable(str(side.get("model"))), _spreads(lambda row, key: row.get(key), rows)
        accuracy, agreement = spreads.pop("accuracy", None), spreads.pop("agreement", None)
        return ModelSummary(role, name, accuracy, agreement, None, None, None, None, where, spreads)
    accuracy = _spread([result.accuracy for result in finished])
    return ModelSummary(
        role=role,
        model=finished[0].model,
        accuracy=accuracy,
        agreement=_spread([result.agreement for result in finished]),
        ema_accuracy=_spread([result.ema_accuracy for result in finished]),
        parameters=finished[0].parameters,
        macs=finished[0].macs,
        seconds=_spread([result.seconds or None for result in finished]),
        measures=_spreads(lambda result, name: result.measures.get(name), finished),
        ema_measures=_spreads(lambda result, name: result.ema_measures.get(name), finished),
    )


def _section_of(recipe: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    """What a recipe says of the model with a role."""
    several: Mapping[str, Any] = recipe.get("teachers", {})
    named = several.get(role.removeprefix("teacher").strip(), {}) if several else recipe.get("teacher", {})
    section: Mapping[str, Any] = named if role.startswith("teacher") else recipe.get("student", {})
    return section


def _spreads(value: Callable[[Any, str], float | None], items: Sequence[Any]) -> dict[str, Spread]:
    """Every measure that any of the items has."""
    spreads = {name: _spread([value(item, name) for item in items]) for name in MEASURES}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _spread(measured: Iterable[float | None]) -> Spread | None:
    values = tuple(value for value in measured if value is not None)
    if not values:
        return None
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(fmean(values), min(values), max(values), deviation, values)


def _curves(members: Sequence[_Run]) -> Iterator[Curve]:
    """By epoch of a model, counted over all its stages, over the runs that have reached it."""
    for role in _roles(members):
        series = [[row for row in run.rows if row["role"] == role] for run in members]
        for measure in dict.fromkeys(key for rows in series for row in rows for key in row if key not in UNCOMPARED):
            points = []
            for epoch in range(max(map(len, series))):
                values = [rows[epoch][measure] for rows in series if epoch < len(rows) and measure in rows[epoch]]
                values = [value for value in values if abs(value) < 1e100]  # no axis reaches to infinity
                if values:
                    points.append((epoch + 1, fmean(values), min(values), max(values)))
            yield Curve(role, measure, tuple(points))


def losses_of(group: Group) -> list[Curve]:
    """The terms of the student's loss, without their sum."""
    excluded = {*not_losses(group.losses), "loss"}
    return [
        curve for curve in group.curves if curve.role == "student" and curve.measure not in excluded and curve.points
    ]


def _classes(members: Sequence[_Run]) -> Iterator[ClassChange]:
    """The largest changes first, with the images of all runs added per class."""
    counted = [run for run in members if _has_class_counts(run)]
    if not counted:
        return
    changes = []
    for index, name in enumerate(counted[0].classes):
        counts = {
            role: [
                sum(getattr(run.results[role], counter)[index] for run in counted) for counter in ("images", "right")
            ]
            for role in ("baseline", "student")
        }
        images = counts["student"][0]
        if images and counts["baseline"][0]:
            baseline, student = (right / total for total, right in counts.values())
            changes.append(ClassChange(name, images, baseline, student))
    yield from sorted(changes, key=lambda item: -abs(item.change))


def _has_class_counts(run: _Run) -> bool:
    results = [run.results.get(role) for role in ("baseline", "student")]
    count = len(run.classes)
    return count > 0 and all(result and len(result.images) == len(result.right) == count for result in results)


def _mean_similarity(similarities: Sequence[LayerSimilarity]) -> LayerSimilarity | None:
    """The mean over seeds of every cell, for runs with the same layers."""
    if not similarities:
        return None
    first = similarities[0]
    same = [other for other in similarities if (other.student, other.teacher) == (first.student, first.teacher)]
    cells = [
        [_mean([other.cka[row][column] for other in same]) for column in range(len(first.teacher))]
        for row in range(len(first.student))
    ]
    images = min(other.images for other in same)
    return LayerSimilarity(images, first.student, first.teacher, tuple(map(tuple, cells)), first.pairs)


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None


def _differences(recipes: Sequence[Any], place: str = "") -> Iterator[Difference]:
    """Key by key; a key that one recipe lacks is one difference, whatever it contains."""
    parts = [
        dict(enumerate(recipe)) if _has_parts(recipe) and isinstance(recipe, list) else recipe for recipe in recipes
    ]
    if all(isinstance(recipe, Mapping) for recipe in parts):
        for key in dict.fromkeys(key for recipe in parts for key in recipe):
            if place or key != "seed":
                yield from _differences([recipe.get(key) for recipe in parts], f"{place}.{key}" if place else str(key))
    elif any(recipe != parts[0] for recipe in parts):
        yield Difference(_printable(place), tuple(_printable(_brief(recipe)) for recipe in recipes))


def _has_parts(value: Any) -> bool:
    return isinstance(value, list | Mapping) and any(isinstance(item, Mapping) for item in value)


def _brief(value: Any) -> str:
    """A value for a cell of a table; a stage or a loss by its name."""
    if isinstance(value, Mapping):
        return str(value.get("name") or value.get("loss") or value.get("model") or "given")
    return ", ".join(map(_brief, value)) if _has_parts(value) else "" if value is None else str(value)


def over_seeds(spread: Spread | None, measure: str = "accuracy") -> str:
    """A measure over seeds: `95.09 ± 1.25%`, the two of two seeds as `93.89–95.00%`, one as `95.00%`."""
    if spread is None:
        return ""
    unit, number = _number(measure)
    if spread.deviation is None:
        return f"{number(spread.mean)}{unit}"
    if len(spread.values) == 2:
        return f"{number(spread.low)}–{number(spread.high)}{unit}"
    return f"{number(spread.mean)} ± {number(spread.deviation)}{unit}"


def _number(measure: str) -> tuple[str, Callable[[float], str]]:
    unit, factor = MEASURES[measure].unit, MEASURES[measure].factor
    return unit, lambda value: f"{factor * value:.{2 if unit else 4}f}"


def points(spread: Spread, measure: str = "accuracy") -> str:
    """A difference of two values of a measure, with its sign; of shares in points of a percent."""
    factor, digits = MEASURES[measure].factor, 2 if MEASURES[measure].unit else 4
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (spread.mean, spread.low, spread.high))
    text = f"{mean} points" if MEASURES[measure].unit else mean
    return text if spread.deviation is None else f"{text} ({low} to {high})"
