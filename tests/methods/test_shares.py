"""Weights that are a share of the task's gradient, against gradients that a backward gives."""

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from probe_kd import Distiller, InputSpec, Objective, Schedule, Share, follow_shares, measure_shares
from probe_kd.errors import LossError
from probe_kd.methods.gradients import gradient_norms

SIZE = InputSpec((3, 32, 32), 0.5, 0.5)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "cnn": ("resnet10t", {"channels": [8, 8, 8, 16]}, "layer3"),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1},
        "blocks.0",
    ),
}


def build(kind: str, seed: int) -> nn.Module:
    name, kwargs, _ = MODELS[kind]
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=5, **kwargs)
    return model


def distiller_of(objectives: Sequence[Objective], kinds: tuple[str, str] = ("cnn", "cnn")) -> Distiller:
    student, teacher = (build(kind, seed) for seed, kind in enumerate(kinds))
    torch.manual_seed(3)  # of the adapters
    return Distiller(student, teacher, objectives, student_input=SIZE, teacher_input=SIZE).train()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5) for _ in range(count)]


def hint(weight: Any, kinds: tuple[str, str] = ("cnn", "cnn")) -> Objective:
    return Objective("hint", weight=weight, pairs=[(MODELS[kinds[0]][2], MODELS[kinds[1]][2])])


