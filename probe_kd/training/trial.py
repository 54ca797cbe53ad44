"""The trial before training: which parameters the losses reach, and whether a step works on real images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from probe_kd.data.loading import loader, placeholder, readable
from probe_kd.engine.spec import Share
from probe_kd.engine.surgery import in_pattern
from probe_kd.errors import ProbeKDError, RunError, for_all, short
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import gradient_norms
from probe_kd.methods.normalisation import without_statistics
from probe_kd.methods.objectives import Objective
from probe_kd.methods.outputs import output_spec
from probe_kd.methods.shares import complaint_about, task_of
from probe_kd.recipe.planner import Plan
from probe_kd.training.devices import memory_format
from probe_kd.training.fitting import fit_for_trial
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.phase import Phase
from probe_kd.training.progress import Progress

MOST_TRIED = 16  # images of the batch that is tried before training
Norms = dict[str, dict[str, float]]  # of the gradient, by loss and parameter


class TrialBatch(NamedTuple):
    """Images, their labels if the data have any, and the number of each among the training images."""

    images: Tensor
    target: Tensor | None
    indices: Tensor


def check_student(plan: Plan, accelerator: Accelerator, progress: Progress) -> None:
    """Make the checks of `probe-kd check` on a batch before training, which may begin with hours for a teacher.

    Raises RunError for errors, and prints remarks.
    """
    models = Models(plan, accelerator)
    with one_step():
        trained = student_of(models)
        batch = first_batch(models, trained, most=MOST_TRIED)
        reach = reach_of(models, trained, batch)
        wrong = [*complaints(trained.phases, reach), *share_complaints(trained.phases, reach)]
        remarks = [*untrained(models, trained, reach, batch.images), *silent_losses(trained.phases, reach)]
        wrong_and_remarks = wrong, remarks
    accelerator.free_memory()
    wrong, remarks = broadcast_object_list([wrong_and_remarks])[0]  # so that all processes end, or none
    if wrong:
        raise for_all(RunError("; ".join(wrong)))
    if accelerator.is_main_process:
        for remark in remarks:
            progress.say(remark)


@contextmanager
def one_step() -> Iterator[None]:
    """Turn any error of models and losses on real images into a RunError."""
    try:
        yield
    except (ProbeKDError, torch.OutOfMemoryError):
        raise
    except Exception as refusal:  # a user's model may raise anything, on a batch of one image say
        raise RunError(f"a step on the first batch of images fails: {short(refusal)}") from refusal


def reach_of(models: Models, trained: TrainedModel, batch: TrialBatch) -> list[tuple[str, Norms]]:
    """The gradient norms of the losses of each stage on these images."""
    reach = []
    for phase in trained.phases:
        distiller = models.distiller(trained, phase)
        fit_for_trial(distiller, batch.images)
        reach.append((phase.name, gradient_norms(distiller.train(), *batch)))
        distiller.close()
    return reach


def student_of(models: Models) -> TrainedModel:
    """The student before training. A teacher that is to be trained is tried first, too."""
    for trained in models.in_turn():
        if trained.phases and trained.is_teacher:
            reach_of(models, trained, first_batch(models, trained, most=MOST_TRIED))
        if trained.is_teacher and not models.plan.recipe.share:
            models.add_teacher(trained)
        if trained.role == "student":
            return trained
    raise AssertionError("every recipe has a student")


def first_batch(models: Models, trained: TrainedModel, *, most: int | None = None) -> TrialBatch:
    """Return the first batch, in the form of the loop, with at most `most` images.

    Raises DataError if an image cannot be read.
    """
    data, device = models.plan.recipe.data, models.accelerator.device
    # Without workers, which would read more batches than this one.
    options = data.model_copy(update={"workers": 0, "batch_size": min(data.batch_size, most or data.batch_size)})
    batches = loader(models.plan.datasets.train, options, models.images_for(trained), training=True)
    placed = batches.on(device, memory_format=memory_format(models.plan.recipe, device))
    images, target, index = next(readable(placed))
    return TrialBatch(images, None if models.plan.datasets.labels == "none" else target, index.to(device))


def untrained(models: Models, trained: TrainedModel, reach: Sequence[tuple[str, Norms]], images: Tensor) -> list[str]:
    """Remark on parameters that the student's output depends on, but that no loss of any stage trains.

    This is not an error: after hints alone, one may train the layers above them in another run. The output of a
    student that does not yield the data's classes is not read by anyone. Frozen layers with weights of their own are as
    they should be.
    """
    if not _yields_classes(models, trained):
        return []
    classes = Objective("cross_entropy", student=trained.output)
    distiller = Distiller(trained.model, None, [classes], student_input=trained.input, student_trace=trained.trace)
    distiller.to(models.accelerator.device)
    target = torch.zeros(len(images), dtype=torch.long, device=images.device)
    used = set(gradient_norms(distiller.train(), images, target)["cross_entropy"])
    distiller.close()
    options = models.plan.recipe.student
    frozen = [layer for phase in trained.phases for layer in phase.freeze if options.pretrained or options.checkpoint]
    used -= {name for name in used if any(in_pattern(name.removeprefix("student."), layer) for layer in frozen)}
    unreached = sorted(used - {name for _, norms in reach for loss in norms.values() for name in loss})
    names = ", ".join(unreached[:6]) + (f" and {len(unreached) - 6} more" if len(unreached) > 6 else "")
    measure = "mAP" if models.plan.datasets.labels == "multilabel" else "accuracy"
    remark = (
        f"no loss of any stage trains {names}, so its {measure} means nothing; add one that reads the student's answer"
    )
    loss = "binary_cross_entropy" if models.plan.datasets.labels == "multilabel" else "cross_entropy"
    return [f"{remark}, `{loss}` say"] * bool(unreached)


def _yields_classes(models: Models, trained: TrainedModel) -> bool:
    with suppress(ProbeKDError):
        return output_spec(trained.trace, trained.output, "student").channels == models.plan.datasets.num_classes
    return False


def complaints(phases: Sequence[Phase], reach: Sequence[tuple[str, Norms]]) -> list[str]:
    """List the errors in the gradients of a first batch."""
    errors = []
    for phase, (stage, norms) in zip(phases, reach, strict=True):
        custom = _custom_losses(phase)
        for loss, gradients in norms.items():
            if not all(map(math.isfinite, gradients.values())):
                errors.append(f"loss `{loss}` of stage `{stage}` has a gradient that is not finite")
            elif not any(gradients.values()) and not (gradients and loss in custom):
                errors.append(
                    f"loss `{loss}` of stage `{stage}` moves nothing; leave it out, or compare what can be trained"
                )
    return errors


def share_complaints(phases: Sequence[Phase], reach: Sequence[tuple[str, Norms]]) -> list[str]:
    """List the weights that cannot be a share of the task's gradient on a first batch."""
    errors = []
    for phase, (stage, norms) in zip(phases, reach, strict=True):
        for index, objective in enumerate(phase.objectives):
            if not isinstance(objective.weight, Share):
                continue
            names = [phase.objectives[position].name for position in task_of(phase.objectives, index)]
            common = [
                (task_norm, norms[objective.name][parameter])
                for name in names
                for parameter, task_norm in norms[name].items()
                if parameter.startswith("student.") and parameter in norms[objective.name]
            ]
            if complaint := complaint_about(objective.name, " + ".join(names), common):
                errors.append(f"stage `{stage}`: {complaint}")
    return errors


