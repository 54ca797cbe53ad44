"""Studies: what is trained, scored, stopped, killed and gone on with, and what is written in the end."""

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import timm
from conftest import Command, begin
from rich.console import Console
from running import Quiet
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score

import probe_kd.data.datasets
import probe_kd.recipe.sections.models
from probe_kd.data.label_sets import LabelSets, MultiHotImages
from probe_kd.engine.tracing import trace
from probe_kd.errors import RunError, Stopped
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.training.progress import Progress
from probe_kd.training.state import Result, TrainState
from probe_kd.tuning import paired, trials
from probe_kd.tuning.feature_pairs import pairs_by_features
from probe_kd.tuning.outcome import Outcome
from probe_kd.tuning.remarks import chance, on_chance
from probe_kd.tuning.report import tables, write_report
from probe_kd.tuning.study import Budget, tune

RECIPE = """\
# three lines of comment
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 16, 24]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 64, fraction: 0.1, hflip: 0.0}
pairs: {layer3: layer3}
stages:
  - epochs: 2
    losses:
      task: {loss: cross_entropy}
      hint: {loss: hint, weight: 1.0, normalize: layer}  # too much
"""
SPACE = "tune: {losses.hint.weight: {log: [0.001, 10]}, optimizer.lr: {values: [0.001, 0.01]}}\n"


def write(folder: Path, text: str = RECIPE + SPACE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def study(recipe: Path, progress: Progress | None = None, *, resume: bool = False, **budget: Any) -> Outcome:
    budget = {"trials": 4, "epochs": 2, "seeds": 0, **budget}
    progress = progress or Quiet()
    return tune(load(recipe), recipe.parent / "out", progress, budget=Budget(**budget), resume=resume)


@cache
def _traced(model: str, arguments: str) -> Any:
    return trace(model, **json.loads(arguments))


def traced(model: str, input_size: Any = None, **arguments: Any) -> Any:
    """Trace each model once: nearly all of the time of a trial that trains nothing is spent there."""
    return _traced(model, json.dumps({"input_size": input_size, **arguments}, default=dict, sort_keys=True))


Figure = Callable[[Plan, int], float]  # the accuracy after so many epochs


@contextmanager
def instead_of_training(figure: Figure) -> Iterator[list[dict[str, Any]]]:
    """Runs that train nothing, and have these figures. Yields what each run was called with."""
    runs: list[dict[str, Any]] = []

    def train(planned: Plan, folder: Path, progress: Progress, **options: Any) -> TrainState:
        stage, images = planned.recipe.stages[-1], set(getattr(planned.datasets.test, "indices", ()))
        runs.append({"recipe": planned.recipe, "folder": folder, "images": images})
        for stage in planned.recipe.stages:
            progress.begin(f"student: {stage.name}", stage.epochs, 1, 0)
        for epoch in range(planned.recipe.val_interval, stage.epochs + 1, planned.recipe.val_interval):
            value = figure(planned, epoch)
            progress.epoch({"role": "student", "stage": stage.name, "epoch": epoch, "accuracy": value})
        value = figure(planned, stage.epochs)
        result = Result("student", "", {}, 0, 0, value, None, 0.0, "")
        (folder / "summary.json").write_text(json.dumps({"results": [vars(result)]}))
        return TrainState(results={"student": result})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "train", train)
        patch.setattr(paired, "train", train)
        patch.setattr(probe_kd.recipe.sections.models, "trace", traced)
        yield runs


def weight_of(planned: Plan) -> float:
    weight = planned.recipe.stages[-1].losses["hint"].weight
    assert isinstance(weight, float)
    return weight


