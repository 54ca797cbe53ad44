"""Runs without classes: explained variance and cosine of the pairs, k-NN and linear probes on a labelled set."""

import csv
import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from running import After, planned, run, run_by_two, stop
from safetensors.torch import load_file, save_file
from sklearn.metrics import explained_variance_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from probe_kd.cli import main
from probe_kd.data.loading import loader
from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.results.evaluation import evaluate
from probe_kd.training.pair_scores import means
from probe_kd.training.state import PairScore

STUDENT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
TEACHER = {"channels": [8, 16, 24, 48], "num_classes": 0}
RECIPE = """\
student: {{model: vit_tiny_patch16_224, model_kwargs: {student}}}
teacher: {{model: resnet18, model_kwargs: {teacher}, checkpoint: {checkpoint}}}
data: {{dataset: sklearn/digits, labels: none, input_size: [3, 16, 16], batch_size: 100, hflip: 0.0, fraction: 0.15}}
pairs: {{blocks.1: layer3}}
evaluate:
  knn: {{dataset: sklearn/digits, fraction: 0.1, k: 5}}
  linear: {{C: 1.0}}
stages:
  - name: hint
    epochs: 2
    losses: {{hint: {{loss: hint, normalize: layer}}}}
    optimizer: {{opt: adamw, lr: 5.0e-3}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recipe, with a teacher whose weights are in a file."""
    checkpoint = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", **TEACHER).state_dict(), checkpoint)
    sides = {name: json.dumps(kwargs) for name, kwargs in (("student", STUDENT), ("teacher", TEACHER))}
    return RECIPE.format(checkpoint=checkpoint, **sides)


def said_by(*arguments: object) -> str:
    """What `probe-kd ...` prints."""
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["probe-kd", *map(str, arguments)])
        patch.setattr(sys, "stdout", said)
        with pytest.raises(SystemExit, match="0"):
            main()
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run. Beside it stands what the command said."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(text)
    (folder / "said.txt").write_text(said_by("train", folder / "recipe.yaml", "--out", folder / "run"))
    return folder / "run"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def results_of(folder: Path) -> dict[str, dict[str, object]]:
    results = json.loads((folder / "summary.json").read_text())["results"]
    return {result["role"]: {k: v for k, v in result.items() if k != "seconds"} for result in results}


