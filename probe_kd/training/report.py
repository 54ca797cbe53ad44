"""What people see of a run: progress, tables, curves. Nothing here computes what it shows."""

import csv
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from probe_kd.console import PlainConsole
from probe_kd.data.datasets import class_names
from probe_kd.engine import patterns
from probe_kd.engine.matching import blocks, stages
from probe_kd.engine.models import packages
from probe_kd.engine.spec import FeatureSpec, ModuleSpec, Pair, Schedule, Tap, Trace
from probe_kd.errors import MatchError, TapError, nearest, visible
from probe_kd.files.atomic import check_regular, put
from probe_kd.methods.adapters import Answer, adapt
from probe_kd.methods.distiller import answers, make_adapters
from probe_kd.recipe.options import RESERVED
from probe_kd.recipe.planner import Plan

Row = dict[str, Any]  # one epoch: MEASURES, and every loss by its name
MEASURES = RESERVED[:-1]
GENERATOR = "probe-kd "  # by which a report names its maker
MOST_BYTES = 10_000_000  # of an evaluation, which has a few kB


@dataclass
class Result:
    """What came of one subject of a run.

    `accuracy` and `agreement` (with the teacher's answers) are shares of the test images, in 0..1; `seconds` were spent
    in training; `weights` is the file in the run's folder, empty where nothing was trained. Those with `ema` are of the
    moving average. `images` are the test images of every class, and `right` those of them that it answers rightly.
    """

    role: str
    model: str
    model_kwargs: dict[str, Any]
    parameters: int
    macs: int
    accuracy: float
    agreement: float | None
    seconds: float
    weights: str
    ema_accuracy: float | None = None
    ema_weights: str = ""
    images: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reach:
    """What one loss of one stage does to one part of the models: how many of its parameters it moves, and how much."""

    stage: str
    loss: str
    part: str
    reached: int
    parameters: int
    norm: float


@dataclass(frozen=True)
class StepCost:
    """What one update of one stage costs and gives, on one real batch, before anything is trained.

    `losses` are the unweighted terms and `loss`, their weighted sum; `seconds` are those of a step when all is warm,
    `steps` are those of the whole stage. The rest is in bytes: `weights` of both models and the adapters, `activations`
    what is kept for the backward. `adapter_macs` are of one image.
    """

    stage: str
    losses: dict[str, float]
    images: int
    steps: int
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    adapter_parameters: int
    adapter_macs: int

    @property
    def memory(self) -> int:
        """The bytes of a step; what a library allocates for itself comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


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

    `cka` is linear CKA in 0..1, `cka_alone` that of the student alone, and `explained_variance` the share of the
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


class Display:
    """How a run shows itself while it goes on: a bar per stage in a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.shown = 0.0  # when something was last shown
        self.title, self.epochs, self.images, self.started = "", 0, 0, 0.0
        self.steps = self.before = self.done = 0  # batches of an epoch, in former epochs, and in this one
        self.text = ""
        self.accuracy = ""

    def begin(self, title: str, epochs: int, steps: int, done: int) -> None:
        """A stage begins: so many epochs of so many steps, the first `done` of them done before."""
        self.title, self.epochs, self.images = title, epochs, 0
        self.steps, self.before, self.done = steps, done * steps, 0
        self.started = self.shown = time.monotonic()
        self.text = self.accuracy = ""
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[epoch]}/{task.fields[epochs]}"),
                TextColumn("{task.fields[losses]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task(
                title, total=epochs * steps, completed=done * steps, epochs=epochs, epoch=done, losses=""
            )

    def step(self, done: int, images: int) -> bool:
        """So many batches of the epoch are done, of so many images each.

        True when losses are wanted, for which the caller has to wait for the GPU.
        """
        self.images += (done - self.done) * images
        self.done = done
        if self.progress is None:
            return False
        self.progress.update(self.task, completed=self.before + done)
        due = time.monotonic() - self.shown > 0.5
        if due:
            self.shown = time.monotonic()
        return due

    def say(self, text: str) -> None:
        """Something that has to be read, also where the run is quiet."""
        PlainConsole(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)

    def tell(self, text: str) -> None:
        """Something that is good to know, where the run is not quiet."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def losses(self, terms: Mapping[str, float]) -> None:
        """The mean losses of the epoch so far."""
        self.text = " ".join(f"{name} {value:.4g}" for name, value in terms.items())
        if self.progress is not None:
            self.progress.update(self.task, losses=self._status())

    def epoch(self, row: Row) -> None:
        """An epoch is done and measured."""
        self.before, self.done = self.before + self.steps, 0
        self.accuracy = f"[green]accuracy {row['accuracy']:.1%}[/]" if "accuracy" in row else self.accuracy
        self.losses({name: value for name, value in row.items() if name not in MEASURES})
        if self.progress is not None:
            self.progress.update(self.task, epoch=row["epoch"], losses=self._status())
        elif not self.quiet and (row["epoch"] == self.epochs or time.monotonic() - self.shown > 5):
            self.shown = time.monotonic()
            self.console.print(f"{self.title}  {row['epoch']}/{self.epochs}  {self._status()}", highlight=False)

    def _status(self) -> str:
        rate = self.images / max(time.monotonic() - self.started, 1e-9)
        return "  ".join(part for part in (self.text, self.accuracy, f"{rate:,.0f} images/s") if part)

    def end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model as `inspect` shows it; `note` says what to know before tapping it."""

    mark: str
    tap: str
    kind: str
    layout: str
    shape: tuple[int, ...]
    reduction: float | None
    parameters: int
    macs: int
    note: str


