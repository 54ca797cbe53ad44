"""The audit of a recipe on one real batch before training: the value and reach of every loss, the cost of a step."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from probe_kd.data.loading import loader
from probe_kd.errors import RunError
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import gradient_norms, measure_shares, training_only
from probe_kd.recipe.planner import Plan
from probe_kd.training.cache_cost import CacheCost, cache_costs
from probe_kd.training.fitting import fit_for_trial
from probe_kd.training.models import Models
from probe_kd.training.optimizers import make_optimizer
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating
from probe_kd.training.trial import (
    Norms,
    TrialBatch,
    complaints,
    first_batch,
    one_step,
    share_complaints,
    silent_losses,
    student_of,
    too_large,
    untrained,
)


@dataclass(frozen=True)
class Reach:
    """How many parameters of one part of the models a loss reaches in a stage, and the norm of their gradients."""

    stage: str
    loss: str
    part: str
    reached: int
    parameters: int
    norm: float


@dataclass(frozen=True)
class StepCost:
    """The losses and the cost of one update of a stage, measured on one real batch before training.

    - `losses`: the unweighted terms, and `loss`, their weighted sum
    - `images`: the images of the batch; `steps`: the steps of the whole stage
    - `seconds`: the time of a step after a warm-up step
    - `weights`, `gradients`, `optimizer`, `activations`: bytes of the weights of both models, the adapters and the
      losses (with what these remember), of the gradients, of the optimizer's state, and of what is saved for the
      backward
    - `adapter_macs`, `loss_macs`: multiply-accumulates of the adapters, and of losses with parameters, for one image
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
    loss_parameters: int
    loss_macs: int

    @property
    def memory(self) -> int:
        """The bytes of a step, without what libraries allocate for themselves."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class MeasuredShare:
    """The weight that makes the gradient of a loss its `share` of that of `of`, measured on one batch before training.

    `task_norm` and `norm` are the norms of the two gradients, without that weight, at the parameters that both reach.
    """

    stage: str
    loss: str
    share: float
    of: str
    task_norm: float
    norm: float
    weight: float


@dataclass(frozen=True)
class Audit:
    """The result of `audit`: the reach of every loss, the cost of a step in every stage, errors and remarks.

    `shares` are the weights that are a share of the task's gradient. `caches` compare the teachers' caches with the
    teachers.
    """

    reach: tuple[Reach, ...]
    costs: tuple[StepCost, ...]
    wrong: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    shares: tuple[MeasuredShare, ...] = ()
    caches: tuple[CacheCost, ...] = ()


def audit(plan: Plan) -> Audit:
    """Run every stage of the student on one batch of the recipe's images, before training.

    `wrong` lists losses and gradients that are not finite, and losses that train no parameter. `remarks` name
    parameters that the student's output depends on, but that no loss of any stage reaches. Raises DataError if images
    cannot be read, and RunError if a step fails or does not fit into memory.
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
    batch = first_batch(models, trained)
    reaches: list[Reach] = []
    costs: list[StepCost] = []
    reach: list[tuple[str, Norms]] = []
    remarks: list[str] = []
    shares: list[MeasuredShare] = []
    caches: list[CacheCost] = []
    steps = len(loader(plan.datasets.train, plan.recipe.data, models.images_for(trained), training=True))
    for phase in trained.phases:
        distiller = models.distiller(trained, phase)
        fit_for_trial(distiller, batch.images)
        norms = gradient_norms(distiller.train(), *batch)
        reach.append((phase.name, norms))
        reaches += [part for loss in norms for part in _by_part(phase.name, loss, norms[loss], distiller)]
        reached_names = {name for loss in norms.values() for name in loss}
        shares_are_wrong = share_complaints([phase], reach[-1:])
        if distiller.shares is not None and not shares_are_wrong:
            shares += _measured(models, phase, distiller, batch)
        if reached_names and not shares_are_wrong:
            costs.append(_cost(models, phase, distiller, batch, reached_names, steps, remarks))
        caches += cache_costs(models, trained, distiller, phase.name, batch.images)
        distiller.close()
    wrong = (*_no_numbers(costs), *complaints(trained.phases, reach), *share_complaints(trained.phases, reach))
    remarks += silent_losses(trained.phases, reach)
    all_remarks = (*untrained(models, trained, reach, batch.images), *remarks)
    return Audit(tuple(reaches), tuple(costs), wrong, all_remarks, tuple(shares), tuple(caches))


def _measured(models: Models, phase: Phase, distiller: Distiller, batch: TrialBatch) -> list[MeasuredShare]:
    """Measure the weights of a stage that are a share of the task's gradient."""
    shares = distiller.shares
    assert shares is not None
    with models.accelerator.autocast():
        measure_shares(distiller, [(batch.images, batch.target, None, batch.indices)])
    return [
        MeasuredShare(phase.name, shares.names[index], share.share, shares.task(index), task, own, shares.values[index])
        for (index, share), (task, own) in zip(shares.shares.items(), shares.norms.tolist(), strict=True)
    ]


