"""What the commands print of models, plans, audits and evaluations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probe_kd.console import amount, duration, size, table_of
from probe_kd.engine import patterns
from probe_kd.engine.matching import blocks, stages
from probe_kd.engine.models import built_by_timm, packages
from probe_kd.engine.spec import FeatureSpec, ModuleSpec, Pair, Schedule, Share, Tap, Trace
from probe_kd.errors import MatchError, TapError, nearest
from probe_kd.measures import MEASURES, OF_LABELLED_SET, OF_PAIRS
from probe_kd.methods.adapters import adapt
from probe_kd.methods.feature_figures import LayerFigures
from probe_kd.methods.feature_matching import defect
from probe_kd.recipe.loss_names import packages_of
from probe_kd.recipe.planner import Plan, PlannedTeacher
from probe_kd.recipe.sections.outputs import role_of_teacher

if TYPE_CHECKING:  # what they import takes a second, and `inspect` needs none of it
    from probe_kd.recipe.feature_measuring import FeatureMatch
    from probe_kd.results.evaluation import Evaluation
    from probe_kd.training.audit import MeasuredShare, Reach, StepCost
    from probe_kd.training.cache_cost import CacheCost

MUCH = 0.25  # of the work of training, from which the cost of an evaluation is told


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model as `inspect` shows it. `note` holds warnings for whoever taps the layer."""

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
    """Return the stage ends and blocks of a trace, all of its modules, or only those that match `glob` and `depth`.

    Raises TapError if no module matches the glob.
    """
    marks = _marks(trace)
    matches = patterns.glob(glob) if glob is not None else None
    narrowed = glob is not None or depth is not None
    rows: list[tuple[int, LayerRow]] = []
    for name, module in trace.modules.items():
        if (matches is not None and not matches(name)) or (depth is not None and module.depth > depth):
            continue
        specs = [spec for spec in trace.specs if spec.tap.module == name and spec.tap.port == "output"]
        selected = [spec for spec in specs if every or narrowed or spec.tap in marks]
        rows += [(spec.order, _layer_row(spec, module, marks)) for spec in selected]
        rows += [(-1, _silent_row(module))] * (not specs and (every or narrowed))
    if glob is not None and not rows:
        raise TapError(f"no module of {trace.model} is named {glob!r}{nearest(glob, trace.modules)}")
    if not (every or narrowed):  # a selection is in the order of the forward, a full list in the order of the modules
        rows.sort(key=lambda item: item[0])
    return [row for _, row in rows]


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
    """Return the table that `inspect` prints."""
    size = "x".join(map(str, trace.input_size))
    title = f"{escape(trace.model)}  {size}  {amount(trace.parameters)} parameters  {amount(trace.macs)} MACs"
    table = table_of(title, "tap", "module", "layout", "shape>", "stride>", "parameters>", "MACs>", "note")
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
    """Return each pair with the features at its taps and the adapter that a hint loss would use."""
    rows = []
    for pair in pairs:
        student_layer, teacher_layer = student[pair.student], teacher[pair.teacher]
        adapter = str(adapt(student_layer, teacher_layer))
        row = PairRow(
            str(pair.student),
            student_layer.describe(),
            str(pair.teacher),
            teacher_layer.describe(),
            adapter,
            pair.reason,
        )
        rows.append(row)
    return rows


def pairs_table(student: str, teacher: str, rows: Iterable[PairRow]) -> Table:
    """Return the table that `match` prints."""
    table = table_of(
        escape(f"{student} <- {teacher}"), "student layer", "yields", "teacher layer", "yields", "adapter", "reason"
    )
    for row in rows:
        table.add_row(*map(escape, astuple(row)))
    return table


