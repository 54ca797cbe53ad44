"""The study of a pretrained teacher: its recipes are legal, and its cells go on from their rows."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pretrained
import pytest
from label_free import write_recipe
from run_table import NotRun, Runs

from probe_kd.engine.models import build_model
from probe_kd.engine.weights import save_weights
from probe_kd.recipe.reading import load

DIGITS = {"dataset": "sklearn/digits", "train_split": "train", "val_split": "validation"}


@pytest.fixture
def settings(tmp_path: Path) -> pretrained.Settings:
    save_weights(build_model("mobilenetv3_small_050", {}), tmp_path / "teacher.safetensors", {})
    return pretrained.Settings(tmp_path, DIGITS, "mobilenetv3_small_050", epochs=1, images=3_000, warmup=0)


def test_every_arm_is_a_recipe(settings: pretrained.Settings) -> None:
    for cell in pretrained.cells():
        values = pretrained.recipe_of(pretrained.Trial(cell, 1e-3, 2), settings, tests=True)
        recipe = load(write_recipe(values, settings.out / "recipe.yaml")).recipe
        assert (recipe.stages[0].optimizer.lr, recipe.seed) == (1e-3, 2)
        assert (recipe.data.labels == "none") == (cell.part == pretrained.FREE)


def test_a_cell_trains_what_it_learns_from_and_goes_on_from_its_rows(
    settings: pretrained.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student of a probed teacher: with one rate and one seed of each use."""
    for name, value in {"RATES": (1e-3,), "CHOICE_SEEDS": (0,), "TEST_SEEDS": (2,)}.items():
        monkeypatch.setattr(pretrained, name, value)
    cell = pretrained.Cell("500 labels", pretrained.FROM_PROBED)
    table = settings.out / "pretrained.csv"

    def runs(pool: Any = None) -> Runs:
        run = partial(pretrained.run_trial, settings=settings)
        return Runs(table, pretrained.KEY, pretrained.place_of, run, pool)

    with pytest.raises(NotRun):
        pretrained.tests(cell, runs(), settings)
    with ThreadPoolExecutor(1) as pool:
        (row,) = pretrained.tests(cell, runs(pool), settings)
    assert 0 < float(row["test"]) <= 100
    assert pretrained.weights_of(pretrained.Cell("500 labels", pretrained.PROBED), 0, settings).exists()
    assert pretrained.tests(cell, runs(), settings) == [row]
    assert {path.name for path in settings.out.iterdir()} == {
        "models",
        "cache",
        "teacher.safetensors",
        "pretrained.csv",
    }


def test_without_labels_knn_on_held_out_images_chooses(settings: pretrained.Settings) -> None:
    cell = pretrained.Cell(pretrained.FREE, "deepest pair")
    choice = pretrained.run_trial(pretrained.Trial(cell, 1e-3, 0), settings)
    assert choice["held_out"] == choice["knn"] != ""
    assert choice["linear"]
    assert choice["explained"]
    assert choice["test"] == ""
