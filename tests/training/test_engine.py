"""What a recipe may say of how it is run: compiled, checkpointed, in another precision or layout, with trackers."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import GRAFT, ROCKET, TINY, TRUNK, Command, record
from running import planned, run
from safetensors.torch import load_file

from probe_kd import Distiller, InputSpec, Objective
from probe_kd.errors import RecipeError
from probe_kd.recipe.options import parse
from probe_kd.recipe.planner import plan
from probe_kd.training.devices import memory_format
from probe_kd.training.loop import make_optimizer

SHORT = TINY.replace("baseline: true\n", "").replace("num_heads: 2}", "num_heads: 2}\n  grad_checkpointing: false")
LOSSES = ("loss", "hint", "task", "soft")


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eager") / "run"
    run(SHORT, folder)
    return folder


def alike(one: Path, two: Path, *, weights: bool = True) -> None:
    """The same run but for rounding."""
    for ours, theirs in zip(record(one), record(two), strict=True):
        for name in LOSSES:
            if ours.get(name):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-2), (ours["stage"], name)
    for name, tensor in load_file(one / "student.safetensors").items() if weights else ():
        torch.testing.assert_close(tensor, load_file(two / "student.safetensors")[name], rtol=0.05, atol=2e-3, msg=name)


@pytest.mark.parametrize("target", ["step", "student", "teacher"])
def test_a_compiled_run_is_the_eager_run_through_stages_that_read_other_layers(
    eager: Path, tmp_path: Path, target: str
) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run(f"{SHORT}torchcompile: {{target: {target}, backend: aot_eager}}\n", tmp_path / "run")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "one graph for each stage"
    assert not torch._dynamo.utils.counters["graph_break"]
    alike(tmp_path / "run", eager)


def test_gradient_checkpointing_changes_nothing_but_what_can_be_tapped(eager: Path, tmp_path: Path) -> None:
    run(SHORT.replace("grad_checkpointing: false", "grad_checkpointing: true"), tmp_path / "run")
    alike(tmp_path / "run", eager)
    student = SHORT[SHORT.index("model:") : SHORT.index("\n  grad_checkpointing")]
    text = SHORT.replace("grad_checkpointing: false", "grad_checkpointing: true").replace(student, "model: resnet10t")
    with pytest.raises(RecipeError, match=r"'layer2'.*children are called one by one.*nearest.*'layer2\.0'"):
        plan(parse(text.replace("blocks.0: layer2", "layer2: layer2").replace("blocks.1: layer3", "layer3: layer3")))
    with pytest.raises(RecipeError, match="has no gradient checkpointing"):
        plan(parse(text.replace("model: resnet10t\n  grad", "model: legacy_seresnet18\n  grad")))


def test_channels_last_is_another_order_of_the_same_numbers(eager: Path, tmp_path: Path) -> None:
    run(f"{SHORT}channels_last: false\n", tmp_path / "run")
    alike(
        tmp_path / "run", eager, weights=False
    )  # Adam's first steps have the size of the rate, however small a gradient


def test_channels_last_is_the_default_of_timms_models_on_the_cpu() -> None:
    own = SHORT.replace("model: resnet10t", "model: torchvision.models:resnet18")
    assert own != SHORT
    last, first = torch.channels_last, torch.contiguous_format
    for text, device, expected in ((SHORT, "cpu", last), (own, "cpu", first), (SHORT, "cuda", first)):
        assert memory_format(parse(text).recipe, torch.device(device)) == expected
    for wish, expected in (("true", last), ("false", first)):
        assert memory_format(parse(f"{own}channels_last: {wish}\n").recipe, torch.device("cuda")) == expected


NARROW = """\
student: {model: resnet18, model_kwargs: {channels: [6, 10, 14, 20]}}
data: {dataset: sklearn/digits, input_size: [3, 32, 32]}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}}}]
"""
STEPS = """
import sys, timm, torch
from probe_kd.training.devices import memory_format
from probe_kd.recipe.options import parse
torch.set_num_threads(1)
layout = memory_format(parse(sys.argv[1]).recipe, torch.device("cpu"))
model = timm.create_model("resnet18", channels=[6, 10, 14, 20], num_classes=10).to(memory_format=layout)
for size in range(60):
    model(torch.randn(16, 3, 32, 32 + size % 3).contiguous(memory_format=layout)).sum().backward()