def best_near_a_hundredth(planned: Plan, epoch: int) -> float:
    from math import log10

    return 0.9 - 0.1 * abs(log10(weight_of(planned) / 0.01)) - 0.01 / epoch + 0.001 * planned.recipe.seed


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A recipe whose teacher needs no training."""
    (tmp_path / "teacher.py").write_text("")
    return write(tmp_path, (RECIPE + SPACE).replace("train: {epochs: 1}", "pretrained: true"))


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that a recipe without a network names are those of a random model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_real_study(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials and one seed, from the command: only training images are read, and the teacher is asked once."""
    opened, open_split = [], probe_kd.data.datasets.open_split

    def recorded(options: Any, key: str, name: str) -> Any:
        opened.append(key)
        return open_split(options, key, name)

    monkeypatch.setattr(probe_kd.data.datasets, "open_split", recorded)
    write(tmp_path)
    options = ["recipe.yaml", "-o", "out", "--epochs", "1"]
    outcome = command("tune", *options, "--trials", "2", "--seeds", "1")
    assert outcome.returncode == 0, outcome.stderr
    slow = "planning the recipe", "training the teacher, once", "planning what the teacher's cache", "running trials"
    lines = [line for line in outcome.stdout.splitlines() if line.startswith(slow)]
    assert all(line.startswith(start) for line, start in zip(lines, slow, strict=True))
    assert set(opened) == {"train_split"}
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert [trial["outcome"] for trial in summary["trials"]] == ["done", "done"]
    assert summary["trials"][0]["is_baseline"]
    asked = [line for line in (out / "study.log").read_text().splitlines() if "images asked of the teacher" in line]
    assert "128 images asked of the teacher, 0 known" in asked[0]
    assert all("0 images asked of the teacher, 128 known" in line for line in asked[1:])
    weights = {str(path.relative_to(out)) for path in out.rglob("*.safetensors")}
    assert weights == {f"{name}/teacher.safetensors" for name in ("teacher", "teacher-of-full-runs")[: len(weights)]}
    assert not list((out / "trials").iterdir())
    assert not (out / "cache").exists()
    plan(load(out / "tuned.yaml"))
    assert "# three lines of comment" in (out / "tuned.yaml").read_text()
    page = (out / "report.html").read_text()
    assert summary["verdict"].split(".")[0] in page.replace("&#39;", "'")
    assert "<script" not in page

    again = command("tune", *options, "--trials", "2", "--seeds", "1")
    assert (again.returncode, "--resume" in again.stderr) == (2, True)
    more = command("tune", *options, "--trials", "3", "--seeds", "0", "--resume", "--quiet")
    assert more.returncode == 0, more.stderr
    assert "planning" not in more.stdout
    assert len(json.loads((out / "summary.json").read_text())["trials"]) == 3
    other = command("tune", *options, "--resume", "--set", "stages.0.losses.hint.weight=2.0")
    assert other.returncode == 2
    assert "`stages.0.losses.hint.weight: 1.0` where there now is `2.0`" in other.stderr


def test_a_trial_says_where_it_is_every_half_minute_of_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out, reported = [0.0], io.StringIO(), list[tuple[int, float]]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    terminal = Progress(Console(file=out, force_terminal=True, width=200, color_system=None))
    progress = trials._Reporting(terminal, "trial 3", "accuracy", 2, lambda *row: reported.append(row))
    for stage in ("hints", "labels"):
        progress.begin(f"student: {stage}", 2, 5, 0)
        for epoch in (1, 2):
            for step in range(1, 6):
                now[0] += 4.0
                if progress.step(step, 32):
                    progress.losses({"loss": 0.5})
            progress.epoch({"role": "student", "stage": stage, "epoch": epoch, "accuracy": 0.5})
        progress.end()
    assert reported == [(1, 0.5), (2, 0.5)]
    starts = [line.partition("  loss")[0] for line in out.getvalue().splitlines()]
    assert starts == [
        "trial 3: student: hints  step 3/5 of epoch 2/2",
        "trial 3: student: labels  step 1/5 of epoch 2/2",
    ]


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    outcome = study(write(tmp_path), trials=3, epochs=1, jobs=2)
    assert sorted(trial.number for trial in outcome.trials) == [0, 1, 2]
    assert {trial.outcome for trial in outcome.trials} <= {"done", "stopped"}


