"""The training loop: against a loop written by hand, through interruptions, and what it leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import NARROW, TINY, record
from rich.console import Console
from running import HINT_ONLY
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import Tensor

from probe_kd import Distiller, InputSpec, Objective, Schedule
from probe_kd.data.loading import DataOptions, loader, mixer
from probe_kd.errors import RecipeError, RunError
from probe_kd.methods.losses.outputs import soft_targets
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load, parse
from probe_kd.recipe.writing import dump
from probe_kd.results.comparison import compare
from probe_kd.tables import teacher_lines
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.optimizers import make_optimizer, make_scheduler
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating
from probe_kd.training.progress import Progress
from probe_kd.training.run import train
from probe_kd.training.scoring import Scorer
from probe_kd.training.state import TrainState


def run(path: Path, folder: Path, display: Progress | None = None, **options: bool) -> TrainState:
    return train(plan(load(path)), folder, display or Progress(Console(quiet=True)), **options)


class Interrupting(Progress):
    """Stops the run at the end of some epoch, as Ctrl-C does."""

    def __init__(self, role: str, stage: str, epoch: int) -> None:
        super().__init__(Console(quiet=True))
        self.at = (role, stage, epoch)

    def epoch(self, row: dict[str, Any]) -> None:
        if (row["role"], row["stage"], row["epoch"]) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    (folder / "tiny.yaml").write_text(NARROW)
    run(folder / "tiny.yaml", folder / "run")
    return folder / "run"


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "at",
    [("teacher", "train", 1), ("student", "hint", 1)],  # tests/test_resume.py kills runs at points inside an epoch
    ids=str,
)
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights_and_metrics(
    whole: Path, tiny: Path, tmp_path: Path, at: tuple[str, str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", Interrupting(*at))
    run(tiny, tmp_path / "run", resume=True)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    roles = {"teacher.safetensors", "baseline.safetensors", "student.safetensors"}
    assert ours.keys() == theirs.keys() == {*roles, "adapters-0.safetensors"}
    for file, tensors in ours.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[file][name]), (file, name)
    drop = {"images_per_second"}
    rows = [
        [{key: value for key, value in row.items() if key not in drop} for row in csv.DictReader(path.open())]
        for path in (tmp_path / "run" / "metrics.csv", whole / "metrics.csv")
    ]
    assert rows[0] == rows[1]
    assert [(row["role"], row["stage"], row["epoch"]) for row in rows[0]] == [
        ("teacher", "train", "1"),
        ("baseline", "task", "1"),
        ("baseline", "task", "2"),
        ("student", "hint", "1"),
        ("student", "task", "1"),
        ("student", "task", "2"),
    ]


def test_the_students_of_a_run_load_into_timm_and_answer_as_they_were_measured(whole: Path) -> None:
    journal = plan(parse((whole / "recipe.yaml").read_text()))
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    answered: dict[str, Tensor] = {}
    for role, file in (("teacher", "teacher"), ("student", "student"), ("baseline", "baseline")):
        trace = journal.teacher if role == "teacher" else journal.student
        given = journal.teacher_input if role == "teacher" else journal.student_input
        assert trace is not None
        assert given is not None
        model = timm.create_model(trace.model, checkpoint_path=str(whole / f"{file}.safetensors"), **trace.model_kwargs)
        batches = loader(journal.datasets.test, journal.recipe.data, given, training=False)
        with torch.no_grad():
            answers, targets = zip(
                *((model.eval()(images).argmax(1), target) for images, target in batches), strict=True
            )
        answered[role] = torch.cat(answers)
        last = [row for row in rows if row["role"] == role][-1]
        for column, expected in (("accuracy", torch.cat(targets)), ("agreement", answered["teacher"])):
            if column == "accuracy" or role != "teacher":
                share = (answered[role] == expected).double().mean().item()
                assert share == pytest.approx(float(last[column]))


@pytest.mark.parametrize("trains", [True, False])
def test_a_teacher_predicts_the_images_of_a_measurement_once(
    tmp_path: Path, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last predictions serve all models after it."""
    text = NARROW
    if not trains:
        file = tmp_path / "teacher.safetensors"
        teacher = timm.create_model("resnet10t", channels=[8, 16, 24, 32], in_chans=3, num_classes=10)
        save_file(teacher.state_dict(), file)
        text = text.replace("train: {epochs: 1}", f"checkpoint: {file}")
    measured: list[str] = []
    predict = Scorer._predict_alike

    def recorded(self: Scorer, models: Sequence[TrainedModel], *arguments: Any) -> Any:
        measured.extend(model.role for model in models)
        return predict(self, models, *arguments)

    monkeypatch.setattr(Scorer, "_predict_alike", recorded)
    (tmp_path / "tiny.yaml").write_text(text)
    run(tmp_path / "tiny.yaml", tmp_path / "run")
    assert Counter(measured) == {"teacher": 1, "baseline": 2, "student": 3}


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
channels_last: false
seed: 3
"""
    torch.manual_seed(1)
    teacher = timm.create_model("resnet10t", num_classes=10).eval()
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    planned = plan(parse(recipe))
    train(planned, tmp_path / "run", Progress(Console(quiet=True)))

    torch.manual_seed(3)
    student = timm.create_model("resnet10t", num_classes=10, stem_type="")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    batches = loader(planned.datasets.train, planned.recipe.data, planned.student_input, training=True, seed=3)
    batches.sampler.begin(0)  # type: ignore[attr-defined]
    student.train()
    for images, target, _ in batches:
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
    (tmp_path / "mine" / "recipe.yaml").write_text("mine too")
    with pytest.raises(RunError, match=r"recipe.yaml was written by no run"):
        run(tiny, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == "mine too"


def test_another_recipe_is_not_resumed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", Interrupting("teacher", "train", 1))
    tiny.write_text(NARROW.replace("weight: 0.5", "weight: 0.6"))
    with pytest.raises(RunError, match="not the one"):
        run(tiny, tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_try(tmp_path: Path) -> None:
    text = NARROW.replace("weight: 0.5}", "weight: 0.5}\n    optimizer: {opt: sgd, lr: 1.0e+30}")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RunError, match=r"'task'.* of baseline became (nan|inf) in epoch 1; try a smaller `lr`"):
        run(tmp_path / "r.yaml", tmp_path / "run")


WRECK = "optimizer: {opt: sgd, lr: 1.0e+38}"
ONE_UPDATE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 16, 16]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 512, hflip: 0.0, fraction: 0.2}
stages: [{epochs: 1, losses: {soft: {loss: soft_targets}}}]
"""


