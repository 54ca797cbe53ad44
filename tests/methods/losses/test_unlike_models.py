"""Every loss of layers trains a step between a CNN, a vision transformer, a Swin (channels last) and a mixer."""

from functools import cache
from typing import Any

import pytest
import torch
from methods.losses.test_trained_losses import IMAGES, LAYERS, MODELS, model
from methods.losses.test_trained_losses import LOSSES as TRAINED
from torch import Tensor, nn

from probe_kd import LOSSES, Distiller, Objective, Probe, Trace, trace

SEEN = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FUNCTIONS = [name for name, loss in LOSSES.items() if loss.reads_layers and not loss.builds_module]
CHOICES: dict[str, dict[str, Any]] = {
    "smooth_l1": {"projector": "orthogonal", "tokens": "pool", "normalize": "layer"},
    "sp": {"tokens": "flatten"},
    "token_match": {"tokens": "all"},
    "gram_tokens": {"grid": "teacher"},
}


@cache
def traced(kind: str, seed: int) -> tuple[nn.Module, Trace]:
    built = model(kind, seed).train()
    return built, trace(built, IMAGES.size, training=True)


def reached(value: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters that a value depends on."""
    parameters = dict(module.named_parameters())
    if not parameters:
        return {}
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def test_every_loss_of_layers_is_tried_between_unlike_models() -> None:
    """Here or, if it has parameters, in test_trained_losses.py and test_labelled_outputs.py."""
    assert {*FUNCTIONS, *TRAINED, "ofa_exits"} == {name for name, loss in LOSSES.items() if loss.reads_layers}


@pytest.mark.parametrize("teacher", MODELS)
@pytest.mark.parametrize("student", MODELS)
def test_a_step_moves_the_student_up_to_its_paired_layer(student: str, teacher: str) -> None:
    (learning, student_trace), (other, teacher_trace) = traced(student, 0), traced(teacher, 1)
    pair = {LAYERS[student][0]: LAYERS[teacher][0]}
    objectives = [Objective(name, pairs=pair, **CHOICES.get(name, {})) for name in FUNCTIONS]
    traces = {"student_trace": student_trace, "teacher_trace": teacher_trace}
    inputs = {"student_input": IMAGES, "teacher_input": IMAGES}
    step = Distiller(learning, other, objectives, **inputs, **traces).train()
    result = step(SEEN)
    step.close()
    with Probe(learning, [student_trace[LAYERS[student][0]]]) as probe:
        (feature,) = probe(SEEN).values()
    below = set(reached(feature.sum(), learning))
    assert 0 < len(below) < len(list(learning.parameters()))
    for name in FUNCTIONS:
        value = result[name]
        assert value is not None
        assert value.isfinite(), name
        gradients = reached(value, learning)
        assert set(gradients) == below, name
        assert all(gradient.isfinite().all() for gradient in gradients.values()), name
        assert any(gradient.any() for gradient in gradients.values()), name
        assert not reached(value, other), name
        assert len(reached(value, step.adapters[f"{name}_"])) == len(list(step.adapters[f"{name}_"].parameters())), name
