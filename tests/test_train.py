"""The training loop: against a loop written by hand, through interruptions, and what it leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY
from rich.console import Console
from safetensors.torch import load_file, save_file

from probe_kd.data import loader
from probe_kd.errors import RunError
from probe_kd.recipe import load, parse, plan
from probe_kd.report import Display
from probe_kd.train import Journal, train


def run(path: Path, folder: Path, display: Display | None = None, **options: bool) -> Journal:
    return train(plan(load(path)), folder, display or Display(Console(quiet=True)), **options)


class Interrupting(Display):
    """Stops the run at the end of some epoch, as Ctrl-C does."""

    def __init__(self, subject: str, stage: str, epoch: int) -> None:
        super().__init__(Console(quiet=True))
        self.at = (subject, stage, epoch)

    def epoch(self, row: dict[str, Any]) -> None:
        if (row["subject"], row["stage"], row["epoch"]) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    (folder / "tiny.yaml").write_text(TINY)
    run(folder / "tiny.yaml", folder / "run")
    return folder / "run"


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "at",
    [("teacher", "train", 1), ("student alone", "task", 1), ("student", "hint", 1), ("student", "task", 1)],
    ids=str,
)
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights_and_metrics(
    whole: Path, tiny: Path, tmp_path: Path, at: tuple[str, str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", Interrupting(*at))
    run(tiny, tmp_path / "run", resume=True)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert ours.keys() == theirs.keys() == {"teacher.safetensors", "student-alone.safetensors", "student.safetensors"}
    for file, tensors in ours.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[file][name]), (file, name)
    drop = {"images_per_second"}
    rows = [
        [{key: value for key, value in row.items() if key not in drop} for row in csv.DictReader(path.open())]
        for path in (tmp_path / "run" / "metrics.csv", whole / "metrics.csv")
    ]
    assert rows[0] == rows[1]
    assert [(row["subject"], row["stage"], row["epoch"]) for row in rows[0]] == [
        ("teacher", "train", "1"),
        ("student alone", "task", "1"),
        ("student alone", "task", "2"),
        ("student", "hint", "1"),
        ("student", "task", "1"),
        ("student", "task", "2"),
    ]


def test_a_crash_between_two_checkpoints_leaves_the_older_one(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(tiny, folder, Interrupting("student", "task", 1))
    (folder / "checkpoint").rename(folder / "checkpoint.old")  # as if stopped in the middle of the exchange
    (folder / "checkpoint.new").mkdir()
    run(tiny, folder, resume=True)
    assert sorted(file.name for file in folder.iterdir() if file.is_dir()) == []


def test_the_students_of_a_run_load_into_timm_and_answer_as_they_were_measured(whole: Path) -> None:
    journal = plan(parse((whole / "recipe.yaml").read_text()))
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    for subject, file in (("student", "student"), ("student alone", "student-alone"), ("teacher", "teacher")):
        trace = journal.teacher if subject == "teacher" else journal.student
        given = journal.teacher_input if subject == "teacher" else journal.student_input
        assert trace is not None
        assert given is not None
        model = timm.create_model(trace.model, checkpoint_path=str(whole / f"{file}.safetensors"), **trace.model_kwargs)
        batches = loader(journal.datasets.test, journal.recipe.data, given, training=False)
        with torch.no_grad():
            right = [model.eval()(images).argmax(1) == target for images, target in batches]
        measured = [float(row["accuracy"]) for row in rows if row["subject"] == subject][-1]
        assert torch.cat(right).double().mean().item() == pytest.approx(measured)


def test_an_epoch_is_what_a_loop_written_by_hand_does(tmp_path: Path) -> None:
    """Soft targets and cross entropy, SGD with momentum, one epoch of two steps: the same weights.

    After more steps rounding alone, by a batch norm's inverse, grows beyond any strict tolerance.
    """
    recipe = f"""\
student: {{model: resnet10t, model_kwargs: {{stem_type: ''}}}}
teacher: {{model: resnet10t, checkpoint: {tmp_path / "teacher.safetensors"}}}
data: {{dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 512, hflip: 0.0, no_aug: true}}
stages:
  - epochs: 1
    losses:
      task: {{loss: cross_entropy, weight: 0.3}}
      soft: {{loss: soft_targets, temperature: 3.0, weight: 0.7}}
    optimizer: {{opt: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.0}}
    scheduler: {{sched: constant}}
seed: 3
"""
    torch.manual_seed(1)
    teacher = timm.create_model("resnet10t", num_classes=10).eval()
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    planned = plan(parse(recipe))
    train(planned, tmp_path / "run", Display(Console(quiet=True)))

    torch.manual_seed(3)
    student = timm.create_model("resnet10t", num_classes=10, stem_type="")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    batches = loader(planned.datasets.train, planned.recipe.data, planned.student_input, training=True)
    torch.manual_seed(3 * 1_000_003 + 1)
    student.train()
    for images, target in batches:
        with torch.no_grad():
            told = teacher(images)
        logits = student(images)
        soft = F.kl_div((logits / 3).log_softmax(1), (told / 3).softmax(1), reduction="batchmean") * 9
        loss = 0.3 * F.cross_entropy(logits, target) + 0.7 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in load_file(tmp_path / "run" / "student.safetensors").items():
        torch.testing.assert_close(tensor, student.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_nothing_of_another_run_is_touched_unasked(whole: Path, tiny: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.iterdir()}
    with pytest.raises(RunError, match=r"--resume.*--overwrite.*--out"):
        run(tiny, whole)
    with pytest.raises(RunError, match="finished"):
        run(tiny, whole, resume=True)
    assert {file: file.stat().st_mtime_ns for file in whole.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not the folder of a run"):
        run(tiny, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_another_recipe_is_not_resumed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", Interrupting("teacher", "train", 1))
    tiny.write_text(TINY.replace("weight: 0.5", "weight: 0.6"))
    with pytest.raises(RunError, match="not the one"):
        run(tiny, tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_try(tmp_path: Path) -> None:
    text = TINY.replace("weight: 0.5}", "weight: 0.5}\n    optimizer: {opt: sgd, lr: 1.0e+30}")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RunError, match=r"'task'.* of student alone became (nan|inf) in epoch 1; try a smaller `lr`"):
        run(tmp_path / "r.yaml", tmp_path / "run")


def test_ctrl_c_leaves_a_run_that_goes_on(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(TINY.replace("epochs: 2", "epochs: 2000"))
    command = [sys.executable, "-m", "probe_kd.cli", "train", "tiny.yaml", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    metrics = tmp_path / "run" / "metrics.csv"
    for _ in range(600):
        if metrics.exists() and "student alone" in metrics.read_text():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "probe-kd train tiny.yaml --out run --resume" in complaint
    assert "Traceback" not in complaint
    journal = json.loads((tmp_path / "run" / "checkpoint" / "journal.json").read_text())
    assert journal["role"] == "student alone"
    assert journal["epoch"] >= 1
