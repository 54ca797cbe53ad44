"""Measure the features of two named models, with their weights, on some of a user's images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from ruamel.yaml import YAML
from torch import nn
from torch.utils.data import Subset

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.loading import loader, readable
from probe_kd.data.options import DataOptions
from probe_kd.engine.matching import Level, doubts, find_pairs
from probe_kd.engine.models import build_model, device_of
from probe_kd.engine.spec import InputSpec, Pair, Trace
from probe_kd.engine.weights import load_weights
from probe_kd.errors import DataError, WeightsError
from probe_kd.methods.feature_figures import FeatureFigures, measure_features
from probe_kd.methods.feature_matching import match_features, most_pairs, remarks
from probe_kd.recipe.distillation import TeacherChoice, default_batch_size, default_epochs, write_distillation
from probe_kd.recipe.scaffold import SMALL, data_lines, has_weights

BATCH, BATCH_OF_LARGE = 64, 32  # images; all candidate features of one batch are in memory at once


@dataclass(frozen=True)
class ImageSource:
    """The training images of a folder or data set, and the options that open them."""

    images: str
    options: DataOptions
    datasets: Datasets

    @property
    def labelled(self) -> bool:
        return self.datasets.labels != "none"


@dataclass(frozen=True)
class FeatureMatch:
    """Two models matched by their features: the figures, the pairs, and sentences on layers that teach nothing.

    The checkpoints are those of the models, None for random weights of a student and for the weights of a teacher's
    name.
    """

    student: Trace
    teacher: Trace
    source: ImageSource
    figures: FeatureFigures
    pairs: tuple[Pair, ...]
    remarks: tuple[str, ...]
    student_checkpoint: str | None = None
    teacher_checkpoint: str | None = None


def match_models(
    student: Trace,
    teacher: Trace,
    images: str,
    *,
    level: Level = "stage",
    num_pairs: int | None = None,
    num_images: int = 512,
    student_checkpoint: str | None = None,
    teacher_checkpoint: str | None = None,
    device: str | None = None,
    seed: int = 0,
) -> FeatureMatch:
    """Measure two traced models on images of a folder or data set, and pair their layers.

    Without `num_pairs`, there are as many pairs as `match` makes at this level, or as layers that can be paired. See
    `measure_models` for the weights. Raises WeightsError, DataError and MatchError.
    """
    source = open_images(images, student)
    checkpoints: dict[str, Any] = {"student_checkpoint": student_checkpoint, "teacher_checkpoint": teacher_checkpoint}
    figures = measure_models(student, teacher, source, num_images=num_images, device=device, seed=seed, **checkpoints)
    most = len(find_pairs(student, teacher, level=level))
    count = min(most, most_pairs(figures)) if num_pairs is None else num_pairs
    pairs = match_features(figures, num_pairs=count)
    notes = (*doubts(pairs, student, teacher, complete=num_pairs is None), *remarks(figures))
    return FeatureMatch(student, teacher, source, figures, pairs, notes, **checkpoints)


def write_matched_recipe(matched: FeatureMatch, path: Path, *, command: str = "") -> None:
    """Write a recipe in which the student learns the features of these pairs, beside the labels if there are any.

    Raises RecipeError.
    """
    count = len(matched.source.datasets.train)  # type: ignore[arg-type]
    batch_size = default_batch_size(count)
    file = None if matched.teacher_checkpoint == "pretrained" else matched.teacher_checkpoint
    write_distillation(
        matched.student,
        [TeacherChoice(matched.teacher, matched.pairs, file)],
        matched.source.images,
        path,
        epochs=default_epochs(count, batch_size),
        batch_size=batch_size,
        labels=matched.source.labelled,
        student_checkpoint=matched.student_checkpoint,
        command=command,
    )


def open_images(images: str, student: Trace) -> ImageSource:
    """Open the images of a folder or data set, with their classes if they have any. Raises DataError."""
    try:
        return _opened(images, student, labels=True)
    except DataError:
        return _opened(images, student, labels=False)


def _opened(images: str, student: Trace, *, labels: bool) -> ImageSource:
    text = "\n".join(data_lines(images, None, student.input_size, labels=labels))
    options = DataOptions.model_validate(YAML(typ="safe").load(text)["data"])
    return ImageSource(images, options, open_datasets(options))


def measure_models(
    student: Trace,
    teacher: Trace,
    source: ImageSource,
    *,
    student_checkpoint: str | None = None,
    teacher_checkpoint: str | None = None,
    num_images: int = 512,
    inputs: tuple[InputSpec, InputSpec] | None = None,
    device: str | None = None,
    seed: int = 0,
) -> FeatureFigures:
    """Build two traced models, and measure their features on training images that `seed` draws.

    A checkpoint is a file, or `pretrained` for the weights of the model's name. The student starts from random weights,
    which `seed` draws too, unless it has a checkpoint; the teacher has those of its name unless it has one. `inputs`
    are those of the student and the teacher, by default as their timm configs say. Raises WeightsError for a teacher
    without weights, and the errors of models and images.
    """
    set_seed(seed)  # as in a run of the recipe with this seed
    models = _build(student, student_checkpoint), _build(teacher, teacher_checkpoint or "pretrained")
    traces = student, teacher
    return measure_built(models, traces, source, num_images=num_images, inputs=inputs, device=device, seed=seed)


def measure_built(
    models: tuple[nn.Module, nn.Module],
    traces: tuple[Trace, Trace],
    source: ImageSource,
    *,
    num_images: int = 512,
    inputs: tuple[InputSpec, InputSpec] | None = None,
    device: str | None = None,
    seed: int = 0,
) -> FeatureFigures:
    """Measure the features of a student and a teacher that are built, on training images that `seed` draws.

    `inputs` are as for `measure_models`. The models are moved to the device. Raises the errors of images.
    """
    student, teacher = traces
    place = torch.accelerator.current_accelerator(check_available=True) if device is None else device_of(device)
    student_model, teacher_model = (model.to(place or torch.device("cpu")) for model in models)
    inputs = inputs or _inputs(student_model, teacher_model, student, teacher)
    count = len(source.datasets.train)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:num_images].tolist()
    view = inputs[0].covering(inputs[1])
    options = source.options.model_copy(update={"batch_size": BATCH if max(view.size[1:]) <= SMALL else BATCH_OF_LARGE})
    batches = loader(Subset(source.datasets.train, chosen), options, view, training=False)
    return measure_features(
        student_model,
        teacher_model,
        readable(batches),
        student_input=inputs[0],
        teacher_input=inputs[1],
        student_trace=student,
        teacher_trace=teacher,
        seed=seed,
    )


def _build(traced: Trace, checkpoint: str | None) -> nn.Module:
    pretrained = checkpoint == "pretrained"
    if pretrained and not has_weights(traced.model):
        raise WeightsError(f"timm has no weights for {traced.model}; give the file with its weights as a checkpoint")
    model = build_model(traced.model, traced.model_kwargs, pretrained=pretrained)
    if checkpoint and not pretrained:
        load_weights(model, checkpoint)
    return model


def _inputs(
    student: nn.Module, teacher: nn.Module, student_trace: Trace, teacher_trace: Trace
) -> tuple[InputSpec, InputSpec]:
    """The inputs of both. A model that does not say how its images are normalised sees those of the other."""
    of_student = InputSpec(student_trace.input_size).filled(student)
    of_teacher = InputSpec(teacher_trace.input_size).filled(teacher)
    if not of_student.complete:
        of_student = replace(of_student, mean=of_teacher.mean, std=of_teacher.std)
    if not of_teacher.complete:
        of_teacher = replace(of_teacher, mean=of_student.mean, std=of_student.std)
    return of_student.or_plain(), of_teacher.or_plain()