def figures_table(matched: "FeatureMatch") -> Table:
    """Return the table of the layers that `match --by features` measured."""
    title = f"Features of {matched.figures.images} training images"
    table = table_of(title, "layer", "yields", "effective rank>", "constant>", "outlier channels>", "note")
    for side, layers in matched.figures.by_side.items():
        for layer in layers:
            statistics, why = layer.statistics, defect(layer, side)
            table.add_row(
                escape(f"{side} {layer.tap}"),
                layer.spec.describe(),
                "" if statistics.effective_rank is None else f"{statistics.effective_rank:.1f}",
                _percent(statistics.constant),
                _outliers(layer),
                why,
                style="yellow" if why else "",
            )
    table.caption = (
        "effective rank: directions in which images differ; constant: share of the energy that is the same for every "
        "image; outlier channels: with 100 times the energy of the median, and the share that they hold"
    )
    return table


def _outliers(layer: LayerFigures) -> str:
    statistics = layer.statistics
    return f"{statistics.outliers} ({statistics.outlier_share:.0%})" if statistics.outliers else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def measured_pairs_table(matched: "FeatureMatch") -> Table:
    """Return the table of the pairs that `match --by features` proposes."""
    title = escape(f"{matched.student.model} <- {matched.teacher.model}")
    table = table_of(title, "student layer", "yields", "teacher layer", "yields", "normalize", "reason")
    for pair in matched.pairs:
        student, teacher = matched.student[pair.student], matched.teacher[pair.teacher]
        cells = (str(pair.student), student.describe(), str(pair.teacher), teacher.describe())
        table.add_row(*map(escape, cells), pair.adapter["normalize"], escape(pair.reason))
    table.caption = (
        "CKA: how alike both features are, 0 for unrelated ones; explained: how much of the teacher's feature a linear "
        "map from the student's gives on images that it was not fitted on"
    )
    return table


def figures_as_json(matched: "FeatureMatch") -> dict[str, Any]:
    """Return what `match --by features --json` prints beside the models."""
    figures = matched.figures
    return {
        "images": figures.images,
        "layers": {
            side: [
                {"tap": str(layer.tap), "channels": layer.spec.channels, **asdict(layer.statistics)}
                | {"is_input": layer.is_input, "defect": defect(layer, side)}
                for layer in layers
            ]
            for side, layers in figures.by_side.items()
        },
        "cka": [[pair.cka for pair in row] for row in figures.pairs],
        "explained": [[pair.explained for pair in row] for row in figures.pairs],
        "pairs": [
            {"student": str(pair.student), "teacher": str(pair.teacher), **pair.adapter, "reason": pair.reason}
            for pair in matched.pairs
        ],
        "remarks": list(matched.remarks),
    }


def plan_table(plan: Plan) -> Table:
    """Return a table of every comparison of a plan, with its adapter."""
    table = table_of("What is compared: student <- teacher", "stage", "loss", "weight>", "layers", "adapter")
    for item in plan.comparisons:
        table.add_row(
            *map(escape, (item.stage, item.objective.name, _weight(item.objective.weight))),
            *map(escape, (str(item.comparison), item.adapter)),
        )
    return table


def _weight(weight: float | Schedule | Share) -> str:
    if isinstance(weight, Share):
        return str(weight)
    return f"{weight.start:g} to {weight.end:g}" if isinstance(weight, Schedule) else f"{weight:g}"


