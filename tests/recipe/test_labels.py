"""`data.labels` in recipes: which losses read them, what is refused, and what a run measures."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import record
from PIL import Image
from running import After, run, same, stop

from probe_kd import load_student
from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.results.evaluation import evaluate

TEXT = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]%(student)s}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 24]}, train: {epochs: %(teacher)s}}
data: {%(data)s, input_size: [3, 16, 16], batch_size: 16, no_aug: true, crop_pct: 1.0}
stages: [{epochs: %(epochs)s, losses: {%(losses)s}, optimizer: {lr: 3.0e-3}}]
%(more)s
"""


def text(losses: str, data: str = "dataset: sklearn/digits", **more: Any) -> str:
    values = {"student": "", "teacher": 1, "epochs": 1, "more": "", **more}
    return TEXT % {"losses": losses, "data": data, **values}


def planned(losses: str, data: str = "dataset: sklearn/digits", **more: Any) -> Plan:
    return plan(parse(text(losses, data, **more)))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images with red, green, both or neither, in CSV files; `rare` is in the training images alone."""
    folder = tmp_path_factory.mktemp("several")
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 32)):
        rows = []
        for number in range(count):
            labels = [name for name, bit in (("red", 1), ("green", 2)) if number % 4 & bit]
            pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., [0, 1]] += np.array([150 * ("red" in labels), 150 * ("green" in labels)], np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
            rare = ["rare"] if split == "train" and number == 5 else []
            rows.append(",".join([f"{split}{number}.png", *labels, *rare]))
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return f"dataset: csv/{folder}, labels: multilabel"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Dark and light images, nine of ten dark."""
    folder = tmp_path_factory.mktemp("two")
    generator = np.random.default_rng(0)
    for number in range(80):
        name = "light" if number % 10 == 0 else "dark"
        pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(120 * (name == "light"))
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"root: {folder}, train_split: ., val_split: none, holdout: 0.25"


@pytest.mark.parametrize(
    ("losses", "labels", "says"),
    [
        ("task: {loss: cross_entropy}", "multilabel", "has any number of them; take `binary_cross_entropy`"),
        ("task: {loss: binary_cross_entropy}", "class", "`data: {labels: class}` has one; take `cross_entropy`"),
        ("task: {loss: binary_cross_entropy, pos_weight: [1, 2]}", "multilabel", "has 2 numbers, and the data have 3"),
        ("task: {loss: cross_entropy, class_weights: [1, 2]}", "class", "has 2 numbers, and the data have 10 classes"),
        ("task: {loss: cross_entropy, class_weights: [1]}", "class", "has 1 numbers, and the data have 10 classes"),
        ("task: {loss: binary_cross_entropy, pos_weight: balanced}", "multilabel", "'balanced'; expected positive"),
        ("task: {loss: cross_entropy, class_weights: even}", "class", "expected a number for each class"),
        ("task: {loss: cross_entropy, class_weights: [1, -1]}", "class", "expected numbers from 0 on"),
    ],
)
def test_a_loss_reads_the_labels_that_it_can_read(losses: str, labels: str, says: str, several: str) -> None:
    data = several if labels == "multilabel" else "dataset: sklearn/digits"
    with pytest.raises(RecipeError, match=re.escape(says)) as refusal:
        planned(losses, data)
    assert len(refusal.value.problems) == 1


def test_softmax_among_several_labels_is_remarked_on(several: str) -> None:
    good = planned("task: {loss: binary_cross_entropy}, soft: {loss: multilabel_soft_targets}", several)
    assert not good.remarks
    (remark,) = planned("soft: {loss: soft_targets}", several).remarks
    assert "`multilabel_soft_targets` compares each class by itself" in remark


