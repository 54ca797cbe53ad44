"""Rows of the study's tables, and lines of markdown from them."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
Row = dict[str, Any]
Key = tuple[Any, ...]
SMALLEST = 0.1  # points, which are ten of the test images


def read(name: str) -> list[Row]:
    """The rows of a table, with numbers where there are any; none where it is not there yet."""
    path = DOCS / "study" / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def groups(rows: Iterable[Row], *keys: str) -> dict[Key, list[Row]]:
    by_key: dict[Key, list[Row]] = {}
    for row in rows:
        by_key.setdefault(tuple(row[key] for key in keys), []).append(row)
    return by_key


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`85.21 ± 0.40`: the mean and the standard deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def by_seed(name: str, values: Mapping[float, float]) -> list[str]:
    """The cells of a line: the name, the value of every seed, and their mean."""
    listed = [values[seed] for seed in sorted(values)]
    return [name, *(f"{value:.2f}" for value in listed), spread(listed)]


def table(*head: str, rows: Iterable[Sequence[object]]) -> str:
    first, *others = ("| " + " | ".join(map(str, line)) + " |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def differences(one: Mapping[Any, float], other: Mapping[Any, float]) -> list[float]:
    """Seed by seed, in the order of the seeds."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def change(values: Sequence[float]) -> str:
    """`+9.60 ± 0.50 (+++)`: the mean of differences, their standard deviation and their signs."""
    signs = "".join("+" if value > 0 else "-" if value < 0 else "0" for value in values)
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):+.1f}{deviation} ({signs})"


def decided(values: Sequence[float]) -> int:
    """1 if these differences are above 0, -1 if below, 0 if undecided.

    They are decided if they have one sign, and their mean is at least `SMALLEST` and beyond their deviation.
    """
    same_sign = min(values) > 0 or max(values) < 0
    if len(values) < 2 or not same_sign or abs(fmean(values)) <= max(stdev(values), SMALLEST):
        return 0
    return 1 if fmean(values) > 0 else -1