"""


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


@pytest.mark.parametrize(
    ("opt", "fused"), [("adamw", True), ("sgd", True), ("adamw, opt_args: {foreach: true}", None), ("lamb", None)]
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_one_kernel_for_all_parameters_moves_them_as_a_loop_over_them_does(
    opt: str, fused: bool | None, memory: torch.memory_format
) -> None:
    text = SHORT.replace("epochs: 1\n    losses", f"epochs: 1\n    optimizer: {{opt: {opt}}}\n    losses")
    options = parse(text).recipe.stages[0].optimizer
    ends = []
    for arguments in (options.opt_args, {**options.opt_args, "foreach": False} if fused else options.opt_args):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=10).to(memory_format=memory)
        given = InputSpec((3, 64, 64))
        distiller = Distiller(model, None, [Objective("cross_entropy")], student_input=given)
        optimizer = make_optimizer(distiller, options.model_copy(update={"opt_args": arguments}))
        assert optimizer.defaults.get("fused") == (fused if arguments is options.opt_args else None)
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            loss = distiller(images, torch.tensor([0, 1, 2, 3]))["loss"]
            gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for p in model.parameters()]
            loss.backward()
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(gradient)  # which keeps the order that the gradient had in memory
            optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bf16_trains_weights_of_float32_and_leaves_the_next_run_its_own_precision(tmp_path: Path) -> None:
    """Two transformers and few images: a convolution in bf16 takes a hundred times as long on some CPUs."""
    text = SHORT.replace("model: resnet10t", SHORT[SHORT.index("model:") : SHORT.index("\n  grad_checkpointing")], 1)
    text = text.replace("layer2", "blocks.0").replace("layer3", "blocks.1")
    text = text.replace("batch_size: 256", "batch_size: 64\n  holdout: 0.9")
    for name, line in (("before", ""), ("bf16", "precision: bf16\n"), ("after", "")):
        run(text + line, tmp_path / name)
    hints = {
        name: [float(row["hint"]) for row in record(tmp_path / name) if row["hint"]]
        for name in ("before", "bf16", "after")
    }
    assert hints["before"] == hints["after"] != hints["bf16"]
    assert hints["bf16"] == pytest.approx(hints["before"], rel=0.05)
    weights = load_file(tmp_path / "bf16" / "student.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_trackers_and_the_summary_of_timm_get_what_the_metrics_say(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(f"{SHORT}trackers: [tensorboard]\n", tmp_path / "run")
    found = events.EventAccumulator(str(tmp_path / "run" / "trackers" / "probe-kd"))
    found.Reload()
    own = [row for row in record(tmp_path / "run") if row["subject"] == "student"]
    seen = found.Scalars("student/accuracy")
    assert [event.value for event in seen] == pytest.approx([float(row["accuracy"]) for row in own], rel=1e-5)
    assert [event.step for event in seen] == [1, 2, 3]
    with (tmp_path / "run" / "summary.csv").open(encoding="utf-8") as file:
        summary = list(csv.DictReader(file))
    assert [float(row["eval_top1"]) for row in summary] == pytest.approx([100 * float(row["accuracy"]) for row in own])
    assert [row["epoch"] for row in summary] == ["0", "1", "2"]
    assert [row["train_loss"] for row in summary] == [row["loss"] for row in own]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trackers: [tensorbord]", "no tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("torchcompile: {backend: inducter}", "no backend 'inducter'; did you mean 'inductor'"),
        ("torchcompile: {mode: max-autotun}", "no mode 'max-autotun'; did you mean 'max-autotune'"),
    ],
)
def test_names_that_torch_or_accelerate_do_not_know_are_refused_in_the_plan(line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(parse(f"{SHORT}{line}\n"))


@pytest.mark.parametrize(
    "text", [TRUNK, GRAFT, ROCKET.replace("modules: interval", "modules: interval, block: params")]
)
def test_what_compiled_code_would_not_notice_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="which compiled code does not notice; leave `torchcompile` out"):
        plan(parse(text + "torchcompile: {target: student}\n"))


def test_check_says_what_does_not_run_and_how_much_a_cache_will_hold(
    command: Command,
    tmp_path: Path,
) -> None:
    text = SHORT.replace("  train: {epochs: 1}", "  train: {epochs: 1}\n  cache: C").replace(
        "  hflip", "  views: 2\n  hflip"
    )
    (tmp_path / "r.yaml").write_text(text)
    result = command("check", "r.yaml", "--json")
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)["not_run"]
    assert [(row["stage"], row["side"], row["last"]) for row in rows] == [
        ("hint", "student", "blocks.1"),
        ("hint", "teacher", "layer3"),
    ]
    assert {"layer4", "fc"} <= set(rows[1]["modules"])
    teacher = planned(SHORT).teacher
    assert teacher is not None
    above = sum(teacher.modules[name].macs for name in ("layer4", "fc"))
    assert rows[1]["share"] == pytest.approx(above / teacher.macs, rel=1e-6)
    shown = command("check", "r.yaml").stdout
    assert "layer4" in shown
    # the hint in one epoch sees view 0, the task in two views 1 and 0
    numbers = [teacher[name].shape[1:] for name in ("layer2", "layer3")]
    size = 4 * 1437 * (sum(torch.Size(shape).numel() for shape in numbers) + 2 * 10)
    assert f"will hold up to {size / 1e9:.3g} GB:" in shown