def test_a_good_value_is_found_and_compared_on_other_images(pretrained: Path) -> None:
    with instead_of_training(best_near_a_hundredth) as runs:
        outcome = study(pretrained, trials=14, seeds=3, epochs=1)
    best = outcome.trial(outcome.best)
    assert best is not None
    assert 0.001 < float(best.values["losses.hint.weight"]) < 0.1
    full, short = runs[-6:], runs[:-6]
    assert [run["recipe"].seed for run in full] == [0, 0, 1, 1, 2, 2]
    assert {stage.epochs for run in full for stage in run["recipe"].stages} == {2}
    assert {stage.epochs for run in short for stage in run["recipe"].stages} == {1}
    assert not set.union(*(run["images"] for run in full)) & set.union(*(run["images"] for run in short))
    comparison = outcome.comparison
    assert comparison is not None
    assert (comparison.better, outcome.uses_tuned) == (3, True)
    assert outcome.mattered[0].path == "losses.hint.weight"
    assert (outcome.mattered[0].importance or 0) > 0.8
    assert outcome.verdict.startswith("The tuned recipe differs by +")
    assert "optimistic" in outcome.verdict
    tuned = load(pretrained.parent / "out" / "tuned.yaml").recipe
    assert tuned.stages[0].losses["hint"].weight == best.values["losses.hint.weight"]
    assert tuned.stages[0].epochs == 2
    page = pretrained.parent / "page.html"
    write_report(outcome, page)
    assert "losses.hint.weight" in page.read_text()
    assert list(tables(outcome))


def test_what_is_not_better_with_other_seeds_is_not_written(pretrained: Path) -> None:
    def figure(planned: Plan, epoch: int) -> float:
        is_full = planned.recipe.stages[-1].epochs == 2
        return weight_of(planned) * (0.05 if is_full else -0.05) + 0.5

    with instead_of_training(figure):
        outcome = study(pretrained, seeds=2, epochs=1)
    assert not outcome.uses_tuned
    assert "The recipe as it stands is kept" in outcome.verdict
    assert load(pretrained.parent / "out" / "tuned.yaml").recipe == load(pretrained).recipe.model_copy(
        update={"tune": None}
    )


def test_a_default_that_nothing_beats_is_kept_without_more_runs(pretrained: Path) -> None:
    with instead_of_training(lambda planned, epoch: 0.9 - abs(weight_of(planned) - 1.0)) as runs:
        outcome = study(pretrained, seeds=3, epochs=1)
    assert len(runs) == len(outcome.trials) == 4
    assert (outcome.best, outcome.comparison) == (0, None)
    assert "No trial was better" in outcome.verdict
    assert all(row.importance is None for row in outcome.mattered)
    assert "too few" in outcome.importance_note


def test_a_score_near_chance_and_a_value_near_the_end_of_its_range_are_told(pretrained: Path) -> None:
    space = "losses.hint.weight: {log: [0.01, 1.5]}, optimizer.lr: {log: [0.0001, 0.1]}, clip_grad: {range: [0.1, 1]}"
    space += ", scheduler.warmup_epochs: {range: [0, 1]}"  # of which less than 0 is no recipe
    recipe = write(
        pretrained.parent, pretrained.read_text().replace(SPACE, f"    clip_grad: 0.12\ntune: {{{space}}}\n")
    )
    with instead_of_training(lambda planned, epoch: 0.1185):
        outcome = study(recipe, trials=1, epochs=1)
    assert outcome.notes == (
        "the best trial has accuracy 11.85%, and guesses have 10.00%: trials that hardly learn are chosen by chance; "
        "give more `--epochs`, or more images",
        "`losses.hint.weight` 1 is near the end of its range (0.01 to 1.5): widen it in `tune`",
        "`clip_grad` 0.12 is near the end of its range (0.1 to 1): widen it in `tune`",
    )
    assert [part for part in tables(outcome) if isinstance(part, str)] == list(tables(outcome)), "a table of dashes"
    page = pretrained.parent / "page.html"
    write_report(outcome, page)
    assert "guesses have 10.00%" in page.read_text()
    assert "importance</th>" not in page.read_text()


