"""Compiled steps: what the eager step does, in one graph, and compiled once whatever changes between steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe_kd import LOSSES, Distiller, InputSpec, Objective, Pair, Schedule
from probe_kd.engine.spec import Share
from probe_kd.methods.gradients import gradient_norms, measure_shares

IMAGES, TARGET = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 1])
SEEN = InputSpec((3, 32, 32), 0.0, 1.0)
SEVERAL_LABELS = ["binary_cross_entropy"]  # which no loss of one label can stand beside
GROUPS = {"one label": [name for name in LOSSES if name not in SEVERAL_LABELS], "several labels": SEVERAL_LABELS}


@contextmanager
def counting(distiller: Distiller, backend: str, **options: Any) -> Iterator[Callable[[], int]]:
    """Compile the step, and count how often it is compiled."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    distiller.compile(backend=backend, fullgraph=True, **options)
    yield lambda: graphs["unique_graphs"]
    torch.compiler.reset()


class Net(nn.Module):
    """Two blocks and a classifier: what is compiled is small beside the losses."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = (
            nn.Sequential(nn.Conv2d(*widths, 3, stride=2, padding=1), nn.BatchNorm2d(widths[1]), nn.ReLU())
            for widths in ((3, first), (first, second))
        )
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(second, 10)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.global_pool(self.layer2(self.layer1(images))))
        return logits


def objective(name: str) -> Objective:
    several = ["layer1", "layer2"] if name == "review" else ["layer2"]
    layers = {"srrl": ["global_pool"]}.get(name, several)  # before the teacher's classifier
    pairs = [Pair(layer, "" if name == "ofa_exits" else layer) for layer in layers]
    return Objective(name, pairs=pairs if LOSSES[name].reads_layers else [])


def balanced(distiller: Distiller, target: Tensor) -> dict[str, float]:
    """For each loss the weight by which its gradient at the student has the same norm."""
    norms = gradient_norms(distiller, IMAGES, target, torch.arange(4))
    squares = {
        name: sum(norm**2 for key, norm in of_loss.items() if key.startswith("student"))
        for name, of_loss in norms.items()
    }
    return {name: square**-0.5 for name, square in squares.items()}


def gradients(distiller: Distiller) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in distiller.named_parameters() if one.grad is not None and one.grad.any()}
    distiller.zero_grad()
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_every_loss_in_a_compiled_step_is_what_it_is_in_an_eager_one(group: str) -> None:
    """In value, in every gradient, and in the state that it leaves behind, over two steps of one graph."""
    torch.manual_seed(0)
    teacher, students = Net(8, 12), [Net(4, 8) for _ in range(2)]
    target = torch.eye(10)[TARGET] if group == "several labels" else TARGET
    objectives = [objective(name) for name in GROUPS[group]]
    eager = Distiller(students[0], teacher, objectives, student_input=SEEN, teacher_input=SEEN, num_images=9).train()
    weights = balanced(eager, target)
    objectives = [replace(one, weight=weights[one.name]) for one in objectives]
    compiled = Distiller(students[1], teacher, objectives, student_input=SEEN, teacher_input=SEEN, num_images=9).train()
    compiled.load_state_dict(eager.state_dict())
    with counting(compiled, "aot_eager") as counted:
        for seed in range(2):
            results = []
            for distiller in (eager, compiled):
                torch.manual_seed(seed)
                results.append(distiller(IMAGES + seed, target, index=torch.arange(4) + seed))
            for name in weights:
                torch.testing.assert_close(
                    results[1][name], results[0][name], msg=lambda text, name=name: f"{name}: {text}"
                )
            sum(weight * results[0][name] for name, weight in weights.items()).backward()
            results[1]["loss"].backward()
            torch.testing.assert_close(gradients(compiled), gradients(eager), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert counted() == 1


def test_a_compiled_step_that_ends_early_is_the_eager_one() -> None:
    """In the gradients, and in the batch statistics, of which those above the last tap stay."""
    torch.manual_seed(0)
    teacher, students = Net(8, 12), [Net(4, 8) for _ in range(2)]
    eager, compiled = (
        Distiller(
            one, teacher, Objective("hint", pairs=[Pair("layer1", "layer1")]), student_input=SEEN, teacher_input=SEEN
        )
        for one in students
    )
    compiled.load_state_dict(eager.state_dict())
    with counting(compiled, "aot_eager") as counted:
        for step in range(2):
            for distiller in (eager, compiled):
                loss = distiller(IMAGES + step)["loss"]
                assert loss is not None
                loss.backward()  # type: ignore[no-untyped-call]
            torch.testing.assert_close(gradients(compiled), gradients(eager), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert counted() == 1
    statistics = [int(getattr(students[1], layer)[1].num_batches_tracked) for layer in ("layer1", "layer2")]
    assert statistics == [2, 0]


def test_weights_that_change_are_not_compiled_again_and_options_once() -> None:
    """Those of schedules, and shares of the task that follow its gradient."""
    torch.manual_seed(0)
    teacher, students = Net(8, 12), [Net(4, 8) for _ in range(2)]
    objectives = [
        Objective("cross_entropy", "task", weight=Schedule(0.5, 2.0, shape="cosine")),
        Objective("hint", pairs=[Pair("layer2", "layer2")], weight=Schedule(1.0, 0.0, epochs=2)),
        Objective("logits", weight=Share(0.3, of="task", batches=1, follow=True)),
    ]
    soft = Objective("soft_targets", "soft", options={"temperature": Schedule(4.0, 1.0)})
    for listed, graphs in ((objectives, 1), ([*objectives, soft], 2)):
        eager, compiled = (Distiller(one, teacher, listed, student_input=SEEN, teacher_input=SEEN) for one in students)
        compiled.load_state_dict(eager.state_dict())
        for distiller in (eager, compiled):
            measure_shares(distiller, [(IMAGES, TARGET)])
        with counting(compiled, "eager") as counted:
            for step in range(5):
                losses = []
                for distiller in (eager, compiled):
                    distiller.set_epoch(step, 5)
                    assert distiller.shares is not None
                    distiller.shares.store(torch.tensor([[step + 1.0, 7.0]]))
                    losses.append(distiller(IMAGES, TARGET)["loss"])
                torch.testing.assert_close(losses[1], losses[0])
                losses[1].backward()
        assert counted() == graphs
        for distiller in (eager, compiled):
            distiller.close()