def models_table(plan: Plan) -> Table:
    """Return a table of the models of a plan, with the input of each."""
    table = table_of("Models", "", "model", "sees", "parameters>", "MACs>")
    sides = [("student", plan.trained, plan.student_input)]
    weights = {name: options.weight for name, options in (plan.recipe.teachers or {}).items()}
    for name, teacher in plan.teachers.items():
        weight = f", weight {weights[name]:g}" if weights.get(name, 1.0) != 1 else ""
        sides.append((teacher.role + weight, teacher.trace, teacher.input))
    for role, trace, input_spec in sides:
        description = (
            f"{'x'.join(map(str, input_spec.size))}, mean {_numbers(input_spec.mean)}, std {_numbers(input_spec.std)}"
        )
        table.add_row(role, escape(trace.model), description, amount(trace.parameters), amount(trace.macs))
    table.caption = f"shared by {plan.sharing}" if plan.sharing else None
    return table


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def teacher_lines(plan: Plan) -> list[str]:
    """List new classifiers, how a teacher that already has weights is fine-tuned, and which teachers are sharded."""
    lines = list(plan.new_classifiers)
    for teacher in plan.teachers.values():
        train = teacher.options.train
        if train is not None and (teacher.options.pretrained or teacher.options.checkpoint):
            how = f"{train.epochs} epochs, lr {train.optimizer.lr:g}"
            lines.append(f"the {teacher.role} has weights, and is first fine-tuned: {how}")
        if teacher.options.shard:
            lines.append(
                f"the {teacher.role} is sharded: each process of a run holds a part of its "
                f"{amount(teacher.trace.parameters)} parameters, and a single process all of them"
            )
    for stage in plan.recipe.stages:
        if stage.teacher_dropping is not None:
            lines.append(
                f"stage {stage.name}: each step learns from the teacher with the greatest loss, and drops each other "
                f"with probability {stage.teacher_dropping:g}"
            )
    return lines


def frozen_lines(plan: Plan) -> list[str]:
    """List the layers of the student that stages freeze, and how many parameters they train."""
    return [
        f"stage {stage.name}: frozen are {', '.join(frozen.layers)}; {amount(frozen.trains)} of {amount(frozen.of)} "
        "parameters of the student train"
        for stage, frozen in zip(plan.recipe.stages, plan.frozen, strict=True)
        if frozen.layers
    ]


def data_lines(plan: Plan) -> list[str]:
    """List the images that a run measures on, and the notes on its data."""
    return [f"data: {text}" for text in (plan.datasets.measured_on, *plan.notes)]


def evaluation_lines(plan: Plan) -> list[str]:
    """List what is measured beside the accuracy, what the run is about, and what it costs if that is much."""
    beside = [name for name in plan.measures if name in (*OF_LABELLED_SET, *OF_PAIRS)]
    if not beside:
        return []
    titles = ", ".join(MEASURES[name].title for name in beside)
    lines = [f"measured: {titles}; the run is about its {MEASURES[plan.headline].title}"]
    lines += [
        f"labelled set: {plan.recipe.probes[name].label}: {datasets.measured_on}"
        for name, datasets in plan.distinct_sets.items()
    ]
    if plan.chosen_by and any(stage.keep == "best" for stage in plan.recipe.stages):
        title = MEASURES[plan.chosen_by].title
        lines.append(f"`keep: best` takes the epoch with the largest {title}, of those that are measured")
    return lines + _cost_of_evaluation(plan)


def _cost_of_evaluation(plan: Plan) -> list[str]:
    """What an evaluation takes beside the training between two, in multiplications; empty if that is little."""
    student, teacher = plan.trained.macs, plan.teacher.macs if plan.teacher else 0
    images = len(plan.datasets.test if plan.datasets.val is None else plan.datasets.val)  # type: ignore[arg-type]
    work = images * (student + teacher) * plan.measures_pairs
    for name, sets in plan.distinct_sets.items():
        every = plan.recipe.probes[name].every
        tested = sets.test if sets.to_choose_by is None else sets.to_choose_by
        work += (len(sets.train) + len(tested)) * student * (every != 0)  # type: ignore[arg-type]
    # A backward is twice a forward.
    training = len(plan.datasets.train) * (3 * student + teacher) * plan.recipe.val_interval  # type: ignore[arg-type]
    share = work / max(training, 1)
    if share < MUCH:
        return []
    return [
        f"an evaluation takes about {share:.0%} of the work of the training between two; a larger `val_interval` makes "
        "it rarer, and `fraction` of a labelled set smaller"
    ]


@dataclass(frozen=True)
class Idle:
    """The modules of one model that one stage does not run, because no loss reads them or anything above them.

    `share` is their share of the MACs of the model.
    """

    stage: str
    side: str
    last: str
    modules: tuple[str, ...]
    share: float


