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


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """One line per epoch of every model, a column for whatever any of them measured."""
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
    own = [row for row in rows if row["role"] == "student"]
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
    """Accuracy of every model by epoch, on the images of `split`, and the loss terms of the student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for role in dict.fromkeys(row["role"] for row in rows):
        epochs = enumerate((row for row in rows if row["role"] == role), 1)
        points = [(epoch, 100 * row["accuracy"]) for epoch, row in epochs if "accuracy" in row]
        if points:
            left.plot(*zip(*points, strict=True), label=role)
    left.set(title=f"{split} accuracy", xlabel="epoch", ylabel="%")
    own = [row for row in rows if row["role"] == "student"]
    for term in dict.fromkeys(key for row in own for key in row if key not in {*MEASURES, "loss"}):
        points = [(epoch, row[term]) for epoch, row in enumerate(own, 1) if term in row]
        right.plot(*zip(*points, strict=True), label=term)
    right.set(title="Training losses of the student (not weighted)", xlabel="epoch", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
