"""The evaluation of a run: against numpy, SciPy, scikit-learn on all images at once, and against the training loop."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import GRAFT, TINY
from rich.console import Console
from safetensors.torch import load_file
from scipy.special import rel_entr, softmax
from sklearn.metrics import explained_variance_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from probe_kd import Distiller, evaluate
from probe_kd.cli import main
from probe_kd.data.loading import loader
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import save_weights
from probe_kd.errors import DataError, RunError
from probe_kd.files.run_folder import Manifest, digests_of, is_measured
from probe_kd.methods.similarity import Sums, cka_sums, explained_variance, linear_cka, variance_sums
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.recipe.writing import dump
from probe_kd.results.evaluation import Evaluation, Scores
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

RECIPE = TINY.replace(
    "model: resnet10t\n", "model: resnet10t\n  input_size: [3, 32, 32]\n  mean: [0.3]\n  std: [0.4]\n"
)


def write_run(folder: Path, text: str, *, adapters: bool = True, same: bool = False) -> Plan:
    """A finished run without the training: models as they were built, but sure of what they say."""
    planned = plan(parse(text), allow_import=["several_answers"])
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(planned.resolved))
    models = {}
    for seed, role in enumerate(("student", "teacher", "baseline")):
        trace = planned.teacher if role == "teacher" else planned.student
        if trace is not None:
            torch.manual_seed(0 if same else seed)
            models[role] = build_model(trace.model, trace.model_kwargs)
            for parameter in list(models[role].parameters())[-2:]:
                nn.init.normal_(parameter, std=0.3)
            save_weights(models[role], folder / f"{role}.safetensors", {})
    for index, objectives in enumerate(planned.objectives if adapters else ()):
        distiller = Distiller(
            models["student"],
            models["teacher"],
            objectives,
            student_input=planned.student_input,
            teacher_input=planned.teacher_input,
            student_trace=planned.student,
            teacher_trace=planned.teacher,
        )
        if distiller.adapters.state_dict():
            save_weights(distiller.adapters, folder / f"adapters-{index}.safetensors", {})
        distiller.close()
    return planned


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made") / "run"
    return folder, write_run(folder, RECIPE)


def by_role(found: Evaluation) -> dict[str, Scores]:
    return {row.role: row for row in found.scores}


def all_at_once(folder: Path, planned: Plan) -> dict[str, Any]:
    """Labels, and of student and teacher the logits and the two paired features of all images, by timm alone."""
    found: dict[str, Any] = {}
    for role, trace, layers in (
        ("student", planned.student, ("blocks.0", "blocks.1")),
        ("baseline", planned.student, ("blocks.0", "blocks.1")),
        ("teacher", planned.teacher, ("layer2", "layer3")),
    ):
        assert trace is not None
        own = planned.teacher_input if role == "teacher" else planned.student_input
        assert own is not None
        given = loader(planned.datasets.test, planned.recipe.data, own.covering(planned.teacher_input), training=False)  # type: ignore[arg-type]
        batches = list(given)
        images, found["target"] = (torch.cat([batch[index] for batch in batches]) for index in (0, 1))
        if images.shape[2:] != own.size[1:]:
            images = F.interpolate(images, own.size[1:], mode="bilinear", antialias=True, align_corners=False)
        model = timm.create_model(
            trace.model, checkpoint_path=str(folder / f"{role}.safetensors"), **trace.model_kwargs
        )
        seen: dict[str, Tensor] = {}
        for layer in layers:
            keep = partial(lambda seen, layer, *_: seen.update({layer: _[2].clone()}), seen, layer)
            model.get_submodule(layer).register_forward_hook(keep)
        with torch.no_grad():
            logits = model.eval()(images)
        found[role] = logits.double().numpy(), [seen[layer].double().numpy() for layer in layers]
    found["target"] = found["target"].numpy()
    return found


def expected_calibration_error(probabilities: np.ndarray, target: np.ndarray, bins: int = 15) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == target
    error = 0.0
    for low in range(bins):
        inside = (confidence >= low / bins) & (confidence < (low + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def gram_cka(ours: np.ndarray, theirs: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the n x n matrices, as the paper defines it."""
    centre = np.eye(len(ours)) - 1 / len(ours)
    first, second = (centre @ (side @ side.T) @ centre for side in (ours, theirs))
    return float((first * second).sum() / np.sqrt((first * first).sum() * (second * second).sum()))


