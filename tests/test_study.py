"""The study in small: its methods, how it chooses and goes on, one run, and what is made of its tables."""

import json
import math
import re
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import control_report
import every_recipe
import fit
import other_reports
import pretrained
import pytest
import recipe_report
import report
import run_table
import torch
from rows import Row, decided

import study
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import save_weights
from probe_kd.recipe.reading import load

DIGITS = ("data.dataset=sklearn/digits", "data.root=null", "data.train_split=train", "data.views=1")
HINT = study.Cell("vit-resnet", "hint, all pairs, normalised")


@pytest.fixture
def settings(tmp_path: Path) -> study.Settings:
    return study.Settings(tmp_path, study.Budget(fraction=0.2, epochs=1, batch_size=64, warmup=0), sets=DIGITS)


class Made(Executor):
    """Runs that are not trained: their accuracy is made up, and the seeds disagree about the best rate."""

    def __init__(self) -> None:
        self.trials: list[study.Trial] = []

    def submit(self, run: Any, trial: study.Trial) -> Future[Any]:  # type: ignore[override]
        self.trials.append(trial)
        best_rate = {0: 2e-3, 1: 2e-2}.get(trial.seed, 6e-3)
        off = math.log10(trial.rate / best_rate) ** 2 + math.log10(trial.factor / 0.3) ** 2
        tests = trial.seed in run.keywords["settings"].test_seeds
        row = {
            "part": "test" if tests else "choice",
            "held_out": f"{80 - 5 * off + (trial.cell.method == 'DIST'):.2f}",
            "test": f"{79 - 5 * off:.2f}" if tests else "",
            "core_seconds": "20.0",
        }
        future: Future[Any] = Future()
        future.set_result(row)
        return future


def runs_of(settings: study.Settings, pool: Executor | None = None) -> run_table.Runs:
    run = partial(study.run_trial, settings=settings)
    return run_table.Runs(settings.out / "control.csv", study.KEY, study.place_of, run, pool)


def test_every_method_has_the_same_budget_and_layers_that_exist(settings: study.Settings) -> None:
    """One recipe for each pair of models, with the losses of all methods."""
    for pair, name in study.PAIRS.items():
        teacher = load(study.RECIPES / f"{pair}.yaml").recipe.teacher
        assert teacher is not None
        weights = study.weights_of(name, settings.out)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_weights(build_model(teacher.model, {"num_classes": 10, **teacher.model_kwargs}), weights, {})
        losses: dict[str, Any] = {}
        for cell in study.cells((pair,)):
            if cell.method != study.TOGETHER:
                own, _ = study.losses_of(cell, 1.0)
                losses |= {f"{key}-{len(losses)}": loss for key, loss in own.items()}
        sets = study.sets_of(study.Trial(study.Cell(pair, "alone"), 1e-3, 1.0, 0), settings)
        planned = study.planned(study.RECIPES / f"{pair}.yaml", 0, [*sets, f"stages.0.losses={json.dumps(losses)}"])
        assert len(planned.objectives[0]) == len(losses)


@pytest.mark.parametrize("method", study.known()["methods"])
def test_a_factor_multiplies_what_varies_and_nothing_else(method: str, settings: study.Settings) -> None:
    cell = study.Cell("vit-resnet", method)
    once, thrice = (set(study.sets_of(study.Trial(cell, 1e-3, factor, 0), settings)) for factor in (1.0, 3.0))
    ((before, after),) = zip(once - thrice, thrice - once, strict=True)
    numbers = [float(number) for number in re.findall(r"[-+]?[\d.]+(?:e-?\d+)?", before)]
    others = [float(number) for number in re.findall(r"[-+]?[\d.]+(?:e-?\d+)?", after)]
    changed = [(one, other) for one, other in zip(numbers, others, strict=True) if one != other]
    assert len(changed) == len(study.known()["methods"][method]["vary"])
    assert all(other == pytest.approx(3 * one) for one, other in changed)