def test_several_labels_are_learned_and_measured_by_average_precision(several: str, tmp_path: Path) -> None:
    losses = "task: {loss: binary_cross_entropy}, soft: {loss: multilabel_soft_targets}"
    options = {"teacher": 5, "epochs": 5, "more": "model_ema: {decay: 0.5}"}
    run(text(losses, several, **options), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["headline"] == "map"
    assert summary["classes"] == ["green", "rare", "red"]
    assert any("has no images of 1 of the 3 classes: 'rare'" in note for note in summary["notes"])
    for result in summary["results"]:
        assert result["accuracy"] is None
        assert result["measures"]["map"] > 0.75, result["role"]  # 0.5 by chance
    assert summary["results"][-1]["ema_measures"]["map"] > 0.5
    evaluation = evaluate(tmp_path / "run")
    for score, result in zip(evaluation.scores, reversed(summary["results"]), strict=True):
        assert (score.role, score.top1) == (result["role"], None)
        assert score.map == pytest.approx(result["measures"]["map"], abs=1e-6)
        assert score.average_precisions is not None
        assert [name for name, value in score.average_precisions.items() if value is None] == ["rare"]
    rows = record(tmp_path / "run")
    assert float(rows[-1]["map"]) == pytest.approx(summary["results"][-1]["measures"]["map"])
    assert "accuracy" not in rows[0]


def test_one_output_tells_two_classes(two: str, tmp_path: Path) -> None:
    one = ", num_classes: 1"
    losses = "task: {loss: binary_cross_entropy, pos_weight: 4.0}"
    run(text(losses, two, student=one, epochs=2), tmp_path / "run")
    results = {
        result["role"]: result for result in json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    }
    student = results["student"]
    assert student["accuracy"] == pytest.approx(sum(student["right"]) / sum(student["images"]))
    assert student["agreement"] is not None
    images, target = zip(*(planned(losses, two, student=one).datasets.test[index] for index in range(20)), strict=True)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    spec = planned(losses, two, student=one).student_input.or_plain()
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (spec.mean, spec.std))
    with torch.no_grad():
        logits = load_student(tmp_path / "run" / "student.safetensors")((pixels - mean) / std)[:, 0]
    labels = torch.tensor(target)
    assert student["accuracy"] == ((logits > 0) == labels).double().mean().item()
    score = evaluate(tmp_path / "run").scores[0]
    assert score.top1 == student["accuracy"]
    assert score.nll == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels.float()).item(), rel=1e-4)
    with pytest.raises(RecipeError, match="reads one output that tells two classes, and the student yields 2"):
        planned(losses, two)
    with pytest.raises(RecipeError, match="classifier has 1 classes and the data 2"):
        planned("task: {loss: cross_entropy}", two, student=one)


def test_balanced_class_weights_are_those_of_the_training_images(two: str) -> None:
    plan_ = planned("task: {loss: cross_entropy, class_weights: balanced}", two)
    counts = plan_.datasets.train_counts
    assert counts is not None
    assert plan_.objectives[0][0].options["class_weights"] == pytest.approx([60 / 2 / count for count in counts])
    assert plan_.recipe.stages[0].losses["task"].options["class_weights"] == "balanced"


def test_a_balanced_run_resumes_with_its_bits(two: str, tmp_path: Path) -> None:
    recipe = text("task: {loss: cross_entropy}", f"{two}, sampler: balanced", epochs=2)
    run(recipe, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "two", After(stop, updates=7))  # of 3 for the teacher, and 3 an epoch
    run(recipe, tmp_path / "two", resume=True)
    same(tmp_path / "one", tmp_path / "two")
    for labels in ("none", "multilabel"):
        with pytest.raises(RecipeError, match=f"with `labels: {labels}` an image has none of its own"):
            planned("hint: {loss: hint}", f"{two}, sampler: balanced, labels: {labels}")


@pytest.mark.parametrize(
    ("teacher", "loss", "outputs"),
    [
        ("num_classes: 7", "soft: {loss: soft_targets}", 7),
        ("num_classes: 7", "hint: {loss: hint}", 16),
        ("num_classes: 0", "hint: {loss: hint}", 16),
    ],
)
def test_without_labels_the_student_has_the_outputs_that_a_loss_compares(
    teacher: str, loss: str, outputs: int, two: str
) -> None:
    recipe = f"""
student: {{model: resnet10t, model_kwargs: {{channels: [8, 8, 8, 16]}}}}
teacher: {{model: resnet10t, pretrained: true, model_kwargs: {{channels: [8, 8, 8, 24], {teacher}}}}}
data: {{{two}, labels: none, input_size: [3, 16, 16], batch_size: 16}}
pairs: {{layer4: layer4}}
stages: [{{epochs: 1, losses: {{hint: {{loss: hint}}, {loss}}}}}]
"""
    recipe = recipe.replace("losses: {hint: {loss: hint}, hint", "losses: {hint")
    planned_ = plan(parse(recipe))
    assert planned_.student.output.channels == outputs
    assert planned_.datasets.num_classes == 0


def test_mixed_labels_train_one_output_and_several(two: str, several: str, tmp_path: Path) -> None:
    for name, data, student in (("two", two, ", num_classes: 1"), ("several", several, "")):
        losses = "task: {loss: binary_cross_entropy, label_smoothing: 0.1}"
        run(text(losses, f"{data}, mixup: 0.4, cutmix: 1.0, fraction: 0.6", student=student), tmp_path / name)
        assert torch.tensor([float(row["loss"]) for row in record(tmp_path / name)]).isfinite().all()
