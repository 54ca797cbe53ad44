"""What a run measures: accuracy, agreement with the teacher, correct answers by class, the loss on held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from probe_kd.data.batches import Batches
from probe_kd.data.loading import loader, readable
from probe_kd.engine.probe import reader
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError, for_all
from probe_kd.measures import OF_PAIRS
from probe_kd.methods.adapters import ImageView
from probe_kd.methods.gradients import not_compiled
from probe_kd.methods.predictions import average_precisions, class_logits, mean_average_precision
from probe_kd.training.devices import memory_format
from probe_kd.training.labelled_sets import LabelledSets
from probe_kd.training.loop import Loop
from probe_kd.training.models import ENSEMBLE, TEACHER_BASELINE, Models, TrainedModel
from probe_kd.training.pair_scores import means, score_all_stages, score_pairs
from probe_kd.training.state import PairScore

# The images of the curves, of the final figures, and those by which an epoch is chosen. Often they are the same.
MeasuredSplit = Literal["val", "test", "choice"]
_HELD_OUT = -1  # the number of an image that is not among the training images


@dataclass(frozen=True)
class Score:
    """The score of one model on one split.

    `accuracy` and `agreement` are None where they mean nothing, and `measures` are the others by their names in
    `MEASURES`. `classes` counts for every class its `images` and those that are `right`.
    """

    accuracy: float | None = None
    agreement: float | None = None
    classes: Mapping[str, list[int]] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, float | None]:
        """The columns of metrics.csv. Those of the accuracy and the agreement are there where there are classes."""
        classified = {"accuracy": self.accuracy, "agreement": self.agreement} if self.accuracy is not None else {}
        agreement = {"agreement": self.agreement} if self.agreement is not None else {}
        return {**classified, **agreement, **self.measures}


class Scorer:
    """Measures the models of a run. Owns the prepared test batches and the teacher's predictions for them."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.plan, self.accelerator = models.plan, models.accelerator
        self.latest: dict[str, Score] = {}  # by role, as long as the weights do not change
        self.teacher_predictions: dict[str, Tensor] = {}  # by split
        # With the workers that read them.
        self.test_batches: dict[tuple[InputSpec, MeasuredSplit], Batches] = {}
        self.labelled_sets = LabelledSets(models)

    def forget_teacher(self) -> None:
        """Discard the teacher's predictions: it is another model now, or has other weights."""
        self.teacher_predictions = {}

    def measure(self, models: Sequence[TrainedModel], split: MeasuredSplit = "val") -> list[Score]:
        """Measure each model on the images of a split. The teacher's score has no agreement.

        Without labels, only the agreement is measured, where a loss compares the outputs.

        Images are read once for all models with the same input, and not at all for models that do not classify.
        """
        scores = iter(self._measure([model for model in models if self._has_predictions(model)], split))
        return [next(scores) if self._has_predictions(model) else Score() for model in models]

    def _has_predictions(self, trained: TrainedModel) -> bool:
        """Whether the class of a model's largest output means something."""
        return self.plan.agrees_without_labels or trained.role == ENSEMBLE or self.plan.classifies(trained.side)

    def _measure(self, models: Sequence[TrainedModel], split: MeasuredSplit) -> list[Score]:
        predicting = list(models)
        teacher = self.models.reference if split not in self.teacher_predictions else None
        teacher = teacher if teacher is not None and self._has_predictions(teacher) else None
        if teacher is not None and any(model is not teacher and not _is_alone(model) for model in models):
            predicting += [teacher] * (teacher not in predicting)
        predicted = self._predict(predicting, split)
        if teacher in predicting:
            self.teacher_predictions[split] = predicted[predicting.index(teacher)][0]
        return [self._score(model, *prediction, split) for model, prediction in zip(models, predicted, strict=False)]

    def measure_student(self, trained: TrainedModel, loop: Loop, epoch: int) -> dict[str, float]:
        """What is measured of the student beside its own classes after an epoch of a stage, by name."""
        recipe = self.plan.recipe
        every = {name: probe.every for name, probe in recipe.probes.items()}
        intervals = {name: recipe.val_interval if value is None else value for name, value in every.items()}
        is_last = epoch == loop.phase.epochs
        due = [name for name, interval in intervals.items() if interval and (is_last or epoch % interval == 0)]
        measures = self.labelled_sets.measure(trained, due, final=False)
        if self.plan.measures_pairs and (is_last or epoch % recipe.val_interval == 0):
            measures |= means(self._pairs(trained, loop, "val"))
        return measures

    def _pairs(self, trained: TrainedModel, loop: Loop, split: MeasuredSplit) -> list[PairScore]:
        batches = self._batches(self.models.images_for(trained), split)
        return score_pairs(loop.distiller, batches, self.accelerator, loop.phase.name)

    def value_to_choose_by(self, trained: TrainedModel, loop: Loop, measures: Mapping[str, float]) -> float | None:
        """The value of `Plan.chosen_by` after an epoch with these `measures`; None if the epoch has none.

        It is of images that give no final figure.
        """
        datasets, name = self.plan.datasets, self.plan.chosen_by
        measured_on = datasets.test if datasets.val is None else datasets.val
        if name in OF_PAIRS and name in measures and datasets.to_choose_by is not measured_on:
            return means(self._pairs(trained, loop, "choice")).get(name)
        return measures.get(name)

    def final_measures(self, trained: TrainedModel) -> dict[str, float]:
        """The final k-NN and linear probe of a model, by name."""
        return self.labelled_sets.measure(trained, list(self.plan.labelled_sets), final=True)

    def final_pairs(self, trained: TrainedModel, folder: Path) -> list[PairScore]:
        """The final score of every pair of the student, through the adapters in the run's folder."""
        if not self.plan.measures_pairs:
            return []
        batches = self._batches(self.models.images_for(trained), self.final)
        return score_all_stages(self.models, trained, folder, batches)

    def _score(self, trained: TrainedModel, answers: Tensor, targets: Tensor, split: MeasuredSplit) -> Score:
        if self.plan.datasets.labels == "multilabel":
            mean = mean_average_precision(average_precisions(answers, targets))
            return Score(measures={} if mean is None else {"map": mean})
        if self.plan.datasets.labels == "none":
            return self._agreement_alone(trained, answers, split)
        accuracy = (answers == targets).double().mean().item()
        labels_by_count = {"images": targets, "right": targets[answers == targets]}
        classes = {name: _per_class(labels, self.plan.datasets.num_classes) for name, labels in labels_by_count.items()}
        if self._is_reference(trained):  # while it trains, its answers change
            self.teacher_predictions[split] = answers
            return Score(accuracy, None, classes)
        if not self.models.teachers or split not in self.teacher_predictions or _is_alone(trained):
            return Score(accuracy, None, classes)
        return Score(accuracy, (answers == self.teacher_predictions[split]).double().mean().item(), classes)

    def _is_reference(self, trained: TrainedModel) -> bool:
        """Whether students will be compared with this model: the single teacher, also before it is one of `models`."""
        return trained.is_teacher and not self.plan.recipe.teachers

    def _agreement_alone(self, trained: TrainedModel, answers: Tensor, split: MeasuredSplit) -> Score:
        if self._is_reference(trained):
            self.teacher_predictions[split] = answers
        if trained.is_teacher or split not in self.teacher_predictions:
            return Score()
        return Score(agreement=(answers == self.teacher_predictions[split]).double().mean().item())

    def _predict(self, models: Sequence[TrainedModel], split: MeasuredSplit) -> list[tuple[Tensor, Tensor]]:
        """Return (predicted classes, true classes) of all images of a split, in their order, for each model.

        With several labels an image, the logits are the prediction.
        """
        by_input: dict[InputSpec, list[int]] = {}
        for index, model in enumerate(models):
            by_input.setdefault(self.models.images_for(model), []).append(index)
        predictions: dict[int, tuple[Tensor, Tensor]] = {}
        for image_input, indices in by_input.items():
            predicted, targets = self._predict_alike([models[index] for index in indices], image_input, split)
            predictions |= {index: (answers, targets) for index, answers in zip(indices, predicted, strict=True)}
        return [predictions[index] for index in range(len(models))]

    @torch.no_grad()
    def _predict_alike(
        self, models: Sequence[TrainedModel], image_input: InputSpec, split: MeasuredSplit
    ) -> tuple[list[Tensor], Tensor]:
        """Return the predictions of models with the same input, and the labels."""
        accelerator = self.accelerator
        views = [ImageView(model.input, model.input).to(accelerator.device) for model in models]
        outputs_of = [reader(model.model, model.output) for model in models]
        for model in models:
            model.model.eval()
        rows: list[tuple[Tensor, ...]] = []
        missing_counts = torch.zeros(len(models), dtype=torch.long, device=accelerator.device)  # read once, at the end
        for pixels, target in readable(self._batches(image_input, split), "test"):
            with accelerator.autocast():
                outputs = [output_of(view(pixels)) for output_of, view in zip(outputs_of, views, strict=True)]
            answers_and_missing = [self._answers(model, output) for model, output in zip(models, outputs, strict=True)]
            rows.append(accelerator.gather_for_metrics((*(answers for answers, _ in answers_and_missing), target)))
            missing_counts += torch.stack([missing for _, missing in answers_and_missing])
        *predicted, targets = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
        for model, count in zip(models, accelerator.reduce(missing_counts, "sum").tolist(), strict=True):
            _check_finite(model, count)
        return predicted, targets

    def _batches(self, image_input: InputSpec, split: MeasuredSplit) -> Batches:
        if (image_input, split) not in self.test_batches:
            datasets = self.plan.datasets
            images = {"val": datasets.val, "choice": datasets.to_choose_by}.get(split)
            images = datasets.test if images is None else images
            batches = loader(images, self.plan.recipe.data, image_input, training=False)
            prepared = batches.prepare(self.accelerator, memory_format(self.plan.recipe, self.accelerator.device))
            self.test_batches[image_input, split] = prepared
        return self.test_batches[image_input, split]

    def _answers(self, trained: TrainedModel, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class of every image, and the number of images without one: their largest output is not finite.

        With several labels an image, its logits, and the number of images of which one is no number.
        """
        class_map = self.plan.class_maps.get(trained.name) if _is_alone(trained) else None
        if class_map is not None:
            logits = logits[:, list(class_map)]
        if self.plan.datasets.labels == "multilabel":
            return logits.float(), logits.isnan().any(1).sum()
        logits = class_logits(logits)
        return logits.argmax(1), logits.amax(1).isfinite().logical_not().sum()  # a class may be ruled out by -inf

    @property
    def final(self) -> MeasuredSplit:
        """The split of the final scores: `val` if the curves are on the same images, so that batches are made once."""
        return "val" if self.plan.datasets.val is None else "test"

    @torch.no_grad()
    def held_out_loss(self, loop: Loop, trained: TrainedModel) -> float:
        """Return the weighted loss on held-out images, by which `keep: best` chooses an epoch.

        Without held-out images, it is measured on the validation images, if they are not the test images.
        """
        dataset, accelerator = self.plan.datasets.to_choose_by, self.accelerator
        assert dataset is not None
        dataset_has_no_labels = self.plan.datasets.labels == "none"
        held_out_batches = loader(dataset, self.plan.recipe.data, self.models.images_for(trained), training=False)
        losses: list[Tensor] = []
        distiller = loop.distiller.eval()
        distiller.set_epoch(loop.phase.epochs, loop.phase.epochs)  # one measure for all epochs, whatever is scheduled
        for images, target in readable(held_out_batches.prepare(accelerator), "held-out"):
            if len(target) > 1 or not losses:  # one image has no variance, which some losses divide by
                index = torch.full((len(images),), _HELD_OUT, device=images.device)
                with accelerator.autocast(), not_compiled():
                    loss = distiller(images, None if dataset_has_no_labels else target, index=index)["loss"]
                losses.append(accelerator.gather_for_metrics(loss.repeat(len(target))).cpu())
        return torch.cat(losses).double().mean().item()


def _is_alone(trained: TrainedModel) -> bool:
    """Whether this is a teacher, which is compared with no other."""
    return trained.is_teacher and trained.role != TEACHER_BASELINE


def _check_finite(trained: TrainedModel, missing: int) -> None:
    """Raise RunError, in all processes, if a model has outputs that are not finite for some images."""
    if not missing:
        return
    advice = (
        "try a smaller `lr`, `clip_grad: 1.0`, or `precision: bf16`"
        if trained.phases
        else "its weights are damaged, or `precision` is too narrow for it; give others, or `precision: no`"
    )
    raise for_all(RunError(f"the outputs of {trained.role} are no numbers: {advice}"))


def _per_class(targets: Tensor, classes: int) -> list[int]:
    """Count the images of each class. Labels out of range, which `eval` refuses, are left out."""
    counts: list[int] = torch.bincount(targets[(targets >= 0) & (targets < classes)], minlength=classes).tolist()
    return counts
