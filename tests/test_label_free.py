"""The study without labels: its commands and recipes are legal, and its rows lead to what is missing."""

from pathlib import Path

import label_free
from typer.main import get_command

from probe_kd.cli import app
from probe_kd.recipe.reading import parse

SETTINGS = label_free.Settings(Path("data"), Path("runs"))


def test_every_command_is_one_of_distill() -> None:
    command = get_command(app).commands["distill"]  # type: ignore[attr-defined]
    todo = list(label_free.distil_rows(SETTINGS, [{"teachers": "imagenet", "seed": 0}]))
    assert len(todo) == 8
    for line, row in todo:
        given = command.make_context("distill", line[2:]).params
        assert len(given["teacher"]) == len(given["checkpoint"]) == len(row["teachers"].split("+"))
        assert given["seed"] == row["seed"]


def test_the_rate_is_chosen_by_the_first_seed_and_tried_with_the_others(tmp_path: Path) -> None:
    settings = label_free.Settings(Path("data"), tmp_path)
    first = [row for _, row in label_free.tune_rows(settings, [])]
    assert {(row["start"], row["lr"]) for row in first} == {
        (start, rate) for start in ("scratch", "imagenet") for rate in label_free.RATES
    }
    rows = [{**row, "val_accuracy": 0.5 + (row["lr"] == 1e-3)} for row in first]
    later = [row for _, row in label_free.tune_rows(settings, rows)]
    assert [(row["lr"], row["seed"]) for row in later] == [(1e-3, 1), (1e-3, 2)] * 2
    assert not list(label_free.tune_rows(settings, [*rows, *({**row, "val_accuracy": 0.5} for row in later)]))
    for recipe in tmp_path.glob("*.yaml"):
        assert parse(recipe.read_text()).recipe.stages[0].epochs == settings.tune_epochs