@pytest.mark.parametrize(
    ("old", "new", "role", "left"),
    [
        ("train: {epochs: 1}", f"train: {{epochs: 1, {WRECK}}}", "teacher", set()),
        ("loss: soft_targets}}", f"loss: soft_targets}}}}, {WRECK}", "student", {"teacher.safetensors"}),
    ],
    ids=["teacher", "student"],
)
def test_a_model_that_its_last_update_wrecks_ends_the_run_at_once_and_is_not_left(
    tmp_path: Path, old: str, new: str, role: str, left: set[str]
) -> None:
    """The loss of that update was a number: it is measured before the weights move."""
    assert old in ONE_UPDATE
    with pytest.raises(RunError, match=rf"the outputs of {role} are no numbers: try a smaller `lr`"):
        train(plan(parse(ONE_UPDATE.replace(old, new))), tmp_path / "run", Progress(Console(quiet=True)))
    assert {file.name for file in (tmp_path / "run").glob("*.safetensors")} == left
    assert not (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_leaves_a_run_that_goes_on(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(NARROW.replace("epochs: 2", "epochs: 2000"))
    command = [sys.executable, "-m", "probe_kd.cli", "train", "tiny.yaml", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    metrics = tmp_path / "run" / "metrics.csv"
    for _ in range(3000):
        if metrics.exists() and "baseline" in metrics.read_text():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "probe-kd train tiny.yaml --out run --resume" in complaint
    assert "Traceback" not in complaint
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    journal = json.loads((newest / "journal.json").read_text())
    assert journal["role"] == "baseline"
    assert journal["epoch"] >= 1


def student_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def test_a_hint_stage_leaves_all_above_its_layer_as_it_was_to_the_bit(tmp_path: Path) -> None:
    """Weight decay would move what is in an optimizer, and a batch norm what is run."""
    (tmp_path / "r.yaml").write_text(HINT_ONLY)
    run(tmp_path / "r.yaml", tmp_path / "run")
    torch.manual_seed(0)
    fresh = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32]).state_dict()
    same = {name for name, tensor in student_of(tmp_path / "run").items() if torch.equal(tensor, fresh[name])}
    above = {name for name in fresh if name.startswith(("layer3", "layer4", "fc"))}
    assert above <= same
    assert not any(name.endswith("conv1.weight") for name in same - above)
    parts = {name.split(".")[0] for name in fresh.keys() - same}
    assert parts == {"conv1", "bn1", "layer1", "layer2"}


def test_neither_network_runs_above_its_tapped_layer_in_a_hint_stage() -> None:
    planned = plan(parse(HINT_ONLY))
    student, teacher = (
        timm.create_model(trace.model, **trace.model_kwargs) for trace in (planned.student, planned.teacher) if trace
    )
    called = []
    for side, model in (("student", student), ("teacher", teacher)):
        for name, module in model.named_modules():
            if name in ("layer2", "layer3", "fc"):
                forward = module.forward
                module.forward = lambda *a, f=forward, n=f"{side} {name}": (called.append(n), f(*a))[1]
    traces = {"student_trace": planned.student, "teacher_trace": planned.teacher}
    Distiller(student, teacher, planned.objectives[0], **traces).train()(torch.randn(2, 3, 16, 16))
    assert sorted(called) == ["student layer2", "teacher layer2"]


def test_the_best_epoch_by_held_out_images_is_kept_and_survives_an_interruption(tmp_path: Path) -> None:
    text = HINT_ONLY.replace("{hint: {loss: hint, activation: tap}}", "{task: {loss: cross_entropy}}").replace(
        "epochs: 2\n    losses", "epochs: 4\n    keep: best\n    losses"
    )
    text = text.replace("{opt: adamw, lr: 1.0e-3, weight_decay: 0.5}", "{opt: sgd, lr: 0.1}")
    text = text.replace("pairs: {layer2: layer2}\n", "")
    text += "    scheduler: {sched: multistep, decay_milestones: [3], decay_rate: 100}\n"  # the last epoch destroys all
    text += "model_ema: {decay: 0.0}\n"  # the average is the student, after every update
    (tmp_path / "r.yaml").write_text(text)
    run(tmp_path / "r.yaml", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r.yaml", tmp_path / "parts", Interrupting("student", "hint", 3))
    run(tmp_path / "r.yaml", tmp_path / "parts", resume=True)
    losses = [float(row["held_out_loss"]) for row in record(tmp_path / "run") if row["role"] == "student"]
    assert losses.index(min(losses)) < 3, "the last epoch is the best, so that this test shows nothing"
    planned = plan(parse(text))
    model = timm.create_model("resnet10t", **planned.student.model_kwargs).eval()
    model.load_state_dict(student_of(tmp_path / "run"))
    assert planned.datasets.held_out is not None
    batches = loader(planned.datasets.held_out, planned.recipe.data, planned.student_input, training=False)
    with torch.no_grad():
        terms = [F.cross_entropy(model(images), target, reduction="none") for images, target in batches]
    assert torch.cat(terms).mean().item() == pytest.approx(min(losses), rel=1e-4)
    ours, theirs = student_of(tmp_path / "parts"), student_of(tmp_path / "run")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for folder in ("run", "parts"):
        average = load_file(tmp_path / folder / "student-ema.safetensors")
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in average.items())
    assert len({*planned.datasets.train.indices} & {*planned.datasets.held_out.indices}) == 0  # type: ignore[attr-defined]
    assert len(planned.datasets.train) + len(planned.datasets.held_out) == 1437  # type: ignore[arg-type]


@pytest.mark.parametrize("same_init", [False, True])
def test_a_teacher_of_the_students_architecture_begins_with_other_weights_unless_asked(same_init: bool) -> None:
    text = HINT_ONLY.replace("resnet18, model_kwargs: {channels: [8, 16, 24, 48]}", "resnet10t, MODEL")
    text = text.replace("MODEL", f"model_kwargs: {{channels: [8, 16, 24, 32]}}, same_init: {str(same_init).lower()}")
    text = text.replace("{hint:", "{task: {loss: cross_entropy}, hint:")
    planned = plan(parse(f"{text}seed: 3\nbaseline: true\n"))
    with accelerating(planned.recipe) as accelerator:
        models = {trained.role: trained.model.state_dict() for trained in Models(planned, accelerator).in_turn()}
    torch.manual_seed(3)
    fresh = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32]).state_dict()
    for role, equal in (("student", True), ("baseline", True), ("teacher", same_init)):
        assert torch.equal(models[role]["conv1.0.weight"], fresh["conv1.0.weight"]) == equal, role
        assert torch.equal(models[role]["fc.weight"], fresh["fc.weight"]) == equal, role


