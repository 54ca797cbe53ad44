"""Tracing: what a forward without weights tells, checked against real forwards and other people's counters."""

import logging
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from probe_kd import Probe, Tap, trace
from probe_kd.engine.models import build_model
from probe_kd.engine.tracing import trace_named
from probe_kd.errors import TapError, TraceError

# tap: layout, shape without the batch, grid, prefix tokens, stride
GOLDEN: dict[str, dict[str, tuple[Any, ...]]] = {
    "resnet18": {
        "conv1": ("NCHW", (64, 112, 112), (112, 112), 0, 2.0),
        "layer3": ("NCHW", (256, 14, 14), (14, 14), 0, 16.0),
        "layer4.1@input": ("NCHW", (512, 7, 7), (7, 7), 0, 32.0),
        "global_pool": ("NC", (512,), None, 0, None),
        "": ("NC", (1000,), None, 0, None),
        "@input": ("NCHW", (3, 224, 224), (224, 224), 0, 1.0),
    },
    "vit_tiny_patch16_224": {
        "patch_embed": ("NLC", (196, 192), (14, 14), 0, 16.0),
        "blocks.5": ("NLC", (197, 192), (14, 14), 1, 16.0),
        "blocks.5.attn.qkv": ("NLC", (197, 576), (14, 14), 1, 16.0),
        "fc_norm": ("NC", (192,), None, 0, None),
    },
    "swin_tiny_patch4_window7_224": {
        "layers.1": ("NHWC", (28, 28, 192), (28, 28), 0, 8.0),
        "layers.3.blocks.1": ("NHWC", (7, 7, 768), (7, 7), 0, 32.0),
        "patch_embed.proj": ("NCHW", (96, 56, 56), (56, 56), 0, 4.0),
    },
    "mixer_s16_224": {
        "blocks.2": ("NLC", (196, 512), (14, 14), 0, 16.0),
    },
    "cait_xxs24_224": {
        "blocks.3": ("NLC", (196, 192), (14, 14), 0, 16.0),
        "norm": ("NLC", (197, 192), (14, 14), 1, 16.0),
    },
    "deit_tiny_distilled_patch16_224": {"blocks.0": ("NLC", (198, 192), (14, 14), 2, 16.0)},
    "vit_small_patch14_reg4_dinov2": {"blocks.0": ("NLC", (1374, 384), (37, 37), 5, 14.0)},
    "convnext_tiny": {"stages.2.blocks.0.mlp.fc1": ("NHWC", (14, 14, 1536), (14, 14), 0, 16.0)},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_layouts_grids_and_strides_are_measured(name: str) -> None:
    traced = trace(name)
    for tap, expected in GOLDEN[name].items():
        spec = traced[tap]
        stride = None if spec.reduction is None else round(spec.reduction, 1)
        assert (str(spec.layout), spec.shape[1:], spec.grid, spec.prefix_tokens, stride) == expected, tap


def test_the_nonlinearity_that_made_a_tensor_is_seen_also_in_place_and_through_containers() -> None:
    resnet, mobile, vit = (trace(name) for name in ("resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"))
    seen = {
        tap: resnet[tap].activation for tap in ("act1", "layer2", "layer2.0.act1", "layer3@input", "bn1", "maxpool", "")
    }
    relu = {"act1", "layer2", "layer2.0.act1", "layer3@input"}
    assert seen == {tap: "relu" if tap in relu else "" for tap in seen}
    assert resnet["bn1"].clone  # one tensor, which the activation overwrites
    assert (mobile["bn1"].activation, mobile["blocks.1"].activation) == ("relu6", "")
    assert (vit["blocks.0.mlp.act"].activation, vit["blocks.0"].activation) == ("gelu", "")


@pytest.mark.parametrize(
    ("name", "size", "tap", "grid"),
    [
        ("resnet18", (3, 96, 160), "layer3", (6, 10)),
        ("swin_tiny_patch4_window7_224", (3, 224, 448), "layers.1", (28, 56)),
        ("vit_tiny_patch16_224", (3, 32, 96), "blocks.3", (2, 6)),
        ("convmixer_768_32", (3, 70, 140), "blocks.0", (10, 20)),
        ("pvt_v2_b0", (3, 64, 128), "stages.1", (8, 16)),
    ],
)
def test_grids_that_are_no_squares(name: str, size: tuple[int, int, int], tap: str, grid: tuple[int, int]) -> None:
    traced = trace(name, size)
    assert traced.input_size == size
    assert traced[tap].grid == grid


def test_a_model_built_for_one_size_is_built_anew_for_another() -> None:
    traced = trace("vit_tiny_patch16_224", 96)
    assert traced.model_kwargs == {"img_size": 96}
    assert traced["blocks.0"].shape[1:] == (37, 192)
    with pytest.raises(TraceError, match="does not run on an input of 3x96x96"):
        trace(timm.create_model("vit_tiny_patch16_224", depth=1), 96)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0", "test_convnext", "res2next50"])
def test_the_trace_is_what_a_real_forward_does(name: str) -> None:
    """Shapes at every tap, values at every tap that is overwritten: those a probe has to clone."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    traced = trace(name)
    specs = [spec for spec in traced.specs if not spec.tap.items and spec.tap.module]
    probe = Probe(model, [str(spec.tap) for spec in specs])
    features = probe(torch.randn(5, *traced.input_size))
    assert {tap: tuple(feature.shape) for tap, feature in features.items()} == {spec.tap: spec.shape for spec in specs}
    assert probe._clones == {spec.tap for spec in specs if spec.clone}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_parameters_and_macs_agree_with_other_counters(name: str) -> None:
    traced, model = trace(name), timm.create_model(name).eval()
    for module in ("", "stages", "blocks", "layer2"):
        if module in traced.modules:
            expected = sum(parameter.numel() for parameter in model.get_submodule(module).parameters())
            assert traced.modules[module].parameters == expected
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *traced.input_size))
    assert traced.macs == counter.get_total_flops() // 2
    assert traced.macs == traced.modules[""].macs


def test_macs_of_one_convolution_by_hand() -> None:
    assert trace("resnet18").modules["conv1"].macs == 64 * 3 * 7 * 7 * 112 * 112


def test_calls_and_silence() -> None:
    traced = trace("vit_tiny_patch16_224", model_kwargs={"depth": 2})
    assert "fused attention" in traced.modules["blocks.0.attn.attn_drop"].silent
    assert traced.modules["blocks.0"].calls == 1
    with pytest.raises(TapError, match="never fires: fused attention"):
        traced["blocks.0.attn.attn_drop"]
    with pytest.raises(TapError, match=r"no module 'blocks.7'; did you mean 'blocks.[01]'"):
        traced["blocks.7"]
    assert traced["blocks.0#0"] is traced["blocks.0"]


def test_a_users_model_is_left_as_it_was() -> None:
    model = timm.create_model("resnet18").train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert trace(model, 64)["layer4"].shape[1:] == (512, 2, 2)
    assert trace(model, 64, training=True).training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.layer1.training, model.layer2.training) == (True, False, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_run_without_values_runs_once_for_real() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.drop(y * y.sum().item())

    model = Looking().train()
    traced = trace(model, (3, 8, 8))
    assert traced["body"].shape[1:] == (4, 6, 6)
    assert not traced.training
    assert model.training


def test_outputs_of_several_tensors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.body(x)
            return OrderedDict(logits=y.mean((2, 3)), aux=(y, y + 1))

    traced = trace(Two(), 8)
    assert [str(spec.tap) for spec in traced.specs if spec.tap.is_output] == ["[logits]", "[aux][0]", "[aux][1]"]
    assert str(traced.output.tap) == "[logits]"
    assert traced["[aux][0]"].tensor == traced["body"].tensor


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("convnext_tinny", None, "timm has no model 'convnext_tinny'; did you mean 'convnext_tiny'"),
        ("resnet18.a9_in1k", None, "timm has no weights 'a9_in1k' for resnet18; did you mean 'a[123]_in1k'"),
        ("json:dumps", None, "cannot build json:dumps"),
        ("json:dump5", None, "json has no function 'dump5'; did you mean 'dump'"),
        ("nowhere.at_all:build", None, "cannot import 'nowhere.at_all'"),
        ("resnet18", (0, 3), "expected"),
        ("resnet18", (3, 4, 5, 6), "does not run on an input of 3x4x5x6"),
        ("resnet18", (3, 4, 5, 6, 7), "expected"),
        ("vgg11", (3, 8, 8), "does not run on an input of 3x8x8"),
        ("local-dir:/nowhere", None, "nowhere"),
        (str(Path(__file__).parent), None, "is called `local-dir:/"),
    ],
)
def test_what_cannot_be_traced_is_told(name: str, size: Any, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(name, size)


def test_a_size_that_the_arguments_rule_out_is_told_with_both_mends() -> None:
    with pytest.raises(TraceError, match=r"built with img_size=32: build it with \[64, 48\]"):
        trace("vit_tiny_patch16_224", (64, 48), model_kwargs={"img_size": 32})


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        (
            "swin_tiny_patch4_window7_224",
            "windw_size",
            "`windw_size` is no argument of the architecture of swin_tiny_patch4_window7_224; "
            "did you mean 'window_size'",
        ),
        ("torch.nn:Flatten", "start_dimm", "'start_dimm'; did you mean 'start_dim'"),
    ],
)
def test_an_argument_that_a_model_does_not_take_gets_the_nearest(name: str, wrong: str, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(name, model_kwargs={wrong: 4})


def test_a_local_folder_of_the_hub_is_a_model(tmp_path: Path) -> None:
    """The files of `timm.models.push_to_hf_hub`, as a user would have downloaded them."""
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7)
    save_for_hf(model, tmp_path, model_config={"num_classes": 7})
    traced = trace(f"local-dir:{tmp_path}")
    assert traced.output.channels == 7
    assert Tap("layer2") in {spec.tap for spec in traced.specs}


def test_what_the_hub_logs_of_itself_is_said_once_by_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("thrown while requesting HEAD")
        raise ConnectionError("no hub")

    shown = list[logging.LogRecord]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", shown.append)
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    monkeypatch.setattr(timm, "create_model", unreachable)
    level = logger.level
    try:
        with pytest.raises(TraceError, match="weights of resnet10t: no hub; give the file with its weights"):
            build_model("resnet10t", {}, pretrained=True)
    finally:
        logger.removeHandler(handler)
    assert (shown, logger.level) == ([], level)


def test_what_timm_registers_is_traced_once_and_anew_where_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another function under the name, other arguments, or a file that may change: each is another trace."""
    first = trace_named("resnet10t", 64, model_kwargs={"num_classes": 3})
    assert first == trace("resnet10t", 64, model_kwargs={"num_classes": 3})
    assert trace_named("resnet10t", 64, model_kwargs={"num_classes": 3}) is first
    assert trace_named("resnet10t", 64, model_kwargs={"num_classes": 4}).output.channels == 4
    assert trace_named("resnet10t", 64, training=True, model_kwargs={"num_classes": 3}).training
    changing = {"channels": [8, 16, 24, 32]}
    before = trace_named("resnet10t", 64, model_kwargs=changing)
    changing["channels"][0] = 16  # another model, of which the first must not know
    assert before.model_kwargs == {"channels": [8, 16, 24, 32]}
    assert trace_named("resnet10t", 64, model_kwargs=changing).parameters > before.parameters
    wider = partial(timm.create_model, "resnet18")
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "resnet10t", lambda **options: wider(num_classes=7))
    assert trace_named("resnet10t", 64, model_kwargs={"num_classes": 3}).output.channels == 7
    (tmp_path / "changing.py").write_text("import timm\ndef net(): return timm.create_model('resnet10t')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert trace_named("changing:net", 64) is not trace_named("changing:net", 64)