def silent_losses(phases: Sequence[Phase], reach: Sequence[tuple[str, Norms]]) -> list[str]:
    """Remark on custom losses with a gradient of zero: a loss may leave out images, by the teacher's answer say."""
    return [
        f"loss `{loss}` of stage `{stage}` has a gradient of zero on the first images, so it may train nothing"
        for phase, (stage, norms) in zip(phases, reach, strict=True)
        for loss, gradients in norms.items()
        if loss in _custom_losses(phase) and gradients and not any(gradients.values())
    ]


def _custom_losses(phase: Phase) -> set[str]:
    return {objective.name for objective in phase.objectives if not isinstance(objective.loss, str)}


def too_large(refusal: Exception) -> str:
    """The message for a device that is out of memory, with what to try."""
    return (
        f"out of memory: {short(refusal)}. Try a smaller `batch_size` with `grad_accum_steps`, `precision: bf16`, or "
        "`grad_checkpointing: true` of the student"
    )


def reached(models: Models, trained: TrainedModel, distiller: Distiller) -> set[str]:
    """The names of the parameters that any loss reaches, measured on images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *models.images_for(trained).size, generator=generator).to(models.accelerator.device)
    target = placeholder(models.plan.datasets, 2)
    target = None if target is None else target.to(models.accelerator.device)
    with without_statistics(distiller.adapters):
        index = torch.arange(2, device=models.accelerator.device)
        norms_of_losses = gradient_norms(distiller.train(), images, target, index)
    return {name for norms in norms_of_losses.values() for name in norms}