def test_a_teacher_that_has_weights_is_fine_tuned_gently_and_the_plan_says_so(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = f"checkpoint: {tmp_path / 'teacher.safetensors'}"
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "teacher.safetensors")
    for weights, training, rate in (
        ("", "{epochs: 1}", 1e-3),
        (given, "{epochs: 1}", 1e-4),
        (given, "{epochs: 1, optimizer: {opt: sgd}}", 1e-4),
        (given, "{epochs: 1, optimizer: {lr: 0.001}}", 1e-3),
    ):
        text = TINY.replace("train: {epochs: 1}", f"train: {training}\n  {weights}")
        planned = plan(parse(text))
        assert planned.recipe.teacher is not None
        assert planned.recipe.teacher.train is not None
        assert planned.recipe.teacher.train.optimizer.lr == rate
        lines = [f"the teacher has weights, and is first fine-tuned: 1 epochs, lr {rate:g}"] if weights else []
        assert teacher_lines(planned) == lines
        assert parse(dump(planned.resolved)).recipe.teacher == planned.resolved.teacher


def test_learning_rates_are_scaled_by_group_and_follow_the_schedule() -> None:
    text = HINT_ONLY.replace("weight_decay: 0.5", "weight_decay: 0.5, lr_scale: {conv1: 0.1, layer2.*.weight: 0.5}")
    planned = plan(parse(text))
    stage = planned.recipe.stages[0]
    student = timm.create_model("resnet10t", **planned.student.model_kwargs)
    distiller = Distiller(
        student, timm.create_model("resnet18"), planned.objectives[0], student_input=planned.student_input
    )
    optimizer = make_optimizer(distiller, stage.optimizer)
    schedule = make_scheduler(optimizer, Phase("s", 10, (), stage.optimizer, stage.scheduler), 5)
    for update, rate in ((0, 1e-3), (25, 5e-4)):
        schedule.step_update(update)
        rates = {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        assert rates[id(student.conv1[0].weight)] == pytest.approx((rate * 0.1, 0.5))
        assert rates[id(student.layer2[0].conv1.weight)] == pytest.approx((rate * 0.5, 0.5))
        assert rates[id(student.layer1[0].bn1.weight)] == pytest.approx((rate, 0.0))
    assert len(rates) == len(list(distiller.parameters()))


def test_a_weight_and_a_temperature_move_as_scheduled() -> None:
    soft = Objective(
        "soft_targets", weight=Schedule(4.0, 1.0, epochs=8), options={"temperature": Schedule(4.0, 2.0, shape="cosine")}
    )
    student, teacher = (timm.create_model("resnet10t", num_classes=4) for _ in range(2))
    images, same = torch.randn(2, 3, 32, 32), InputSpec((3, 32, 32))
    distiller = Distiller(student, teacher, [soft], student_input=same, teacher_input=same).eval()
    logits, told = student(images), teacher(images)
    for epoch, weight, temperature in ((0, 4.0, 4.0), (4, 2.5, 3.0), (8, 1.0, 2.0), (20, 1.0, 2.0)):
        distiller.set_epoch(epoch, 8)
        expected = soft_targets(logits, told, temperature=temperature)
        torch.testing.assert_close(distiller(images)["loss"], weight * expected)
    assert Schedule(0.0, 1.0).at(2, 8) == 0.25
    assert Schedule(0.0, 1.0, shape="cosine").at(2, 8) == pytest.approx((1 - 2**-0.5) / 2)


def test_a_teacher_of_other_classes_is_read_through_a_class_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("resnet10t", num_classes=12)
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    (tmp_path / "map.json").write_text(json.dumps([11, 10, 9, 8, 7, 6, 5, 4, 3, 2]))
    text = TINY.replace(
        "train: {epochs: 1}", f"checkpoint: {tmp_path}/t.safetensors\n  model_kwargs: {{num_classes: 12}}"
    )
    text = text.replace("num_classes: 12}", f"num_classes: 12}}\n  class_map: {tmp_path}/map.json").replace(
        "true", "false"
    )
    (tmp_path / "r.yaml").write_text(text)
    journal = run(tmp_path / "r.yaml", tmp_path / "run")
    planned = plan(parse(text))
    batches = loader(planned.datasets.test, planned.recipe.data, planned.teacher_input, training=False)  # type: ignore[arg-type]
    with torch.no_grad():
        right = [(teacher.eval()(images)[:, range(11, 1, -1)].argmax(1) == target) for images, target in batches]
    assert journal.results["teacher"].accuracy == pytest.approx(torch.cat(right).double().mean().item())
    for wrong, says in (
        ("[1, 2]", "2 entries; expected 10"),
        ("{}", "no JSON list|not a JSON list"),
        ("[", "cannot read"),
    ):
        (tmp_path / "map.json").write_text(wrong)
        with pytest.raises(RecipeError, match=says):
            plan(parse(text))


def test_mixed_images_are_timms_and_both_models_see_the_same(tmp_path: Path) -> None:
    options = DataOptions(input_size=(3, 16, 16), batch_size=8, mixup=0.8, cutmix=1.0)
    images, target = torch.randn(8, 3, 16, 16), torch.arange(8)
    mix = mixer(options, 10)
    assert mix is not None
    np.random.seed(3)
    mixed, soft = mix(images.clone(), target)
    np.random.seed(3)
    theirs, labels = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=10)(
        images.clone(), target
    )
    assert torch.equal(mixed, theirs)
    assert torch.equal(soft, labels)
    assert not torch.equal(mixed, images)
    seen: dict[str, torch.Tensor] = {}
    student, teacher = (timm.create_model("resnet10t", num_classes=10) for _ in range(2))
    student.register_forward_pre_hook(lambda _, args: seen.update(student=args[0]))
    teacher.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[0]))
    given, wanted = InputSpec((3, 16, 16), 0.0, 1.0), InputSpec((3, 16, 16), (0.5,), (0.25,))
    objectives = [Objective("cross_entropy"), Objective("soft_targets")]
    Distiller(student, teacher, objectives, student_input=given, teacher_input=wanted)(mixed, soft)
    torch.testing.assert_close(seen["teacher"], (seen["student"] - 0.5) / 0.25)
    assert torch.equal(seen["student"], mixed)
    (tmp_path / "r.yaml").write_text(NARROW.replace("hflip: 0.0", "hflip: 0.0\n  mixup: 0.8\n  cutmix: 1.0"))
    assert run(tmp_path / "r.yaml", tmp_path / "run").results["student"].accuracy > 0
    with pytest.raises(RecipeError, match=r"batch_size 63 is odd, and mixup and cutmix mix images in pairs"):
        parse(TINY.replace("batch_size: 64", "batch_size: 63\n  mixup: 0.8"))