@pytest.mark.parametrize("batch_size", [None, 7, 360])
def test_every_measure_is_what_others_find_from_all_images_at_once(
    made: tuple[Path, Plan], batch_size: int | None
) -> None:
    """256 and 104 images, 51 times 7 and 3, and all: an odd last batch changes nothing."""
    folder, planned = made
    found, raw = evaluate(folder, batch_size=batch_size), all_at_once(folder, planned)
    assert not AcceleratorState._shared_state  # a run after it may want another precision
    assert (found.images, list(by_role(found))) == (360, ["student", "baseline", "teacher"])
    target, told = raw["target"], softmax(raw["teacher"][0], 1)
    for role, row in by_role(found).items():
        logits = raw[role.replace(" ", "-")][0]
        probabilities = softmax(logits, 1)
        assert row.top1 == pytest.approx((logits.argmax(1) == target).mean(), abs=1e-12)
        assert row.top5 == pytest.approx(top_k_accuracy_score(target, logits, k=5), abs=1e-12)
        assert row.nll == pytest.approx(log_loss(target, probabilities), rel=1e-5)
        assert row.calibration_error == pytest.approx(expected_calibration_error(probabilities, target), rel=1e-4)
        if role == "teacher":
            assert (row.agreement, row.kl) == (None, None)
        else:
            assert row.agreement == pytest.approx((logits.argmax(1) == told.argmax(1)).mean(), abs=1e-12)
            assert row.kl == pytest.approx(rel_entr(told, probabilities).sum(1).mean(), rel=1e-5)
    assert len({row.calibration_error for row in found.scores}) == 3
    adapters = {name: value.double().numpy() for name, value in load_file(folder / "adapters-0.safetensors").items()}
    for index, row in enumerate(found.pairs):
        tokens, map_ = raw["student"][1][index], raw["teacher"][1][index]
        assert row.cka == pytest.approx(gram_cka(tokens[:, 1:].mean(1), map_.mean((2, 3))), rel=1e-4)
        alone = raw["baseline"][1][index][:, 1:].mean(1)
        assert row.cka_alone == pytest.approx(gram_cka(alone, map_.mean((2, 3))), rel=1e-4)
        predicted = project(tokens, map_, adapters, index)
        wanted = F.layer_norm(torch.tensor(map_).permute(0, 2, 3, 1), map_.shape[1:2]).permute(0, 3, 1, 2).numpy()
        share = explained_variance_score(
            wanted.reshape(360, -1), predicted.reshape(360, -1), multioutput="variance_weighted"
        )
        assert row.explained_variance == pytest.approx(share, rel=1e-4)
    assert [(row.stage, row.loss, row.student, row.teacher, row.note) for row in found.pairs] == [
        ("hint", "hint", "blocks.0", "layer2", ""),
        ("hint", "hint", "blocks.1", "layer3", ""),
    ]


