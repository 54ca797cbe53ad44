"""The outcome of a study: tables for a terminal, and one self-contained HTML page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from probe_kd.console import table_of
from probe_kd.files.run_folder import GENERATOR
from probe_kd.measures import MEASURES, Measure
from probe_kd.results.html import WIDTH, axis, environment_of_pages, write_html
from probe_kd.tuning.outcome import Outcome, TrialSummary
from probe_kd.tuning.trials import short_value
from probe_kd.version import __version__


def tables(outcome: Outcome) -> Iterator[Table | str]:
    """The output in a terminal."""
    if outcome.comparison is not None and outcome.comparison.seeds:
        table = table_of("At the full budget, with the same seeds", "seed", "as it stands>", "tuned>", "difference>")
        for row in _seed_rows(outcome):
            table.add_row(*row)
        yield table
    if outcome.has_importances:
        table = table_of("What mattered", "value", "importance>", "the recipe", "the best trial")
        for value in outcome.mattered:
            importance = "-" if value.importance is None else f"{value.importance:.0%}"
            table.add_row(escape(value.path), importance, escape(value.default), escape(value.best))
        yield table
    yield f"importance: {outcome.importance_note}"
    yield from (f"note: {note}" for note in outcome.notes)
    yield outcome.verdict


def _seed_rows(outcome: Outcome) -> Iterator[tuple[str, str, str, str]]:
    comparison, measure = outcome.comparison, MEASURES[outcome.measure]
    assert comparison is not None
    sides = zip(comparison.seeds, comparison.default, comparison.tuned, comparison.differences, strict=True)
    for seed, default, tuned, difference in sides:
        yield str(seed), measure.text(default), measure.text(tuned), f"{measure.factor * difference:+.2f}"


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the page. Raises RunError if it cannot be written."""
    environment = environment_of_pages()
    environment.filters["values_text"] = _values_text
    measure = MEASURES[outcome.measure]
    text = environment.get_template("tune.html").render(
        kind="tuning",
        title=outcome.recipe,
        outcome=outcome,
        measure=measure,
        seeds=list(_seed_rows(outcome)) if outcome.comparison else [],
        same_images=any("measured on the images" in note for note in outcome.notes),
        chart=_chart(outcome, measure),
        generator=f"{GENERATOR}{__version__}",
    )
    write_html(text, path)


def _values_text(values: Mapping[str, float | str]) -> str:
    return ", ".join(f"{path} {short_value(value)}" for path, value in values.items())


def _chart(outcome: Outcome, measure: Measure) -> dict[str, Any]:
    """One dot for every trial that has a value."""
    valued = [trial for trial in outcome.trials if trial.value is not None]
    left, right, top, bottom = 56.0, WIDTH - 16, 10.0, 190.0
    values = [measure.factor * _value(trial) for trial in valued]
    up, height = axis(min(values), max(values), bottom, top, False)
    last = max(trial.number for trial in valued)
    dots = [
        {
            "x": left + 10 + (right - left - 20) * trial.number / max(last, 1),
            "y": height(measure.factor * _value(trial)),
            "r": 6 if trial.is_baseline or trial.number == outcome.best else 3.5,
            "style": "s1" if trial.is_baseline else "s0",
            "done": trial.outcome == "done",
        }
        for trial in valued
    ]
    return {"dots": dots, "up": up, "left": left, "right": right, "width": WIDTH, "height": bottom + 34}


def _value(trial: TrialSummary) -> float:
    assert trial.value is not None
    return trial.value