def layer_rows(
    trace: Trace, *, every: bool = False, glob: str | None = None, depth: int | None = None
) -> list[LayerRow]:
    """The stage ends and blocks of a trace; or all of its modules, or those that `glob` and `depth` leave.

    Raises TapError for a glob that no module matches.
    """
    marks = _marks(trace)
    named = patterns.glob(glob) if glob is not None else None
    narrowed = glob is not None or depth is not None
    found: list[tuple[int, LayerRow]] = []
    for name, module in trace.modules.items():
        if (named is not None and not named(name)) or (depth is not None and module.depth > depth):
            continue
        specs = [spec for spec in trace.specs if spec.tap.module == name and spec.tap.port == "output"]
        shown = [spec for spec in specs if every or narrowed or spec.tap in marks]
        found += [(spec.order, _layer_row(spec, module, marks)) for spec in shown]
        found += [(-1, _silent_row(module))] * (not specs and (every or narrowed))
    if glob is not None and not found:
        raise TapError(f"no module of {trace.model} is named {glob!r}{nearest(glob, trace.modules)}")
    if not (every or narrowed):  # the choice reads in the order of the forward, the whole in that of the modules
        found.sort(key=lambda item: item[0])
    return [row for _, row in found]


def _marks(trace: Trace) -> dict[Tap, str]:
    try:
        ends = {spec.tap: "stage" for spec in stages(trace)}
    except MatchError:  # a model without stages still has layers to show
        ends = {}
    return {spec.tap: "block" for spec in blocks(trace)} | ends | {trace.output.tap: "output"}


def _layer_row(spec: FeatureSpec, module: ModuleSpec, marks: Mapping[Tap, str]) -> LayerRow:
    notes = [f"called {spec.calls} times"] * (spec.calls > 1) + ["overwritten later, so cloned"] * spec.clone
    notes += [f"{spec.prefix_tokens} prefix tokens"] * bool(spec.prefix_tokens)
    return LayerRow(
        mark=marks.get(spec.tap, ""),
        tap=str(spec.tap),
        kind=module.kind,
        layout=str(spec.layout),
        shape=spec.shape[1:],
        reduction=spec.reduction,
        parameters=module.parameters,
        macs=module.macs,
        note=", ".join(notes),
    )


def _silent_row(module: ModuleSpec) -> LayerRow:
    note = module.silent or "yields no tensor"
    return LayerRow("", module.name, module.kind, "", (), None, module.parameters, module.macs, note)


def layers_table(trace: Trace, rows: Iterable[LayerRow]) -> Table:
    """What `inspect` prints."""
    size = "x".join(map(str, trace.input_size))
    title = f"{escape(trace.model)}  {size}  {amount(trace.parameters)} parameters  {amount(trace.macs)} MACs"
    table = _table(title, "tap", "module", "layout", "shape>", "stride>", "parameters>", "MACs>", "note")
    table.caption = "shapes without the batch; ● stage end, ○ block: what `match` chooses from; ◆ the output"
    signs = {"stage": "[bold green]●[/]", "block": "○", "output": "◆"}
    for row in rows:
        table.add_row(
            f"{signs.get(row.mark, ' ')} {escape(row.tap or repr(''))}",
            row.kind,
            row.layout,
            "x".join(map(str, row.shape)),
            "" if row.reduction is None else f"{row.reduction:.3g}",
            amount(row.parameters),
            amount(row.macs),
            row.note,
            style="bold" if row.mark in ("stage", "output") else "",
        )
    return table


