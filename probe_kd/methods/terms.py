"""The terms of a loss: the value of each objective for the features of both models, and their weighted sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import Tap, value_at
from probe_kd.errors import LossError
from probe_kd.methods.dropping import TeacherDropping
from probe_kd.methods.losses.common import check_finite
from probe_kd.methods.losses.labels import check_labels
from probe_kd.methods.losses.multilabel import check_shares
from probe_kd.methods.objectives import Objective
from probe_kd.methods.targets import compared, teacher_side
from probe_kd.methods.teachers import TeacherFeatures

Parts = list[tuple[str | None, Tensor]]


class Terms:
    """Evaluate the objectives: `terms(student, teacher, target)` returns their weighted sum, and each one's value.

    `weights` and `options` are the current values, which `set_epoch` updates. `checked` tells whether the values of a
    step were checked; on a device other than the CPU, only the first step is.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        adapters: nn.ModuleDict,
        *,
        block_gradient: bool,
        dropping: TeacherDropping | None = None,
    ) -> None:
        self.objectives, self.adapters, self.block_gradient = objectives, adapters, block_gradient
        self.dropping = dropping
        self.checked = False
        self.set_epoch(0, 1)

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Set every weight and option that is a `Schedule` to its value after `epoch` of `epochs`."""
        self.weights = [value_at(objective.weight, epoch, epochs) for objective in self.objectives]
        self.options = [
            {name: value_at(value, epoch, epochs) for name, value in objective.options.items()}
            for objective in self.objectives
        ]

    def __call__(
        self, student: Mapping[Tap, Tensor], teacher: TeacherFeatures, target: Tensor | None, *, drop: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted terms. With `drop`, the sum is without the dropped teachers."""
        parts = [self._parts(index, student, teacher, target) for index in range(len(self.objectives))]
        if not torch.compiler.is_compiling():
            self.checked = True
        totals = [_total([part for _, part in of_objective]) for of_objective in parts]
        terms = {objective.name: total for objective, total in zip(self.objectives, totals, strict=True)}
        if self.dropping is not None and drop:
            totals = self._without_dropped(parts, self.dropping)
        return _total([_weighted(weight, total) for weight, total in zip(self.weights, totals, strict=True)]), terms

    def _without_dropped(self, parts: Sequence[Parts], dropping: TeacherDropping) -> list[Tensor]:
        losses: dict[str, Tensor] = {}
        for weight, of_objective in zip(self.weights, parts, strict=True):
            for name, part in of_objective:
                if name is not None:
                    losses[name] = losses.get(name, 0.0) + weight * part.detach()
        factors = dropping.factors(losses)
        if not torch.compiler.is_compiling():
            dropping.draw(next(iter(factors.values())).device)
        return [
            _total([part if name is None else factors[name] * part for name, part in of_objective])
            for of_objective in parts
        ]

    def _parts(
        self, index: int, student: Mapping[Tap, Tensor], teacher: TeacherFeatures, target: Tensor | None
    ) -> Parts:
        """The summands of one objective, each with the name of the one teacher that it compares with."""
        objective = self.objectives[index]
        if objective.resolved.reads != "labels":
            return self._comparisons(index, student, teacher)
        if objective.of == "student":
            return [(None, self._labels(index, student[objective.outputs.student], target))]
        return [(None, self._labels(index, teacher.own[objective.outputs.teacher], target))]

    def _labels(self, index: int, output: Tensor, target: Tensor | None) -> Tensor:
        objective = self.objectives[index]
        if target is None:
            raise LossError(f"'{objective.name}' compares with labels, and the step got no target")
        if isinstance(objective.loss, str) and self._checks_values(output):
            if objective.resolved.multilabel:
                check_shares(output, target)
            else:
                ignored: Any = self.options[index].get("ignore_index")
                check_labels(output, target, ignored)
        return objective.resolved.function(output, target, **self.options[index])

    def _comparisons(self, index: int, student: Mapping[Tap, Tensor], teacher: TeacherFeatures) -> Parts:
        objective, options = self.objectives[index], self.options[index]
        if not self.block_gradient and isinstance(objective.loss, str):  # one of the user's detaches otherwise
            options = {**options, "block_gradient": False}
        parts: Parts = []
        for _, comparison, adapter in compared([objective], self.adapters):
            student_features = comparison.features("student", student, matrices=objective.resolved.reads_matrices)
            target = teacher_side(objective, comparison, adapter, teacher.compared, teacher.targets)
            sides = adapter.student_steps(student_features), target
            term = objective.resolved.function(*sides, **options)
            if self._checks_values(term):
                check_finite(objective.name, term, *sides)
            parts.append((None if comparison.is_mean else comparison.teachers[0], _weighted(comparison.weight, term)))
        return parts

    def _checks_values(self, tensor: Tensor) -> bool:
        """Whether to check values that the losses do not check themselves: in the first step on a GPU."""
        return not self.checked and tensor.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling()


def _weighted(weight: float, term: Tensor) -> Tensor:
    return term if weight == 1 else weight * term  # forth and back, a product by one is two kernels for nothing


def _total(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])
