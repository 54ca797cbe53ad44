"""The terms of a loss: the value of each objective for the features of both models, and their weighted sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import Schedule, Tap, value_at
from probe_kd.errors import LossError
from probe_kd.methods.dropping import TeacherDropping
from probe_kd.methods.losses.calling import call_loss
from probe_kd.methods.losses.checks import check_finite, flat
from probe_kd.methods.losses.labels import check_labels, check_values
from probe_kd.methods.losses.multilabel import check_shares
from probe_kd.methods.objectives import Objective
from probe_kd.methods.shares import ShareWeights
from probe_kd.methods.targets import compared, module_key, teacher_side
from probe_kd.methods.teachers import TeacherFeatures

Parts = list[tuple[str | None, Tensor]]
Given = Mapping[str, Tensor | None]  # what a step got beside the images: `labels` and `index`


class Terms:
    """Evaluate the objectives: `terms(student, teacher, target)` returns their weighted sum, and each one's value.

    `weights` and `options` are the current values, which `set_epoch` updates; the weights of `shares` are measured.
    `checked` tells whether the values of a step were checked; on a device other than the CPU, only the first step is.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        adapters: nn.ModuleDict,
        losses: nn.ModuleDict,
        *,
        block_gradient: bool,
        dropping: TeacherDropping | None = None,
        shares: ShareWeights | None = None,
    ) -> None:
        self.objectives, self.adapters, self.losses = objectives, adapters, losses
        self.block_gradient = block_gradient
        self.dropping, self.shares = dropping, shares
        self.checked = False
        self.set_epoch(0, 1)

    def set_epoch(self, epoch: float, epochs: int, like: Tensor | None = None) -> None:
        """Set every weight and option that is a `Schedule` to its value after `epoch` of `epochs`.

        A compiled step takes its weights on the device of `like`, a parameter.
        """
        self._scheduled = [value_at(objective.weight, epoch, epochs) for objective in self.objectives]
        like = torch.empty(0) if like is None else like
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._compiled_weights: list[float | Tensor] = [
            torch.full((), weight, dtype=dtype, device=like.device)
            if isinstance(objective.weight, Schedule)
            else weight
            for objective, weight in zip(self.objectives, self._scheduled, strict=True)
        ]
        self.options = [
            {name: value_at(value, epoch, epochs) for name, value in objective.options.items()}
            for objective in self.objectives
        ]

    @property
    def weights(self) -> list[float]:
        """The present weight of each objective. Raises LossError for a `Share` that was not measured."""
        return self._scheduled if self.shares is None else self.shares.inserted(self._scheduled)

    def _factors(self) -> Sequence[float | Tensor]:
        """The weights in a step. In a compiled one, those that change are tensors: numbers are compiled as they are."""
        if not torch.compiler.is_compiling():
            return self.weights
        weights = self._compiled_weights
        return weights if self.shares is None else self.shares.inserted_tensors(weights)

    def __call__(
        self,
        student: Mapping[Tap, Tensor],
        teacher: TeacherFeatures,
        target: Tensor | None,
        index: Tensor | None = None,
        *,
        drop: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted terms. With `drop`, the sum is without the dropped teachers.

        `index` is the number of each image among the training images, if a loss reads it.
        """
        given = {"labels": target, "index": index}
        parts = [self._parts(position, student, teacher, given) for position in range(len(self.objectives))]
        if not torch.compiler.is_compiling():
            self.checked = True
        totals = [_total([part for _, part in of_objective]) for of_objective in parts]
        terms = {objective.name: total for objective, total in zip(self.objectives, totals, strict=True)}
        if self.dropping is not None and drop:
            totals = self._without_dropped(parts, self.dropping)
        return _total([_weighted(weight, total) for weight, total in zip(self._factors(), totals, strict=True)]), terms

    def _without_dropped(self, parts: Sequence[Parts], dropping: TeacherDropping) -> list[Tensor]:
        losses: dict[str, Tensor] = {}
        for weight, of_objective in zip(self._factors(), parts, strict=True):
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

    def _parts(self, position: int, student: Mapping[Tap, Tensor], teacher: TeacherFeatures, given: Given) -> Parts:
        """The summands of one objective, each with the name of the one teacher that it compares with."""
        objective = self.objectives[position]
        if objective.resolved.reads != "labels":
            return self._comparisons(position, student, teacher, given)
        if objective.of == "student":
            return [(None, self._labels(position, student[objective.outputs.student], given))]
        return [(None, self._labels(position, teacher.own[objective.outputs.teacher], given))]

    def _labels(self, position: int, output: Tensor, given: Given) -> Tensor:
        objective, options = self.objectives[position], self.options[position]
        target, *also = self._given(objective, ("labels", *objective.resolved.also), given)
        if isinstance(objective.loss, str):
            if self._checks_values(output):
                if objective.resolved.multilabel:
                    check_shares(output, target)
                else:
                    ignored: Any = options.get("ignore_index")
                    check_labels(output, target, ignored)
            value: Tensor = objective.resolved.function(output, target, *also, **options)
            return value
        function = objective.resolved.function
        return call_loss(function, objective.name, output, target, *also, options=options)

    @staticmethod
    def _given(objective: Objective, names: Sequence[str], given: Given) -> list[Tensor]:
        """The labels and indices that a loss reads. Raises LossError for one that the step did not get."""
        values = []
        for name in names:
            value = given[name]
            if value is None:
                argument = {"labels": "target", "index": "index"}[name]
                what = {"labels": "compares with labels", "index": "reads the indices of the images"}[name]
                raise LossError(f"'{objective.name}' {what}, and the step got no {argument}")
            values.append(value)
        return values

    def _comparisons(
        self, position: int, student: Mapping[Tap, Tensor], teacher: TeacherFeatures, given: Given
    ) -> Parts:
        objective = self.objectives[position]
        also = self._given(objective, objective.resolved.also, given)
        parts: Parts = []
        for number, (_, comparison, adapter) in enumerate(compared([objective], self.adapters)):
            student_features = comparison.features("student", student, several=objective.resolved.reads_several)
            target = teacher.sides.get((position, number))
            if target is None:
                target = teacher_side(objective, comparison, adapter, teacher.compared, teacher.targets)
            sides = adapter.student_steps(student_features), target
            checks = self._checks_values(flat(sides[0])[0])
            if checks and isinstance(objective.loss, str) and "labels" in objective.resolved.also:
                check_values(flat(target)[0].shape[1], also[0], loss=objective.name)
            term = self._term(position, number, *sides, *also)
            if checks:
                check_finite(objective.name, term, *sides)
            parts.append((None if comparison.is_mean else comparison.teachers[0], _weighted(comparison.weight, term)))
        return parts

    def _term(self, position: int, number: int, *sides: Any) -> Tensor:
        """The loss of one comparison of an objective, the `number`-th."""
        objective, options = self.objectives[position], self.options[position]
        if objective.resolved.builds_module:
            modules: Any = self.losses[module_key(objective.name)]
            return call_loss(modules[number], objective.name, *sides, block_gradient=self.block_gradient)
        function = objective.resolved.function
        if not isinstance(objective.loss, str):
            return call_loss(function, objective.name, *sides, options=options, block_gradient=self.block_gradient)
        if not self.block_gradient:
            options = {**options, "block_gradient": False}
        term: Tensor = function(*sides, **options)
        return term

    def _checks_values(self, tensor: Tensor) -> bool:
        """Whether to check values that the losses do not check themselves: in the first step on a GPU."""
        if torch.compiler.is_compiling():  # first, or the compiled step would depend on `checked`
            return False
        return not self.checked and tensor.device.type not in ("cpu", "meta")


def _weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(term.dtype) * term
    return term if weight == 1 else weight * term  # forth and back, a product by one is two kernels for nothing


def _total(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])
