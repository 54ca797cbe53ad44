"""The zoo of timm: captures equal to timm's own, and every model traced."""

import csv
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from families import families
from torch import Tensor, nn

from probe_kd import FeatureSpec, Layout, Probe, Tap, Trace, trace
from probe_kd.methods.adapters import ToMap

# `feature_info` names no module that runs, or (Hiera) one whose tokens timm sorts anew before it returns them.
WITHOUT_ORACLE = {
    "coat_tiny",
    "gemma4_vit_167m",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "mvitv2_tiny",
    "twins_svt_small",
}
# Smaller than the model's own, where that saves a second or more: the architecture is the same.
SIZES = {
    "convmixer_768_32": 56,
    "inception_resnet_v2": 139,
    "inception_v4": 139,
    "mobilenetv5_base": 128,
    "naflexvit_base_patch16_parfac_gap": 96,
    "nasnetalarge": 96,
    "nextvit_small": 96,
    "pnasnet5large": 96,
    "sam2_hiera_tiny": 256,
    "samvit_base_patch16_224": 112,
    "sequencer2d_s": 28,  # the meta device takes every position of its LSTMs alone
    "vgg11": 64,
}
LARGE = {"deepseek_vit_412m", "qwen3_vit_88m", "gemma4_vit_167m"}  # a minute each


def oracle(model: nn.Module, images: Tensor) -> tuple[list[str], list[Tensor]]:
    """timm's own intermediate features, with the modules that they come from."""
    modules = [str(info["module"]) for info in model.feature_info.info] if hasattr(model.feature_info, "info") else []
    modules = modules or [str(info["module"]) for info in model.feature_info]
    features = model.forward_intermediates(images, intermediates_only=True, norm=False, output_fmt="NCHW")
    return modules, features


@torch.no_grad()
def agree(name: str, traced: Trace) -> int:
    """How many features of a model were compared, all equal to the last bit."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(1, *traced.input_size, generator=torch.Generator().manual_seed(1))
    modules, features = oracle(model, images)
    taps = [tap_of(traced, module, feature.shape[1]) for module, feature in zip(modules, features, strict=False)]
    found = [(tap, feature) for tap, feature in zip(taps, features, strict=False) if tap is not None]
    captured = Probe(model, [tap for tap, _ in found])(images)
    for tap, expected in found:
        spec = traced[tap]
        assert (spec.channels, spec.grid) == (expected.shape[1], tuple(expected.shape[2:])), tap
        assert torch.equal(as_map(spec, captured[tap]), expected), tap
    return len(found)


def as_map(spec: FeatureSpec, feature: Tensor) -> Tensor:
    """The same numbers as a map, by the layout, the grid and the prefix tokens that the trace measured."""
    assert spec.grid is not None
    return feature if spec.layout is Layout.NCHW else ToMap(spec.layout, spec.grid, spec.prefix_tokens)(feature)


def tap_of(traced: Trace, module: str, channels: int) -> Tap | None:
    """The output of a module; the item of the right width, where it yields several."""
    specs = [spec for spec in traced.specs if spec.tap.module == module and spec.tap.port == "output" and spec.spatial]
    return next((spec.tap for spec in specs if spec.channels == channels or not spec.tap.items), None)


def is_consistent(traced: Trace) -> bool:
    orders = [spec.order for spec in traced.specs]
    in_order = orders == sorted(set(orders)) and len({spec.tap for spec in traced.specs}) == len(orders)
    return in_order and {spec.tap.module for spec in traced.specs} <= set(traced.modules) and traced.macs > 0


@pytest.mark.parametrize("name", families())
def test_every_family_is_traced_and_its_captures_are_timms_intermediates_to_the_bit(name: str) -> None:
    traced = trace(name, SIZES.get(name))
    assert traced.parameters > 0
    assert is_consistent(traced)
    if name not in WITHOUT_ORACLE | LARGE:
        assert agree(name, traced) >= 3


# The others take the same way through training mode; `make test-zoo` traces all.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if index % 4 == 1 else pytest.mark.zoo) for index, name in enumerate(families())],
)
def test_families_are_traced_in_training_mode(name: str) -> None:
    assert is_consistent(trace(name, SIZES.get(name), training=True))


def trace_one(name: str) -> tuple[str, float, str]:
    """(name, seconds, what went wrong)"""
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        traced = trace(name)
        problem = "" if any(spec.spatial for spec in traced.specs) else "no spatial feature"
    except Exception as refusal:
        problem = f"{type(refusal).__name__}: {refusal}"
    return name, time.perf_counter() - started, problem


@pytest.mark.zoo
def test_every_model_of_timm_is_traced() -> None:
    """Writes zoo.csv, the ones that fail first."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = sorted(pool.map(trace_one, timm.list_models(), chunksize=8), key=lambda row: (not row[2], row[0]))
    with Path("zoo.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seconds", "problem"])
        writer.writerows((name, f"{seconds:.3f}", problem) for name, seconds, problem in rows)
    failed = [f"{name}: {problem}" for name, _, problem in rows if problem]
    seconds = [seconds for _, seconds, _ in rows]
    median = statistics.median(seconds)
    print(f"{len(rows)} models, {len(failed)} fail; seconds: median {median:.2f}, max {max(seconds):.1f}")
    assert len(rows) > 1000
    assert not failed, "\n".join(failed)