@dataclass(frozen=True)
class PairRow:
    """One pair as `match` shows it."""

    student: str
    student_feature: str
    teacher: str
    teacher_feature: str
    adapter: str
    reason: str


def pair_rows(pairs: Iterable[Pair], student: Trace, teacher: Trace) -> list[PairRow]:
    """The pairs with what they yield and how that is brought together for a hint."""
    rows = []
    for pair in pairs:
        ours, theirs = student[pair.student], teacher[pair.teacher]
        adapter = str(adapt(ours, theirs))
        row = PairRow(str(pair.student), ours.describe(), str(pair.teacher), theirs.describe(), adapter, pair.reason)
        rows.append(row)
    return rows


def pairs_table(student: str, teacher: str, rows: Iterable[PairRow]) -> Table:
    """What `match` prints."""
    table = _table(
        escape(f"{student} <- {teacher}"), "student layer", "yields", "teacher layer", "yields", "adapter", "reason"
    )
    for row in rows:
        table.add_row(*map(escape, astuple(row)))
    return table


def plan_table(plan: Plan) -> Table:
    """What a recipe is about to do: every comparison, with its adapter."""
    table = _table("What is compared: student <- teacher", "stage", "loss", "weight>", "layers", "adapter")
    for item in plan.comparisons:
        table.add_row(
            *map(escape, (item.stage, item.objective.name, _weight(item.objective.weight))),
            *map(escape, (str(item.comparison), item.adapter)),
        )
    return table


def models_table(plan: Plan) -> Table:
    """The models of a recipe, and what each sees."""
    table = _table("Models", "", "model", "sees", "parameters>", "MACs>")
    sides = [("student", plan.trained, plan.student_input)]
    if plan.teacher and plan.teacher_input:
        sides.append(("teacher", plan.teacher, plan.teacher_input))
    for role, trace, given in sides:
        sees = f"{'x'.join(map(str, given.size))}, mean {_numbers(given.mean)}, std {_numbers(given.std)}"
        table.add_row(role, escape(trace.model), sees, amount(trace.parameters), amount(trace.macs))
    table.caption = f"shared by {plan.sharing}" if plan.sharing else None
    return table


def teacher_lines(plan: Plan) -> list[str]:
    """Which models get a new classifier; that a teacher which has weights is trained on, and at which learning rate."""
    teacher, lines = plan.recipe.teacher, list(plan.new_classifiers)
    if teacher is None or teacher.train is None or not (teacher.pretrained or teacher.checkpoint):
        return lines
    train = teacher.train
    return [
        *lines,
        f"the teacher has weights, and is first fine-tuned: {train.epochs} epochs, lr {train.optimizer.lr:g}",
    ]


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


@dataclass(frozen=True)
class Idle:
    """What of one model one stage does not run, since no loss looks that far up; and what share of its MACs that is."""

    stage: str
    side: str
    last: str
    modules: tuple[str, ...]
    share: float


def idle_rows(plan: Plan) -> list[Idle]:
    """Of every stage, the layers that do not run at all, because the forward stops at the last tap."""
    rows = []
    for stage, objectives in zip(plan.recipe.stages, plan.objectives, strict=True):
        for index, (side, trace) in enumerate((("student", plan.trained), ("teacher", plan.teacher))):
            taps = [tap for objective in objectives for tap in objective.taps[index]]
            # A trunk or a graft takes the other model's layers as well, so that there both run whole.
            if trace is None or not taps or plan.sharing or any(tap.is_output for tap in taps):
                continue
            last = max((trace[tap] for tap in taps), key=lambda spec: spec.order)
            above = [module for module in trace.modules.values() if module.first > last.order]
            names = {module.name for module in above}
            top = [module for module in above if module.parent not in names]
            saved = sum(module.macs for module in top)
            row = Idle(stage.name, side, str(last.tap), tuple(m.name for m in top), saved / max(trace.macs, 1))
            rows += [row] * bool(top)
    return rows


