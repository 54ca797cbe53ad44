"""A table in which every run is a row: what a study needs to go on, without any run's folder."""

import csv
import multiprocessing
import os
import statistics
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from probe_kd.training.records import write_metrics

Row = dict[str, Any]
Rows = list[Row]
C = TypeVar("C")  # a cell


class Trial(Protocol):
    """A run that may have a row: hashable, with the values by which its row is found."""

    @property
    def key(self) -> tuple[str, ...]: ...

    def __hash__(self) -> int: ...


class NotRun(Exception):
    """A run that has no row."""


class Runs:
    """The rows of a table. `run` makes the row of a trial that has none, in `pool`; without a pool it is NotRun.

    `columns` are those of a trial's key. Rows are sorted by `place`. A table that has a run twice, as after a merge,
    stops the program.
    """

    def __init__(
        self,
        table: Path,
        columns: Sequence[str],
        place: Callable[[Row], Any],
        run: Callable[[Any], Row] | None = None,
        pool: Executor | None = None,
    ) -> None:
        self.table, self.columns, self.place, self.run, self.pool = table, columns, place, run, pool
        rows = read(table)
        self.rows = {self._key(row): row for row in rows}
        if len(rows) > len(self.rows):
            raise SystemExit(f"{table} has two rows of one run (of one {', '.join(columns)}); leave one of them")
        self.commit = commit() if pool else ""
        self.lock = threading.Lock()
        self.begun: dict[Trial, Future[Row]] = {}

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in self.columns)

    def row_of(self, trial: Trial) -> Row:
        row = self.rows.get(trial.key)
        if row is not None:
            return row
        if self.pool is None or self.run is None:
            raise NotRun(trial)
        with self.lock:
            future = self.begun.get(trial)
            if future is None:
                future = self.begun[trial] = self.pool.submit(self.run, trial)
        row = dict(zip(self.columns, trial.key, strict=True)) | future.result() | {"commit": self.commit}
        with self.lock:
            if trial.key not in self.rows:
                self.rows[trial.key] = row
                write_metrics(sorted(self.rows.values(), key=self.place), self.table)
        return row

    def mean(self, trials: Sequence[Trial], column: str) -> float:
        return statistics.fmean(float(self.row_of(trial)[column]) for trial in trials)


def divided(
    asked: Sequence[C], rows_of: Callable[[C], Rows], runs: Runs, name_of: Callable[[C], tuple[str, str]], usual: int
) -> tuple[list[C], list[C], float | None]:
    """The cells that are finished, those that are left, and the hours of two cores that these take (`hours_left`)."""
    done = list(finished(asked, rows_of))
    left = [cell for cell in asked if cell not in done]
    return done, left, hours_left(runs, [*map(name_of, left)], [*map(name_of, done)], usual)


def finished(chosen: Sequence[Any], rows_of: Callable[[Any], Rows]) -> dict[Any, Rows]:
    """The cells whose runs all have a row, with the rows on the test images."""
    done = {}
    for cell in chosen:
        with suppress(NotRun):
            done[cell] = rows_of(cell)
    return done


def hours_left(
    runs: Runs, left: Sequence[tuple[str, str]], done: Sequence[tuple[str, str]], usual: int
) -> float | None:
    """Hours of two cores for the cells that are left, by the runs in the table. None where there is none.

    A cell is the values of the table's first two columns; runs with the same first one are taken to last alike. A cell
    has as many runs as those that are done, or `usual`.
    """
    first, second = runs.columns[:2]
    if not runs.rows:
        return None
    seconds: dict[str, list[float]] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in runs.rows.values():
        seconds.setdefault(row[first], []).append(float(row["core_seconds"]))
        counts[row[first], row[second]] = counts.get((row[first], row[second]), 0) + 1
    all_seconds = [value for values in seconds.values() for value in values]
    expected = statistics.fmean([counts[cell] for cell in done]) if done else usual
    missing = ((max(1.0, expected - counts.get(cell, 0)), seconds.get(cell[0], all_seconds)) for cell in left)
    return sum(count * statistics.fmean(values) for count, values in missing) / 2 / 3600


def read(path: Path) -> Rows:
    """The rows of a table; none where it is not there yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def beside(rows: Rows, path: Path, *keys: str) -> Rows:
    """The rows, and those of the table that is there which are about something else: nothing measured is lost."""
    new = {tuple(row[key] for key in keys) for row in rows}
    return [row for row in read(path) if tuple(row[key] for key in keys) not in new] + rows


def choose(
    score: Callable[[float], float], values: Sequence[float], first: Sequence[float]
) -> tuple[float, list[float]]:
    """The best of these values and all that were tried: none is the best whose neighbours were not tried."""
    places = [place for place, value in enumerate(values) if value in first] or list(range(len(values)))
    scores = {place: score(values[place]) for place in places}
    while True:
        best = max(scores, key=scores.__getitem__)
        beside_best = [place for place in (best - 1, best + 1) if 0 <= place < len(values) and place not in scores]
        if not beside_best:
            return values[best], [values[place] for place in sorted(scores)]
        scores[beside_best[0]] = score(values[beside_best[0]])


def percent(share: float | None) -> str:
    """A cell of a table; empty where there is no share."""
    return "" if share is None else f"{100 * share:.2f}"


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that end with this one, also where it is killed."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def commit() -> str:
    """The commit that runs are of, with a mark if code or recipes differ from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=root).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