def gradients(distiller: Distiller, term: str, batches: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradients of one term of steps on these batches by a plain backward, with the draws of a measurement."""
    kept = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    of_batches = []
    with torch.random.fork_rng():
        for batch in batches:
            distiller.zero_grad()
            distiller(*batch)[term].backward()  # type: ignore[union-attr, no-untyped-call]
            parameters = distiller.student.named_parameters()
            of_batches.append({name: value.grad.double() for name, value in parameters if value.grad is not None})
    distiller.load_state_dict(kept)
    return of_batches


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("kinds", [("cnn", "vit"), ("vit", "cnn")], ids="<-".join)
def test_a_share_is_that_of_the_norms_at_the_parameters_that_both_reach(kinds: tuple[str, str]) -> None:
    task, aux = Objective("cross_entropy", "task", weight=2.0), Objective("soft_targets", weight=Share(1.5, batches=2))
    distiller = distiller_of([aux, hint(Share(0.3), kinds), task], kinds)
    own = batches(3)
    weights = measure_shares(distiller, own)
    for name, share, count in (("hint", 0.3, 3), ("soft_targets", 1.5, 2)):
        norms = []
        of_batches = (gradients(distiller, term, own[:count]) for term in ("task", name))
        for of_task, of_term in zip(*of_batches, strict=True):
            assert set(of_term) < set(of_task) or name == "soft_targets"
            common = set(of_task) & set(of_term)
            norms.append([2 * norm([of_task[key] for key in common]), norm([of_term[key] for key in common])])
        of_task_norms, of_term_norms = zip(*norms, strict=True)
        assert weights[name] * sum(of_term_norms) / sum(of_task_norms) == pytest.approx(share, rel=1e-5)

    (whole,) = gradients(distiller, "loss", own[:1])
    parts = {name: gradients(distiller, name, own[:1])[0] for name in ("task", "hint", "soft_targets")}
    key = next(iter(parts["hint"]))
    expected = 2 * parts["task"][key] + sum(weights[name] * parts[name][key] for name in weights)
    torch.testing.assert_close(whole[key], expected, rtol=1e-4, atol=1e-6)


def test_measuring_changes_nothing_else_and_is_kept_in_the_state() -> None:
    objectives = [Objective("cross_entropy", "task"), hint(Share(0.3))]
    distiller = distiller_of(objectives)
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items() if name != "shares.norms"}
    numbers = torch.get_rng_state()
    weights = measure_shares(distiller, batches(2))
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(tensor, distiller.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in distiller.parameters())
    other = distiller_of(objectives)
    other.load_state_dict(distiller.state_dict())
    assert other.weights == distiller.weights == {"task": 1.0, **weights}
    assert "shares.norms" not in distiller_of([hint(1.0)]).state_dict()


def test_a_step_before_the_weights_are_measured_says_what_to_call() -> None:
    distiller = distiller_of([Objective("cross_entropy", "task"), hint(Share(0.3))])
    gradient_norms(distiller, *batches(1)[0])  # of unweighted terms
    with pytest.raises(LossError, match=r"which was not measured; call `measure_shares\(distiller, batches\)`"):
        distiller(*batches(1)[0])
    with pytest.raises(LossError, match="no batches"):
        measure_shares(distiller, [])


def test_a_share_that_follows_is_an_average_of_one_batch_in_so_many() -> None:
    first, second = batches(2)
    objectives = [Objective("cross_entropy", "task"), hint(Share(0.3, batches=4, follow=True))]
    objectives.append(Objective("soft_targets", weight=Share(2.0, batches=1)))
    distiller = distiller_of(objectives)
    measure_shares(distiller, [first])
    assert distiller.shares is not None
    at_first, fixed = distiller.shares.norms[0].clone(), distiller.weights["soft_targets"]
    for step in range(1, 4):
        follow_shares(distiller, step, *second)
        assert torch.equal(distiller.shares.norms[0], at_first)
    follow_shares(distiller, 4, *second)
    task, own = distiller.shares.norms[0].tolist()
    assert distiller.weights["hint"] == 0.3 * task / own
    assert distiller.weights["soft_targets"] == fixed
    measure_shares(distiller, [second])
    torch.testing.assert_close(torch.tensor([task, own]), at_first + (distiller.shares.norms[0] - at_first) / 4)


@pytest.mark.parametrize("factor", [1.0, 1e-5], ids=["plain", "gradients that vanish in float16"])
def test_shares_in_float16_are_those_of_float32(factor: float) -> None:
    distiller = distiller_of([Objective("cross_entropy", "task", weight=factor), hint(Share(0.3))])
    exact = measure_shares(distiller, batches(1))["hint"]
    with torch.autocast("cpu", torch.float16):
        assert measure_shares(distiller, batches(1))["hint"] == pytest.approx(exact, rel=0.05)


def test_a_compiled_step_is_measured_as_it_is() -> None:
    """A compiled graph allows one backward only, and a measurement takes several."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(64, 5)) for _ in "st")
    objectives = [Objective("cross_entropy", "task"), Objective("logits", weight=Share(0.3, batches=1, follow=True))]
    distiller = Distiller(student, teacher, objectives, student_input=SIZE, teacher_input=SIZE)
    measure_shares(distiller, batches(1))
    distiller.compile(backend="aot_eager")
    loss = distiller(*batches(1)[0])["loss"]
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    follow_shares(distiller, 1, *batches(2)[1])
    torch._dynamo.reset()
    distiller._compiled_call_impl = None
    assert distiller.weights["logits"] == measure_shares(distiller, [batches(2)[1]])["logits"]


TASK = Objective("cross_entropy", "task")
REFUSED = {
    "is the only loss": [hint(Share(0.3))],
    "no other loss with a weight of its own reads labels or outputs; name one of attention as `of`": [
        hint(Share(0.3)),
        Objective("attention", pairs=[("layer3", "layer3")]),
    ],
    "reads labels, so it is the task itself": [Objective("cross_entropy", weight=Share(0.3)), hint(1.0)],
    "cannot weigh a share of itself; name another loss as `of`: task": [TASK, hint(Share(0.3, of="hint"))],
    "which is no loss; did you mean 'task'": [TASK, hint(Share(0.3, of="tesk"))],
    "whose own weight is a share": [
        TASK,
        Objective("soft_targets", "soft", weight=Share(1.0)),
        hint(Share(0.3, of="soft")),
    ],
    "whose weight is 0 when it is measured": [
        Objective("cross_entropy", "task", weight=Schedule(0.0, 1.0)),
        hint(Share(0.3, of="task")),
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_share_of_what_cannot_be_is_refused(message: str) -> None:
    with pytest.raises(LossError) as refusal:
        distiller_of(REFUSED[message])
    assert message in str(refusal.value)


def test_without_labels_the_first_loss_of_outputs_is_the_task_and_of_names_another() -> None:
    objectives = [hint(Share(0.3)), Objective("soft_targets"), Objective("logits")]
    distiller = distiller_of(objectives)
    assert distiller.shares is not None
    assert distiller.shares.task(0) == "soft_targets"
    named = distiller_of([hint(Share(0.3, of="logits")), *objectives[1:], TASK])
    assert named.shares is not None
    assert named.shares.task(0) == "logits"


@pytest.mark.parametrize("share", [0, -0.3, float("inf"), float("nan"), True, "0.3"])
def test_a_share_is_a_number_above_zero(share: Any) -> None:
    with pytest.raises(LossError, match="expected a number above 0"):
        Share(share)


def test_only_a_weight_may_be_a_share() -> None:
    with pytest.raises(LossError, match="option 'temperature' of 'soft_targets' is a Share"):
        Objective("soft_targets", options={"temperature": Share(0.3)})


def test_losses_without_a_common_parameter_and_gradients_of_zero_are_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.head_dist = nn.Flatten(), nn.Linear(3072, 5), nn.Linear(3072, 5)

        def forward(self, images: Tensor) -> Tensor:
            features = self.body(images)
            return (self.head(features) + self.head_dist(features)) / 2

    objectives = [
        Objective("cross_entropy", "task", student="head"),
        Objective("soft_targets", "soft", student="head_dist", weight=Share(0.5)),
    ]
    apart = Distiller(TwoHeads(), TwoHeads(), objectives, student_input=SIZE, teacher_input=SIZE)
    with pytest.raises(LossError, match="'soft' and 'task' reach no parameter of the student in common"):
        measure_shares(apart, batches(1))
    zero = distiller_of([Objective("cross_entropy", "task"), hint(Share(0.3))])
    torch.nn.init.zeros_(zero.student.fc.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(LossError, match=r"the gradient of 'task' is zero \(.*starts at zero.*'hint' and"):
        measure_shares(zero, batches(1))