def project(tokens: np.ndarray, map_: np.ndarray, weights: Mapping[str, np.ndarray], index: int) -> np.ndarray:
    """Tokens without the class token, averaged to the map's grid, by the 1x1 convolution of one pair."""
    grid = map_.shape[2]
    maps = tokens[:, 1:].transpose(0, 2, 1).reshape(len(tokens), -1, 4, 4)
    assert (4 % grid, grid == map_.shape[3]) == (0, True)
    maps = maps.reshape(*maps.shape[:2], grid, 4 // grid, grid, 4 // grid).mean((3, 5))
    kernel, bias = (weights[name] for name in sorted(weights, reverse=True) if name.startswith(f"hint_.{index}."))
    return np.einsum("nchw,dc->ndhw", maps, kernel[:, :, 0, 0]) + bias[:, None, None]


def summed(sums: Callable[[Tensor, Tensor], Sums], ours: np.ndarray, theirs: np.ndarray, sizes: list[int]) -> Sums:
    total: Sums = {}
    for first, second in zip(torch.tensor(ours).split(sizes), torch.tensor(theirs).split(sizes), strict=True):
        more = sums(first, second)
        total = {name: total.get(name, 0) + value for name, value in more.items()}  # type: ignore[misc]
    return total


def test_linear_cka_is_the_papers_and_blind_to_rotation_scale_and_offset() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(37, 5)) + 100, rng.normal(size=(37, 8)) ** 3
    theirs[:, :5] += 3 * ours
    sizes = [16, 16, 5]
    found = linear_cka(summed(cka_sums, ours, theirs, sizes))
    assert found == pytest.approx(gram_cka(ours, theirs), rel=1e-9)
    assert 0.1 < found < 0.9
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(summed(cka_sums, ours, 3 * theirs @ rotation - 7, sizes)) == pytest.approx(found, rel=1e-9)
    assert linear_cka(summed(cka_sums, theirs, theirs @ rotation, sizes)) == pytest.approx(1, abs=1e-12)
    sheared = theirs @ np.diag(np.arange(1.0, 9.0) ** 2)
    assert linear_cka(summed(cka_sums, theirs, sheared, sizes)) < 0.99, (
        "it is not blind to what a regression would undo"
    )
    assert np.isnan(linear_cka(summed(cka_sums, ours, np.full_like(theirs, 0.1), sizes)))


def test_explained_variance_is_scikit_learns_and_1_only_where_the_target_is_met() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(37, 4, 3, 2)) * np.arange(1.0, 5.0)[:, None, None] + 50
    predicted = wanted + rng.normal(size=wanted.shape) + np.arange(4.0)[:, None, None]
    sizes = [16, 16, 5]
    found = explained_variance(summed(variance_sums, predicted, wanted, sizes))
    theirs = explained_variance_score(
        wanted.reshape(37, -1), predicted.reshape(37, -1), multioutput="variance_weighted"
    )
    assert found == pytest.approx(theirs, rel=1e-9)
    assert 0.5 < found < 0.95
    assert explained_variance(summed(variance_sums, wanted, wanted, sizes)) == 1
    mean = np.broadcast_to(wanted.mean(0), wanted.shape)
    assert explained_variance(summed(variance_sums, mean.copy(), wanted, sizes)) == pytest.approx(0, abs=1e-9)
    assert explained_variance(summed(variance_sums, -wanted, wanted, sizes)) == pytest.approx(-3)
    assert np.isnan(explained_variance(summed(variance_sums, wanted, np.full_like(wanted, 0.1), sizes)))


def test_a_student_that_is_its_teacher_explains_it_wholly(tmp_path: Path) -> None:
    """By a comparison without weights, which needs no file."""
    text = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 100}
pairs: {layer1: layer1, layer2: layer2}
stages:
  - epochs: 1
    losses: {task: {loss: cross_entropy}, hint: {loss: hint, policy: never}, at: {loss: attention}, fsp: {loss: fsp}}
"""
    write_run(tmp_path / "run", text, adapters=False, same=True)
    found = evaluate(tmp_path / "run")
    student = by_role(found)["student"]
    assert (student.agreement, student.kl) == (1, pytest.approx(0, abs=1e-12))
    for row in found.pairs:
        assert row.cka == pytest.approx(1)
        assert row.explained_variance == (None if row.loss == "at" else 1)
    assert "own channels" in next(row.note for row in found.pairs if row.loss == "at")
    assert [row.loss for row in found.pairs] == ["hint", "hint", "at", "at", "fsp", "fsp"]


SMALLER = TINY.replace("epochs: 2", "epochs: 1").replace(
    "model: resnet10t\n", "model: resnet10t\n  input_size: [3, 12, 14]\n  mean: [0.3]\n  std: [0.4]\n"
)


@pytest.mark.parametrize(
    "text", [SMALLER, GRAFT.replace("epochs: 2", "epochs: 1") + "baseline: true\n"], ids=["smaller teacher", "graft"]
)
def test_a_run_is_measured_as_the_training_loop_measured_it(tmp_path: Path, text: str) -> None:
    results = train(plan(parse(text)), tmp_path / "run", Progress(Console(quiet=True))).results
    found = by_role(evaluate(tmp_path / "run"))
    assert found.keys() == results.keys()
    for role, row in found.items():
        assert (row.top1, row.weights) == (pytest.approx(results[role].accuracy, abs=1e-12), results[role].weights)
    assert found["student"].agreement == pytest.approx(results["student"].agreement, abs=1e-12)


OWN = """\
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        z = self.head(self.one(x).relu().mean((2, 3)))
        return z if self.training else {"logits": z, "more": z - 1}

