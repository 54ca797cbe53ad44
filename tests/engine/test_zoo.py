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
SIZES = {"sequencer2d_s": 56}  # the meta device takes every position of its LSTMs alone
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


@pytest.mark.parametrize("name", families())
def test_every_family_is_traced_in_both_modes_and_its_captures_are_timms_intermediates_to_the_bit(name: str) -> None:
    traces = [trace(name, SIZES.get(name), training=training) for training in (False, True)]
    for traced in traces:
        assert traced.parameters > 0
        assert traced.macs > 0
        orders = [spec.order for spec in traced.specs]
        assert orders == sorted(set(orders))
        assert {spec.tap.module for spec in traced.specs} <= set(traced.modules)
        assert len({spec.tap for spec in traced.specs}) == len(orders)
    if name not in WITHOUT_ORACLE | LARGE:
        assert agree(name, traces[0]) >= 3


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
