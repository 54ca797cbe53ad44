"""Rocket Launching: what is shared, which parameters each loss moves, and a student that stands alone afterwards."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GRAFT, ROCKET, TRUNK, record
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from probe_kd import (
    Distiller,
    InputSpec,
    Objective,
    Sharing,
    Tap,
    graft,
    load_student,
    share_convolutions,
    share_trunk,
    trace,
)
from probe_kd.errors import LossError, RecipeError, TapError
from probe_kd.methods.gradients import gradient_norms
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

SIZE = (3, 32, 32)
CHANNELS = {"channels": [8, 16, 24, 32], "num_classes": 10}
LIGHT, BOOSTER = (
    Objective("cross_entropy", "light"),
    Objective("cross_entropy", "booster", of="teacher"),
)
HINT = Objective("logits", "hint", options={"reduction": "sum"}, weight=0.03)


def resnets(deeper: tuple[int, ...] = (2, 2, 2, 2)) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    light = timm.create_model("resnet18", layers=[1, 1, 1, 1], **CHANNELS)
    return light, timm.create_model("resnet18", layers=list(deeper), **CHANNELS)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, *SIZE, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def weights(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, Sharing]:
    return student, share_convolutions(student, teacher, "interval")


def trunk(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, Sharing]:
    seen, known = trace(student, 32, training=True), trace(teacher, 32, training=True)
    return student, share_trunk(student, teacher, Tap("layer1"), Tap("layer1"), seen, known)


def grown(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, Sharing]:
    seen, known = trace(student, 32, training=True), trace(teacher, 32, training=True)
    return graft(student, teacher, Tap("layer1"), Tap("layer1"), seen, known)


FORMS: dict[str, Callable[[nn.Module, nn.Module], tuple[nn.Module, Sharing]]] = {
    "weights": weights,
    "trunk": trunk,
    "graft": grown,
}


def rocket(form: str, block: Any) -> tuple[Distiller, nn.Module]:
    # The trunk's own first stage has to be alike; elsewhere the booster is deeper.
    student, teacher = resnets((1, 2, 2, 2) if form == "trunk" else (2, 2, 2, 2))
    student, sharing = FORMS[form](student, teacher) if form != "none" else (student, None)
    same = InputSpec(SIZE)
    options = {"student_input": same, "teacher_input": same, "block": block, "sharing": sharing}
    return Distiller(student, teacher, [LIGHT, BOOSTER, HINT], **options).train(), teacher


def groups(distiller: Distiller, teacher: nn.Module) -> dict[str, set[int]]:
    ours = {id(p) for p in distiller.student.parameters()}
    theirs = {id(p) for p in teacher.parameters()}
    return {"student": ours - theirs, "shared": ours & theirs, "teacher": theirs - ours}


def moved(distiller: Distiller, teacher: nn.Module) -> dict[str, str]:
    """Per loss, the groups of parameters that get a gradient."""
    named, found = dict(distiller.named_parameters()), groups(distiller, teacher)
    moving = {}
    for loss, norms in gradient_norms(distiller, *batch()).items():
        reached = {id(named[name]) for name, norm in norms.items() if norm > 0}
        moving[loss] = " ".join(group for group, members in found.items() if members & reached)
    return moving


# The table in docs/methods.md.
MOVES = {
    "output": {"light": "student shared", "booster": "shared teacher", "hint": "student shared"},
    "params": {"light": "student shared", "booster": "shared teacher", "hint": "student shared"},
    "trunk": {"light": "student", "booster": "shared teacher", "hint": "student"},
    "off": {"light": "student shared", "booster": "shared teacher", "hint": "student shared teacher"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", MOVES)
def test_each_loss_moves_exactly_what_the_gradient_block_lets_it(form: str, block: str) -> None:
    distiller, teacher = rocket(form, block)
    assert all(groups(distiller, teacher).values())
    assert moved(distiller, teacher) == MOVES[block]


@pytest.mark.parametrize("block", MOVES)
def test_without_anything_shared_it_is_joint_training(block: str) -> None:
    distiller, teacher = rocket("none", block)
    expected = {loss: moves.replace(" shared", "").replace("shared ", "") for loss, moves in MOVES[block].items()}
    assert moved(distiller, teacher) == expected


def gradients(distiller: Distiller, loss: str) -> dict[str, Tensor]:
    named = dict(distiller.named_parameters())
    found = torch.autograd.grad(distiller(*batch())[loss], list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("form", ["weights", "trunk"])
def test_params_is_off_for_all_but_the_boosters_own_and_output_is_less(form: str) -> None:
    """By hand: the whole gradient of ||l - z||^2 through both, of which `params` leaves out the booster's own."""
    off, params, output = (gradients(rocket(form, block)[0], "hint") for block in ("off", "params", "output"))
    assert set(params) == set(output) < set(off)
    for name, gradient in params.items():
        torch.testing.assert_close(gradient, off[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(params[name], output[name]) for name in params)


@pytest.mark.parametrize("block", ["output", "params", "off"])
def test_two_steps_are_those_of_a_loop_by_hand(block: str) -> None:
    """The authors' code: shared weights, private norms, z detached, one optimizer."""
    distiller, teacher = rocket("weights", block)
    student, other = resnets()
    theirs = dict(other.named_modules())
    for name, module in student.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight = theirs[name].weight
    by_hand = list(dict.fromkeys([*student.parameters(), *other.parameters()]))
    own = [p for p in other.parameters() if not any(p is q for q in student.parameters())]
    ours, hand = (torch.optim.SGD(parameters, 0.05, momentum=0.9) for parameters in (distiller.parameters(), by_hand))
    for seed in range(2):
        images, target = batch(seed)
        ours.zero_grad()
        distiller(images, target)["loss"].backward()
        ours.step()
        hand.zero_grad()
        light, z = student.train()(images), other.train()(images)
        hint = 0.03 * ((light - (z.detach() if block == "output" else z)) ** 2).sum() / len(images)
        (F.cross_entropy(light, target) + F.cross_entropy(z, target)).backward(retain_graph=True)
        kept = [p.grad.clone() for p in own]
        hint.backward()
        if block == "params":  # the hint spares what is the booster's alone
            for parameter, gradient in zip(own, kept, strict=True):
                parameter.grad = gradient
        hand.step()
    for mine, yours in ((distiller.student, student), (teacher, other)):
        for (name, tensor), expected in zip(mine.state_dict().items(), yours.state_dict().values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("form", "inner"), [("trunk", "layer1.0.conv1"), ("graft", "layer1.1.conv2")])
@pytest.mark.parametrize("block", ["output", "params"])
def test_a_shared_trunk_runs_once_and_counts_its_batches_once(form: str, inner: str, block: str) -> None:
    distiller, teacher = rocket(form, block)
    calls = []
    layer = teacher.get_submodule(inner)
    forward = layer.forward
    layer.forward = lambda x: (calls.append(x.requires_grad or True), forward(x))[1]
    distiller(*batch())
    assert len(calls) == (2 if block == "params" else 1)  # `params` runs the booster once more, on purpose
    counters = {name: int(b) for name, b in distiller.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counters.values()) == {1}
    student = {id(module) for module in distiller.student.modules()}
    assert layer is teacher.get_submodule(inner)
    assert id(layer) in student


def test_private_norms_count_for_themselves() -> None:
    distiller, teacher = rocket("weights", "output")
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for seed in range(2):  # at first the booster's further blocks are identities
        distiller(*batch(seed))["loss"].backward()
        optimizer.step()
    student = distiller.student
    assert student.layer1[0].conv1.weight is teacher.layer1[0].conv1.weight
    assert student.layer1[0].bn1 is not teacher.layer1[0].bn1
    assert student.layer2[0].bn2.num_batches_tracked == teacher.layer2[0].bn2.num_batches_tracked == 2
    assert not torch.equal(student.layer2[0].bn2.running_mean, teacher.layer2[0].bn2.running_mean)


@pytest.mark.parametrize("form", FORMS)
def test_the_student_alone_answers_as_it_did_beside_the_teacher(form: str) -> None:
    distiller, _ = rocket(form, "output")
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05)
    distiller(*batch())["loss"].backward()
    optimizer.step()
    distiller.eval()
    images, target = batch(3)
    together = distiller(images, target)["output"]
    distiller.close()
    alone = copy.deepcopy(distiller.student)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in alone.modules())
    assert torch.equal(alone(images), together)
    if form != "graft":
        fresh = timm.create_model("resnet18", layers=[1, 1, 1, 1], **CHANNELS).eval()
        fresh.load_state_dict(alone.state_dict())
        assert torch.equal(fresh(images), together)