def images_of(text: str, dataset: object, side: str) -> tuple[Tensor, Tensor]:
    spec = getattr(planned(text), f"{side}_input")
    batches = list(loader(dataset, planned(text).recipe.data, spec, training=False))  # type: ignore[arg-type]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def loaded(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def test_the_figures_are_those_of_scikit_learn(text: str, trained: Path) -> None:
    results, checkpoint = results_of(trained), Path(text.split("checkpoint: ")[1].split("}")[0])
    student = loaded(timm.create_model("vit_tiny_patch16_224", **STUDENT), trained / "student.safetensors")
    teacher = loaded(timm.create_model("resnet18", **TEACHER), checkpoint)
    labelled = planned(text).labelled_sets["knn"]
    for role, side, model in (("student", "student", student), ("teacher", "teacher", teacher)):
        (train, labels), (test, expected) = (images_of(text, part, side) for part in (labelled.train, labelled.test))
        knn = KNeighborsClassifier(5, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
        score = knn.fit(model(train), labels).score(model(test), expected)
        assert results[role]["measures"]["knn"] == pytest.approx(score, abs=1e-9)  # type: ignore[index]
    images, _ = images_of(text, planned(text).datasets.test, "student")
    others, _ = images_of(text, planned(text).datasets.test, "teacher")
    tokens = student.forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    adapter = load_file(trained / "adapters-0.safetensors")
    (weight,) = (tensor for name, tensor in adapter.items() if name.endswith("weight"))
    (bias,) = (tensor for name, tensor in adapter.items() if name.endswith("bias"))
    target = teacher.layer3(
        teacher.layer2(teacher.layer1(teacher.maxpool(teacher.act1(teacher.bn1(teacher.conv1(others))))))
    )
    target = F.layer_norm(target.movedim(1, -1), (24,)).movedim(-1, 1)
    predicted = F.conv2d(F.adaptive_avg_pool2d(tokens, target.shape[2:]), weight, bias)
    sides = target.flatten(1).double().numpy(), predicted.flatten(1).double().numpy()
    explained = explained_variance_score(*sides, multioutput="variance_weighted")
    cosine = F.cosine_similarity(predicted.double(), target.double(), dim=1).mean().item()
    (pair,) = results["student"]["pairs"]  # type: ignore[misc]
    assert (pair["student"], pair["teacher"], pair["loss"], pair["stage"]) == ("blocks.1", "layer3", "hint", "hint")  # type: ignore[index]
    assert pair["explained_variance"] == pytest.approx(explained, abs=1e-5)  # type: ignore[index]
    assert pair["cosine"] == pytest.approx(cosine, abs=1e-5)  # type: ignore[index]


def test_the_mean_is_over_the_pairs_of_the_last_stage_that_compares_features() -> None:
    def score(stage: str, explained: float | None, cosine: float | None) -> PairScore:
        return PairScore(stage, "hint", "layer1", "layer1", explained, cosine)

    first, second = score("one", -3.0, 0.1), [score("two", 0.5, 0.2), score("two", None, 0.4), score("two", None, None)]
    assert means([first, *second, score("three", None, None)]) == pytest.approx(
        {"explained_variance": 0.5, "cosine": 0.3}
    )
    assert means([score("three", None, None)]) == means([]) == {}


def test_every_model_is_measured_and_none_has_an_accuracy(trained: Path) -> None:
    results, rows = results_of(trained), rows_of(trained)
    assert set(results) == {"teacher", "untrained student", "student"}
    for result in results.values():
        assert (result["accuracy"], result["agreement"]) == (None, None)
        assert {"knn", "linear"} <= set(result["measures"])  # type: ignore[call-overload]
    assert json.loads((trained / "summary.json").read_text())["headline"] == "knn"
    student = results["student"]["measures"]
    assert float(rows[-1]["explained_variance"]) == student["explained_variance"]  # type: ignore[index]
    assert float(rows[-1]["cosine"]) == student["cosine"]  # type: ignore[index]
    assert "accuracy" not in rows[0]


def test_no_command_speaks_of_accuracy(trained: Path, tmp_path: Path) -> None:
    said = {
        "train": (trained.parent / "said.txt").read_text(),
        "compare": said_by("compare", trained, "-o", tmp_path / "report.html"),
        "eval": said_by("eval", trained),
        "export": said_by("export", trained, "-o", tmp_path / "out"),
        "report": (tmp_path / "report.html").read_text(),
        "card": (tmp_path / "out" / "README.md").read_text(),
        "metrics": (trained / "metrics.csv").read_text(),
    }
    assert [name for name, text in said.items() if "accuracy" in text.lower()] == []
    knn = results_of(trained)["student"]["measures"]["knn"]  # type: ignore[index]
    for name in ("train", "compare", "report", "card"):
        assert f"{knn:.2%}" in said[name], name
        assert "k-NN" in said[name], name
    assert "the run is about its k-NN" in " ".join(said["train"].split())  # however wide the terminal is


def test_eval_finds_what_the_run_measured_at_its_end(trained: Path) -> None:
    (pair,), evaluation = results_of(trained)["student"]["pairs"], evaluate(trained)  # type: ignore[misc]
    values = pair["explained_variance"], pair["cosine"]  # type: ignore[index]
    assert [(row.explained_variance, row.cosine) for row in evaluation.pairs] == [pytest.approx(values, rel=1e-6)]
    assert all(score.top1 is None for score in evaluation.scores)


LABELLED = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}
teacher: {model: resnet18, model_kwargs: {channels: [8, 16, 24, 48]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 100, hflip: 0.0, fraction: 0.15}
pairs: {layer1: layer1, layer2: layer2}
stages:
  - epochs: 1
    losses: {task: {loss: cross_entropy}, hint: {loss: hint}, attention: {loss: attention}}
"""


def test_pairs_are_not_asked_for_where_no_loss_compares_any() -> None:
    alone = LABELLED.replace("pairs:", "# pairs:").replace(", hint: {loss: hint}, attention: {loss: attention}", "")
    assert plan(parse(alone + "evaluate: {pairs: false}\n")).measures == ("accuracy", "agreement")
    with pytest.raises(RecipeError, match=r"8:12: .* measures what losses of features compare"):
        plan(parse(alone + "evaluate: {pairs: true}\n"))


def test_with_labels_measuring_more_changes_no_bit_of_the_rest(tmp_path: Path) -> None:
    more = LABELLED + "evaluate: {pairs: true, knn: {dataset: sklearn/digits, fraction: 0.1}}\n"
    run(LABELLED, tmp_path / "plain")
    run(more, tmp_path / "more")
    for file in (tmp_path / "plain").glob("*.safetensors"):
        one, two = (load_file(tmp_path / name / file.name) for name in ("plain", "more"))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), file.name
    plain, wide = rows_of(tmp_path / "plain"), rows_of(tmp_path / "more")
    assert [{key: row[key] for key in plain[0]} for row in wide] == plain
    assert set(wide[0]) - set(plain[0]) == {"knn", "explained_variance", "cosine"}
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["headline"] == "accuracy"
    student = results_of(tmp_path / "more")["student"]
    assert student["accuracy"] == results_of(tmp_path / "plain")["student"]["accuracy"]
    pairs: list[dict[str, Any]] = student["pairs"]  # type: ignore[assignment]
    scores = {(pair["loss"], pair["student"]): pair["explained_variance"] for pair in pairs}
    found = {(row.loss, row.student): row.explained_variance for row in evaluate(tmp_path / "more").pairs}
    assert scores.pop(("attention", "layer2")) is scores.pop(("attention", "layer1")) is None
    assert scores == {key: pytest.approx(value, rel=1e-6) for key, value in found.items() if value is not None}
    values = list(scores.values())
    assert student["measures"]["explained_variance"] == pytest.approx(sum(values) / 2)  # type: ignore[index]


def test_a_run_that_goes_on_has_the_same_figures(text: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "run", After(stop, epochs=1))
    run(text, tmp_path / "run", resume=True)
    assert rows_of(tmp_path / "run") == rows_of(trained)
    assert results_of(tmp_path / "run") == results_of(trained)


def test_two_processes_have_the_figures_of_one(text: str, tmp_path: Path) -> None:
    still = text.replace("5.0e-3", "1.0e-12").replace("epochs: 2", "epochs: 1")
    run(still, tmp_path / "one")
    assert run_by_two(still, tmp_path / "two") == ["done", "done"]
    one, two = (results_of(tmp_path / name) for name in ("one", "two"))
    for role, result in one.items():
        assert result["measures"] == pytest.approx(two[role]["measures"], rel=1e-6)


def test_without_labels_the_best_epoch_is_that_of_the_headline(text: str, tmp_path: Path) -> None:
    wild = text.replace("lr: 5.0e-3}", "lr: 0.3}\n    scheduler: {sched: constant}\n    keep: best")
    wild = wild.replace("fraction: 0.15", "fraction: 0.15, val_split: none, holdout: 0.2")
    for name, measure, new in (
        ("knn", "knn", wild.replace("k: 5", "k: 5, val_split: none, holdout: 0.5")),
        ("explained", "explained_variance", wild[: wild.index("evaluate")] + wild[wild.index("stages") :]),
    ):
        run(new, tmp_path / name)
        values = [float(row[measure]) for row in rows_of(tmp_path / name)]
        assert max(values) > values[-1], "the last epoch is the best: nothing is tested"
        assert results_of(tmp_path / name)["student"]["measures"][measure] == max(values)  # type: ignore[index]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("knn: {dataset: sklearn/digits, ", "knn: {", "name its labelled images, by `dataset` or `root`"),
        ("dataset: sklearn/digits, fraction: 0.1", "dataset: sklearn/digit", "there is no dataset"),
        ("model_kwargs: {\"img", "embedding: blocks.7, model_kwargs: {\"img", "no module 'blocks.7'"),
        ("k: 5", "k: 0", "greater than or equal to 1"),
        ("C: 1.0", "C: none", "expected 'auto'"),
        ("    losses", "    keep: best\n    losses", "`keep: best` chooses by the k-NN"),
        ("{hint: {loss", "{cosine: {loss", "a loss cannot be called `cosine`"),
    ],
)  # fmt: skip
def test_check_says_what_is_wrong(text: str, old: str, new: str, said: str) -> None:
    assert old in text
    changed = text.replace(old, new, 1).replace("fraction: 0.15", "fraction: 0.15, val_split: none, holdout: 0.2")
    with pytest.raises(RecipeError, match=said):
        plan(parse(changed))


@pytest.mark.parametrize(("images", "says"), [("knn/validation", "has images"), ("copies", "4 of 4"), ("others", "")])
def test_a_labelled_set_of_images_that_the_run_trains_on_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, says: str
) -> None:
    """Without labels too, k-NN on images that were trained on says less: by one folder, and by copies of its files."""
    monkeypatch.chdir(tmp_path)
    files = [f"{kind}/{kind}{index}.png" for kind in "ab" for index in "01"]
    places = [f"knn/{split}/{file}" for split in ("train", "validation") for file in files]
    for seed, place in enumerate([*places, *(f"others/{index}.png" for index in range(4))]):
        pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    shutil.copytree("knn/validation", "copies")
    save_file(timm.create_model("resnet18", **TEACHER).state_dict(), "t.safetensors")
    recipe = plan(
        parse(f"""\
student: {{model: resnet10t, model_kwargs: {{channels: [8, 16, 24, 32]}}}}
teacher: {{model: resnet18, model_kwargs: {json.dumps(TEACHER)}, checkpoint: t.safetensors}}
data: {{root: {images}, labels: none, input_size: [3, 16, 16], holdout: 0.5}}
pairs: {{layer2: layer2}}
stages: [{{epochs: 1, losses: {{hint: {{loss: hint}}}}}}]
evaluate: {{knn: {{root: knn}}, linear: {{}}}}
""")
    )
    notes = [note for note in recipe.notes if "that the run trains on" in note]
    assert len(notes) == bool(says)
    assert all(note.startswith("labelled set: ") and says in note for note in notes)
    assert recipe.labelled_sets["knn"] is recipe.labelled_sets["linear"]  # embedded once