def idle_rows(plan: Plan) -> list[Idle]:
    """Return, for every stage, the layers that do not run because the forward stops at the last tap."""
    rows = []
    for stage, objectives in zip(plan.recipe.stages, plan.objectives, strict=True):
        taps_of: dict[str, list[Tap]] = {}
        for objective in objectives:
            taps_of.setdefault("student", []).extend(objective.taps[0])
            for tap in objective.taps[1]:
                taps_of.setdefault(role_of_teacher(tap.model), []).append(tap.local)
        traces = {"student": plan.trained} | {teacher.role: teacher.trace for teacher in plan.teachers.values()}
        for side, trace in traces.items():
            taps = taps_of.get(side, [])
            # With a trunk or a graft, a model also uses layers of the other one, so both run completely.
            if not taps or plan.sharing or any(tap.is_output for tap in taps):
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
    """Return the table of layers that do not run, as `check` prints it."""
    table = table_of(
        "Not run: above the last layer that a loss reads", "stage", "model", "last", "not run", "of its MACs>"
    )
    for row in rows:
        table.add_row(*map(escape, (row.stage, row.side, row.last, ", ".join(row.modules))), f"{row.share:.0%}")
    return table


def cache_lines(plan: Plan) -> list[str]:
    """Estimate the final size of each teacher's cache, at four bytes per number. Empty if the plan has no cache."""
    return [line for teacher in plan.teachers.values() for line in _cache_lines(plan, teacher)]


def _cache_lines(plan: Plan, teacher: PlannedTeacher) -> list[str]:
    options = teacher.options
    if options.cache is None:
        return []
    images, total, lines = len(plan.datasets.train), 0.0, []  # type: ignore[arg-type]
    for target, numbers, views in plan.stored_targets(teacher):
        size = 4.0 * numbers * images * views
        total += size
        times = f"{images} images x {views} views x {numbers} numbers"
        lines.append(f"  {target or repr('')}: {times} = {size / 1e9:.3g} GB")
    new = " (every epoch shows new views; `data.views` or `no_aug` bounds them)" * (plan.recipe.data.num_views is None)
    whose = f"The cache of the {teacher.role}" if teacher.name else "The teacher's cache"
    return [f"{whose} in {options.cache} will hold up to {total / 1e9:.3g} GB{new}:", *lines]


def cache_cost_lines(costs: Iterable["CacheCost"]) -> list[str]:
    """Say of each cache what a batch of rows takes beside the teacher, and whether that is slower."""
    lines = []
    for cost in costs:
        text = (
            f"stage {cost.stage}: {cost.images} images take {cost.memory * 1000:.3g} ms from the cache of the "
            f"{role_of_teacher(cost.teacher)} in memory, {cost.disk * 1000:.3g} ms from the disk, and "
            f"{cost.asked * 1000:.3g} ms from the {role_of_teacher(cost.teacher)} itself"
        )
        where = "" if cost.fits else f", since {size(cost.size)} do not fit into memory"
        advice = "leave `cache` out, take a faster disk, or compare smaller features"
        lines.append(f"{text}. The cache would be slower than the teacher{where}: {advice}" if cost.is_slower else text)
    return lines


def reach_table(rows: Iterable["Reach"]) -> Table:
    """Return a table of the parameters that every loss reaches, with the norm of its unweighted gradient."""
    table = table_of("Gradients on one batch, before training", "stage", "loss", "moves", "parameters>", "norm>")
    for row in rows:
        table.add_row(row.stage, row.loss, row.part, f"{row.reached}/{row.parameters}", f"{row.norm:.3g}")
    return table


