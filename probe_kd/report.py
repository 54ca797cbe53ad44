"""What people see of a run: progress, tables, curves. Nothing here computes what it shows."""

import csv
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]  # one epoch: MEASURES, and every loss by its name
MEASURES = ("subject", "stage", "epoch", "accuracy", "agreement", "images_per_second", "lr")


@dataclass
class Result:
    """What came of one subject of a run.

    `accuracy` and `agreement` (with the teacher's answers) are shares of the test images, in 0..1; `seconds` were spent
    in training; `weights` is the file in the run's folder, empty where nothing was trained.
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


class Display:
    """How a run shows itself while it goes on: a bar per stage in a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.shown = 0.0  # when something was last shown
        self.title, self.epochs, self.images, self.started = "", 0, 0, 0.0
        self.text = ""
        self.accuracy = ""

    def begin(self, title: str, epochs: int, steps: int, done: int) -> None:
        """A stage begins: so many epochs of so many steps, the first `done` of them done before."""
        self.title, self.epochs, self.images = title, epochs, 0
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

    def step(self, images: int) -> bool:
        """After every step. True when losses are wanted, for which the caller has to wait for the GPU."""
        self.images += images
        if self.progress is None:
            return False
        self.progress.advance(self.task)
        due = time.monotonic() - self.shown > 0.5
        if due:
            self.shown = time.monotonic()
        return due

    def losses(self, terms: Mapping[str, float]) -> None:
        """The mean losses of the epoch so far."""
        self.text = " ".join(f"{name} {value:.4g}" for name, value in terms.items())
        if self.progress is not None:
            self.progress.update(self.task, losses=self._status())

    def epoch(self, row: Row) -> None:
        """An epoch is done and measured."""
        self.accuracy = f"[green]accuracy {row['accuracy']:.1%}[/]"
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


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """One line per epoch of every subject, a column for whatever any of them measured."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    aside = path.with_suffix(".partial")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


def write_summary(results: Iterable[Result], about: Mapping[str, Any], path: Path) -> None:
    """The results for other programs to read."""
    path.write_text(json.dumps({**about, "results": [asdict(result) for result in results]}, indent=1) + "\n")


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy of every subject by epoch, and the loss terms of the student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for subject in dict.fromkeys(row["subject"] for row in rows):
        accuracies = [100 * row["accuracy"] for row in rows if row["subject"] == subject]
        left.plot(range(1, len(accuracies) + 1), accuracies, label=subject)
    left.set(title="Test accuracy", xlabel="epoch", ylabel="%")
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


def results_table(results: Iterable[Result]) -> Table:
    """The end of a run: accuracy, agreement with the teacher, size."""
    table = Table(title="Test images")
    for column in ("", "model", "accuracy", "agreement", "parameters", "MACs", "training"):
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    for result in results:
        table.add_row(
            result.role,
            result.model,
            f"{result.accuracy:.2%}",
            "" if result.agreement is None else f"{result.agreement:.2%}",
            amount(result.parameters),
            amount(result.macs),
            f"{result.seconds:.0f} s" if result.seconds else "",
        )
    return table


def amount(number: float) -> str:
    """Three digits and a unit: 11.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
