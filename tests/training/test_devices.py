"""In which order of memory a run computes, by device and model."""

import subprocess
import sys

import pytest
import torch
from conftest import TINY

from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.devices import memory_format

NARROW = """\
student: {model: resnet18, model_kwargs: {channels: [6, 10, 14, 20]}}
data: {dataset: sklearn/digits, input_size: [3, 32, 32]}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}}}]
"""
STEPS = """
import sys, timm, torch
from probe_kd.training.devices import memory_format
from probe_kd.recipe.reading import parse
torch.set_num_threads(1)
layout = memory_format(parse(sys.argv[1]).recipe, torch.device("cpu"))
model = timm.create_model("resnet18", channels=[6, 10, 14, 20], num_classes=10).to(memory_format=layout)
for size in range(60):
    model(torch.randn(16, 3, 32, 32 + size % 3).contiguous(memory_format=layout)).sum().backward()
"""


def test_channels_last_is_the_default_of_timms_models_on_the_cpu() -> None:
    own = TINY.replace("model: resnet10t", "model: torchvision.models:resnet18")
    assert own != TINY
    last, first = torch.channels_last, torch.contiguous_format
    for text, device, expected in ((TINY, "cpu", last), (own, "cpu", first), (TINY, "cuda", first)):
        assert memory_format(parse(text).recipe, torch.device(device)) == expected
    for wish, expected in (("true", last), ("false", first)):
        assert memory_format(parse(f"{own}channels_last: {wish}\n").recipe, torch.device("cuda")) == expected


def test_a_model_whose_backward_corrupts_memory_with_channels_last_is_trained_without() -> None:
    """torch 2.14.1 writes past the end for convolutions of kernel 1 and stride 2 over fewer than 8 channels."""
    process = subprocess.run([sys.executable, "-c", STEPS, NARROW], capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr.decode()[-500:]
    wide = NARROW.replace("[6, 10, 14, 20]", "[16, 16, 24, 32]")
    for text, expected in ((NARROW, torch.contiguous_format), (wide, torch.channels_last)):
        assert memory_format(parse(text).recipe, torch.device("cpu")) == expected
    assert plan(parse(f"{NARROW}channels_last: false\n"))
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match=r"the backward of 'layer2.0.downsample.0' of the student"):
            plan(parse(f"{NARROW}channels_last: true\n"))