def shares_table(rows: Iterable["MeasuredShare"], *, trains_teacher: bool) -> Table:
    """Return a table of the weights that are a share of the task's gradient, with the norms of both gradients."""
    columns = ("stage", "loss", "share>", "of", "its norm>", "norm of the loss>", "weight>")
    table = table_of("Weights that are a share of a gradient, on one batch, before training", *columns)
    if trains_teacher:
        table.caption = "The teacher is not trained yet: the weights will have other values."
    for row in rows:
        numbers = (f"{value:.4g}" for value in (row.task_norm, row.norm, row.weight))
        table.add_row(escape(row.stage), escape(row.loss), f"{row.share:g}", escape(row.of), *numbers)
    return table


def losses_table(rows: Iterable["StepCost"], *, trains_teacher: bool) -> Table:
    """Return a table of the losses on one batch before training, and of the weighted sum of each stage."""
    table = table_of("Losses on one batch, before training", "stage", "loss", "value>")
    if trains_teacher:
        table.caption = "The teacher is not trained yet: what its answers decide will have other values."
    for row in rows:
        for name, value in sorted(row.losses.items(), key=lambda item: item[0] == "loss"):
            table.add_row(row.stage, "weighted sum" if name == "loss" else name, f"{value:.4g}")
    return table


def costs_table(rows: Sequence["StepCost"]) -> Table:
    """Return a table of the time and memory of a step in each stage, and of the share of the adapters and losses."""
    columns = ["stage", "step>", "images/s>", "steps>", "stage takes>", "memory>", "of it activations>", "adapters>"]
    losses = any(row.loss_parameters for row in rows)  # most losses have no parameters
    columns += ["losses>"] * losses
    table = table_of(f"A step of {rows[0].images} images, on this machine", *columns)
    for row in rows:
        table.add_row(
            row.stage,
            f"{row.seconds * 1000:.3g} ms",
            f"{row.images / row.seconds:.3g}",
            str(row.steps),
            duration(row.seconds * row.steps),
            size(row.memory),
            size(row.activations),
            _parts(row.adapter_parameters, row.adapter_macs),
            *[_parts(row.loss_parameters, row.loss_macs)] * losses,
        )
    return table


def _parts(parameters: int, macs: int) -> str:
    return f"{amount(parameters)}, {amount(macs)} MACs" if parameters else "none"


def scores_table(evaluation: "Evaluation") -> Table:
    """Return a table of the accuracy and calibration of every model of a run, and of its agreement with the teacher."""
    if any(row.map is not None for row in evaluation.scores):
        return _multilabel_table(evaluation)
    columns = _score_columns(evaluation)
    title = f"{evaluation.run}: {evaluation.images} images ({evaluation.split})"
    teachers = list(dict.fromkeys(name for row in evaluation.scores for name in row.agreements))
    with_each = [f"with {name}" for name in teachers]
    table = table_of(title, "", "model", "weights", *(f"{column}>" for column in (*columns, *with_each)))
    for row in evaluation.scores:
        values = [form(getattr(row, name)) for name, form in columns.values()]
        has_any = any(values) or not columns
        values += [_share(row.agreements.get(name)) for name in teachers]
        table.add_row(row.role, *map(escape, (row.model, row.weights)), *(values if has_any else ["-"] * len(values)))
    table.caption = None
    if "NLL" in columns:
        table.caption = "NLL, and KL(teacher || student), in nats per image; calibration error: expected, 15 bins, l1"
    elif "KL" in columns:
        table.caption = "KL(teacher || student), in nats per image"
    if teachers:
        of_mean = f"agreement and KL are with the mean of {', '.join(teachers)}, and then with each"
        table.caption = f"{table.caption}; {of_mean}" if table.caption else of_mean
    if any(row.role == "teacher baseline" for row in evaluation.scores):
        table.caption = f"{table.caption or ''}; agreement and KL are with the teacher that trained with the student"
    return table


