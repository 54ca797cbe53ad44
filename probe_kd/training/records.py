"""The tables and curves that a run writes: metrics.csv, summary.csv, summary.json and curves.png."""

import csv
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe_kd.data.datasets import class_names
from probe_kd.errors import visible
from probe_kd.files.atomic import put
from probe_kd.measures import MEASURES, OF_LABELLED_SET, not_losses
from probe_kd.recipe.keys import RESERVED
from probe_kd.recipe.planner import Plan
from probe_kd.training.state import Result, Row

TABLES = ("metrics.csv", "summary.csv", "curves.png", "summary.json")


def write_report(results: Sequence[Result], rows: Sequence[Row], plan: Plan, folder: Path, headline: str) -> None:
    """Write the tables, the curves, and `summary.json`, which marks the run as finished.

    `headline` is the measure that the run is about.
    """
    # The last checkpoint wrote the tables too, unless the run was killed between the two.
    write_metrics(rows, folder / "metrics.csv")
    other_columns = not_losses(plan.recipe.loss_names)
    write_timm_summary(rows, folder / "summary.csv", other_columns)
    split = "Test" if plan.datasets.val is None else "Validation"
    draw_curves(rows, folder / "curves.png", other_columns, headline=headline, split=split)
    partial = folder / "summary.partial"
    summary = {
        "seed": plan.recipe.seed,
        "headline": headline or None,
        "classes": class_names(plan.datasets),
        "measured_on": plan.datasets.measured_on,
        "skipped_images": {split: len(names) for split, names in plan.datasets.skipped.items()},
        "notes": list(plan.notes),
        **_labelled_sets(plan),
        "results": [asdict(result) for result in results],
    }
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    put(partial, folder / "summary.json")


def _labelled_sets(plan: Plan) -> dict[str, Any]:
    """The images that each probe classifies, in words."""
    texts = {name: f"{plan.recipe.probes[name].label}: {sets.measured_on}" for name, sets in plan.labelled_sets.items()}
    return {"labelled_sets": texts} if texts else {}


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """Write one line per epoch of every model, with a column for each value that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(_cell, columns))
        writer.writerows([_cell(row.get(key)) for key in columns] for row in rows)
    put(partial, path)


def _cell(value: Any) -> Any:
    """Mark text that begins like a formula as text, so that a spreadsheet does not compute it."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


def write_timm_summary(rows: Sequence[Row], path: Path, other_columns: Collection[str]) -> None:
    """Write the student's epochs in the format of timm's training script: `train_*`, `eval_top1` in percent, `lr`.

    `other_columns` are those of `rows` that hold no loss.
    """
    no_losses = {*RESERVED, *other_columns}
    student_rows = [row for row in rows if row["role"] == "student"]
    losses = [{f"train_{key}": value for key, value in row.items() if key not in no_losses} for row in student_rows]
    summary_rows = [
        {"epoch": epoch, **loss, **_evaluated(row, other_columns), "lr": row["lr"]}
        for epoch, (row, loss) in enumerate(zip(student_rows, losses, strict=True))
    ]
    if summary_rows:
        write_metrics(summary_rows, path)


def _evaluated(row: Row, other_columns: Collection[str]) -> Row:
    """The measures of a row as timm's script calls them: `eval_top1` for the accuracy, and shares in percent."""
    taken = [name for name in MEASURES if name in row and name in other_columns and name != "agreement"]
    names = {name: "top1" if name == "accuracy" else name for name in taken}
    return {f"eval_{names[name]}": MEASURES[name].factor * row[name] for name in taken}


def draw_curves(
    rows: Sequence[Row], path: Path, other_columns: Collection[str], *, headline: str = "accuracy", split: str = "Test"
) -> None:
    """Draw the headline of every model by epoch, on the images of `split`, and the loss terms of the student.

    `other_columns` are those of `rows` that hold no loss.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    # Room for the labels, measured once: a layout engine draws everything twice.
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=0.92, wspace=0.15)
    if headline:
        _draw_measure(left, rows, headline, split)
    student_rows = [row for row in rows if row["role"] == "student"]
    for term in dict.fromkeys(key for row in student_rows for key in row if key not in {*other_columns, "loss"}):
        points = [(epoch, row[term]) for epoch, row in enumerate(student_rows, 1) if term in row]
        right.plot(*zip(*points, strict=True), label=term, marker=".")
    right.set(title="Training losses of the student (not weighted)", xlabel="epoch", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def _draw_measure(axes: Any, rows: Sequence[Row], name: str, split: str) -> None:
    measure = MEASURES[name]
    for role in dict.fromkeys(row["role"] for row in rows):
        epochs = enumerate((row for row in rows if row["role"] == role), 1)
        points = [(epoch, measure.factor * row[name]) for epoch, row in epochs if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=role, marker=".")
    # k-NN and linear probes have images of their own.
    title = measure.title if name in OF_LABELLED_SET else f"{split} {measure.title}"
    axes.set(title=title, xlabel="epoch", ylabel=measure.unit)
