"""Fine-tuning a backbone: layers that a stage freezes stay as they were to the bit, and learn again afterwards."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import Command, record
from running import After, planned, run, run_by_two, same, stop
from safetensors.torch import load_file, save_file
from torch import Tensor

from probe_kd import Distiller, InputSpec, Objective
from probe_kd.engine.weights import backbone
from probe_kd.errors import RecipeError
from probe_kd.training.models import Models
from probe_kd.training.optimizers import make_optimizer
from probe_kd.training.processes import accelerating

PROBE = """\
student: {{model: "local-dir:{folder}", pretrained: true, new_classifier: true}}
data: {{dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 64, hflip: 0.0, fraction: 0.1}}
model_ema: {{decay: 0.5}}
stages:
  - name: probe
    epochs: 2
    freeze: backbone
    losses: {{task: {{loss: cross_entropy}}}}
    optimizer: {{lr: 0.01, weight_decay: 0.05}}
"""
TUNE = """\
  - name: tune
    epochs: 1
    freeze: [conv1, "glob:layer1.*"]
    losses: {task: {loss: cross_entropy}}
    optimizer: {lr: 0.01, layer_decay: 0.7, lr_scale: {layer3: 0.1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone without a classifier, as timm's own tools write it."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0, channels=[8, 16, 24, 32])
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1)
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 0}
    place = tmp_path_factory.mktemp("backbone")
    arguments = {"channels": [8, 16, 24, 32]}
    save_for_hf(model, place, model_args=arguments, safe_serialization=True)
    return place


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def in_layers(names: set[str], *layers: str) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{layer}." for layer in layers))}


def test_a_probe_of_a_backbone_trains_the_classifier_alone(folder: Path, tmp_path: Path) -> None:
    """Also its moving average, and in two processes, and compiled, all statistics of batch norms are what they were."""
    text = PROBE.format(folder=folder)
    run(text, tmp_path / "one")
    assert run_by_two(text.replace("batch_size: 64", "batch_size: 32"), tmp_path / "two") == ["done", "done"]
    run(f"{text}torchcompile: {{target: step, backend: eager}}\n", tmp_path / "compiled")
    before = load_file(folder / "model.safetensors")
    for name in ("one", "two", "compiled"):
        for weights in ("student", "student-ema"):
            after = load_file(tmp_path / name / f"{weights}.safetensors")
            assert after.keys() - before.keys() == {"fc.weight", "fc.bias"}
            assert changed(before, after) == set()
    losses = [[float(row["task"]) for row in record(tmp_path / name)] for name in ("one", "two", "compiled")]
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_then_all_trains_but_what_the_next_stage_freezes_and_a_stopped_run_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path
) -> None:
    text = PROBE.format(folder=folder) + TUNE
    run(text, tmp_path / "whole")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "whole" / "student.safetensors")
    held = in_layers(set(before), "conv1", "layer1")
    assert changed(before, after) == set(before) - held
    for epochs in (1, 2):  # within the probe, and at its end
        parts = tmp_path / str(epochs)
        with pytest.raises(KeyboardInterrupt):
            run(text, parts, After(stop, epochs=epochs))
        run(text, parts, resume=True)
        same(parts, tmp_path / "whole")


def test_rates_of_layers_multiply_and_frozen_layers_have_none(folder: Path, tmp_path: Path) -> None:
    plan = planned(PROBE.format(folder=folder) + TUNE)
    with accelerating(plan.recipe, tmp_path) as accelerator:
        models = Models(plan, accelerator)
        (trained,) = models.in_turn()
        distiller = models.distiller(trained, trained.phases[1])
        optimizer = make_optimizer(distiller, trained.phases[1].optimizer)
        names = {id(parameter): name for name, parameter in trained.model.named_parameters()}
        scales = {
            names[id(parameter)]: group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]
        }
        distiller.close()
    assert in_layers(set(scales), "conv1", "layer1") == set()
    assert scales["fc.weight"] == 1
    assert scales["layer4.0.conv1.weight"] == pytest.approx(0.7)
    assert scales["layer3.0.conv1.weight"] == pytest.approx(0.7**2 * 0.1)
    assert all(parameter.requires_grad for parameter in trained.model.parameters())


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ("[layre1]", "no parameter of ResNet matches 'layre1'; did you mean 'layer1'"),
        ("['*']", "all of the student is frozen"),
        ("[conv1, bn1, 'layer[12]*']", "loss `hint` of stage `probe` reads 'layer2', and all layers before it are"),
        ("[layer3]", "'layer3' is frozen and has an `lr_scale`"),
    ],
)
def test_what_would_train_nothing_is_refused_at_its_line(folder: Path, freeze: str, says: str) -> None:
    text = PROBE.format(folder=folder).replace("freeze: backbone", f"freeze: {freeze}")
    text = text.replace(
        "losses: {task: {loss: cross_entropy}}", "losses: {task: {loss: cross_entropy}, hint: {loss: hint}}"
    )
    text = text.replace("weight_decay: 0.05", "lr_scale: {layer3: 0.1}")
    text += "teacher: {model: resnet10t, train: {epochs: 1}}\npairs: {layer2: layer2}\n"
    with pytest.raises(RecipeError) as refused:
        planned(text)
    (problem,) = refused.value.problems
    assert says in problem.message
    assert text.splitlines()[problem.line - 1].strip().startswith("freeze:")


def test_check_shows_what_is_frozen(folder: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text(PROBE.format(folder=folder) + TUNE)
    shown = command("check", "tune.yaml", "--no-batch").stdout
    assert "stage probe: frozen are conv1, bn1, layer1, layer2, layer3, layer4; 330 of 62.2 k parameters" in shown
    assert "stage tune: frozen are conv1, glob:layer1.*;" in shown


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_backbone_is_all_but_the_classifiers(name: str) -> None:
    with torch.device("meta"):
        model, bare = timm.create_model(name), timm.create_model(name, num_classes=0)
    names = {
        key for key, _ in model.named_parameters() if any(f"{key}.".startswith(f"{it}.") for it in backbone(model))
    }
    assert names == {key for key, _ in bare.named_parameters()}


def test_a_distiller_gives_frozen_layers_back_when_it_is_closed() -> None:
    student = timm.create_model("resnet10t", num_classes=3, channels=[8, 16, 24, 32])
    distiller = Distiller(
        student, None, [Objective("cross_entropy")], student_input=InputSpec((3, 32, 32)), freeze=["layer1", "bn1"]
    ).train()
    assert not student.bn1.training
    assert student.layer2[0].bn1.training
    distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))["loss"].backward()
    assert {name for name, it in student.named_parameters() if it.grad is None} == {
        name for name, _ in student.named_parameters() if name.startswith(("layer1.", "bn1."))
    }
    distiller.close()
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_checkpoint_of_a_backbone_takes_a_new_classifier(folder: Path, tmp_path: Path) -> None:
    """As a file, and not as a folder: nothing of the classifier is in it."""
    save_file(load_file(folder / "model.safetensors"), tmp_path / "backbone.safetensors")
    model = "model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}, "
    model += f"checkpoint: {tmp_path / 'backbone.safetensors'}"
    text = PROBE.format(folder=folder).replace(f'model: "local-dir:{folder}", pretrained: true', model)
    assert planned(text).new_classifiers == (
        "the student gets a new classifier (fc) of 10 classes; all else is that of backbone.safetensors",
    )
