"""Losses with parameters in a Distiller: between unlike models, in the optimizer, in checkpoints, and in a run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from probe_kd import Distiller, InputSpec, Objective
from probe_kd.errors import LossError

IMAGES = InputSpec((3, 32, 32), 0.5, 0.25)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": partial(timm.create_model, "resnet10t", channels=[8, 8, 8, 16], stem_width=8),
    "vit": partial(
        timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
    ),
    "swin": partial(SwinTransformer, img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2)),
    "mixer": partial(MlpMixer, img_size=32, patch_size=8, embed_dim=16, num_blocks=2),
}
LAYERS = {
    "cnn": ("layer1", "layer4"),
    "vit": ("blocks.0", "blocks.1"),
    "swin": ("layers.0", "layers.1"),
    "mixer": ("blocks.0", "blocks.1"),
}
CLASSIFIED = {"cnn": "layer4", "vit": "norm", "swin": "norm", "mixer": "norm"}  # what the classifier reads
LOSSES: dict[str, dict[str, Any]] = {
    "vid": {},
    "mgd": {},
    "srrl": {},
    "rsd": {},
    "crd": {"negatives": 5},
    "review": {"width": 8},
    "patch_similarity_queue": {"size": 64},
}


def model(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind](num_classes=5)


def objectives(student: str, teacher: str) -> list[Objective]:
    pairs = dict(zip(LAYERS[student], LAYERS[teacher], strict=True))
    classified = {
        "pairs": {LAYERS[student][1]: CLASSIFIED[teacher]},
        "tokens": "cls" if teacher == "vit" else "pool",
    }
    return [
        Objective(name, options=options, **(classified if name == "srrl" else {"pairs": pairs}))
        for name, options in LOSSES.items()
    ]


def distiller(student: str, teacher: str) -> Distiller:
    models, terms = (model(student), model(teacher, 1)), objectives(student, teacher)
    return Distiller(*models, terms, student_input=IMAGES, teacher_input=IMAGES, num_images=20).train()


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    return {"images": images, "target": torch.arange(6) % 5, "index": torch.randperm(20, generator=generator)[:6]}


def gradients(value: Tensor | None, module: nn.Module) -> list[Tensor]:
    """Those of the parameters that the value depends on."""
    assert value is not None
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True) if parameters else ()
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("teacher", MODELS)
@pytest.mark.parametrize("student", MODELS)
def test_a_step_between_any_two_models(student: str, teacher: str) -> None:
    step = distiller(student, teacher)
    result = step(**batch())
    for name in LOSSES:
        own = step.losses[f"{name}_"]
        of_student, of_loss = gradients(result[name], step.student), gradients(result[name], own)
        assert all(gradient.isfinite().all() for gradient in (*of_student, *of_loss)), name
        assert any(gradient.abs().max() > 0 for gradient in of_student), name
        assert len(of_loss) == sum(parameter.requires_grad for parameter in own.parameters()), name
        adapters = step.adapters[f"{name}_"]
        assert len(gradients(result[name], adapters)) == len(list(adapters.parameters())), name
    step.close()


def test_a_copy_of_the_state_goes_on_with_the_same_bits() -> None:
    """Steps of an optimizer, and after them those of a second Distiller with the state of the first."""
    step, copied = distiller("vit", "cnn"), distiller("vit", "cnn")
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    start = {name: value.clone() for name, value in step.losses.state_dict().items()}
    for seed in range(2):
        step(**batch(seed))["loss"].backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in step.losses.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "classifier" not in name}
    assert not any("losses" in name for name in step.student.state_dict())
    copied.load_state_dict(step.state_dict())
    values = []
    for one in (step, copied):
        torch.manual_seed(0)
        values.append([one(**batch(seed))[name] for seed in (5, 6) for name in LOSSES])
    assert values[0] == values[1]


@pytest.mark.parametrize(("block", "learns"), [("output", False), ("off", True)])
def test_the_gradient_block_decides_whether_the_teacher_learns(block: str, learns: bool) -> None:
    labels, models = Objective("cross_entropy", "labels", of="teacher"), (model("vit"), model("cnn", 1))
    terms = [term for term in objectives("vit", "cnn") if term.name != "srrl"]
    options = {"student_input": IMAGES, "teacher_input": IMAGES, "num_images": 20, "block": block}
    with pytest.raises(LossError, match="the classifier of a frozen teacher"):
        Distiller(*models, [*objectives("vit", "cnn"), labels], **options)  # type: ignore[arg-type]
    step = Distiller(*models, [*terms, labels], **options).train()  # type: ignore[arg-type]
    result = step(**batch())
    assert step.teacher is not None
    for name in (term.name for term in terms):
        assert any(gradient.abs().max() > 0 for gradient in gradients(result[name], step.teacher)) == learns, name


def test_autocast_changes_no_type_of_a_loss_or_of_what_it_remembers() -> None:
    step = distiller("cnn", "vit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = step(**batch())
    assert {result[name].dtype for name in LOSSES} == {torch.float32}  # type: ignore[union-attr]
    assert {value.dtype for value in step.losses.state_dict().values()} == {torch.float32, torch.int64}
    assert all(gradient.isfinite().all() for gradient in gradients(result["loss"], step))