def test_patterns_share_the_bottom_or_the_first_blocks_of_every_stage() -> None:
    student, teacher = resnets()
    assert [*share_convolutions(student, teacher, "bottom").names][-1] == "layer1.0.downsample.0"
    names = share_convolutions(*resnets(), "interval").names
    assert {"conv1", "layer1.0.conv1", "layer4.0.conv2", "layer3.0.downsample.0"} <= set(names)
    assert not any(".1." in name or name == "fc" for name in names)
    named = share_convolutions(*resnets(), {"layer2.0": "layer2.0", "conv1": "conv1"})
    assert str(named) == "weights: layer2.0, conv1"


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda s, t: share_convolutions(s, t, {"layer1": "layer1"}), "only the teacher has '1.conv"),
        (
            lambda s, t: share_convolutions(s, t, {"layer1.0": "layer2.0"}),
            r"'layer1.0' cannot share weights with 'layer2.0'",
        ),
        (lambda s, t: share_convolutions(s, t, ["bn1"]), "no convolution or linear layer"),
        (lambda s, t: share_convolutions(s, t, ["layer9"]), "did you mean 'layer"),
        (lambda s, t: share_convolutions(s, timm.create_model("vit_tiny_patch16_224", depth=1), "bottom"), "nothing"),
        (trunk, "'layer1' of the student cannot be 'layer1' of the teacher: only the teacher has '1.bn1.bias'"),
        (
            lambda s, t: trunk(s, timm.create_model("resnet18", layers=[1, 1, 1, 1], act_layer="gelu", **CHANNELS)),
            "has ReLU.* where the teacher has GELU",
        ),
    ],
)
def test_what_differs_is_told_and_nothing_is_changed(do: Any, says: str) -> None:
    student, teacher = resnets()
    before = [id(p) for p in student.parameters()]
    with pytest.raises(TapError, match=says):
        do(student, teacher)
    assert [id(p) for p in student.parameters()] == before


