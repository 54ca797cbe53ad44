"""A recipe on one real batch, before anything is trained: what every loss gives and moves, what a step costs."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from probe_kd.data.loading import loader
from probe_kd.errors import RunError
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import gradient_norms, training_only
from probe_kd.recipe.planner import Plan
from probe_kd.training.models import Models
from probe_kd.training.optimizers import make_optimizer
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating
from probe_kd.training.trial import Norms, complaints, first_batch, one_step, student_of, too_large, untrained


@dataclass(frozen=True)
class Reach:
    """What one loss of one stage does to one part of the models: how many of its parameters it moves, and how much."""

    stage: str
    loss: str
    part: str
    reached: int
    parameters: int
    norm: float


@dataclass(frozen=True)
class StepCost:
    """What one update of one stage costs and gives, on one real batch, before anything is trained.

    `losses` are the unweighted terms and `loss`, their weighted sum; `seconds` are those of a step when all is warm,
    `steps` are those of the whole stage. The rest is in bytes: `weights` of both models and the adapters, `activations`
    what is kept for the backward. `adapter_macs` are of one image.
    """

    stage: str
    losses: dict[str, float]
    images: int
    steps: int
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    adapter_parameters: int
    adapter_macs: int

    @property
    def memory(self) -> int:
        """The bytes of a step; what a library allocates for itself comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Audit:
    """What one real batch told: of every loss, what it moves; of every stage, what a step costs; and what is wrong."""

    reach: tuple[Reach, ...]
    costs: tuple[StepCost, ...]
    wrong: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def audit(plan: Plan) -> Audit:
    """Every stage of the student on one batch of the recipe's images, before anything is trained.

    Wrong are a loss that is no number, one that moves nothing, and a gradient that is not finite; remarked on is a
    parameter that no loss of any stage reaches although the student's answer depends on it. Raises DataError where
    images cannot be read, RunError where a step fails or does not fit into memory.
    """
    with accelerating(plan.recipe) as accelerator:
        models = Models(plan, accelerator)
        try:
            with one_step():
                return _audit(plan, models)
        except torch.OutOfMemoryError as refusal:
            raise RunError(too_large(refusal)) from refusal


def _audit(plan: Plan, models: Models) -> Audit:
    trained = student_of(models)
    images, target = first_batch(models, trained)
    found: list[Reach] = []
    costs: list[StepCost] = []
    reach: list[tuple[str, Norms]] = []
    remarks: list[str] = []
    steps = len(loader(plan.datasets.train, plan.recipe.data, models.images_for(trained), training=True))
    for phase in trained.phases:
        distiller = models.distiller(trained, phase)
        norms = gradient_norms(distiller.train(), images, target)
        reach.append((phase.name, norms))
        found += [part for loss in norms for part in _by_part(phase.name, loss, norms[loss], distiller)]
        reached = {name for loss in norms.values() for name in loss}
        if reached:
            costs.append(_cost(models, phase, distiller, images, target, reached, steps, remarks))
        distiller.close()
    wrong = (*_no_numbers(costs), *complaints(reach))
    return Audit(tuple(found), tuple(costs), wrong, (*untrained(models, trained, reach, images, target), *remarks))


def _cost(
    models: Models,
    phase: Phase,
    distiller: Distiller,
    images: Tensor,
    target: Tensor,
    reached: set[str],
    steps: int,
    remarks: list[str],
) -> StepCost:
    """Two real steps, of which the second is timed; the models are as they were after it.

    A learning rate at which the first makes the loss no number is remarked on: no error, since it may warm up.
    """
    before = copy.deepcopy(distiller.state_dict())
    with training_only(distiller, reached) as moved:
        optimizer = make_optimizer(distiller, phase.optimizer)
        saved: dict[int, int] = {}
        with FlopCounterMode(display=False) as counter, _counting(distiller, saved), models.accelerator.autocast():
            result = distiller(images, target)
        _update(optimizer, result["loss"], models)
        begun = time.perf_counter()
        with models.accelerator.autocast():
            loss = distiller(images, target)["loss"]
        _update(optimizer, loss, models)
        seconds = time.perf_counter() - begun
        if loss is not None and not loss.isfinite():
            remarks.append(
                f"the loss of stage `{phase.name}` is {loss.item()} after one update at `lr: {phase.optimizer.lr:g}`; "
                "try a smaller one"
            )
    distiller.load_state_dict(before)
    teacher = distiller.frozen_teacher
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    adapters = {
        f"Distiller.adapters.{name}"
        for name, _ in distiller.adapters.named_modules()
        if name.endswith((".student_steps", ".teacher_steps"))
    }
    macs = sum(sum(count.values()) for name, count in counter.get_flop_counts().items() if name in adapters) // 2
    return StepCost(
        phase.name,
        {name: float(value.detach()) for name, value in result.items() if name != "output" and value is not None},
        images=len(images),
        steps=phase.epochs * steps,
        seconds=seconds,
        weights=_bytes([*distiller.parameters(), *(teacher.parameters() if teacher else ())]),
        gradients=_bytes(moved),
        optimizer=_bytes(state),
        activations=sum(saved.values()),
        adapter_parameters=sum(parameter.numel() for parameter in distiller.adapters.parameters()),
        adapter_macs=macs // len(images),
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor | None, models: Models) -> None:
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    if models.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _counting(distiller: Distiller, saved: dict[int, int]) -> Iterator[None]:
    """Inside, `saved` gets the bytes of every storage that is kept for the backward, weights left out."""
    held = [*distiller.parameters(), *distiller.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _by_part(stage: str, loss: str, norms: Mapping[str, float], distiller: Distiller) -> list[Reach]:
    parts: dict[str, list[str]] = {}
    shared = {id(parameter) for parameter in distiller.shared}
    for name, parameter in distiller.named_parameters():
        part = ".".join(name.split(".")[: 1 if name.startswith("adapters") else 2])
        part = part.replace("student.", "shared.") if id(parameter) in shared else part
        parts.setdefault(part, []).append(name)
    rows = [(part, [norms[name] for name in names if name in norms], len(names)) for part, names in parts.items()]
    kept = [row for row in rows if row[1]] or [("nothing", [0.0], 0)]
    return [Reach(stage, loss, part, len(some), total, math.hypot(*some)) for part, some, total in kept]


def _no_numbers(costs: Sequence[StepCost]) -> Iterator[str]:
    for cost in costs:
        for name, value in cost.losses.items():
            if not math.isfinite(value):
                yield (
                    f"loss `{name}` of stage `{cost.stage}` is {value} on the first batch, before anything is trained"
                )
