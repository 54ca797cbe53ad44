"""The study in small: its methods, one cell that is run and gone on with, and what is made of its tables."""

import csv
import math
from dataclasses import asdict
from pathlib import Path

import fit
import pytest
import report
import torch

import study
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import save_weights
from probe_kd.recipe.reading import load

DIGITS = ("data.dataset=sklearn/digits", "data.root=null", "data.train_split=train", "data.views=1")


@pytest.fixture
def settings(tmp_path: Path) -> study.Settings:
    budget = study.Budget(fraction=0.2, epochs=2, batch_size=64, warmup=0)
    return study.Settings(tmp_path, {study.FEW: budget, study.ALL: budget}, (0, 1), (1e-3, 4e-3), DIGITS)


@pytest.mark.parametrize("cell", study.cells(), ids=lambda cell: f"{cell.images}-{cell.pair}-{cell.method}")
def test_every_method_is_a_recipe_within_the_same_budget(cell: study.Cell) -> None:
    settings = study.Settings(Path("runs"), study.BUDGETS)
    found = load(study.RECIPES / f"{cell.pair}.yaml", 0, study.sets_of(cell, 1e-3, settings)).recipe
    assert sum(stage.epochs for stage in found.stages) == study.BUDGETS[cell.images].epochs
    assert {stage.optimizer.lr for stage in found.stages} == {1e-3}
    assert found.teacher is not None
    assert bool(found.teacher.checkpoint) != bool(found.share)


def test_every_method_can_be_run_where_it_names_layers_and_with_the_first_pair_that_it_is_tried_with(
    settings: study.Settings,
) -> None:
    for pair in study.PAIRS:
        teacher = load(study.RECIPES / f"{pair}.yaml").recipe.teacher
        assert teacher is not None
        study.teacher_of(pair, settings).mkdir(parents=True, exist_ok=True)
        made = build_model(teacher.model, {"num_classes": 10, **teacher.model_kwargs})
        save_weights(made, study.teacher_of(pair, settings) / "student.safetensors", {})
    tried: set[str] = set()
    for cell in study.cells():
        names_layers = study.known()["methods"][cell.method].get("layers", "all") != "all"
        if cell.images == study.FEW and (names_layers or cell.method not in tried):
            tried.add(cell.method)
            sets = [*settings.sets, *study.sets_of(cell, 1e-3, settings)]
            assert study.planned(study.RECIPES / f"{cell.pair}.yaml", 0, sets).objectives


def test_a_cell_chooses_by_held_out_images_and_goes_on_where_it_was(settings: study.Settings) -> None:
    study.run(
        study.RECIPES / "teacher-resnet.yaml",
        0,
        [*settings.sets, "stages.0.epochs=1"],
        study.teacher_of("resnet-resnet", settings),
    )
    cell = study.Cell(study.FEW, "resnet-resnet", "soft targets, T 4")
    rows, curves = study.run_cell(cell, settings)
    runs = {folder.parent.name: folder for folder in settings.out.glob("runs/*/*/*/*/summary.json")}
    assert len(runs) == len(settings.rates) + len(settings.seeds) - 1
    ends = {row["lr"]: row["held_out"] for row in curves if row["seed"] == 0 and row["epoch"] == 2}
    assert {row["lr"] for row in rows} == {max(ends, key=ends.__getitem__)}
    before = {folder: folder.stat().st_mtime_ns for folder in runs.values()}
    assert study.run_cell(cell, settings) == (rows, curves)
    assert {folder: folder.stat().st_mtime_ns for folder in runs.values()} == before


def test_a_table_keeps_what_was_measured_of_other_cells(tmp_path: Path) -> None:
    first, second, third = (asdict(cell) for cell in list(study.cells())[:3])
    table = tmp_path / "tests.csv"
    study.write([{**row, "lr": 0.1, "seed": 0, "test": 1.0} for row in (first, third)], table)
    study.write([{**row, "lr": 0.2, "seed": 0, "test": 2.0} for row in (second, third)], table)
    with table.open(encoding="utf-8") as file:
        rows = [(row["method"], row["lr"], row["test"]) for row in csv.DictReader(file)]
    assert rows == [(first["method"], "0.1", "1.0"), (second["method"], "0.2", "2.0"), (third["method"], "0.2", "2.0")]


def test_a_learning_rate_is_the_best_only_between_two_others() -> None:
    for peak in study.RATES:
        asked: list[float] = []

        def accuracy(rate: float, peak: float = peak, asked: list[float] = asked) -> float:
            asked.append(rate)
            return -abs(math.log(rate / peak))

        best, tried = study.choose(accuracy, study.RATES)
        assert best == peak
        assert sorted(asked) == tried
        at = study.RATES.index(peak)
        assert set(study.RATES[max(0, at - 1) : at + 2]) <= set(tried)


def test_what_the_tables_say_follows_from_their_rows() -> None:
    base = {"images": "few", "pair": "a-b", "lr": 0.1, "teacher": 90.0, "teacher_alone": "", "agreement": 50.0}
    tests = [
        {**base, "method": method, "seed": seed, "test": test}
        for method, seed, test in (("alone", 0, 80.0), ("alone", 1, 82.0), ("hint", 0, 81.0), ("hint", 1, 84.0))
    ]
    (_, table) = report.accuracies(tests)
    assert "| hint | 0.1 | 82.50 ± 2.12 | +1.50 (+1.00 to +2.00) | 50.00 ± 0.00 |" in table
    run = [{"step": step, "explained": share} for step, share in ((0, 0.0), (10, 0.4), (20, 0.8))]
    assert report._steps(run, 0.5) == pytest.approx(10)
    assert report._steps(run, 0.9) == pytest.approx(18)
    assert (
        report.put("a\n<!-- study: x -->\nold\n<!-- end -->\nb", "x", "new")
        == "a\n<!-- study: x -->\n\nnew\n<!-- end -->\nb"
    )


def test_a_student_fits_what_a_teacher_like_it_gives_and_a_frozen_one_only_what_its_map_can() -> None:
    """A teacher is its own best student: with its weights all is explained, and frozen noise explains little."""
    torch.manual_seed(0)
    kwargs = {"in_chans": 1, "channels": [8, 16, 24, 32]}
    model = ("resnet10t", kwargs)
    images = torch.randn(128, 1, 32, 32)
    spec = study.plan(
        load(study.RECIPES / "resnet-resnet.yaml", sets=[*DIGITS, "teacher.train.epochs=1"])
    ).student_input
    teacher = fit.build_model(*model).eval()
    bench = fit.Bench("resnet-resnet", teacher, images, images, model, spec)
    twin = bench.new_student(1)
    twin.load_state_dict(teacher.state_dict())
    objective = fit.arms(*fit.STAGES["resnet-resnet"])["attention"]
    distiller = fit.Distiller(twin, teacher, [objective], student_input=spec, teacher_input=spec)
    assert fit.explained(bench, distiller, objective) == pytest.approx((1.0, 1.0), abs=1e-5)
    distiller.close()
    rows = fit.fit(bench, bench.new_student(1), fit.HINTS, rate=8e-3, seed=0, steps=40)
    assert rows[-1]["explained"] > rows[0]["explained"]
    frozen = bench.new_student(1).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    fit.fit(bench, frozen, fit.FLOW, rate=2e-3, seed=0, frozen=True, steps=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