def test_a_teacher_that_trains_needs_a_loss_and_one_that_does_not_has_none() -> None:
    student, teacher = resnets()
    for arguments, says in (
        (([LIGHT, HINT], "output"), "no objective is its own"),
        (([LIGHT, BOOSTER], None), "frozen"),
        (([LIGHT, BOOSTER], "outputs"), "block 'outputs': expected one of 'output', 'params', 'trunk', 'off'"),
    ):
        with pytest.raises(LossError, match=says):
            Distiller(student, teacher, arguments[0], block=arguments[1])  # type: ignore[arg-type]
    with pytest.raises(LossError, match="`of` one of them"):
        Objective("logits", of="teacher")
    same, wider = InputSpec(SIZE), InputSpec(SIZE, (0.5,))
    student, teacher = resnets((1, 2, 2, 2))
    _, sharing = trunk(student, teacher)
    inputs = {"student_input": same, "teacher_input": wider}
    with pytest.raises(LossError, match="a shared trunk sees one image"):
        Distiller(student, teacher, [LIGHT, BOOSTER], block="output", sharing=sharing, **inputs)


def go(text: str, folder: Path, display: Progress | None = None, **options: bool) -> Any:
    return train(plan(parse(text)), folder, display or Progress(Console(quiet=True)), **options)


@pytest.mark.parametrize("text", [ROCKET, TRUNK, GRAFT], ids=["weights", "trunk", "graft"])
def test_a_rocket_run_tells_what_the_booster_lost_and_resumes_exactly(tmp_path: Path, text: str) -> None:
    journal = go(text, tmp_path / "whole")
    assert list(journal.results) == ["teacher baseline", "teacher", "student"]
    assert all(result.accuracy > 0 for result in journal.results.values())
    assert record(tmp_path / "whole")[-1]["role"] == "student"

    class Stop(Progress):
        def epoch(self, row: dict[str, Any]) -> None:
            if (row["role"], row["epoch"]) == ("student", 1):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(text, tmp_path / "parts", Stop(Console(quiet=True)))
    go(text, tmp_path / "parts", resume=True)
    for file in ("student", "teacher", "teacher-baseline"):
        ours, theirs = (load_file(tmp_path / run / f"{file}.safetensors") for run in ("parts", "whole"))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file
    planned = plan(parse(text))
    student = load_student(tmp_path / "whole" / "student.safetensors")
    assert sum(p.numel() for p in student.parameters()) == planned.trained.parameters
    images = torch.randn(2, *planned.student_input.size)
    if text != GRAFT:
        path = str(tmp_path / "whole" / "student.safetensors")
        plain = timm.create_model(planned.student.model, checkpoint_path=path, **planned.student.model_kwargs)
        assert torch.equal(plain.eval()(images), student(images))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("form: weights", "form: wieghts", "'weights', 'trunk', 'graft' or 'none'"),
        ("modules: interval", "at: layer1", "form `weights` has no `at`; it has `modules`"),
        ("form: weights, modules: interval", "form: trunk", "form `trunk` needs `at`"),
        (
            "modules: interval",
            "modules: [layer1]",
            "'layer1' cannot share weights with 'layer1': only the student has '0.downsample.1'",
        ),
        ("modules: interval", "modules: [layer7]", "did you mean 'layer"),
        ("form: weights, modules: interval", "form: graft, at: head", "cut at 'head'|no module 'head'"),
        ("booster: {loss: cross_entropy, of: teacher}", "booster: {loss: cross_entropy}", "has no loss for it; add"),
        ("share: {form: weights, modules: interval}", "baseline: true", "learns only where both train together"),
        ("model: resnet18, ", "model: resnet18, train: {epochs: 1}, ", "the stages train the teacher too"),
    ],
)
def test_a_recipe_that_cannot_share_says_why(old: str, new: str, says: str) -> None:
    assert old in ROCKET
    with pytest.raises(RecipeError, match=says):
        plan(parse(ROCKET.replace(old, new, 1) if "model" not in old else ROCKET.replace(old, new)))
