"""What a run measures: accuracy, agreement with the teacher, right answers by class, the loss on held-out images."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from probe_kd.data.batches import Batches
from probe_kd.data.loading import loader, readable
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError, for_all
from probe_kd.methods.adapters import ImageView
from probe_kd.training.devices import memory_format
from probe_kd.training.loop import Loop
from probe_kd.training.models import TEACHER_BASELINE, Models, TrainedModel

MeasuredSplit = Literal["val", "test"]  # the images of the curves and of the final figures; often the same


class Score(NamedTuple):
    """Of one model on one split; `classes` has two counts of every class: its `images`, and those that are `right`."""

    accuracy: float
    agreement: float | None
    classes: dict[str, list[int]]


class Scorer:
    """Measures the models of a run; it owns the prepared test batches, and what the teacher predicts for them."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.plan, self.accelerator = models.plan, models.accelerator
        self.latest: dict[str, Score] = {}  # by role, while the weights are still those
        self.teacher_predictions: dict[str, Tensor] = {}  # by split
        # With the workers that read them.
        self.test_batches: dict[tuple[InputSpec, MeasuredSplit], Batches] = {}

    def forget_teacher(self) -> None:
        """The teacher is another now, or has other weights."""
        self.teacher_predictions = {}

    def measure(self, models: Sequence[TrainedModel], split: MeasuredSplit = "val") -> list[Score]:
        """The score of each model on the images of a split, the teacher's without an agreement.

        Images are read once for all models that see them alike.
        """
        asked = list(models)
        teacher = self.models.teacher if split not in self.teacher_predictions else None
        if teacher is not None and any(it is not teacher and it.role != "teacher" for it in models):
            asked += [teacher] * (teacher not in asked)
        predicted = self._predict(asked, split)
        if teacher in asked:
            self.teacher_predictions[split] = predicted[asked.index(teacher)][0]
        return [self._score(model, *found, split) for model, found in zip(models, predicted, strict=False)]

    def _score(self, trained: TrainedModel, answers: Tensor, targets: Tensor, split: MeasuredSplit) -> Score:
        accuracy = (answers == targets).double().mean().item()
        counted = {"images": targets, "right": targets[answers == targets]}
        classes = {name: _per_class(kept, self.plan.datasets.num_classes) for name, kept in counted.items()}
        if trained is self.models.teacher or trained.role == TEACHER_BASELINE:  # while it trains, its answers change
            self.teacher_predictions[split] = answers
            return Score(accuracy, None, classes)
        if self.models.teacher is None or split not in self.teacher_predictions or trained.role == "teacher":
            return Score(accuracy, None, classes)
        return Score(accuracy, (answers == self.teacher_predictions[split]).double().mean().item(), classes)

    def _predict(self, models: Sequence[TrainedModel], split: MeasuredSplit) -> list[tuple[Tensor, Tensor]]:
        """Of each model (predicted classes, true classes) of all images of a split, in their order."""
        by_input: dict[InputSpec, list[int]] = {}
        for index, model in enumerate(models):
            by_input.setdefault(self.models.images_for(model), []).append(index)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for given, indices in by_input.items():
            predicted, targets = self._predict_alike([models[index] for index in indices], given, split)
            found |= {index: (answers, targets) for index, answers in zip(indices, predicted, strict=True)}
        return [found[index] for index in range(len(models))]

    @torch.no_grad()
    def _predict_alike(
        self, models: Sequence[TrainedModel], given: InputSpec, split: MeasuredSplit
    ) -> tuple[list[Tensor], Tensor]:
        """The predicted classes of models that see the images of a split in one form, and the true classes."""
        accelerator = self.accelerator
        if (given, split) not in self.test_batches:
            datasets = self.plan.datasets
            images = datasets.val if split == "val" and datasets.val is not None else datasets.test
            batches = loader(images, self.plan.recipe.data, given, training=False)
            prepared = batches.prepare(accelerator, memory_format(self.plan.recipe, accelerator.device))
            self.test_batches[given, split] = prepared
        views = [ImageView(model.input, model.input).to(accelerator.device) for model in models]
        for model in models:
            model.model.eval()
        rows: list[tuple[Tensor, ...]] = []
        wrong = torch.zeros(len(models), dtype=torch.long, device=accelerator.device)  # read once, at the end
        for pixels, target in readable(self.test_batches[given, split], "test"):
            with accelerator.autocast():
                outputs = [model.model(view(pixels)) for model, view in zip(models, views, strict=True)]
            found = [self._answers(model, output) for model, output in zip(models, outputs, strict=True)]
            rows.append(accelerator.gather_for_metrics((*(answers for answers, _ in found), target)))
            wrong += torch.stack([missing for _, missing in found])
        *predicted, targets = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
        for model, count in zip(models, accelerator.reduce(wrong, "sum").tolist(), strict=True):
            _check_finite(model, count)
        return predicted, targets

    def _answers(self, trained: TrainedModel, output: Any) -> tuple[Tensor, Tensor]:
        """The class of every image, and how many images have none: the largest of their outputs is no number."""
        logits = _logits(output)
        if self.plan.class_map is not None and trained.role == "teacher":
            logits = logits[:, list(self.plan.class_map)]
        return logits.argmax(1), logits.amax(1).isfinite().logical_not().sum()  # a class may be ruled out by -inf

    @property
    def final(self) -> MeasuredSplit:
        """Where the images of the curves are those of the final figures, their batches are kept but once."""
        return "val" if self.plan.datasets.val is None else "test"

    @torch.no_grad()
    def held_out_loss(self, loop: Loop, trained: TrainedModel) -> float:
        """The weighted loss on held-out images, by which `keep: best` chooses an epoch.

        Without such images it is on the validation images, where the test images are others.
        """
        chosen_by, accelerator = self.plan.datasets.to_choose_by, self.accelerator
        assert chosen_by is not None
        images_held_out = loader(chosen_by, self.plan.recipe.data, self.models.images_for(trained), training=False)
        losses: list[Tensor] = []
        distiller = loop.distiller.eval()
        distiller.set_epoch(loop.phase.epochs, loop.phase.epochs)  # one measure for all epochs, whatever is scheduled
        for images, target in readable(images_held_out.prepare(accelerator), "held-out"):
            if len(target) > 1 or not losses:  # one image has no variance, which some losses divide by
                with accelerator.autocast():
                    loss = distiller(images, target)["loss"]
                losses.append(accelerator.gather_for_metrics(loss.repeat(len(target))).cpu())
        return torch.cat(losses).double().mean().item()


def _check_finite(trained: TrainedModel, wrong: int) -> None:
    """Raises RunError, in all processes, where a model has no answer to some images: it is of no use to anybody."""
    if not wrong:
        return
    mend = (
        "try a smaller `lr`, `clip_grad: 1.0`, or `precision: bf16`"
        if trained.phases
        else "its weights are damaged, or `precision` is too narrow for it; give others, or `precision: no`"
    )
    raise for_all(RunError(f"the outputs of {trained.role} are no numbers: {mend}"))


def _per_class(targets: Tensor, classes: int) -> list[int]:
    """How many images of each class there are. A label that is none, which `eval` refuses, is left out."""
    counts: list[int] = torch.bincount(targets[(targets >= 0) & (targets < classes)], minlength=classes).tolist()
    return counts


def _logits(output: Any) -> Tensor:
    """The model's answer: the first tensor, where it gives several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output