def idle_table(rows: Iterable[Idle]) -> Table:
    """What `check` prints of them."""
    table = _table(
        "Not run: above the last layer that a loss reads", "stage", "model", "last", "not run", "of its MACs>"
    )
    for row in rows:
        table.add_row(*map(escape, (row.stage, row.side, row.last, ", ".join(row.modules))), f"{row.share:.0%}")
    return table


def cache_lines(plan: Plan) -> list[str]:
    """What the teacher's cache will hold in the end, at four bytes a number; nothing where there is none."""
    options, teacher = plan.recipe.teacher, plan.teacher
    if options is None or options.cache is None or teacher is None:
        return []
    views: dict[Answer, set[int]] = {}
    age = 0
    for stage, objectives in zip(plan.recipe.stages, plan.objectives, strict=True):
        shown = {epoch % (plan.recipe.data.num_views or epoch + 1) for epoch in range(age, age + stage.epochs)}
        adapters = make_adapters(objectives, plan.trained, teacher, plan.class_map)
        for answer in answers(objectives, adapters, teacher).values():
            views.setdefault(answer, set()).update(shown)
        age += stage.epochs
    images, total, lines = len(plan.datasets.train), 0.0, []  # type: ignore[arg-type]
    for answer, seen in views.items():
        numbers = 2 * options.cache_top_k + 1 if options.cache_top_k and not answer.name else prod(answer.shape)
        size = 4.0 * numbers * images * len(seen)
        total += size
        times = f"{images} images x {len(seen)} views x {numbers} numbers"
        lines.append(f"  {answer.name or repr('')}: {times} = {size / 1e9:.3g} GB")
    new = " (every epoch shows new views; `data.views` or `no_aug` bounds them)" * (plan.recipe.data.num_views is None)
    return [f"The teacher's cache in {options.cache} will hold up to {total / 1e9:.3g} GB{new}:", *lines]


def reach_table(rows: Iterable[Reach]) -> Table:
    """What every loss moves, and how much: the norm of its gradient, unweighted."""
    table = _table("Gradients on one batch, before training", "stage", "loss", "moves", "parameters>", "norm>")
    for row in rows:
        table.add_row(row.stage, row.loss, row.part, f"{row.reached}/{row.parameters}", f"{row.norm:.3g}")
    return table


def losses_table(rows: Iterable[StepCost], *, trains_teacher: bool) -> Table:
    """What every loss gives on one batch, before training, and what its stage weighs them to."""
    table = _table("Losses on one batch, before training", "stage", "loss", "value>")
    if trains_teacher:
        table.caption = "The teacher is not trained yet: what its answers decide will have other values."
    for row in rows:
        for name, value in sorted(row.losses.items(), key=lambda item: item[0] == "loss"):
            table.add_row(row.stage, "weighted sum" if name == "loss" else name, f"{value:.4g}")
    return table


def costs_table(rows: Sequence[StepCost]) -> Table:
    """What a step of the student's stages costs on this machine: time and memory, and the adapters' share."""
    columns = ("stage", "step>", "images/s>", "steps>", "stage takes>", "memory>", "of it activations>", "adapters>")
    table = _table(f"A step of {rows[0].images} images, on this machine", *columns)
    for row in rows:
        table.add_row(
            row.stage,
            f"{row.seconds * 1000:.3g} ms",
            f"{row.images / row.seconds:.3g}",
            str(row.steps),
            duration(row.seconds * row.steps),
            size(row.memory),
            size(row.activations),
            f"{amount(row.adapter_parameters)}, {amount(row.adapter_macs)} MACs" if row.adapter_parameters else "none",
        )
    return table


