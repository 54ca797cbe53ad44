"""Weights with another classifier: only it begins anew, and where the file lay decides nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from running import Quiet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from probe_kd.engine.weights import load_weights, read_header
from probe_kd.errors import RecipeError, WeightsError
from probe_kd.methods.sharing import load_student
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load, parse
from probe_kd.results.export import export
from probe_kd.training.run import train

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "a linear layer": ("resnet10t", {"channels": (8, 8, 8, 8)}, {"fc"}),
    "two heads": ("deit_tiny_distilled_patch16_224", VIT, {"head", "head_dist"}),
    "a convolution": ("resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16)}, {"head.fc"}),
    "behind a norm": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, {"head.fc"}),
}


def build(kind: str, classes: int, **more: Any) -> nn.Module:
    name, kwargs, _ = MODELS[kind]
    model: nn.Module = timm.create_model(name, num_classes=classes, **kwargs, **more)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["new where other", "new"])
def test_only_the_classifier_begins_anew(kind: str, how: Any, tmp_path: Path) -> None:
    heads = MODELS[kind][2]
    for classes, renewed in ((7, True), (5, how == "new")):
        source, model = build(kind, classes), build(kind, 5)
        began = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        left = load_weights(model, saved(source, tmp_path / "w.safetensors"), how)
        assert {name.rpartition(".")[0] for name in left} == (heads if renewed else set())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, (began if name in left else source.state_dict())[name]), name
        with pytest.raises(WeightsError, match="does not fit") if classes == 7 else pytest.MonkeyPatch.context():
            load_weights(build(kind, 5), tmp_path / "w.safetensors")


def test_a_checkpoint_without_a_classifier_gets_one_and_any_other_difference_is_refused(tmp_path: Path) -> None:
    source = build("a linear layer", 0)  # timm's headless
    assert load_weights(build("a linear layer", 5), saved(source, tmp_path / "w.safetensors"), "new where other")
    wide = timm.create_model("resnet10t", num_classes=7, channels=(8, 8, 8, 16))
    with pytest.raises(WeightsError, match=r"'layer4.0.conv1.weight' is 16x8x3x3 in the checkpoint and 8x8x3x3"):
        load_weights(build("a linear layer", 5), saved(wide, tmp_path / "wide.safetensors"), "new")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(WeightsError, match="Sequential does not say which of its layers is the classifier"):
        load_weights(plain, saved(plain, tmp_path / "plain.safetensors"), "new")


RECIPE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}%s}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}, checkpoint: %s%s}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 64, fraction: 0.1, hflip: 0.0}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}, soft: {loss: soft_targets}}}]
"""


def test_a_recipe_says_which_models_get_a_new_classifier(tmp_path: Path) -> None:
    file = saved(build("a linear layer", 7), tmp_path / "w.safetensors")
    wide = saved(timm.create_model("resnet10t", channels=(8, 8, 8, 16)), tmp_path / "wide.safetensors")
    planned = plan(parse(RECIPE % ("", file, ", train: {epochs: 1}")))
    says = "gets a new classifier (fc) of 10 classes; all else is that of w.safetensors"
    assert planned.new_classifiers == (f"the teacher {says}",)
    both = plan(parse(RECIPE % (f", checkpoint: {file}, new_classifier: true", file, ", train: {epochs: 1}")))
    assert both.new_classifiers == (f"the student {says}", f"the teacher {says}")
    for student, teacher, message in (
        (
            "",
            "",
            r"does not fit ResNet: 'fc.weight' is 7x8.*\{num_classes: 7\}` .* `class_map` .*; or `train: \{epochs: .*"
            "`new_classifier: true`",
        ),
        ("", f", class_map: {list(range(10))}", r"fc.weight.*; `model_kwargs: \{num_classes: 7\}` [^;]*`class_map`"),
        (
            f", checkpoint: {file}",
            ", train: {epochs: 1}",
            "does not fit ResNet: 'fc.weight' is 7x8.*; `new_classifier: true` lets all else be the checkpoint's",
        ),
        (f", checkpoint: {wide}, new_classifier: true", ", train: {epochs: 1}", r"conv1.weight.* and 12 more\n"),
        ("", ", new_classifier: true", "a new classifier of a teacher that is not trained answers at random"),
        (", new_classifier: true", ", train: {epochs: 1}", "the model has no weights, so that all of it is new"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan(parse(RECIPE % (student, file, teacher)))


def test_a_run_does_not_depend_on_the_folder_that_its_weights_came_from(tmp_path: Path) -> None:
    source = build("a linear layer", 7)
    written = []
    for folder in ("here", "somewhere/quite/else"):
        file = saved(source, tmp_path / folder / "w.safetensors")
        text = RECIPE % (f", checkpoint: {file}, new_classifier: true", file, ", train: {epochs: 1}")
        train(plan(parse(text)), tmp_path / folder / "run", Quiet())
        written.append(tmp_path / folder / "run")
    for name in ("teacher.safetensors", "student.safetensors"):
        first, second = (load_file(run / name) for run in written)
        assert all(torch.equal(first[key], second[key]) for key in first | second), name
        headers = [safe_open(run / name, "pt").metadata() for run in written]
        assert headers[0] == headers[1]


LOCAL = """\
student: {model: "local-dir:%s", pretrained: true}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 64, fraction: 0.1, hflip: 0.0}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}}}]
"""


def test_what_was_fine_tuned_from_a_folder_is_whole_without_it(tmp_path: Path) -> None:
    """Its architecture, arguments and normalisation go into what the run writes."""
    source, kwargs = build("a linear layer", 7), MODELS["a linear layer"][1]
    written = []
    for folder in (tmp_path / "here", tmp_path / "else" / "there"):
        saved(source, folder / "model.safetensors")
        config = {"num_classes": 7, "input_size": [3, 16, 16], "mean": [0.1] * 3, "std": [0.7] * 3, "classifier": "fc"}
        about = {"architecture": "resnet10t", "num_classes": 7, "model_args": kwargs, "pretrained_cfg": config}
        (folder / "config.json").write_text(json.dumps(about))
        train(plan(parse(LOCAL % folder)), folder / "run", Quiet())
        written.append(folder / "run" / "student.safetensors")
        assert load(folder / "run" / "recipe.yaml").recipe.data.mean == (0.1, 0.1, 0.1)
        export(folder / "run", folder / "exported")
        (folder / "config.json").unlink()
    first, second = map(load_file, written)
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert read_header(written[0]) == read_header(written[1])
    assert read_header(written[0])["model"] == "resnet10t"
    assert load_student(written[1]).fc.out_features == 10