def test_chance_is_what_guesses_score() -> None:
    rng = numpy.random.default_rng(0)
    labels = rng.random((20_000, 3)) < [0.5, 0.1, 0.3]
    images = MultiHotImages([], LabelSets.of([numpy.flatnonzero(row).tolist() for row in labels]), 3)  # type: ignore[arg-type]
    multilabel: Any = SimpleNamespace(headline="map", datasets=SimpleNamespace(test=images))
    guessed = average_precision_score(labels, rng.random(labels.shape), average="macro")
    assert chance(multilabel) == pytest.approx(guessed, abs=0.01)
    for classes, least in ((2, 0.6), (6, 1 / 3), (100, 0.02)):
        sets = SimpleNamespace(num_classes=classes, train_counts=None)
        of_classes: Any = SimpleNamespace(headline="accuracy", datasets=sets)
        assert on_chance(least - 0.001, of_classes, can_lengthen=True)
        assert not on_chance(least + 0.001, of_classes, can_lengthen=True)
    assert not on_chance(0.0, cast(Any, SimpleNamespace(headline="cosine", labelled_sets={})), can_lengthen=True)


def test_the_most_frequent_class_for_all_images_is_no_score() -> None:
    """One class has 90 of 100 images: trials that always answer it score 90 %, whatever the number of classes."""
    for others in ([10], [5, 3, 2, 0, 0]):
        sets = SimpleNamespace(num_classes=1 + len(others), train_counts=[*others, 90])
        for planned in (
            SimpleNamespace(headline="accuracy", datasets=sets),
            SimpleNamespace(headline="knn", labelled_sets={"knn": sets}),
        ):
            (note,) = on_chance(0.9, cast(Any, planned), can_lengthen=True)
            assert "the most frequent class as the answer for all images has 90.00%" in note
            assert not on_chance(0.921, cast(Any, planned), can_lengthen=True)


def test_what_is_behind_is_stopped_but_never_the_recipe_itself(pretrained: Path) -> None:
    text = pretrained.read_text().replace("epochs: 2", "epochs: 9")
    with instead_of_training(
        lambda planned, epoch: 0.1 if weight_of(planned) == 1.0 else 0.9 - weight_of(planned) / 20
    ):
        outcome = study(write(pretrained.parent, text), trials=8, epochs=9)
    assert outcome.trials[0].outcome == "done"
    stopped = [trial for trial in outcome.trials if trial.outcome == "stopped"]
    assert stopped
    assert {trial.epochs for trial in stopped} == {5}
    assert outcome.trial(outcome.best).outcome == "done"  # type: ignore[union-attr]


def test_failures_are_told_and_all_of_them_are_an_error(pretrained: Path) -> None:
    import torch

    reasons = [RunError("'hint' became nan"), torch.OutOfMemoryError("CUDA out of memory"), ValueError("odd")]

    def figure(planned: Plan, epoch: int) -> float:
        if weight_of(planned) != 1.0:
            raise reasons.pop()
        return 0.5

    with instead_of_training(figure):
        outcome = study(pretrained, trials=4, epochs=1)
    assert [trial.outcome for trial in outcome.trials] == ["done", "failed", "failed", "failed"]
    assert outcome.notes == (
        "trial 1 failed: ValueError: odd",
        "trial 2 failed: OutOfMemoryError: CUDA out of memory",
        "trial 3 failed: 'hint' became nan",
    )
    other = pretrained.parent / "other"
    other.mkdir()
    with (
        instead_of_training(lambda planned, epoch: 1 / 0),
        pytest.raises(RunError, match=r"no trial has trained to its end; ZeroDivisionError"),
    ):
        study(write(other, pretrained.read_text()), trials=2)