def duration(seconds: float) -> str:
    """Two digits and a unit: 3.4 h."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"


def size(count: float) -> str:
    """Three digits and a unit of bytes: 11.2 MB."""
    return f"{amount(count)}B" if count >= 1000 else f"{count:.0f} B"


def _weight(weight: float | Schedule) -> str:
    return f"{weight.start:g} to {weight.end:g}" if isinstance(weight, Schedule) else f"{weight:g}"


def write_report(results: Sequence[Result], rows: Sequence[Row], plan: Plan, folder: Path) -> None:
    """The tables, the curves, and the summary for other programs, which marks the run as finished."""
    # The last checkpoint wrote the tables too, unless the run was killed between the two.
    write_metrics(rows, folder / "metrics.csv")
    write_timm_summary(rows, folder / "summary.csv")
    draw_curves(rows, folder / "curves.png", "Test" if plan.datasets.val is None else "Validation")
    aside = folder / "summary.partial"
    found = {
        "seed": plan.recipe.seed,
        "classes": class_names(plan.datasets),
        "measured_on": plan.datasets.measured_on,
        "skipped_images": {split: len(names) for split, names in plan.datasets.skipped.items()},
        "notes": list(plan.datasets.notes),
        "results": [asdict(result) for result in results],
    }
    aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put(aside, folder / "summary.json")


def data_lines(plan: Plan) -> list[str]:
    """Which images a run measures on, and what else is to be known of its data."""
    return [f"data: {text}" for text in (plan.datasets.measured_on, *plan.datasets.notes)]


def print_student(plan: Plan, folder: Path, console: Console) -> None:
    """The end of a run: where it is, how to load the student, and what else one may do with it."""
    student = plan.student
    arguments = "".join(f", {key}={value!r}" for key, value in student.model_kwargs.items())
    weights = folder / "student.safetensors"
    timms = plan.grown is None and ":" not in student.model.removeprefix("hf-hub:").removeprefix("local-dir:")
    line = f"  timm.create_model({student.model!r}, checkpoint_path={str(weights)!r}{arguments})"
    line = line if timms else f"  probe_kd.load_student({str(weights)!r}{_allowing(plan)})"
    first = f"Results in {folder}. " + ("The student is plain timm:" if timms else "The student:")
    for text in (first, line, _next_commands(plan, folder, timms=timms)):
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def doubts(accuracies: Mapping[str, float]) -> list[str]:
    """What in the accuracies of a run's subjects says that it cannot have taught what was hoped for."""
    teacher, alone = (accuracies.get(role) for role in ("teacher", "student alone"))
    if teacher is None or alone is None or teacher >= alone:
        return []
    return [
        f"The teacher ({teacher:.2%}) is worse than the student alone ({alone:.2%}), so there is "
        "little to learn from it: train it longer, or give it other weights, another learning rate or the right mean "
        "and std."
    ]


def _next_commands(plan: Plan, folder: Path, *, timms: bool) -> str:
    """In one line, to be copied."""
    names = [found.model for found in (plan.student, plan.teacher) if found]
    allowed = "".join(f" --allow-import {package}" for package in packages(names))
    run = quote(str(folder))
    export = f"probe-kd export {run} -o DIR{'' if timms else ' --onnx'}{allowed}"  # what timm cannot build goes to ONNX
    return f"Next: probe-kd eval {run}{allowed} | {export} | probe-kd compare {run} ..."


def _allowing(plan: Plan) -> str:
    """What `load_student` has to be told for models that are functions of one's own."""
    traces = [plan.student] + [plan.teacher] * (plan.grown is not None and plan.teacher is not None)
    allowed = packages(found.model for found in traces if found)
    return f", allow_import={allowed}" if allowed else ""


def is_measured(file: Path) -> bool:
    """Whether a file was written by `eval -o` or `compare -o`, whatever it is called: its contents say so."""
    try:
        check_regular(file)
        if file.suffix.lower() in (".html", ".htm"):
            with file.open(encoding="utf-8") as page:
                return f'<meta name="generator" content="{GENERATOR}' in page.read(2000)
        found = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size < MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return False
    names = {part.name for part in fields(Evaluation)}
    return isinstance(found, dict) and found.keys() | {"notes"} == names  # which those of before have not


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """One line per epoch of every subject, a column for whatever any of them measured."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    aside = path.with_suffix(".partial")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(_cell, columns))
        writer.writerows([_cell(row.get(key)) for key in columns] for row in rows)
    put(aside, path)


def _cell(value: Any) -> Any:
    """What a spreadsheet shows, and does not compute: text that begins as a formula is marked as text."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


def write_timm_summary(rows: Sequence[Row], path: Path) -> None:
    """The student's epochs as timm's training script writes them: `train_*`, `eval_top1` in percent, `lr`."""
    own = [row for row in rows if row["subject"] == "student"]
    losses = [{f"train_{key}": value for key, value in row.items() if key not in RESERVED} for row in own]
    told = [
        {"epoch": epoch, **loss, **_in_percent(row), "lr": row["lr"]}
        for epoch, (row, loss) in enumerate(zip(own, losses, strict=True))
    ]
    if told:
        write_metrics(told, path)


def _in_percent(row: Row) -> Row:
    return {"eval_top1": 100 * row["accuracy"]} if "accuracy" in row else {}


