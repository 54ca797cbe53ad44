"""The Distiller: one step against a loop written by hand, and a teacher that nothing can see or change."""

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from probe_kd import LOSSES, Distiller, InputSpec, Objective, Pair, Schedule, match, trace
from probe_kd.errors import AdapterError, LossError, ProbeKDError, TapError, TraceError
from probe_kd.methods.losses.matrices import flow_matrix, fsp

SMALL_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
HINT = Objective("hint", pairs=[Pair("blocks.1", "layer2"), Pair("blocks.3", "layer4", weight=0.5)], weight=2.0)
SOFT = Objective("soft_targets", "soft", options={"temperature": 2.0}, weight=0.7)
TASK = Objective("cross_entropy", "task")


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
    return student, timm.create_model("resnet10t", num_classes=10)


def batch(size: int = 64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, size, size, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def distil(objectives: Sequence[Objective] = (TASK, SOFT, HINT), **options: Any) -> Distiller:
    student, teacher = models()
    same = InputSpec((3, 64, 64), 0.0, 1.0)
    return Distiller(student, teacher, objectives, **{"student_input": same, "teacher_input": same, **options}).train()


def test_a_step_is_what_a_loop_by_hand_does() -> None:
    distiller = distil()
    student, teacher = models()
    student.train()
    student.load_state_dict(distiller.student.state_dict())
    teacher.load_state_dict(distiller._teacher.probe.model.state_dict())  # type: ignore[union-attr]
    images, target = batch()
    result = distiller(images, target)

    seen: dict[str, Tensor] = {}
    student.blocks[1].register_forward_hook(lambda *_: seen.update({"blocks.1": _[2]}))
    student.blocks[3].register_forward_hook(lambda *_: seen.update({"blocks.3": _[2]}))
    logits = student(images)
    with torch.no_grad():
        told = teacher.eval()(images)
        maps = teacher.forward_intermediates(images, intermediates_only=True)
    hints = []
    for index, (name, theirs) in enumerate((("blocks.1", maps[2]), ("blocks.3", maps[4]))):
        tokens = seen[name][:, 1:]  # without the class token
        map_ = tokens.transpose(1, 2).reshape(4, 48, 8, 8)
        map_ = F.adaptive_avg_pool2d(map_, theirs.shape[2:])
        projector = distiller.adapters["hint_"][index].student_steps[-1]
        hints.append(F.mse_loss(F.conv2d(map_, projector.weight, projector.bias), theirs))
    task, hint = F.cross_entropy(logits, target), hints[0] + 0.5 * hints[1]
    soft = 4 * F.kl_div((logits / 2).log_softmax(1), (told / 2).softmax(1), reduction="batchmean")
    for name, expected in (("task", task), ("soft", soft), ("hint", hint), ("output", logits)):
        torch.testing.assert_close(result[name], expected, msg=name)
    torch.testing.assert_close(result["loss"], task + 0.7 * soft + 2.0 * hint)

    result["loss"].backward()
    (task + 0.7 * soft + 2.0 * hint).backward()
    for (name, ours), other in zip(distiller.student.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_result_is_the_contract_of_timms_training_task() -> None:
    result = distil()(*batch())
    assert list(result) == ["loss", "output", "task", "soft", "hint"]
    assert result["output"].shape == (4, 10)
    assert all(result[name].ndim == 0 for name in ("loss", "task", "soft", "hint"))


def test_nothing_changes_the_teacher_and_nobody_sees_it() -> None:
    distiller = distil()
    teacher = distiller._teacher.probe.model  # type: ignore[union-attr]
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    assert distiller.student.training
    assert not any(module.training for module in teacher.modules())
    names = {name.split(".")[0] for name in (*distiller.state_dict(), *dict(distiller.named_parameters()))}
    assert names == {"student", "adapters"}
    assert teacher not in set(distiller.modules())
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for seed in range(2):
        distiller(*batch(seed=seed))["loss"].backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_the_teacher_follows_to_another_precision() -> None:
    distiller = distil().double()
    assert {parameter.dtype for parameter in distiller._teacher.probe.model.parameters()} == {torch.float64}  # type: ignore[union-attr]
    images, target = batch()
    assert distiller(images.double(), target)["loss"].dtype == torch.float64


def test_each_model_sees_images_of_its_own_size_and_normalisation() -> None:
    student, teacher = models()
    ours = InputSpec((3, 64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    theirs = InputSpec((3, 96, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    distiller = Distiller(student, teacher, [SOFT, HINT], student_input=ours, teacher_input=theirs).eval()
    pixels = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    seen: dict[int, Tensor] = {}
    student.register_forward_pre_hook(lambda _, args: seen.update({0: args[0]}))
    teacher.register_forward_pre_hook(lambda _, args: seen.update({1: args[0]}))
    distiller((pixels - 0.5) / 0.5)
    small = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (theirs.mean, theirs.std))
    torch.testing.assert_close(seen[0], (small - 0.5) / 0.5)
    torch.testing.assert_close(seen[1], (pixels - mean) / std, rtol=1e-5, atol=1e-5)


def test_the_student_stops_below_where_no_loss_needs_its_output() -> None:
    distiller = distil([Objective("hint", pairs=[Pair("blocks.1", "layer2")])])
    for _ in range(2):
        distiller.zero_grad()
        result = distiller(batch()[0])
        assert result["output"] is None
        result["loss"].backward()
    untouched = {name for name, p in distiller.student.named_parameters() if p.grad is None}
    assert {"head.weight", "blocks.2.norm1.weight", "blocks.3.mlp.fc1.weight"} <= untouched
    assert not any(name.startswith(("blocks.0", "blocks.1", "patch_embed")) for name in untouched)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_every_kind_of_pair(loss: str) -> None:
    torch.manual_seed(0)
    student, teacher = timm.create_model("resnet10t", num_classes=10), timm.create_model("resnet18", num_classes=10)
    names = {"srrl": ("global_pool",)}.get(loss, ("layer1", "layer2", "layer3"))  # before the teacher's classifier
    pairs = [Pair(name, "" if loss == "ofa_exits" else name) for name in names] if LOSSES[loss].reads_layers else []
    same = InputSpec((3, 64, 64))
    distiller = Distiller(student, teacher, [Objective(loss, pairs=pairs)], student_input=same, num_images=9).train()
    images, target = batch()
    target = torch.eye(10)[target] if LOSSES[loss].multilabel else target
    distiller(images, target, index=torch.arange(len(images)))["loss"].backward()
    assert student.layer1[0].conv1.weight.grad is not None
    assert student.conv1[0].weight.grad.abs().sum() > 0


def test_a_flow_may_run_between_two_pairs() -> None:
    student, teacher = timm.create_model("resnet10t"), timm.create_model("resnet18")
    pairs = [Pair("layer1", "layer1"), Pair("layer2", "layer2", weight=0.5), Pair("layer3", "layer4")]
    flow = Objective("fsp", "flow", pairs=pairs, between=[["layer1", "layer2"], ["layer2", "layer3"]], policy="always")
    same = InputSpec((3, 64, 64))
    distiller = Distiller(student, teacher, [flow], student_input=same, teacher_input=same).eval()
    assert [str(comparison) for comparison in flow.comparisons] == [
        "layer1 <- layer1 to layer2 <- layer2",
        "layer2 <- layer2 to layer3 <- layer4",
    ]
    images = batch()[0]
    ours = dict(zip(("layer1", "layer2", "layer3"), student.eval().forward_intermediates(images)[1][1:4], strict=True))
    theirs = dict(
        zip(("layer1", "layer2", "layer4"), pick(teacher.eval().forward_intermediates(images)[1]), strict=True)
    )
    total = 0.0
    for index, (a, b, c, d) in enumerate((("layer1", "layer2") * 2, ("layer2", "layer3", "layer2", "layer4"))):
        first, second = distiller.adapters["flow_"][index].parameters()
        matrix = first @ flow_matrix(ours[a], ours[b]) @ second.T
        total += 0.5 * fsp(matrix, flow_matrix(theirs[c], theirs[d])).item()
    assert distiller(images)["loss"].item() == pytest.approx(total, rel=1e-4)
    for wrong, says in (([["layer1"]], "two layers"), ([["layer1", "layr2"]], "did you mean 'layer2'")):
        with pytest.raises(LossError, match=says):
            Objective("fsp", pairs=pairs, between=wrong)
    with pytest.raises(LossError, match="`between` means nothing"):
        Objective("hint", pairs=pairs, between=[["layer1", "layer2"]])


def pick(features: list[Tensor]) -> list[Tensor]:
    return [features[1], features[2], features[4]]


@pytest.mark.parametrize(
    ("loss", "options", "says"),
    [
        ("fsp", {"normalize": "layer"}, "`normalize` means nothing for 'fsp'.*`relative: true`"),
        ("attention", {"policy": "always"}, "`policy` means nothing for 'attention'"),
        ("cross_entropy", {"of": "techer"}, "of 'techer': expected 'student' or 'teacher'; did you mean 'teacher'"),
        ("soft_targets", {"tokens": "cls"}, "`tokens` means nothing for 'soft_targets'"),
    ],
)
def test_what_means_nothing_for_a_loss_is_refused(loss: str, options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        Objective(loss, pairs=[Pair("layer1", "layer1")], **options)


@pytest.mark.parametrize(
    ("loss", "options", "says"),
    [
        ("fsp", {"relative": "no"}, "relative is 'no'; expected true or false"),
        ("soft_targets", {"standardize": 1}, "standardize is 1; expected true or false"),
        ("dist", {"inter": True}, "inter is True; expected a finite number"),
        ("soft_targets", {"temperature": float("inf")}, "temperature is inf; expected a finite number"),
        ("soft_targets", {"temperature": Schedule(4.0, float("nan"))}, "temperature is nan; expected a finite number"),
        ("hint", {"reduction": "means"}, "reduction is 'means'; expected 'sum' or 'mean'; did you mean 'mean'"),
        ("attention", {"form": ["code"]}, r"form is \['code'\]; expected 'paper' or 'code'"),
    ],
)
def test_a_value_of_another_type_than_its_option_is_refused(loss: str, options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        Objective(loss, pairs=[Pair("layer1", "layer1")], options=options)


def test_copies_and_compiled_distillers_do_the_same() -> None:
    distiller, (images, target) = distil().eval(), batch()
    expected = distiller(images, target)
    twin = copy.deepcopy(distiller)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(distil().eval(), backend=counter, fullgraph=True)
    for other in (twin, compiled):
        for name, value in other(images, target).items():
            torch.testing.assert_close(value, expected[name])
    compiled(*batch(seed=5))
    assert counter.frame_count == 1
    nn.init.zeros_(twin.student.head.weight)
    assert torch.equal(distiller(images, target)["loss"], expected["loss"])


@pytest.mark.parametrize("how", ["step", "models"])
def test_a_compiled_step_of_hints_runs_no_layer_above_the_last_tap(how: str) -> None:
    """Dead code would be dropped but for batch norms, whose statistics an eager step does not move."""
    student = timm.create_model("resnet10t", channels=(8, 8, 16, 16), num_classes=10)
    teacher = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=10)
    twin = copy.deepcopy(student)
    hint = Objective("hint", pairs=[Pair("layer2", "layer2")])
    eager, compiled = (
        Distiller(model, teacher, hint, student_input=InputSpec((3, 64, 64), 0.0, 1.0)).train()
        for model in (student, twin)
    )
    compiled.adapters.load_state_dict(eager.adapters.state_dict())
    torch.compiler.reset()
    convolutions = []

    def backend(graph: Any, _: Any) -> Any:
        convolutions.append(sum(node.target is torch.conv2d for node in graph.graph.nodes))
        return graph.forward

    if how == "step":
        compiled.compile(backend=backend, fullgraph=True)
    else:
        compiled.compile_models("student", "teacher", backend=backend, fullgraph=True)
    images = torch.randn(4, 3, 64, 64)
    expected, result = eager(images)["loss"], compiled(images)["loss"]
    torch.testing.assert_close(result, expected)
    result.backward()
    counted = [
        sum(
            isinstance(it, nn.Conv2d) for name, it in model.named_modules() if not name.startswith(("layer3", "layer4"))
        )
        for model in (student, teacher)
    ]
    assert sorted(convolutions) == ([sum(counted) + 1] if how == "step" else sorted(counted))
    for (name, one), two in zip(student.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def test_losses_are_computed_in_float32_under_autocast() -> None:
    distiller = distil()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distiller(*batch())
    assert result["output"].dtype == torch.bfloat16
    assert {result[name].dtype for name in ("loss", "task", "soft", "hint")} == {torch.float32}
    result["loss"].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in distiller.parameters())


def test_closing_takes_all_hooks_off() -> None:
    distiller = distil()
    both = [distiller.student, distiller._teacher.probe.model]  # type: ignore[union-attr]
    distiller.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in both for m in model.modules())


def test_the_plan_says_what_is_compared() -> None:
    lines = [f"{name}: {pair}: {adapter}" for name, pair, adapter in distil().plan]
    assert lines == [
        "soft: output <- output: vector 10",
        "hint: blocks.1 <- layer2: tokens 8x8+1 48 -> map -> conv1x1 48->128",
        "hint: blocks.3 <- layer4: tokens 8x8+1 48 -> map -> 2x2 -> conv1x1 48->512",
    ]


@pytest.mark.parametrize(
    ("objectives", "held"),
    [
        ([Objective("hint", pairs=[("layer1", "blocks.1")])], 1),  # the class token is sliced off: a view
        ([Objective("hint", pairs=[("layer1", "blocks.1")], tokens="cls")], 0),
        ([Objective("hint", pairs=[("layer1", "blocks.1")], normalize="layer")], 0),
        ([Objective("gram", pairs=[("layer1", "blocks.1")]), Objective("hint", pairs=[("layer2", "blocks.1")])], 1),
        ([Objective("gram", pairs=[("layer1", "blocks.1"), ("layer2", "blocks.2")], policy="always")], 0),
    ],
)
def test_features_of_the_teacher_are_gone_when_the_student_runs(objectives: list[Objective], held: int) -> None:
    """All but those that are compared as they are: the memory of the others is free for the student."""
    teacher, student = models()
    same = InputSpec((3, 64, 64), 0.0, 1.0)
    distiller = Distiller(student, teacher, objectives, student_input=same, teacher_input=same).train()
    images, _ = batch()
    features: list[StorageWeakRef] = []
    for block in teacher.blocks[1:3]:  # before the probe, which stops at its last tap
        block.register_forward_hook(lambda *_: features.append(StorageWeakRef(_[2].untyped_storage())), prepend=True)
    alive: list[int] = []
    student.register_forward_pre_hook(lambda *_: alive.append(sum(not feature.expired() for feature in features)))
    distiller(images)["loss"].backward()
    assert features
    assert alive == [held]


def test_matched_pairs_go_straight_in() -> None:
    student, teacher = models()
    pairs = match(trace(student, 64, training=True), trace(teacher, 64))
    distiller = Distiller(student, teacher, [Objective("hint", pairs=pairs)], student_input=InputSpec((3, 64, 64)))
    assert len(distiller.plan) == 4
    assert torch.isfinite(distiller(batch()[0])["loss"])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: distil([]), LossError, "at least one objective"),
        (lambda: distil([TASK, TASK]), LossError, "two objectives are named 'task'"),
        (lambda: Objective("hitn"), LossError, "there is no loss 'hitn'; did you mean 'hint'"),
        (lambda: Objective("hint"), LossError, "there are no pairs; name them"),
        (lambda: Objective("soft_targets", options={"T": 2}), LossError, "no option 'T'; it has temperature"),
        (lambda: Objective("logits", "loss"), LossError, "cannot be named 'loss'"),
        (lambda: distil([Objective("hint", pairs=[Pair("blocks.9", "layer2")])]), TapError, "did you mean 'blocks"),
        (lambda: distil([Objective("hint", pairs=[Pair("blocks.1", "layer9")])]), TapError, "did you mean 'layer"),
        (lambda: Distiller(models()[0], None, [SOFT]), LossError, "'soft' need a teacher"),
        (lambda: distil([TASK])(batch()[0]), LossError, "'task' compares with labels, and the step got no target"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_the_first_step(make: Any, error: type, says: str) -> None:
    assert issubclass(error, ProbeKDError)
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (Objective("hint", pairs=[("blocks.1", "layer1")]), "layer1: map 16x16 64 -> 8x8"),
        (Objective("hint", pairs=[("blocks.1", "layer2")]), "layer2"),  # of one size: nothing is smaller
        (
            Objective("hint", pairs=[("blocks.1", "layer1")], normalize="layer"),
            "layer1: map 16x16 64 -> 8x8 -> layer norm",
        ),
        (Objective("hint", pairs=[("blocks.1", "layer1")], normalize="channel"), "layer1"),  # over the batch
        (
            Objective("hint", pairs=[("blocks.1", "layer1")], policy="fixed"),
            "layer1: map 16x16 64 -> 8x8 -> fixed 64->48",
        ),
        (Objective("hint", pairs=[("blocks.1", "layer1")], tokens="pool"), "layer1: map 16x16 64 -> mean"),
        (Objective("gram", pairs=[("blocks.1", "layer1")]), "layer1: map 16x16 64 -> matrix 64x64"),
        (Objective("gram", pairs=[("blocks.3", "layer4")]), "layer4"),  # 512 x 512 numbers where the map has 512 x 4
        (
            Objective("fsp", pairs=[("blocks.1", "layer2")]),
            "layer2@input . layer2: map 16x16 64 . map 8x8 128 -> matrix 64x128",
        ),
        (Objective("attention", pairs=[("blocks.1", "layer1")]), "layer1: map 16x16 64 -> 8x8"),
        (Objective("soft_targets"), ""),
    ],
    ids=lambda it: it.loss if isinstance(it, Objective) else it,
)
def test_a_step_that_is_told_what_the_teacher_gave_is_the_step_that_asks(objective: Objective, kept: str) -> None:
    distiller = distil([objective])
    images, target = batch()
    cached = distiller.teacher_targets(images)
    assert distiller.targets == (kept,)
    assert [tuple(feature.shape[1:]) for feature in cached] == [it.shape for it in distiller._targets.values()]
    assert not any(feature.requires_grad for feature in cached)
    live = distiller(images, target)
    with mock.patch.object(distiller._teacher, "run", side_effect=AssertionError("the teacher ran")):
        again = distiller(images, target, cached)
    assert torch.equal(live["loss"], again["loss"])
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(it["loss"], parameters, allow_unused=True) for it in (live, again))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_what_two_losses_take_of_the_teacher_is_asked_for_once() -> None:
    hint = [("blocks.1", "layer1")]
    objectives = [Objective("hint", pairs=hint), Objective("hint", "again", pairs=hint), Objective("logits"), SOFT]
    distiller = distil(objectives)
    assert distiller.targets == ("layer1: map 16x16 64 -> 8x8", "")
    assert len(distiller.teacher_targets(batch()[0])) == 2


CONFIGURED = {"student_input": InputSpec((3, 64, 64)), "teacher_input": InputSpec((3, 64, 64))}


class Plain(nn.Module):
    """A model that no timm config belongs to; `through` is what stands between its two parts."""

    def __init__(self, through: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.through, self.head = nn.Conv2d(3, 8, 3, 2, 1), through or nn.Identity(), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.through(self.body(images)).mean((2, 3)))
        return logits


def loss_of(**inputs: Any) -> float:
    student, teacher = models()  # mean and std 0.5, and those of ImageNet
    distiller = Distiller(student.eval(), teacher, [SOFT], **inputs).eval()
    with torch.no_grad():
        return float(distiller(batch()[0])["loss"])


def test_an_input_of_a_size_alone_is_normalised_as_the_models_own_config_says() -> None:
    size, half, imagenet = (3, 64, 64), (0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spelled = {"student_input": InputSpec(size, *half), "teacher_input": InputSpec(size, *imagenet)}
    expected = loss_of(**spelled)
    alone = {side: InputSpec(size) for side in spelled}
    assert loss_of() == loss_of(**alone) == loss_of(teacher_input=alone["teacher_input"]) == expected
    assert loss_of(**{**alone, "teacher_input": InputSpec(size, std=imagenet[1])}) == expected
    assert loss_of(**{side: InputSpec(size, 0.0, 1.0) for side in spelled}) != expected  # none at all is said


def test_where_only_one_model_says_how_images_are_normalised_it_has_to_be_given() -> None:
    teacher = models()[1]
    with pytest.raises(LossError, match=r"for the student, Plain, .*give student_input=InputSpec\(\(3, 64, 64\), mean"):
        Distiller(Plain(), teacher, [SOFT], student_input=InputSpec((3, 64, 64)))
    with pytest.raises(LossError, match="for the teacher, Plain"):
        Distiller(teacher, Plain(), [SOFT])
    seen: list[Tensor] = []
    unknown = Plain()
    unknown.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Distiller(Plain(), unknown, [SOFT], student_input=InputSpec((3, 64, 64))).eval()(batch()[0])
    assert torch.equal(seen[-1], batch()[0])  # two that say nothing see the images as they are


def test_a_train_of_a_module_around_both_does_not_move_the_teacher() -> None:
    teacher = models()[1]
    outer = nn.ModuleDict(
        {"teacher": teacher, "distiller": Distiller(models()[0], teacher, [TASK, SOFT], **CONFIGURED)}
    )
    before = copy.deepcopy(teacher.state_dict())
    for module in (outer, teacher, teacher.layer1):  # all of it, and a part
        module.train()
        outer["distiller"](*batch())["loss"].backward()
        assert not any(part.training for part in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def shared_by(how: str) -> tuple[nn.Module, nn.Module]:
    student, teacher = (timm.create_model("resnet10t", num_classes=10) for _ in range(2))
    if how == "one model":
        return teacher, teacher
    if how == "a layer":
        student.layer1 = teacher.layer1
    elif how == "a parameter":
        student.fc.weight = teacher.fc.weight
    elif how == "memory":  # another Parameter, on the same numbers
        student.fc.weight = nn.Parameter(teacher.fc.weight.detach())
    elif how == "statistics":
        student.bn1.running_mean = teacher.bn1.running_mean
    elif how == "a wrapper":
        return nn.Sequential(teacher), teacher
    return student, teacher


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("one model", "are one object"),
        (
            "a layer",
            "'layer1.0.conv1.weight' of the student is 'layer1.0.conv1.weight' of the teacher, which is frozen",
        ),
        ("a parameter", "'fc.weight' of the student is 'fc.weight' of the teacher"),
        ("memory", "'fc.weight' of the student is 'fc.weight' of the teacher"),
        ("statistics", "'bn1.running_mean' of the student"),
        ("a wrapper", "'0.conv1.0.weight' of the student is 'conv1.0.weight' of the teacher"),
    ],
)
def test_what_a_student_has_in_common_with_a_frozen_teacher_is_refused_by_name(how: str, says: str) -> None:
    with pytest.raises(LossError, match=says):
        Distiller(*shared_by(how), [TASK, SOFT], **CONFIGURED)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, feature: Tensor) -> Tensor:
        given = feature.detach().requires_grad_() if not feature.requires_grad else feature
        result: Tensor = checkpoint(self.inner, given, use_reentrant=True)
        return result


class Cut(nn.Module):
    def forward(self, feature: Tensor) -> Tensor:
        return feature.detach()


@pytest.mark.parametrize(("through", "tap"), [(Reentrant(), "through.inner"), (Cut(), "through")])
def test_a_tapped_feature_without_a_gradient_is_told_in_the_first_step(through: nn.Module, tap: str) -> None:
    student, teacher = Plain(through), models()[1]
    plain = {"student_input": InputSpec((3, 64, 64), 0.0, 1.0), "teacher_input": InputSpec((3, 64, 64), 0.0, 1.0)}
    distiller = Distiller(student, teacher, [Objective("hint", pairs=[(tap, "layer1")])], **plain).train()
    with pytest.raises(LossError, match=f"no gradient reaches the student through '{tap}'"):
        distiller(*batch())
    distiller.eval()(*batch())
    with torch.no_grad():
        distiller.train()(*batch())


def test_a_frozen_body_is_told_and_a_student_all_of_which_is_frozen_lets_the_adapters_learn() -> None:
    hint = Objective("hint", pairs=[("body", "layer1")])
    plain = {"student_input": InputSpec((3, 64, 64), 0.0, 1.0), "teacher_input": InputSpec((3, 64, 64), 0.0, 1.0)}
    distiller = Distiller(Plain(), models()[1], [hint], **plain).train()
    distiller.student.body.requires_grad_(False)
    with pytest.raises(LossError, match="through 'body': all before it is frozen"):
        distiller(batch()[0])
    distiller.student.requires_grad_(False)
    distiller(batch()[0])["loss"].backward()
    assert all(parameter.grad is not None for parameter in distiller.adapters.parameters())


def test_a_lazy_module_is_refused_in_words() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    for sides in ((lazy, models()[1]), (models()[0], lazy)):
        with pytest.raises(
            TraceError, match=r"'1' of the .* is a LazyLinear, which has no size before its first forward"
        ):
            Distiller(*sides, [SOFT], **CONFIGURED)


@pytest.mark.parametrize(
    ("images", "target", "says"),
    [
        (torch.zeros(4, 3, 64, 64, dtype=torch.uint8), None, "the images are torch.uint8; expected floats"),
        (np.zeros((4, 3, 64, 64), np.float32), None, "the images are a ndarray; expected a torch.Tensor"),
        (torch.zeros(4, 1, 64, 64), None, "4x1x64x64; expected batch x 3 x .*Grey"),
        (torch.zeros(4, 64, 64, 3), None, "4x64x64x3; expected batch x 3 x height"),
        (torch.zeros(3, 64, 64), None, "3x64x64; expected batch"),
        (torch.zeros(0, 3, 64, 64), None, "0x3x64x64; expected batch"),
        (
            torch.zeros(4, 3, 64, 64, dtype=torch.float64),
            None,
            r"torch.float64, and the student is not, but torch.float32; give `images.f",
        ),
        (torch.zeros(4, 3, 64, 64).half(), None, r"torch.float16, and the student is not.*`images.float.*autocast"),
        (torch.zeros(4, 3, 64, 64).bfloat16(), None, r"torch.bfloat16, and the student is not"),
        (torch.zeros(4, 3, 64, 64).index_fill(0, torch.tensor(2), torch.nan), None, "image 2 of the batch holds nan"),
        (torch.full((4, 3, 64, 64), torch.inf), None, "image 0 of the batch holds inf.*expected finite numbers"),
        (torch.zeros(4, 3, 64, 64), torch.tensor([0, 1, 2, 10]), "label 10 of 10 classes"),
        (torch.zeros(4, 3, 64, 64), torch.tensor([0, 1, 2]), r"a target \(3,\)"),
        (torch.zeros(4, 3, 64, 64), np.zeros(4, np.int64), "the target is a ndarray"),
        (torch.zeros(4, 3, 64, 64), torch.zeros(4), r"class indices \(whole numbers\)"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_step_refuses_what_is_no_batch_of_images_and_labels(images: Any, target: Any, says: str, given: bool) -> None:
    inputs = CONFIGURED if given else {}
    student, teacher = models()
    labels = torch.zeros(4, dtype=torch.long) if target is None else target
    with pytest.raises(LossError, match=says):
        Distiller(student, teacher, [TASK, SOFT], **inputs)(images, labels)


def test_a_teacher_of_another_type_than_the_images_is_refused_and_autocast_takes_halves() -> None:
    student, teacher = models()
    distiller = Distiller(student, teacher, [TASK, SOFT], **CONFIGURED)
    images, target = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(distiller(images.bfloat16(), target)["loss"])
    teacher.bfloat16()
    with pytest.raises(LossError, match=r"torch.float32, and the teacher is not, but torch.bfloat16.*distiller.to"):
        distiller(images, target)


def test_one_image_is_refused_where_a_norm_in_training_would_have_one_value_of_it() -> None:
    teacher, images = models()[1], torch.randn(1, 3, 32, 32)
    small = {"student_input": InputSpec((3, 32, 32)), "teacher_input": InputSpec((3, 32, 32))}
    distiller = Distiller(timm.create_model("resnet10t", num_classes=10), teacher, [SOFT], **small).train()
    with pytest.raises(LossError, match=r"the images are a batch of one, and a batch norm in training.*`batch_size`"):
        distiller(images)
    assert torch.isfinite(distiller.eval()(images)["loss"])


def test_models_whose_output_is_a_map_are_refused_where_a_loss_reads_outputs() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 10, 8, 8))
    with pytest.raises(AdapterError, match="the student's output is 10 x 8 x 8 an image"):
        Distiller(dense, copy.deepcopy(dense), [SOFT], student_input=InputSpec((3, 64, 64)))
