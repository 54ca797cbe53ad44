"""What a recipe may say of how it is run: compiled, checkpointed, in another precision or layout, with trackers."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from conftest import GRAFT, ROCKET, TINY, TRUNK, record
from running import run
from safetensors.torch import load_file

from probe_kd import Distiller, InputSpec, Objective
from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.optimizers import make_optimizer

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


def test_a_compiled_run_compiles_each_stage_once(tmp_path: Path) -> None:
    """Whatever is scheduled, evaluated in other modes, measured of pairs, or smaller than a batch."""
    text = """\
student: {model: resnet10t, model_kwargs: {channels: [4, 4, 8, 8]}}
teacher: {model: resnet10t, model_kwargs: {channels: [4, 8, 8, 8]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], fraction: 0.15, batch_size: 64, hflip: 0.0, holdout: 0.2}
pairs: {layer2: layer2}
evaluate: {pairs: true}
stages:
  - {name: hint, epochs: 2, losses: {hint: {loss: hint}}, keep: best}
  - name: task
    epochs: 3
    keep: best
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, weight: {start: 1.0, end: 0.1, shape: cosine}}
      hint: {loss: hint, weight: {start: 1.0, end: 0.0, epochs: 1}}
torchcompile: {backend: eager}
"""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run(text, tmp_path / "run")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3, "of the teacher, and of the student's stages"
    assert not torch._dynamo.utils.counters["graph_break"]


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
    text = text.replace("batch_size: 64", "batch_size: 16\n  holdout: 0.9")
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
    own = [row for row in record(tmp_path / "run") if row["role"] == "student"]
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


TEACHERS = "teachers: {one: {model: resnet10t, train: {epochs: 1}}, two: {model: resnet10t, train: {epochs: 1}}}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("  - name: task", "  - name: task\n    grad_accum_steps: 2"),
            "would add up the wrong ones; take another mode",
        ),
        (
            ("teacher:\n  model: resnet10t\n  train: {epochs: 1}", TEACHERS),
            "would overwrite what the one before it gave",
        ),
    ],
)
def test_cuda_graphs_that_would_be_overwritten_are_refused(change: tuple[str, str], message: str) -> None:
    text = SHORT.replace("layer2", "one:layer2").replace("layer3", "two:layer3") if TEACHERS in change else SHORT
    text = text.replace(*change) + "torchcompile: {target: teacher, mode: MODE}\n"
    with pytest.raises(RecipeError, match=message):
        plan(parse(text.replace("MODE", "reduce-overhead")))
    plan(parse(text.replace("MODE", "max-autotune-no-cudagraphs")))


@pytest.mark.parametrize(
    "text", [TRUNK, GRAFT, ROCKET.replace("modules: interval", "modules: interval, block: params")]
)
def test_what_compiled_code_would_not_notice_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="which compiled code does not notice; leave `torchcompile` out"):
        plan(parse(text + "torchcompile: {target: student}\n"))