def test_a_cell_is_chosen_by_the_mean_of_two_seeds_and_goes_on_from_its_table_alone(settings: study.Settings) -> None:
    pool, table = Made(), settings.out / "control.csv"
    with pytest.raises(run_table.NotRun):
        study.tests(HINT, runs_of(settings), settings)
    rows = study.tests(HINT, runs_of(settings, pool), settings)
    assert [(row["lr"], row["factor"], row["seed"]) for row in rows] == [("0.006", "0.3", seed) for seed in "234"]
    tried = {(trial.rate, trial.factor) for trial in pool.trials}
    assert tried == {(rate, 1.0) for rate in (2e-3, 6e-3, 2e-2)} | {(6e-3, factor) for factor in (0.1, 0.3)}
    assert len(pool.trials) == len({(trial.rate, trial.factor, trial.seed) for trial in pool.trials}) == 5 * 2 + 3
    other = study.Cell("vit-resnet", "DIST")
    table_alone = runs_of(settings)
    assert study.tests(HINT, table_alone, settings) == rows
    done, left, hours = study.progress([HINT, other], table_alone, settings)
    assert (done, left) == ([HINT], [other])
    assert hours == pytest.approx(13 * 20 / 2 / 3600)
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if ",choice," not in line or ",1,1," not in line) + "\n")
    again = Made()
    assert [row["test"] for row in study.tests(HINT, runs_of(settings, again), settings)] == [
        row["test"] for row in rows
    ]
    assert {(trial.factor, trial.seed) for trial in again.trials} == {(1.0, 1)}