def test_a_fraction_is_trained_on_and_only_some_epochs_are_measured(tiny: Path, tmp_path: Path) -> None:
    """Of the images that are not held out; and a curve has the points that were measured."""
    settings = ["data.fraction=0.5", "val_interval=2", "stages.1.epochs=3", "baseline=false"]
    planned = plan(load(tiny, sets=settings))
    every = plan(load(tiny, sets=["data.fraction=0.75", "data.holdout=0.2"])).datasets
    assert len(planned.datasets.train) == round(0.5 * 1437)  # type: ignore[arg-type]
    assert planned.datasets.held_out is None
    assert not set(every.train.indices) & set(every.held_out.indices)  # type: ignore[attr-defined,union-attr]
    train(planned, tmp_path / "run", Progress(Console(quiet=True)))
    rows = [row for row in record(tmp_path / "run") if row["role"] == "student"]
    assert [row["stage"] + row["epoch"] for row in rows if row["accuracy"]] == ["hint1", "task2", "task3"]
    assert all(float(row["loss"]) > 0 for row in rows)
    summary = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert len(summary) == 1 + 4
    (group,) = compare([tmp_path / "run"]).groups
    (curve,) = [curve for curve in group.curves if (curve.role, curve.measure) == ("student", "accuracy")]
    assert [epoch for epoch, *_ in curve.points] == [1, 3, 4]