def _multilabel_table(evaluation: "Evaluation", most: int = 10) -> Table:
    """Return a table of the mean average precision of every model, and of the student's worst classes."""
    table = table_of(
        f"{evaluation.run}: {evaluation.images} images ({evaluation.split})", "", "model", "weights", "mAP>"
    )
    for row in evaluation.scores:
        table.add_row(row.role, *map(escape, (row.model, row.weights)), _share(row.map))
    precisions = evaluation.scores[0].average_precisions or {}
    by_value = sorted((value, name) for name, value in precisions.items() if value is not None)
    left_out = sum(value is None for value in precisions.values())
    worst = ", ".join(f"{name} {value:.1%}" for value, name in by_value[:most])
    table.caption = (
        f"mAP: the mean over {len(by_value)} classes of the average precision; the student's lowest: {worst}"
    )
    if left_out:
        table.caption += f"; {left_out} classes that no image has are left out"
    table.caption = escape(table.caption)
    return table


def _score_columns(evaluation: "Evaluation") -> dict[str, tuple[str, Callable[[float | None], str]]]:
    """The columns of the table of scores, by title: the field of `Scores`, and how it is shown."""
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "top-1": ("top1", _share),
        "top-5": ("top5", _share),
        "NLL": ("nll", _decimals),
        "calibration error": ("calibration_error", _share),
        "agreement": ("agreement", _share),
        "KL": ("kl", _decimals),
    }
    classifies = any(row.top1 is not None for row in evaluation.scores)
    has = {name: any(getattr(row, name) is not None for row in evaluation.scores) for name, _ in columns.values()}
    # With classes, the columns are always the same.
    return {title: column for title, column in columns.items() if classifies or has[column[0]]}


def similarity_table(evaluation: "Evaluation") -> Table:
    """Return a table of the similarity of the compared layers of student and teacher."""
    alone = any(row.cka_alone is not None for row in evaluation.pairs)
    without_classes = all(row.top1 is None for row in evaluation.scores)
    measured = ["CKA>", *["CKA alone>"] * alone, "explained variance>", *["cosine>"] * without_classes]
    table = table_of(
        "Features: student <- teacher", "stage", "loss", "student layer", "teacher layer", *measured, "note"
    )
    for row in evaluation.pairs:
        values = (row.cka, *[row.cka_alone] * alone, row.explained_variance, *[row.cosine] * without_classes)
        table.add_row(
            *map(escape, (row.stage, row.loss, row.student, row.teacher)),
            *map(_decimals, values),
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


def print_student(plan: Plan, folder: Path, console: Console) -> None:
    """Print where the results of a run are, how to load the student, and the next commands."""
    student = plan.student
    arguments = "".join(f", {key}={value!r}" for key, value in student.model_kwargs.items())
    weights = folder / "student.safetensors"
    is_timm = plan.grown is None and built_by_timm(student.model)
    line = f"  timm.create_model({student.model!r}, checkpoint_path={str(weights)!r}{arguments})"
    line = line if is_timm else f"  probe_kd.load_student({str(weights)!r}{_allow_import_argument(plan)})"
    first = f"Results in {folder}. " + ("The student is plain timm:" if is_timm else "The student:")
    for text in (first, line, _next_commands(plan, folder, is_timm=is_timm)):
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _next_commands(plan: Plan, folder: Path, *, is_timm: bool) -> str:
    """Return the next commands in one line, ready to be copied."""
    allowed = "".join(f" --allow-import {package}" for package in packages_of(plan.recipe))
    run = quote(str(folder))
    export = (
        f"probe-kd export {run} -o DIR{'' if is_timm else ' --onnx'}{allowed}"  # what timm cannot build goes to ONNX
    )
    return f"Next: probe-kd eval {run}{allowed} | {export} | probe-kd compare {run} ..."


def _allow_import_argument(plan: Plan) -> str:
    """Return the `allow_import` argument that `load_student` needs for models built by the user's own functions."""
    traces = [plan.student] + [plan.teacher] * (plan.grown is not None and plan.teacher is not None)
    allowed = packages(trace.model for trace in traces if trace)
    return f", allow_import={allowed}" if allowed else ""