def _cost(
    models: Models,
    phase: Phase,
    distiller: Distiller,
    batch: TrialBatch,
    reached_names: set[str],
    steps: int,
    remarks: list[str],
) -> StepCost:
    """Take two real steps, time the second, and restore the models.

    If the loss is not finite after the first update, this is a remark and no error, since the learning rate may have
    a warm-up.
    """
    initial_state = copy.deepcopy(distiller.state_dict())
    taken = _two_steps(models, phase, distiller, batch, reached_names)
    if taken.second_loss is not None and not taken.second_loss.isfinite():
        remarks.append(
            f"the loss of stage `{phase.name}` is {taken.second_loss.item()} after one update at "
            f"`lr: {phase.optimizer.lr:g}`; try a smaller one"
        )
    distiller.load_state_dict(initial_state)
    of_teachers = [parameter for model in distiller.frozen_teachers.values() for parameter in model.parameters()]
    steps_of_adapters = (".student_steps", ".teacher_steps", ".fitted_steps")
    adapters = {
        f"adapters.{name}" for name, _ in distiller.adapters.named_modules() if name.endswith(steps_of_adapters)
    }
    losses = {f"losses.{name}" for name, _ in distiller.losses.named_modules() if name.count(".") == 1}
    return StepCost(
        phase.name,
        taken.losses,
        images=len(batch.images),
        steps=phase.epochs * steps,
        seconds=taken.seconds,
        weights=_bytes([*distiller.parameters(), *distiller.losses.buffers(), *of_teachers]),
        gradients=taken.gradients,
        optimizer=taken.optimizer,
        activations=taken.activations,
        adapter_parameters=sum(parameter.numel() for parameter in distiller.adapters.parameters()),
        adapter_macs=_macs(taken.counter, adapters) // len(batch.images),
        loss_parameters=sum(parameter.numel() for parameter in distiller.losses.parameters()),
        loss_macs=_macs(taken.counter, losses) // len(batch.images),
    )


class _TwoSteps(NamedTuple):
    """What two real steps took: the first one's losses, operations and bytes, the second one's loss and seconds."""

    losses: dict[str, float]
    counter: FlopCounterMode
    activations: int
    gradients: int
    optimizer: int
    second_loss: Tensor | None
    seconds: float


def _two_steps(
    models: Models, phase: Phase, distiller: Distiller, batch: TrialBatch, reached_names: set[str]
) -> _TwoSteps:
    with training_only(distiller, reached_names) as trained_parameters:
        optimizer = make_optimizer(distiller, phase.optimizer)
        saved_bytes: dict[int, int] = {}
        with (
            FlopCounterMode(display=False) as counter,
            _counting(distiller, saved_bytes),
            models.accelerator.autocast(),
        ):
            result = distiller(batch.images, batch.target, index=batch.indices)
        _update(optimizer, result["loss"], models)
        started = time.perf_counter()
        with models.accelerator.autocast():
            second_loss = distiller(batch.images, batch.target, index=batch.indices)["loss"]
        _update(optimizer, second_loss, models)
        seconds = time.perf_counter() - started
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return _TwoSteps(
        {name: float(value.detach()) for name, value in result.items() if name != "output" and value is not None},
        counter,
        activations=sum(saved_bytes.values()),
        gradients=_bytes(trained_parameters),
        optimizer=_bytes(state),
        second_loss=second_loss,
        seconds=seconds,
    )


def _macs(counter: FlopCounterMode, names: set[str]) -> int:
    """The multiply-accumulates of these modules of the Distiller in one batch."""
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"Distiller.{name}"].values()) for name in names if f"Distiller.{name}" in counts) // 2


def _update(optimizer: torch.optim.Optimizer, loss: Tensor | None, models: Models) -> None:
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    if models.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _counting(distiller: Distiller, saved_bytes: dict[int, int]) -> Iterator[None]:
    """Record in `saved_bytes` the size of every storage that is saved for the backward, without the weights."""
    tensors = [*distiller.parameters(), *distiller.buffers()]
    own_storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own_storages:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
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
    reached = [row for row in rows if row[1]] or [("nothing", [0.0], 0)]
    return [
        Reach(stage, loss, part, len(part_norms), total, math.hypot(*part_norms)) for part, part_norms, total in reached
    ]


def _no_numbers(costs: Sequence[StepCost]) -> Iterator[str]:
    for cost in costs:
        for name, value in cost.losses.items():
            if not math.isfinite(value):
                yield (
                    f"loss `{name}` of stage `{cost.stage}` is {value} on the first batch, before anything is trained"
                )
