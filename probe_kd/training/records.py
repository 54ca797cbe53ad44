"""The tables and curves that a run writes: metrics.csv, summary.csv, summary.json and curves.png."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe_kd.data.datasets import class_names
from probe_kd.errors import visible
from probe_kd.files.atomic import put
from probe_kd.recipe.keys import RESERVED
from probe_kd.recipe.planner import Plan
from probe_kd.training.state import MEASURES, Result, Row

TABLES = ("metrics.csv", "summary.csv", "curves.png", "summary.json")


def write_report(results: Sequence[Result], rows: Sequence[Row], plan: Plan, folder: Path) -> None:
    """Write the tables, the curves, and `summary.json`, which marks the run as finished."""
    # The last checkpoint wrote the tables too, unless the run was killed between the two.
    write_metrics(rows, folder / "metrics.csv")
    write_timm_summary(rows, folder / "summary.csv")
    draw_curves(rows, folder / "curves.png", "Test" if plan.datasets.val is None else "Validation")
    partial = folder / "summary.partial"
    summary = {
        "seed": plan.recipe.seed,
        "classes": class_names(plan.datasets),
        "measured_on": plan.datasets.measured_on,
        "skipped_images": {split: len(names) for split, names in plan.datasets.skipped.items()},
        "notes": list(plan.datasets.notes),
        "results": [asdict(result) for result in results],
    }
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    put(partial, folder / "summary.json")


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


def write_timm_summary(rows: Sequence[Row], path: Path) -> None:
    """Write the student's epochs in the format of timm's training script: `train_*`, `eval_top1` in percent, `lr`."""
    student_rows = [row for row in rows if row["role"] == "student"]
    losses = [{f"train_{key}": value for key, value in row.items() if key not in RESERVED} for row in student_rows]
    summary_rows = [
        {"epoch": epoch, **loss, **_in_percent(row), "lr": row["lr"]}
        for epoch, (row, loss) in enumerate(zip(student_rows, losses, strict=True))
    ]
    if summary_rows:
        write_metrics(summary_rows, path)


def _in_percent(row: Row) -> Row:
    return {"eval_top1": 100 * row["accuracy"]} if "accuracy" in row else {}


def draw_curves(rows: Sequence[Row], path: Path, split: str = "Test") -> None:
    """Draw the accuracy of every model by epoch, on the images of `split`, and the loss terms of the student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for role in dict.fromkeys(row["role"] for row in rows):
        epochs = enumerate((row for row in rows if row["role"] == role), 1)
        points = [(epoch, 100 * row["accuracy"]) for epoch, row in epochs if "accuracy" in row]
        if points:
            left.plot(*zip(*points, strict=True), label=role)
    left.set(title=f"{split} accuracy", xlabel="epoch", ylabel="%")
    student_rows = [row for row in rows if row["role"] == "student"]
    for term in dict.fromkeys(key for row in student_rows for key in row if key not in {*MEASURES, "loss"}):
        points = [(epoch, row[term]) for epoch, row in enumerate(student_rows, 1) if term in row]
        right.plot(*zip(*points, strict=True), label=term)
    right.set(title="Training losses of the student (not weighted)", xlabel="epoch", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