def build(num_classes=10):
    return Two(num_classes)
"""
MINE = """\
student: {{model: "several_answers:build"}}
{teacher}
data: {{dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 100}}
stages: [{{epochs: 1, losses: {{task: {{loss: cross_entropy}}{soft}}}}}]
"""


def test_a_model_of_ones_own_with_several_answers_in_eval_mode_and_a_teacher_of_more_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "several_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    classes = [11, 3, 2, 1, 0, 5, 6, 7, 8, 9]
    torch.manual_seed(5)
    teacher = timm.create_model("resnet10t", num_classes=12).eval()
    nn.init.normal_(teacher.fc.weight)
    save_weights(teacher, tmp_path / "teacher.safetensors", {})
    side = f"{{model: resnet10t, checkpoint: {tmp_path / 'teacher.safetensors'}, class_map: {classes}, "
    side = f"teacher: {side}model_kwargs: {{num_classes: 12}}}}"
    write_run(tmp_path / "alone", MINE.format(teacher="", soft=""), adapters=False)
    planned = write_run(
        tmp_path / "run", MINE.format(teacher=side, soft=", soft: {loss: soft_targets}"), adapters=False
    )
    (tmp_path / "run" / "teacher.safetensors").unlink()  # its weights lie elsewhere
    found = evaluate(tmp_path / "run", allow_import=["several_answers"])
    rows = by_role(found)
    batches = list(loader(planned.datasets.test, planned.recipe.data, planned.student_input, training=False))
    images, target = (torch.cat([batch[index] for batch in batches]) for index in (0, 1))
    student = build_model("several_answers:build", {})
    student.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
    with torch.no_grad():
        ours = student.eval()(images)["logits"]
        assert planned.teacher_input is not None
        given = loader(planned.datasets.test, planned.recipe.data, planned.teacher_input, training=False)
        theirs = torch.cat([teacher(images) for images, _ in given])[:, classes]
    assert rows["student"].nll == pytest.approx(F.cross_entropy(ours, target).item(), rel=1e-5)
    assert rows["teacher"].nll == pytest.approx(F.cross_entropy(theirs, target).item(), rel=1e-5)
    assert rows["teacher"].weights == str(tmp_path / "teacher.safetensors")
    told = rel_entr(softmax(theirs.double().numpy(), 1), softmax(ours.double().numpy(), 1)).sum(1).mean()
    assert rows["student"].kl == pytest.approx(told, rel=1e-5)
    assert found.pairs == ()
    alone = evaluate(tmp_path / "alone", allow_import=["several_answers"])
    assert by_role(alone).keys() == {"student", "baseline"}
    assert (alone.scores[0].agreement, alone.scores[0].kl) == (None, None)
    assert alone.scores[0].nll == rows["student"].nll
    Manifest({}, digests_of([tmp_path / "teacher.safetensors"])).write(tmp_path / "run")
    assert by_role(evaluate(tmp_path / "run", allow_import=["several_answers"])) == rows
    save_weights(teacher, tmp_path / "teacher.safetensors", {"another": "1"})
    with pytest.raises(RunError, match=r"teacher.safetensors is not the file that .* was begun with.*put the former"):
        evaluate(tmp_path / "run", allow_import=["several_answers"])


def test_two_processes_find_what_one_does(made: tuple[Path, Plan]) -> None:
    """With batches of 50, the last of which are filled up with images that were there before."""
    command = ["-m", "probe_kd.cli", "eval", str(made[0]), "--batch-size", "50", "--json"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found, one = json.loads(run.stdout), evaluate(made[0], batch_size=360)
    assert (found["images"], len(found["scores"]), len(found["pairs"])) == (360, 3, 2)
    for theirs, ours in zip((*found["scores"], *found["pairs"]), (*one.scores, *one.pairs), strict=True):
        for name, value in vars(ours).items():
            assert theirs[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


Outcome = tuple[int, str, str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["probe-kd", "eval", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_writes_and_tells_what_it_does_not_know(
    command: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    write_run(folder, TINY, adapters=False)
    code, shown, _ = command(folder, "-o", tmp_path / "new" / "found.json", "--device", "cpu")
    assert is_measured(tmp_path / "new" / "found.json"), "else --overwrite would take it for a stranger's file"
    assert code == 0
    for part in (
        "baseline",
        "teacher.safetensors",
        "top-5",
        "blocks.1",
        "no adapters-0.safetensors",
        "finally is",
    ):
        assert part in shown
    code, text, _ = command(folder, "--json")
    found = json.loads(text)
    assert found == json.loads((tmp_path / "new" / "found.json").read_text())
    assert {row["explained_variance"] for row in found["pairs"]} == {None}
    (folder / "student.safetensors").rename(folder / "student-ema.safetensors")
    (folder / "baseline.safetensors").rename(folder / "student.safetensors")
    code, text, _ = command(folder, "--ema", "--json")
    average = json.loads(text)["scores"][0]
    assert average == {**found["scores"][0], "weights": "student-ema.safetensors"}
    code, text, _ = command(folder, "--weights", folder / "student.safetensors", "--json", "--split", "train")
    assert (code, json.loads(text)["images"]) == (0, 359)
    code, _, said = command(folder, "-o", tmp_path / "new" / "found.json")
    assert (code, "--overwrite" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is not the folder of a run (there is none)"),
        (["ran"], "did you mean 'run'"),
        (["empty"], "it has no recipe.yaml"),
        (["odd"], "odd is not the folder of a run (its recipe.yaml is a folder, and no file)\n"),
        (["round"], "round is not the folder of a run (it is a link that goes round, or to nothing)"),
        (["/dev/null"], "/dev/null is not the folder of a run (it is a device or a pipe)"),
        (
            ["unfinished"],
            "go on with it: probe-kd train unfinished/recipe.yaml --out unfinished --resume",
        ),
        (["no-teacher"], "has no teacher.safetensors; go on with it"),
        (["run", "--ema"], "kept no moving average"),
        (["run", "--ema", "--weights", "run/student.safetensors"], "give one of the two"),
        (["run", "--weights", "run/teacher.safetensors"], "does not fit VisionTransformer"),
        (["run", "--weights", "none.safetensors"], "none.safetensors"),
        (["run", "--split", "held_out"], "held no training images out"),
        (["run", "--split", "tset"], "tset"),
        (["run", "--device", "warp:9"], "'warp:9' cannot be used here"),
        (["other-adapters"], "adapters-0.safetensors' does not fit"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_evaluated_is_one_clear_error(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = arguments[0] if arguments[0] in ("unfinished", "no-teacher", "other-adapters") else "run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "recipe.yaml").mkdir(parents=True)
    (tmp_path / "round").symlink_to("round")
    write_run(tmp_path / name, TINY, adapters=False)
    if name == "other-adapters":
        save_weights(nn.Linear(2, 2), tmp_path / name / "adapters-0.safetensors", {})
    missing = {"unfinished": "student.safetensors", "no-teacher": "teacher.safetensors"}.get(name)
    if missing:
        (tmp_path / name / missing).unlink()
    code, _, said = command(*arguments)
    assert (code, "Traceback" in said) == (2, False), said
    assert says in " ".join(said.split()) + "\n"


def test_labels_that_are_no_classes_are_told(made: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"split 'tests': expected one of 'test', 'val', 'train', 'held_out'"):
        evaluate(made[0], split="tests")  # type: ignore[arg-type]
    monkeypatch.setattr("probe_kd.data.sources.DigitImages.__getitem__", lambda self, index: (self.images[index], 10))
    with pytest.raises(DataError, match="label 10 of an image is none of the 10 classes"):
        evaluate(made[0])