def test_a_table_with_a_run_twice_is_refused(settings: study.Settings) -> None:
    """As after a merge of two clones that went on from one table: neither figure is the right one."""
    lines = (study.TABLES / "control.csv").read_text(encoding="utf-8").splitlines()
    (settings.out / "control.csv").write_text("\n".join(lines[:5]), encoding="utf-8")
    assert len(runs_of(settings).rows) == 4
    (settings.out / "control.csv").write_text("\n".join([*lines[:5], lines[2]]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"control\.csv has two rows of one run"):
        runs_of(settings)


def test_the_two_best_are_those_of_the_held_out_images_with_their_weights(settings: study.Settings) -> None:
    cell = study.together("vit-resnet", runs_of(settings, Made()), settings)
    assert cell.parts == (("DIST", 0.3), (HINT.method, 0.3))
    losses, decay = study.losses_of(cell, 3.0)
    weights = {name: loss.get("weight", 1.0) for name, loss in losses.items()}
    assert weights == pytest.approx({"task": 1.0, "dist": 0.9, "hint": 0.9})
    assert decay == 1
    row = runs_of(settings, Made()).row_of(study.Trial(cell, 6e-3, 1.0, 2))
    assert row["parts"] == "DIST x 0.3 + hint, all pairs, normalised x 0.3"


def test_a_run_leaves_its_row_and_no_folder_of_its_own_and_another_teacher_is_refused(settings: study.Settings) -> None:
    recipe = study.RECIPES / "teacher-resnet.yaml"
    study.run(
        recipe, 0, [*DIGITS, "stages.0.epochs=1", "data.fraction=0.2"], study.teacher_folder("resnet", settings.out)
    )
    teacher = study.run_teacher("resnet", settings)
    before = set(settings.out.iterdir())
    row = study.run_trial(study.Trial(HINT, 6e-3, 1.0, 2), settings)
    assert set(settings.out.iterdir()) == {*before, settings.out / "cache"}  # the teacher's answers stay
    assert 0 < float(row["test"]) <= 100
    assert 0 < float(row["held_out"]) <= 100
    diverged = study.run_trial(study.Trial(HINT, 1e30, 1.0, 0), settings)
    assert (diverged["held_out"], diverged["test"]) == ("0.00", "")
    table = settings.out / "teachers.csv"
    for _ in range(2):
        study.check_teachers([teacher], table)
    assert run_table.read(table) == [teacher]
    with pytest.raises(SystemExit, match="another teacher `resnet`"):
        study.check_teachers([teacher | {"digest": "0"}], table)


def test_a_learning_rate_is_the_best_only_between_two_others() -> None:
    for peak in study.RATES:
        asked: list[float] = []

        def accuracy(rate: float, peak: float = peak, asked: list[float] = asked) -> float:
            asked.append(rate)
            return -abs(math.log(rate / peak))

        best, tried = run_table.choose(accuracy, study.RATES, study.FIRST)
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


def test_a_verdict_needs_one_sign_and_a_mean_beyond_the_deviation() -> None:
    for values, verdict in (
        ((1.0, 1.2, 0.9), 1),
        ((-1.0, -1.2, -0.9), -1),
        ((0.1, 3.0, 0.1), 0),
        ((1.0, 1.0, -0.1), 0),
        ((0.02, 0.02, 0.02), 0),
    ):
        assert decided(values) == verdict


def test_what_is_said_of_the_control_follows_from_its_finished_cells() -> None:
    """A remedy that is better everywhere is the answer, and one that is not finished is left out."""
    pairs, methods = tuple(study.PAIRS), study.all_methods()
    accuracy = {"alone": 70.0, control_report.AUTOMATIC: 75.0, "RSD": 77.0, "OFA, outputs and exits": 76.0}

    def tested(seeds: int) -> list[Row]:
        return [
            {"pair": pair, "method": name, "part": "test", "seed": seed, "test": accuracy.get(name, 72.0) + 0.1 * seed}
            for pair in pairs
            for name in methods
            for seed in range(2, 2 + (seeds if name == "RSD" else 3))
        ]

    whole = control_report.accuracies(tested(3))
    assert "3 of 125 cells are finished" in control_report.state([{"core_seconds": 20.0}], 3, 122, 5.0)
    assert "**All 125 cells are finished.** Their 2 runs took 1.5 hours" in control_report.state(
        [{"core_seconds": 5400.0}] * 2, 125, 0, 0.0
    )
    first, table = control_report.answer(whole, pairs, methods)
    assert "RSD; OFA, outputs and exits are better in all 5 of them" in first
    assert "| RSD | ViT <- ResNet +2.0 ± 0.0 (+++);" in table
    (orders,) = control_report.claims(whole, pairs)
    assert orders.count("confirmed +1.0 ± 0.0 (+++)") == 5
    assert orders.count("refuted -2.0 ± 0.0 (---)") == 10
    (gained,) = control_report.summary(whole, pairs)
    assert gained.count("| 70.3 % | +2.0 | +5.0 |") == 6
    order = list(control_report.means(whole, pairs, methods))
    assert order[:3] == ["RSD", "OFA, outputs and exits", control_report.AUTOMATIC]
    assert "RSD +7.0; OFA, outputs and exits +6.0; hint" in "".join(control_report.ranking(whole, pairs, methods))
    part = control_report.accuracies(tested(2))
    assert "RSD" not in control_report.means(part, pairs, methods)
    assert "RSD" not in "".join(control_report.answer(part, pairs, methods))
    assert "no answer" in "".join(control_report.answer({}, pairs, methods))


def test_what_is_said_of_the_pretrained_teacher_follows_from_its_rows() -> None:
    def row(part: str, arm: str, seed: int, **values: Any) -> Row:
        empty = {"use": "test", "test": "", "knn": "", "linear": "", "explained": ""}
        return {"part": part, "arm": arm, "seed": seed, **empty, **values}

    arms = {pretrained.STUDENT_ALONE: 75.0, pretrained.FROM_PROBED: 80.0, pretrained.FROM_TUNED: 78.0}
    labelled = [row("500 labels", arm, seed, test=value + seed) for arm, value in arms.items() for seed in (2, 3, 4)]
    table, gained, verdict = other_reports.pretrained(labelled)
    assert "| features and outputs of the probed teacher | 83.00 ± 1.00 |  |  |" in table
    assert "Yes: +2.0 ± 0.0 (+++)" in verdict
    assert f"| {pretrained.FROM_TUNED} | +3.0 ± 0.0 (+++) |  |  |" in gained
    assert pretrained.UNLABELLED not in gained
    assert "Not measured yet" in "".join(other_reports.pretrained(labelled[1:2]))
    first = next(iter(pretrained.CHANGES))
    seeds, judged = (2, 3, 4), pretrained.FREE
    free = [row(judged, arm, seed, knn=70.0 + seed, linear=75.0) for arm in pretrained.CHANGES for seed in seeds]
    free += [row(judged, first, 0, use="choice", knn=60.0 + n, explained=n / 10) for n in range(4)]
    _, order = other_reports.without_labels(free)
    assert "rank correlation of +1.00" in order
    assert "costs 0.00 points" in order


def test_the_pages_say_what_the_tables_say() -> None:
    for page, bodies in report.pages().items():
        text = page.read_text(encoding="utf-8")
        assert report.filled(text, bodies) == text, "run python study/report.py"
    shown = (report.DOCS.parent / "README.md").read_text(encoding="utf-8")
    row = run_table.read(every_recipe.TABLE)[0]
    assert (row["recipe"], row["seed"]) == ("quickstart", "0")
    for role, agreement in (("baseline", "baseline_agreement"), ("student", "agreement")):
        assert re.search(rf"^ {role} +{row[role]}% +{row[agreement]}% ", shown, re.MULTILINE), role


def test_what_is_said_of_the_recipes_follows_from_their_rows() -> None:
    def row(recipe: str, seed: int, student: float, **values: Any) -> Row:
        models = {"student_model": "a", "teacher_model": "b"}
        empty = dict.fromkeys(("teacher_alone", "teacher", "baseline", "agreement", "baseline_agreement"), "")
        return {"recipe": recipe, "seed": seed, "student": student, **models, **empty, **values}

    measured = {"teacher": 98.0, "agreement": 95.0, "baseline_agreement": 79.0}
    rows = [row("quickstart", seed, 90.0 + seed, baseline=80.0, **measured) for seed in (0, 1, 2)]
    rows += [row("rkd", seed, 79.9 + seed / 5) for seed in (0, 1, 2)] + [row("ofa", seed, 70.0) for seed in (0, 1, 2)]
    rows += [row("fsp", 0, 60.0)]
    table, gained = recipe_report.quickstart(rows)
    assert "| mean | 98.00 ± 0.00 | 80.00 ± 0.00 | 91.00 ± 1.00 |" in table
    assert gained == "The distilled student over the baseline: +11.0 ± 1.0 (+++) points, +10.0 to +12.0.\n"
    table, *verdicts = recipe_report.losses(rows)
    assert "| rkd | 79.90 | 80.10 | 80.30 | 80.10 ± 0.20 | +0.1 ± 0.2 (-++) |" in table
    assert verdicts == ["- Better: quickstart.", "- Undecided: rkd.", "- Worse: ofa.", ""]
    assert "| fsp | a <- b |  |  |  | 60.00 |  |" in "".join(recipe_report.once(rows))
    begun = [*rows[1:], row("crd", 1, 85.0), row("crd", 2, 86.0), row("dkd", 2, 85.0)]
    assert not [*recipe_report.losses(begun)], "the quickstart lacks a seed"
    assert {"crd", "dkd"}.isdisjoint(
        re.findall(r"\w+", "".join((*recipe_report.losses(rows + begun[-3:]), *recipe_report.once(begun))))
    )
    assert not [*recipe_report.quickstart([]), *recipe_report.losses([]), *recipe_report.once([])]


def test_every_recipe_has_its_runs_and_each_run_a_whole_row() -> None:
    """Those that differ from the quickstart in their losses alone have its seeds, and not its baseline again."""
    trials = every_recipe.trials()
    assert {trial.recipe for trial in trials} == {path.stem for path in report.DOCS.parent.glob("recipes/*.yaml")}
    several = {trial.recipe for trial in trials if trial.seed}
    assert several == {"quickstart", "review", "dkd", "rkd", "crd", "ofa"}
    assert {trial.recipe for trial in trials if trial.sets} == several - {"quickstart"}
    short = ("data.fraction=0.05", "teacher.train.epochs=1", "stages.0.epochs=1", "stages.0.scheduler.warmup_epochs=0")
    row = every_recipe.run_trial(every_recipe.Trial("rkd", 1), short)
    of_table = run_table.read(every_recipe.TABLE)[0].keys()
    assert list(of_table) == [*every_recipe.KEY, *row, "commit"]
    assert {name for name, value in row.items() if value == ""} == {"teacher_alone", "baseline", "baseline_agreement"}


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
