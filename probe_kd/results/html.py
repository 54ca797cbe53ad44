"""Show a comparison of runs: tables for a terminal, and one self-contained HTML file.

The file loads and runs nothing, and its content security policy forbids both. Everything from a run's folder passes
through a template that escapes it. The charts are SVG in the colours of the page, dark on a dark page; this file
computes only their coordinates, in units of the chart.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from probe_kd.console import FoldingTable, amount, table_of
from probe_kd.errors import RunError, visible
from probe_kd.files.atomic import put
from probe_kd.files.run_folder import GENERATOR
from probe_kd.measures import MEASURES, OF_LABELLED_SET, OF_PAIRS, not_losses
from probe_kd.results.comparison import (
    ClassChange,
    Curve,
    Group,
    LayerSimilarity,
    ModelSummary,
    RunComparison,
    Spread,
    losses_of,
    over_seeds,
    points,
)
from probe_kd.version import __version__

MOST_CLASSES = 20  # in the chart of changes by class
# From these values on, a cell of the heat map is closer to black than to white, on a dark and on a light page.
HALF, DEEP = 0.58, 0.825
WIDTH = 480.0  # of a chart, also on a narrow phone, so that its text stays legible
Place = tuple[float, float]
PAIR_COLUMNS = tuple(f"{MEASURES[name].title}>" for name in OF_PAIRS)


def tables(comparison: RunComparison) -> Iterator[Table | Text | str]:
    """The output in a terminal: a table for every group, then lines of text."""
    for group in comparison.groups:
        about = f"{' <- '.join(models_of(group)) or 'nothing is measured yet'}; {seeds_of(group)}"
        yield Text.assemble((group.name, "bold"), f": {about}")
        if group.summaries:
            yield _table(group)
        yield from (f"  {row.role}: {fewer_seeds(row, group)}" for row in group.summaries if fewer_seeds(row, group))
        if group.gain:
            yield f"  the student over the {group.gain_over}: {points(group.gain, group.headline)}"
        yield from (f"  {line}" for line in [_cost_of_sharing(group)] if line)
        if group.pair_scores:
            yield _pairs_table(group)
    if comparison.differences:
        yield f"The recipes of {' | '.join(group.name for group in comparison.groups)} differ in:"
    for difference in comparison.differences[:12]:
        yield f"  {difference.key}: {' | '.join(value or '-' for value in difference.values)}"
    if len(comparison.differences) > 12:
        yield f"  and {len(comparison.differences) - 12} more; -o FILE.html or --json has them all"
    yield from (f"note: {note}" for note in comparison.notes)


def _table(group: Group) -> Table:
    """One row per model; the names of the models are printed above the table.

    With accuracy and agreement alone it has at most 80 columns. With more it becomes a list in a narrow terminal.
    """
    measures = columns_of(group)
    kind = Table if len(measures) <= 2 else FoldingTable
    table = kind(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True, min_width=13)
    for column in (*(MEASURES[name].title for name in measures), "parameters", "MACs", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in group.summaries:
        size = [amount(value) if value is not None else "" for value in (row.parameters, row.macs)]
        seconds = f"{row.seconds.mean:,.0f} s" if row.seconds else row.unfinished and "so far"
        table.add_row(row.role, *(cell(row.of(name), name) for name in measures), *size, seconds)
        if any(row.ema_of(name) for name in measures):
            table.add_row("  its average", *(over_seeds(row.ema_of(name), name) for name in measures))
    return table


def _pairs_table(group: Group) -> Table:
    """One row per pair: how much of the teacher's features the student's explain."""
    table = table_of("Features: student <- teacher", "student layer", "teacher layer", "loss", *PAIR_COLUMNS)
    several_stages = len({pair.stage for pair in group.pair_scores}) > 1
    for pair in group.pair_scores:
        loss = f"{pair.stage}: {pair.loss}" if several_stages else pair.loss
        values = (cell(getattr(pair, name), name) for name in OF_PAIRS)
        table.add_row(pair.student, pair.teacher, loss, *values)
    return table


def columns_of(group: Group) -> list[str]:
    """The measures of the table of results, the headline first; with classes, the accuracy and the agreement.

    What only the student has, the explained variance of the pairs, is in the table if there is nothing else.
    """
    measured = {name for row in group.summaries for name in MEASURES if row.of(name)}
    if group.headline not in OF_PAIRS:
        measured -= set(OF_PAIRS)
    classified = {"agreement"} if "accuracy" in measured else set()
    return sorted(measured | classified, key=lambda name: (name != group.headline, list(MEASURES).index(name)))


def cell(spread: Spread | None, measure: str) -> str:
    """A measure over seeds for a cell of the table: `-` where it means nothing.

    A model that has no teacher agrees with nobody, and its cell is empty.
    """
    return over_seeds(spread, measure) or ("" if measure == "agreement" else "-")


def models_of(group: Group) -> list[str]:
    """The student's name, and the teacher's, or those of several teachers."""
    names = {row.role: row.model for row in group.summaries}
    sides = (("student", "baseline"), ("teacher", "teacher baseline"))  # a run may have come to its baseline only
    both = [next(names[role] for role in roles if role in names) for roles in sides if names.keys() & set(roles)]
    several = [name for role, name in names.items() if role.startswith("teacher ") and role not in sides[1]]
    return both + [", ".join(several)] * bool(several)


def seeds_of(group: Group) -> str:
    """`seed 0`, or `3 seeds (0, 1, 2): mean ± standard deviation`."""
    seeds = ", ".join(map(str, group.seeds))
    spread = {1: "", 2: ": least–greatest"}.get(len(group.seeds), ": mean ± standard deviation")
    return f"seed {seeds}" if len(group.seeds) == 1 else f"{len(group.seeds)} seeds ({seeds}){spread}"


def fewer_seeds(row: ModelSummary, group: Group) -> str:
    """A note on a model that some runs of its group have not finished; empty if all have."""
    count, every = row.seeds, len(group.seeds)
    if row.unfinished:
        return f"not finished, at {row.unfinished}"
    return f"of {count} of {every} seeds" + ", least–greatest" * (count == 2) if 0 < count < every else ""


def _cost_of_sharing(group: Group) -> str:
    """How training with the student changed the teacher's accuracy; empty without a teacher baseline."""
    by_role = {row.role: row.accuracy.mean for row in group.summaries if row.accuracy}
    if not {"teacher", "teacher baseline"} <= by_role.keys():
        return ""
    change = 100 * (by_role["teacher"] - by_role["teacher baseline"])
    if abs(change) < 0.005:
        return "trained with the student, the teacher is as accurate as alone"
    word = "gained" if change > 0 else "lost"
    return f"training with the student, the teacher {word} {abs(change):.2f} points of accuracy"