def draw_curves(rows: Sequence[Row], path: Path, split: str = "Test") -> None:
    """Accuracy of every subject by epoch, on the images of `split`, and the loss terms of the student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for subject in dict.fromkeys(row["subject"] for row in rows):
        epochs = enumerate((row for row in rows if row["subject"] == subject), 1)
        points = [(epoch, 100 * row["accuracy"]) for epoch, row in epochs if "accuracy" in row]
        if points:
            left.plot(*zip(*points, strict=True), label=subject)
    left.set(title=f"{split} accuracy", xlabel="epoch", ylabel="%")
    own = [row for row in rows if row["subject"] == "student"]
    for term in dict.fromkeys(key for row in own for key in row if key not in {*MEASURES, "loss"}):
        points = [(epoch, row[term]) for epoch, row in enumerate(own, 1) if term in row]
        right.plot(*zip(*points, strict=True), label=term)
    right.set(title="Training losses of the student (not weighted)", xlabel="epoch", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def scores_table(found: Evaluation) -> Table:
    """What every model of a run answers, and how near that is to the teacher."""
    columns = ("model", "weights", "top-1>", "top-5>", "NLL>", "calibration error>", "agreement>", "KL>")
    table = _table(f"{found.run}: {found.images} images ({found.split})", "", *columns)
    for row in found.scores:
        table.add_row(
            row.role,
            *map(escape, (row.model, row.weights)),
            *(_share(row.top1), _share(row.top5), _decimals(row.nll), _share(row.calibration_error)),
            *(_share(row.agreement), _decimals(row.kl)),
        )
    table.caption = "NLL, and KL(teacher || student), in nats per image; calibration error: expected, 15 bins, l1"
    if any(row.role == "teacher alone" for row in found.scores):
        table.caption += "; agreement and KL are with the teacher that trained with the student"
    return table


def similarity_table(found: Evaluation) -> Table:
    """How alike the compared layers of student and teacher are."""
    alone = any(row.cka_alone is not None for row in found.pairs)
    columns = ("loss", "student layer", "teacher layer", "CKA>", *["CKA alone>"] * alone, "explained variance>", "note")
    table = _table("Features: student <- teacher", "stage", *columns)
    for row in found.pairs:
        table.add_row(
            *map(escape, (row.stage, row.loss, row.student, row.teacher)),
            *(_decimals(value) for value in (row.cka, *[row.cka_alone] * alone, row.explained_variance)),
            escape(row.note),
        )
    table.caption = (
        "CKA: linear, of each feature's mean over positions. Explained variance: of the teacher's feature, after the "
        "adapter as the end of its stage left it. The student is as it finally is, also for earlier stages."
    )
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


class _Table(Table):
    """A table that becomes a list of entries where the terminal is too narrow for its columns."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(map(_least_width, self.columns)) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield Text.from_markup(f"{self.title}\n", style="italic")
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            yield Text.from_markup(str(cells[0]), style="bold")
            named = [(column.header, cell) for column, cell in zip(self.columns[1:], cells[1:], strict=True) if cell]
            for line in _filled([f"{name}: {cell}" for name, cell in named], options.max_width - INDENT):
                yield Padding(Text.from_markup(line), (0, 0, 0, INDENT))
        yield Text.from_markup(f"\n{self.caption or ''}", style="dim italic")


INDENT = 4
FOLDED = 24  # a column of text that is narrower is a tower of single words


def _least_width(column: Column) -> int:
    """What a column needs, with the space beside it: all of its numbers and names, some of its texts."""
    texts = [Text.from_markup(str(text)) for text in (column.header, *column.cells)]
    whole = max(text.cell_len for text in texts)
    if column.no_wrap:
        return whole + 3
    return max(min(whole, FOLDED), *(len(word) for text in texts for word in text.plain.split() or [""])) + 3


def _filled(pieces: Iterable[str], width: int) -> list[str]:
    """Lines of as many pieces as they have room for; what is longer than a line has one of its own."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" · {piece}"
        else:
            lines.append(piece)
    return lines


def _table(title: str, first: str, *others: str) -> Table:
    """A table whose first column, the names, is never cut. A column written `name>` is aligned to the right."""
    table = _Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        right = column.endswith(">")
        table.add_column(column.removesuffix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def amount(number: float) -> str:
    """Three digits and a unit: 11.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
