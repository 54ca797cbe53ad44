"""Losses of outputs and labels in recipes: what they read is checked, and a run trains with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record
from running import run
from safetensors.torch import load_file
from timm import create_model

from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse

TEXT = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]%(student)s}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 24]%(kwargs)s}, %(teacher)s}
data: {dataset: sklearn/digits, %(data)s, input_size: [3, 16, 16], batch_size: 64, no_aug: true, crop_pct: 1.0}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}, %(losses)s}, optimizer: {lr: 3.0e-3}}]
"""
EXITS = 'exits: {loss: ofa_exits, pairs: {layer2: "", layer4: ""}}'
ALL = (
    f"dkd: {{loss: dkd, alpha: 1, beta: 8, temperature: 4}}, nkd: {{loss: nkd}}, ofa: {{loss: ofa, eps: 1.2}}, {EXITS}"
)


def text(losses: str, **more: Any) -> str:
    values = {"student": "", "kwargs": "", "teacher": "train: {epochs: 1}", "data": "fraction: 0.2", **more}
    return TEXT % {"losses": losses, **values}


def planned(losses: str, **more: Any) -> Plan:
    return plan(parse(text(losses, **more)))


@pytest.fixture(scope="module")
def of_12(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher of 12 classes, as a recipe names it."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(create_model("resnet10t", channels=[8, 8, 8, 24], num_classes=12).state_dict(), file)
    return {"kwargs": ", num_classes: 12", "teacher": f"checkpoint: {file}"}


@pytest.mark.parametrize("loss", ["dkd", "nkd", "ofa", "ofa_exits"])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("none", r"loss `one` \(LOSS\) reads labels, and `data: \{labels: none\}` has none"),
        ("multilabel", r"loss `one` \(LOSS\) reads one class an image, .* take `multilabel_soft_targets`"),
    ],
)
def test_labels_that_these_losses_cannot_read_are_refused(loss: str, labels: str, says: str) -> None:
    pairs = ', pairs: {layer2: ""}' if loss == "ofa_exits" else ""
    with pytest.raises(RecipeError, match=says.replace("LOSS", loss)):
        planned(f"one: {{loss: {loss}{pairs}}}", data=f"labels: {labels}")


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ('{layer2: ""}', "the teacher's output yields 12 numbers an image; give a `class_map`"),
        (
            "{layer2: layer2}",
            r"the teacher's tap 'layer2' yields 8x\dx\d numbers an image; pair the layers with its out",
        ),
        ("{layer2: global_pool}", "the teacher's tap 'global_pool' yields 24 numbers an image"),
        ("{layer2: nothing}", "'nothing'"),
    ],
)
def test_exits_end_at_an_output_of_the_data_s_classes(pairs: str, says: str, of_12: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(f"exits: {{loss: ofa_exits, pairs: {pairs}}}", **of_12)


def test_outputs_of_other_classes_than_the_labels_are_refused() -> None:
    alone = text("dkd: {loss: dkd}", student=", num_classes: 7", kwargs=", num_classes: 7")
    with pytest.raises(RecipeError, match="the student's classifier has 7 classes and the data 10"):
        plan(parse(alone.replace("task: {loss: cross_entropy}, ", "")))


def test_a_run_with_a_class_map_trains_the_exits_and_exports_none_of_them(
    of_12: dict[str, str], tmp_path: Path
) -> None:
    teacher = of_12["teacher"] + ", class_map: [11, 2, 3, 4, 5, 6, 7, 8, 9, 10]"
    run(text(ALL, **{**of_12, "teacher": teacher}), tmp_path / "run")
    trained = [row for row in record(tmp_path / "run") if row.get("role") == "student"]
    assert all(float(trained[-1][name]) > 0 for name in ("dkd", "nkd", "ofa", "exits"))
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert set(weights) == set(create_model("resnet10t", channels=[8, 8, 8, 16]).state_dict())