def as_json(comparison: RunComparison) -> str:
    """The whole comparison as JSON, with null for NaN, which JSON lacks."""
    return json.dumps(json.loads(json.dumps(asdict(comparison)), parse_constant=lambda _: None), indent=1)


def write_page(comparison: RunComparison, path: Path) -> None:
    """Write the comparison as one HTML file. Raises RunError if it cannot be written."""
    write_html(page(comparison), path)


def write_html(text: str, path: Path) -> None:
    """Write a page, whole or not at all. Raises RunError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.partial")
        aside.write_text(text, encoding="utf-8")
        put(aside, path)
    except OSError as refusal:
        raise RunError(f"cannot write {path}: {refusal.strerror}") from None


def environment_of_pages() -> Environment:
    """The templates of pages, which escape all that they show."""
    return Environment(
        loader=PackageLoader("probe_kd.results"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(comparison: RunComparison) -> str:
    """The comparison as HTML."""
    environment = environment_of_pages()
    environment.filters |= {"amount": amount, "over_seeds": over_seeds, "points": points, "signed": _signed}
    environment.filters |= {"cell": cell}
    sections = [_section(group, number) for number, group in enumerate(comparison.groups)]
    return environment.get_template("report.html").render(
        kind="distillation",
        comparison=comparison,
        sections=sections,
        title=", ".join(group.name for group in comparison.groups[:3]) + " ..." * (len(comparison.groups) > 3),
        overview=_overview(comparison) if len(comparison.groups) > 1 else None,
        columns=_columns_of_all(comparison),
        measures=MEASURES,
        generator=f"{GENERATOR}{__version__}",
        most_classes=MOST_CLASSES,
    )


def _section(group: Group, number: int) -> dict[str, Any]:
    """The values that the template shows for one group."""
    losses = losses_of(group)
    charts = [
        *(_chart_of_measure(group, name, number) for name in _charted(group)),
        _chart(f"losses-{number}", "Losses of the student, not weighted", "", losses, lambda curve: curve.measure),
    ]
    similarity = group.similarity
    pairs = similarity.pairs if similarity else group.pairs
    return {
        "group": group,
        "number": number,
        "models": models_of(group),
        "seeds": seeds_of(group),
        "cost": _cost_of_sharing(group),
        "charts": [chart for chart in charts if chart],
        "arcs": _arcs(group, similarity, pairs) if pairs and len(models_of(group)) > 1 else None,
        "heat": _heat(similarity) if similarity else None,
        "bars": _bars(group.classes[:MOST_CLASSES]) if group.classes else None,
        "headline": MEASURES.get(group.headline),
        "by_role": {row.role: row for row in group.summaries},
    }


def _charted(group: Group) -> list[str]:
    """The headline, and without classes all other measures that are taken by epoch."""
    if group.headline in ("accuracy", ""):
        return [group.headline] * bool(group.headline)
    other_columns = not_losses(group.losses)
    curves = {curve.measure for curve in group.curves if curve.points and curve.measure in other_columns}
    return [group.headline, *(name for name in MEASURES if name in curves and name != group.headline)]


def _chart_of_measure(group: Group, name: str, number: int) -> "_Chart | None":
    measure = MEASURES[name]
    curves = [curve for curve in group.curves if curve.measure == name]
    return _chart(
        f"{name}-{number}", title_of(name), measure.unit, curves, lambda curve: curve.role, factor=measure.factor
    )


def title_of(measure: str) -> str:
    """`Accuracy on the test images`; k-NN and linear probes are on images of their own."""
    title = MEASURES[measure].heading
    return title if measure in OF_LABELLED_SET else f"{title} on the test images"


def _columns_of_all(comparison: RunComparison) -> list[str]:
    """The measures of the table of results of all groups."""
    columns = [name for group in comparison.groups for name in columns_of(group)]
    return sorted(dict.fromkeys(columns), key=list(MEASURES).index)


@dataclass(frozen=True)
class _Series:
    """One line of a chart: its path, the band from minimum to maximum, and the coordinates of its points."""

    name: str
    style: int
    line: str
    band: str
    dots: tuple[Place, ...]
    last: str


@dataclass(frozen=True)
class _Chart:
    id: str
    title: str
    unit: str
    scale: str
    width: float
    height: float
    frame: tuple[float, float, float, float]  # left, top, right, bottom
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    series: tuple[_Series, ...]


ROLE_STYLES = {"student": 0, "baseline": 1, "teacher": 2, "teacher baseline": 3, "untrained student": 4}


def _chart(
    id_: str,
    title: str,
    unit: str,
    curves: Sequence[Curve],
    name: Callable[[Curve], str],
    *,
    factor: float | None = None,
) -> _Chart | None:
    """Curves by epoch. Measures have a `factor`; losses have none, and a logarithmic scale if all are positive."""
    is_loss, factor = factor is None, 1.0 if factor is None else factor
    curves = [curve for curve in curves if curve.points]
    values = [factor * value for curve in curves for _, *values_of_epoch in curve.points for value in values_of_epoch]
    if not values:
        return None
    frame, last = (48.0, 12.0, WIDTH - 12, 248.0), max(point[0] for curve in curves for point in curve.points)
    logarithmic = is_loss and min(values) > 0
    up, height = axis(min(values), max(values), frame[3], frame[1], logarithmic)
    x = _linear(1, max(last, 2), frame[0] + 8, frame[2] - 8)
    across = [(x(epoch), str(epoch)) for epoch in _epochs(last)]
    series = []
    for number, curve in enumerate(curves):
        places = [
            (x(epoch), *(height(factor * value) for value in values_of_epoch))
            for epoch, *values_of_epoch in curve.points
        ]
        outline = [(place[0], place[3]) for place in places] + [(place[0], place[2]) for place in reversed(places)]
        spread = any(point[2] != point[3] for point in curve.points)
        dots = tuple((place[0], place[1]) for place in places) if len(places) <= 30 else ()
        style = number % 8 if is_loss else ROLE_STYLES.get(curve.role, 5 + number % 3)
        last_value = f"{factor * curve.points[-1][1]:.4g}{unit}"
        line = _way((place[0], place[1]) for place in places)
        series.append(_Series(name(curve), style, line, _way(outline) if spread else "", dots, last_value))
    scale = "logarithmic" if logarithmic else "linear"
    return _Chart(id_, title, unit, scale, WIDTH, 290, frame, tuple(across), tuple(up), tuple(series))


def _way(places: Iterable[Place]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _epochs(last: int) -> list[int]:
    step = max(1, math.ceil(last / 8))
    step = next(nice for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, step) if nice >= step)
    return sorted({1, *range(step, last + 1, step)} - ({step} if step == 2 and last > 8 else set()))


def axis(
    low: float, high: float, bottom: float, top: float, logarithmic: bool
) -> tuple[list[tuple[float, str]], Callable[[float], float]]:
    """The ticks of an axis, and the function from a value to its coordinate."""
    if logarithmic:
        marks = [part * 10.0**power for power in range(-12, 13) for part in (1, 2, 5)]
        least = max((mark for mark in marks if mark <= low), default=low)
        most = min((mark for mark in marks if mark >= high), default=high)
        most = most if most > least else least * 10
        ticks = [mark for mark in marks if least <= mark <= most]
        ticks = ticks if len(ticks) <= 7 else [mark for mark in ticks if f"{mark:e}".startswith("1.0")]
        coordinate = _linear(math.log(least), math.log(most), bottom, top)
        return [(coordinate(math.log(mark)), f"{mark:g}") for mark in ticks], lambda value: coordinate(math.log(value))
    step = _step(low, high)
    least, most = math.floor(low / step) * step, math.ceil(high / step) * step
    most = most if most > least else least + step
    height = _linear(least, most, bottom, top)
    count = round((most - least) / step)
    return [(height(least + step * n), f"{least + step * n:g}") for n in range(count + 1)], height


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, about a fifth of the range."""
    rough = max(high - low, abs(high) * 1e-6) / 5 if high > low else (abs(high) or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(part * power for part in (1, 2, 5, 10) if part * power >= rough * 0.999)


def _overview(comparison: RunComparison) -> dict[str, Any] | None:
    """The headline of the first group for every model of every group on one scale, each seed as a dot."""
    name = comparison.groups[0].headline or "accuracy"
    factor = MEASURES[name].factor
    measured = [
        (group, [(summary.role, spread) for summary in group.summaries if (spread := summary.of(name))])
        for group in comparison.groups
    ]
    values = [factor * value for _, rows in measured for _, spread in rows for value in spread.values]
    if not values:
        return None
    frame = (128.0, WIDTH - 24)
    marks, x = axis(min(values), max(values), frame[0], frame[1], False)
    y, drawn = 8.0, []
    for group, rows in measured:
        y += 20
        heading, lines = (y, _cut(group.name, 56)), []
        for role, spread in rows:
            y += 21
            lines.append(
                {
                    "y": y,
                    "role": role,
                    "style": ROLE_STYLES.get(role, 5),
                    "mean": x(factor * spread.mean),
                    "ends": (x(factor * spread.low), x(factor * spread.high)),
                    "dots": [x(factor * value) for value in spread.values],
                }
            )
        y += 12
        drawn.append({"heading": heading, "lines": lines})
    sizes = {"frame": frame, "bottom": y, "height": y + 40, "width": WIDTH}
    texts = {"title": title_of(name), "name": MEASURES[name].heading, "unit": MEASURES[name].unit}
    return {"groups": drawn, "marks": marks, **sizes, **texts}


def _arcs(group: Group, similarity: LayerSimilarity | None, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Two columns of layers, the first at the top, and an arc for every pair, with a width by its CKA if measured."""
    sides = (
        [similarity.student, similarity.teacher]
        if similarity
        else [tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True)]
    )
    height = 26.0 * max(map(len, sides))
    paired = [{pair[index] for pair in pairs} for index in (0, 1)]
    places: list[dict[str, float]] = [
        {layer: 44 + (number + 0.5) * height / len(layers) for number, layer in enumerate(layers)} for layers in sides
    ]
    columns = [
        [{"name": _cut(layer, 20), "y": y, "paired": layer in paired[index]} for layer, y in places[index].items()]
        for index in (0, 1)
    ]
    arcs = []
    for pair in (pair for pair in pairs if pair[0] in sides[0] and pair[1] in sides[1]):
        start, end = places[0][pair[0]], places[1][pair[1]]
        cka = similarity.of(pair) if similarity else None
        way = f"M166 {start:.1f} C240 {start:.1f} 240 {end:.1f} 314 {end:.1f}"
        text = "" if cka is None else f"{cka:.2f}"
        thick = 1.5 if cka is None else 1.5 + 10 * cka
        arcs.append({"way": way, "thick": f"{thick:.1f}", "text": text, "at": (240, (start + end) / 2), "pair": pair})
    models = [_cut(name, 27) for name in models_of(group)]
    return {"columns": columns, "arcs": arcs, "models": models, "height": 52 + height, "width": WIDTH}


def _heat(similarity: LayerSimilarity) -> dict[str, Any]:
    """The heat map of CKA: student layers as rows, teacher layers as columns."""
    names = [_cut(name, 19) for name in similarity.student]
    left, top, wide, high = 20.0 + 6.8 * max(map(len, names), default=0), 96.0, 40.0, 26.0
    pairs = set(similarity.pairs)
    cells = [
        {
            "x": left + wide * column,
            "y": top + high * row,
            "value": value,
            "text": "–" if value is None else f"{value:.2f}",
            "deep": "" if value is None or value < HALF else "half" if value < DEEP else "deep",
            "paired": (student_layer, teacher_layer) in pairs,
        }
        for row, (student_layer, values) in enumerate(zip(similarity.student, similarity.cka, strict=True))
        for column, (teacher_layer, value) in enumerate(zip(similarity.teacher, values, strict=True))
    ]
    width = max(left + wide * len(similarity.teacher) + 40, 260)
    return {
        "cells": sorted(cells, key=lambda cell: bool(cell["paired"])),  # so that their frames are drawn last
        "rows": [(top + high * (row + 0.5), name) for row, name in enumerate(names)],
        "columns": [(left + wide * (column + 0.5), _cut(name, 19)) for column, name in enumerate(similarity.teacher)],
        "size": (wide, high),
        "corner": (left, top),
        "width": width,
        "height": top + high * len(similarity.student) + 8,
        "best": max((cell["value"] for cell in cells if cell["value"] is not None), default=None),
    }


def _bars(classes: Sequence[ClassChange]) -> dict[str, Any]:
    """Bars of the change per class, to the right of the middle if the student is better than the baseline."""
    most = max(abs(item.change) for item in classes) or 1.0
    middle, reach = 304.0, 100.0
    bars = []
    for number, item in enumerate(classes):
        long = reach * abs(item.change) / most
        better = item.change >= 0
        bars.append(
            {
                "y": 8 + 24.0 * number,
                "name": _cut(item.name, 17),
                "x": middle if better else middle - long,
                "long": max(long, 0.5),
                "better": better,
                "text": _signed(item.change),
                "text_x": middle + long + 6 if better else middle - long - 6,
            }
        )
    return {"bars": bars, "middle": middle, "width": WIDTH, "height": 16 + 24.0 * len(classes)}


def _signed(share: float) -> str:
    """In percentage points, with a minus sign as wide as the plus."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _cut(text: str, most: int) -> str:
    """Shorten a name in its middle, because names differ mostly at their ends."""
    if len(text) <= most:
        return text
    length = most - 1
    return f"{text[: length // 2]}…{text[-(length - length // 2) :]}"
