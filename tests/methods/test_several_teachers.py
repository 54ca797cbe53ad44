"""Several teachers in one step: against loops by hand, a mean in float64, and what is refused."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from probe_kd import Distiller, InputSpec, Objective, Pair
from probe_kd.errors import LossError, ProbeKDError, TapError
from probe_kd.methods.ensembles import MeanOfTeachers
from probe_kd.methods.steps import Classes

PLAIN = InputSpec((3, 32, 32), 0.0, 1.0)
SMALL = {"channels": (8, 8, 16, 16), "num_classes": 10}
TASK = Objective("cross_entropy", "task")
SOFT = Objective("soft_targets", "soft", options={"temperature": 2.0})
BOTH = [Pair("layer4", "dino:blocks.1"), Pair("layer4", "siglip:layer4", weight=0.5)]
HINT = Objective("hint", pairs=BOTH, normalize="layer")


def student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", **SMALL)


def teachers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    vit = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 12}
    return {
        "dino": timm.create_model("vit_tiny_patch16_224", **vit).eval(),
        "siglip": timm.create_model("resnet18", **SMALL).eval(),
    }


INPUTS: dict[str, Any] = {
    "student_input": PLAIN,
    "teacher_input": {"dino": InputSpec((3, 48, 48), 0.5, 0.25), "siglip": InputSpec((3, 32, 32), 0.25, 0.5)},
}
CLASS_MAP = {"dino": [*range(11, 1, -1)]}


def distil(*objectives: Objective, models: Mapping[str, nn.Module] | None = None, **options: Any) -> Distiller:
    return Distiller(student(), models or teachers(), objectives, **{**INPUTS, **options}).train()


class Tiny(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU()), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


TINY_PAIRS = [Pair("body", "a:body"), Pair("body", "b:body")]


def tiny(*objectives: Objective, **options: Any) -> Distiller:
    torch.manual_seed(0)
    models = {"a": Tiny(6), "b": Tiny(4)}
    inputs: dict[str, Any] = {"student_input": PLAIN, "teacher_input": dict.fromkeys(models, PLAIN)}
    return Distiller(Tiny(4), models, objectives, **inputs, **options).train()


def batch(seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, 32, 32, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def test_a_step_with_two_teachers_is_what_a_loop_by_hand_does() -> None:
    models = teachers()
    distiller = distil(TASK, SOFT, HINT, models=models, class_map=CLASS_MAP, teacher_weight={"dino": 3.0})
    images, target = batch()
    result = distiller(images, target)

    seen: dict[str, Tensor] = {}
    hooked = (distiller.student.layer4, "own"), (models["dino"].blocks[1], "dino"), (models["siglip"].layer4, "siglip")
    for module, name in hooked:
        module.register_forward_hook(lambda *_, name=name: seen.update({name: _[2]}))
    logits = distiller.student(images)
    large = F.interpolate(images, (48, 48), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        outputs = {"dino": models["dino"]((large - 0.5) / 0.25), "siglip": models["siglip"]((images - 0.25) / 0.5)}
    hints = []
    tokens = seen["dino"][:, 1:].transpose(1, 2).reshape(4, 32, 6, 6)
    for index, map_ in enumerate((tokens, seen["siglip"])):
        size = min(map_.shape[-1], 1)  # the student's grid is a single position
        map_ = F.layer_norm(F.adaptive_avg_pool2d(map_, size).permute(0, 2, 3, 1), map_.shape[1:2]).permute(0, 3, 1, 2)
        projector = distiller.adapters["hint_"][index].student_steps[-1]
        hints.append(F.mse_loss(F.conv2d(seen["own"], projector.weight, projector.bias), map_))
    hint = 3.0 * hints[0] + 0.5 * hints[1]
    mean = 0.75 * outputs["dino"][:, CLASS_MAP["dino"]].softmax(1) + 0.25 * outputs["siglip"].softmax(1)
    soft = 4 * F.kl_div((logits / 2).log_softmax(1), (mean.log() / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(result["soft"], soft)
    torch.testing.assert_close(result["hint"], hint, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["loss"], F.cross_entropy(logits, target) + soft + hint, rtol=1e-4, atol=1e-5)
    own = [{id(parameter) for parameter in adapter.parameters()} for adapter in distiller.adapters["hint_"]]
    assert all(own)
    assert not own[0] & own[1]


numbers = st.floats(-30, 30) | st.just(-torch.inf)
rows = st.lists(numbers, min_size=3, max_size=3).map(lambda row: [0.5, *row])  # at least one class is not masked


@given(st.lists(st.tuples(rows, st.floats(0.01, 10), st.permutations(range(4))), min_size=1, max_size=4))
def test_the_mean_of_teachers_is_that_of_their_probabilities_in_float64(
    teachers: list[tuple[list[float], float, list[int]]],
) -> None:
    outputs = [torch.tensor([row]) for row, _, _ in teachers]
    weights = [weight for _, weight, _ in teachers]
    mean = MeanOfTeachers([Classes(class_map) for _, _, class_map in teachers], weights)(outputs)
    expected = sum(
        weight / sum(weights) * torch.tensor([row], dtype=torch.float64)[:, class_map].exp()
        / torch.tensor(row, dtype=torch.float64).exp().sum()
        for row, weight, class_map in teachers
    )  # fmt: skip
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(mean, expected.log().float(), rtol=1e-5, atol=1e-5)


def test_a_loss_of_outputs_reads_the_classifiers_alone_and_an_unread_teacher_does_not_run() -> None:
    models = teachers()
    distiller = distil(SOFT, models=models)  # dino has other classes, and no class map
    assert [f"{name}: {comparison}" for name, comparison, _ in distiller.plan] == ["soft: output <- siglip output"]
    assert distiller.unread_teachers == ("dino",)
    with mock.patch.object(models["dino"], "forward", side_effect=AssertionError("it ran")):
        distiller(batch()[0])
    both = distil(SOFT, models=models, class_map=CLASS_MAP)
    (line,) = both.plan
    assert str(line[1]) == "output <- mean of dino output, siglip output"
    assert line[2] == "vector 10 | teacher log of the mean: 0.5 dino output + 0.5 siglip output"
    assert not both.unread_teachers


def test_some_teachers_may_be_cached_while_the_others_run() -> None:
    models = teachers()
    distiller = distil(SOFT, HINT, models=models, class_map=CLASS_MAP)
    images = batch()[0]
    cached = dict(zip(distiller.targets, distiller.teacher_targets(images), strict=True))
    assert list(cached) == [
        *("dino:", "siglip:"),
        "dino:blocks.1: tokens 6x6+1 32 -> map -> 1x1 -> layer norm",
        "siglip:layer4",
    ]
    assert list(distiller.targets_of("siglip")) == ["siglip:", "siglip:layer4"]
    assert [target.name for target in distiller.targets_of("siglip").values()] == ["", "layer4"]
    live = distiller(images)
    for name in models:
        part = {key: cached[key] for key in distiller.targets_of(name)}
        again = distiller.teacher_targets(images, [name])
        assert all(torch.equal(one, two) for one, two in zip(part.values(), again, strict=True))
        for run in (part, cached):
            with mock.patch.object(models[name], "forward", side_effect=AssertionError("it ran")):
                assert torch.equal(distiller(images, None, run)["loss"], live["loss"])
    with pytest.raises(LossError, match="cached_targets has 'siglip:layer5'; did you mean 'siglip:layer4'"):
        distiller(images, None, {"siglip:layer5": images})


@pytest.mark.parametrize("how", ["step", "models"])
def test_a_compiled_step_does_the_same_and_draws_without_compiling_again(how: str) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    eager, compiled = (tiny(SOFT, Objective("hint", pairs=TINY_PAIRS), teacher_dropping=0.5) for _ in range(2))
    if how == "step":
        compiled.compile(backend=backend, fullgraph=True)
    else:
        compiled.compile_models("student", "teacher", backend=backend, fullgraph=True)
    losses = []
    for epoch in range(6):
        eager.set_epoch(epoch, 6)
        compiled.set_epoch(epoch, 6)
        losses += [eager(batch()[0])["loss"], compiled(batch()[0])["loss"]]
    torch.testing.assert_close(losses[::2], losses[1::2])
    assert len({f"{loss.item():.3f}" for loss in losses}) > 1
    assert len(graphs) == (1 if how == "step" else 3)  # the student and each teacher


def test_dropping_keeps_the_teacher_of_the_greatest_loss_and_draws_by_seed_epoch_and_step() -> None:
    hints = Objective("hint", "a", pairs=TINY_PAIRS[:1]), Objective("hint", "b", pairs=TINY_PAIRS[1:], weight=1e-3)
    distiller = tiny(TASK, *hints, teacher_dropping=0.5, seed=3)

    def drawn(epoch: float, steps: int = 40) -> list[bool]:
        """Whether each step learns from the second teacher, whose loss is small."""
        distiller.set_epoch(epoch, 1)
        learns = []
        for seed in range(steps):
            result = distiller(*batch(seed))
            both = result["task"] + result["a"] + 1e-3 * result["b"]
            learns.append(torch.isclose(result["loss"], both, rtol=1e-7).item())
            if not learns[-1]:
                torch.testing.assert_close(result["loss"], result["task"] + result["a"])
        return learns

    first = drawn(0.25)
    assert 10 < sum(first) < 30
    assert drawn(0.5) != first
    assert drawn(0.25) == first
    assert drawn(0.25, 3) == first[:3]
    result = distiller.eval()(*batch())
    torch.testing.assert_close(result["loss"], result["task"] + result["a"] + 1e-3 * result["b"])


def test_of_a_dropped_teacher_no_gradient_arrives() -> None:
    distiller = tiny(Objective("hint", pairs=TINY_PAIRS), teacher_dropping=1.0)
    distiller(batch()[0])["loss"].backward()
    norms = [adapter.student_steps[-1].weight.grad.norm() for adapter in distiller.adapters["hint_"]]
    assert sorted(norm > 0 for norm in norms) == [False, True]


def test_a_flow_between_two_layers_is_one_for_each_teacher() -> None:
    pairs = [Pair(layer, f"{name}:{layer}") for name in ("a", "b") for layer in ("layer2", "layer3")]
    flow = Objective("fsp", pairs=pairs, between=[("layer2", "layer3")])
    models = {name: timm.create_model("resnet10t", **SMALL) for name in ("a", "b")}
    plain = {"student_input": PLAIN, "teacher_input": dict.fromkeys(models, PLAIN)}
    distiller = distil(flow, models=models, **plain)
    assert [str(comparison) for _, comparison, _ in distiller.plan] == [
        "layer2 <- a:layer2 to layer3 <- a:layer3",
        "layer2 <- b:layer2 to layer3 <- b:layer3",
    ]
    distiller(batch()[0])["loss"].backward()


def other_classes() -> dict[str, nn.Module]:
    return {"siglip": timm.create_model("resnet18", **{**SMALL, "num_classes": 3})}


def hint(teacher: str) -> Objective:
    return Objective("hint", pairs=[("layer4", teacher)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: distil(hint("blocks.1")), "'blocks.1' does not say whose layer.*dino, siglip; write 'dino:blocks.1'$"),
        (lambda: distil(hint("layer9")), "write 'dino:layer9' or 'siglip:layer9'"),
        (lambda: distil(hint("dina:blocks.1")), "no teacher 'dina'; did you mean 'dino'.*the teachers: dino, siglip"),
        (lambda: distil(hint("dino:blocks.7")), "no module 'blocks.7'; did you mean 'blocks.1'"),
        (
            lambda: Distiller(student(), teachers()["siglip"], [hint("siglip:layer4")]),
            "'siglip:layer4' names the model 'siglip', and .* single one without a name; write 'layer4'",
        ),
        (lambda: distil(Objective("hint", pairs=[("dino:layer4", "dino:blocks.1")])), "write 'layer4'"),
        (lambda: distil(hint("glob:blocks.*")), "'glob:' begins a pattern"),
        (lambda: distil(SOFT, models={"re": student()}), "'re:' begins a pattern"),
        (lambda: distil(SOFT, models={"a b": student()}), "'a b' cannot be the name of a teacher"),
        (
            lambda: distil(SOFT, models={"dino": teachers()["dino"]} | other_classes()),
            "the student's 10 classes .dino yields vector 12, siglip yields vector 3.; name one, as in teacher='dino:'",
        ),
        (lambda: distil(SOFT, teacher_input=PLAIN), "teacher_input has to say which.*'dino': ...} of dino, sig"),
        (lambda: distil(SOFT, class_map={"dinno": [0]}), "class_map is for 'dinno'; did you mean 'dino'"),
        (lambda: distil(SOFT, teacher_weight={"dino": 0.0}), "weight 0.0 of the teacher 'dino': expected a finite num"),
        (lambda: distil(SOFT, teacher_dropping=0.5), "chooses between teachers.* compare with 'siglip' alone"),
        (lambda: distil(HINT, teacher_dropping=1.5), "teacher_dropping 1.5: expected a probability"),
        (lambda: distil(TASK, block="output"), "`block` trains a single teacher, and dino, siglip have names"),
        (
            lambda: Distiller(student(), student(), [SOFT], teacher_input={"dino": PLAIN}),
            "teacher_input is for 'dino'; the teachers: there is one teacher, without a name",
        ),
        (
            lambda: Distiller(student(), student(), [Objective("soft_targets", teacher="mean")]),
            "'mean' is the mean of several teachers' outputs, and there is one",
        ),
        (
            lambda: distil(Objective("soft_targets", teacher=["dino:", "siglip:"])),
            "the student has 10 classes and the teacher 12",
        ),
    ],
)  # fmt: skip
def test_what_is_not_said_of_several_teachers_is_asked_for_by_name(make: Any, says: str) -> None:
    with pytest.raises(ProbeKDError, match=says):
        make()


def test_one_teacher_with_a_name_needs_none_in_its_taps() -> None:
    alone = {"siglip": teachers()["siglip"]}
    inputs = {"teacher_input": PLAIN}
    named, unnamed = (distil(SOFT, hint(tap), models=alone, **inputs) for tap in ("siglip:layer4", "layer4"))
    unnamed.load_state_dict(named.state_dict())
    assert torch.equal(named(batch()[0])["loss"], unnamed(batch()[0])["loss"])
    with pytest.raises(TapError, match="no teacher 'other'"):
        distil(hint("other:layer4"), models=alone, **inputs)