def test_values_that_do_not_go_together_are_no_result(pretrained: Path) -> None:
    """Each can stand in the recipe by itself; both are a warm-up that leaves nothing."""
    space = "tune: {scheduler.warmup_epochs: {values: [0, 1]}, pairs: {values: [auto, {layer2: layer2}]}}\n"
    text = pretrained.read_text().replace(SPACE, space).replace("pairs: {layer3: layer3}", "pairs: {layer2: layer2}")
    with instead_of_training(lambda planned, epoch: 0.5) as runs:
        outcome = study(write(pretrained.parent, text), trials=6, epochs=1)
    failed = [trial for trial in outcome.trials if trial.outcome == "failed"]
    assert len(runs) == len(outcome.trials) - len(failed)
    assert all("leave nothing" in trial.why for trial in failed)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_trial_is_begun_anew_with_its_values(pretrained: Path, name: str) -> None:
    """SIGINT comes where a run trains, which raises Stopped, and SIGTERM where none does."""
    seen: list[float] = []

    def figure(planned: Plan, epoch: int) -> float:
        seen.append(weight_of(planned))
        if len(seen) == 3:
            if name == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped("stopped by SIGINT")
        return 0.5

    handler = signal.getsignal(signal.SIGTERM)
    with instead_of_training(figure):
        with pytest.raises(Stopped, match=rf"^stopped by {name}; 1 of 4 trials are done$"):
            study(pretrained, trials=4, epochs=1)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert not list((pretrained.parent / "out" / "trials").iterdir())
        outcome = study(pretrained, trials=4, epochs=1, resume=True)
    assert len(outcome.trials) == 4
    assert len(set(seen)) == 4
    assert seen.count(seen[2]) > 1


def forever(recipe: Path) -> None:
    def figure(planned: Plan, epoch: int) -> float:
        time.sleep(0.0 if weight_of(planned) == 1.0 else 600.0)
        return 0.5

    with instead_of_training(figure):
        study(recipe, epochs=1)


def test_a_killed_study_goes_on(pretrained: Path) -> None:
    process = begin(forever, pretrained)
    folder = pretrained.parent / "out" / "trials" / "0001"
    for _ in range(600):
        if (folder / ".lock").is_file() and (folder / ".lock").stat().st_size:
            break
        time.sleep(0.1)
    assert process.pid is not None
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with instead_of_training(lambda planned, epoch: 0.5):
        outcome = study(pretrained, epochs=1, resume=True)
    assert [trial.outcome for trial in outcome.trials] == ["done"] * 4
    assert outcome.trials[0].number == 0
    assert not folder.exists()


def test_pairs_by_features_are_measured_once_for_a_study(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pretrained.read_text().replace(SPACE, "tune: {pairs: {from: features, num_pairs: [1, 2]}}\n")
    weights = pretrained.parent / "teacher.safetensors"
    save_file(timm.create_model("resnet10t", channels=[8, 8, 16, 24], num_classes=10).state_dict(), weights)
    write(pretrained.parent, text.replace("pretrained: true", f"checkpoint: {weights}"))
    with instead_of_training(lambda planned, epoch: 0.1 * len(planned.resolved.pairs)) as runs:
        assert study(pretrained, trials=6).best > 0
        seen = {run["recipe"].pairs["layer4"].normalize for run in runs if "layer4" in run["recipe"].pairs}
        assert seen == {"fitted"}  # a random teacher hardly tells images apart
        measured = pairs_by_features(load(pretrained).recipe, plan(load(pretrained)), [1])
        monkeypatch.setattr("probe_kd.tuning.space.pairs_by_features", lambda *_: measured)
        assert len(study(pretrained, trials=8, resume=True).trials) == 8
        pretrained.write_text(pretrained.read_text().replace("num_pairs: [1, 2]", "num_pairs: [1, 3]"))
        with pytest.raises(RunError, match="was begun with `tune"):
            study(pretrained, trials=8, resume=True)


def test_folders_of_others_are_left_alone(pretrained: Path) -> None:
    out = pretrained.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"holds more than a study writes \(notes.txt\)"):
            study(pretrained, resume=resume)
    with pytest.raises(RunError, match="--epochs 7: the recipe has 1 stage and 2 epochs"):
        study(pretrained, epochs=7, resume=True) if (out / "notes.txt").unlink() is None else None


def test_without_optuna_the_command_says_what_to_install(
    command: Command, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = command("tune", "recipe.yaml")
    assert (outcome.returncode, outcome.stderr) == (
        2,
        "error: `probe-kd tune` needs Optuna: pip install 'probe-kd[tune]'\n",
    )
