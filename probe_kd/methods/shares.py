"""Weights that are a share of the task's gradient: what the task is, and the norms that were measured."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.spec import Schedule, Share
from probe_kd.errors import LossError, nearest
from probe_kd.methods.objectives import Objective


def has_shares(objectives: Sequence[Objective]) -> bool:
    return any(isinstance(objective.weight, Share) for objective in objectives)


def task_of(objectives: Sequence[Objective], index: int) -> tuple[int, ...]:
    """The positions of the objectives of whose gradient the weight of objective `index` is a share.

    Raises LossError where that is no other loss, or not clear which.
    """
    objective = objectives[index]
    share = objective.weight
    assert isinstance(share, Share)
    if objective.resolved.reads == "labels":
        raise LossError(
            f"'{objective.name}' reads labels, so it is the task itself, and its weight cannot be a share of that; "
            "give it a number, and the other losses shares"
        )
    if len(objectives) == 1:
        raise LossError(
            f"'{objective.name}' is the only loss, so its weight cannot be a share of another; give a number"
        )
    if share.of:
        return (_named(objectives, index, share.of),)
    of_labels = [
        position
        for position, other in enumerate(objectives)
        if other.resolved.reads == "labels" and other.of == "student" and _weighs(other)
    ]
    of_outputs = [
        position
        for position, other in enumerate(objectives)
        if other.resolved.reads == "outputs" and position != index and _weighs(other)
    ]
    if not of_labels and not of_outputs:
        others = [other.name for position, other in enumerate(objectives) if position != index and _weighs(other)]
        advice = f"name one of {', '.join(others)} as `of`" if others else "give one of the losses a number as weight"
        raise LossError(
            f"the weight of '{objective.name}' is a share of the task's gradient, and no other loss with a weight of "
            f"its own reads labels or outputs; {advice}"
        )
    return tuple(of_labels) or (of_outputs[0],)


def _named(objectives: Sequence[Objective], index: int, name: str) -> int:
    """The position of the objective that `of` names."""
    names = [objective.name for objective in objectives]
    others = [other for position, other in enumerate(names) if position != index]
    if name == names[index]:
        raise LossError(f"'{name}' cannot weigh a share of itself; name another loss as `of`: {', '.join(others)}")
    if name not in names:
        raise LossError(
            f"the weight of '{names[index]}' is a share of '{name}', which is no loss{nearest(name, others)}; the "
            f"others: {', '.join(others)}"
        )
    other = objectives[names.index(name)]
    if isinstance(other.weight, Share):
        raise LossError(
            f"the weight of '{names[index]}' is a share of '{name}', whose own weight is a share; name a loss whose "
            "weight is a number"
        )
    if other.of == "teacher":
        raise LossError(f"the weight of '{names[index]}' is a share of '{name}', which trains the teacher alone")
    if not _weighs(other):
        raise LossError(f"the weight of '{names[index]}' is a share of '{name}', whose weight is 0 when it is measured")
    return names.index(name)


def _weighs(objective: Objective) -> bool:
    """Whether the weight is a number or schedule that is not 0 at the start of a stage, when shares are measured."""
    weight = objective.weight.start if isinstance(objective.weight, Schedule) else objective.weight
    return not isinstance(weight, Share) and weight != 0


def complaint_about(name: str, task: str, norms: Sequence[Sequence[float]]) -> str:
    """Why the gradient of `name` cannot be made a share of that of `task`; empty if it can.

    `norms` are those of the task's and of its own gradient, at each parameter that both reach or together.
    """
    advice = "give its weight a number, or name another loss as `of`"
    if not norms:
        return f"'{name}' and '{task}' reach no parameter of the student in common, so neither is a share; {advice}"
    for whose, of_side in zip((task, name), zip(*norms, strict=True), strict=True):
        if not all(map(isfinite, of_side)) or not any(of_side):
            value = "not finite" if any(of_side) else "zero"
            starts_at_zero = whose == task and not any(of_side)
            cause = (
                " (as from a classifier that starts at zero; a first stage with the labels alone helps)"
                if starts_at_zero
                else ""
            )
            return (
                f"the gradient of '{whose}' is {value}{cause} at the parameters that '{name}' and '{task}' both reach, "
                f"so neither is a share; {advice}"
            )
    return ""


class ShareWeights(nn.Module):
    """The weights of the objectives whose `weight` is a `Share`, from the norms of gradients that were measured.

    `norms` has a row for each of them: the mean norm of the task's gradient, and that of its own. It is a buffer, so
    checkpoints hold it. A step before they are measured raises LossError, except inside of `unmeasured`.

    Raises LossError where it is not clear of which loss a weight is a share.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.names = [objective.name for objective in objectives]
        self.shares = {
            index: objective.weight for index, objective in enumerate(objectives) if isinstance(objective.weight, Share)
        }
        self.tasks = {index: task_of(objectives, index) for index in self.shares}
        self.bypassed = False  # for a trial, in which only gradients' reach matters
        self.values: dict[int, float] = {}  # as Python values, because reading a buffer would wait for a GPU
        self.measured = False  # a compiled step would depend on the values where it asks if there are any
        self.register_buffer("norms", torch.full((len(self.shares), 2), torch.nan))
        self.norms: Float[Tensor, "shares 2"]
        # The values for a compiled step, which would be compiled anew for every new number.
        self.register_buffer("tensors", torch.full((len(self.shares),), torch.nan), persistent=False)
        self.tensors: Float[Tensor, " shares"]

    def inserted(self, weights: Sequence[float]) -> list[float]:
        """The weights of all objectives, with those that are measured in their places."""
        self._check_measured()
        return [self.values.get(index, weight) for index, weight in enumerate(weights)]

    def inserted_tensors(self, weights: Sequence[float | Tensor]) -> list[float | Tensor]:
        """As `inserted`, with those that are measured as tensors."""
        self._check_measured()
        measured = dict(zip(self.shares, self.tensors.unbind(), strict=True))
        return [measured.get(index, weight) for index, weight in enumerate(weights)]

    def _check_measured(self) -> None:
        if not self.measured and not self.bypassed:
            names = ", ".join(repr(self.names[index]) for index in self.shares)
            raise LossError(
                f"the weight of {names} is a share of the task's gradient, which was not measured; call "
                "`measure_shares(distiller, batches)` with training batches before the first step"
            )

    @property
    def by_name(self) -> dict[str, float]:
        """The weights that were measured, by the names of their objectives."""
        return {self.names[index]: value for index, value in self.values.items()}

    def describe(self, *, followed: bool = False) -> str:
        """Say which weight makes which gradient a share of which other; with `followed`, of the shares that follow."""
        texts = (
            f"the gradient of `{self.names[index]}` is {share.share:g} of that of `{self.task(index)}` by a weight of "
            f"{self.values[index]:.4g}"
            for index, share in self.shares.items()
            if share.follow or not followed
        )
        return ", ".join(texts)

    def task(self, index: int) -> str:
        """The names of the losses that are the task of objective `index`."""
        return " + ".join(self.names[position] for position in self.tasks[index])

    @torch.no_grad()
    def store(self, norms: Float[Tensor, "shares 2"]) -> None:
        """Set the norms, and the weights that follow from them.

        Raises LossError for a norm that is zero or not finite.
        """
        for index, sides in zip(self.shares, norms.tolist(), strict=True):
            if complaint := complaint_about(self.names[index], self.task(index), [sides]):
                raise LossError(complaint)
        self.norms.copy_(norms)
        self._read()

    def _read(self) -> None:
        """Compute the weights from what the buffer holds, so that they are the same to the bit after a checkpoint."""
        self.values = {
            index: share.share * task / own
            for (index, share), (task, own) in zip(self.shares.items(), self.norms.tolist(), strict=True)
        }
        self.tensors.copy_(torch.tensor([*self.values.values()]))
        self.measured = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.values, self.measured = {}, False
        if self.norms.device.type != "meta" and all(map(isfinite, self.norms.flatten().tolist())):
            self._read()


@contextmanager
def unmeasured(shares: ShareWeights | None) -> Iterator[None]:
    """Let steps run in which weights do not matter, before they are measured."""
    if shares is None:
        yield
        return
    bypassed, shares.bypassed = shares.bypassed, True
    try:
        yield
    finally:
        shares.bypassed = bypassed
