"""What is tried on images before anything is trained: which parameters the losses reach, and whether a step works."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from probe_kd.data.loading import loader, readable
from probe_kd.errors import ProbeKDError, RunError, for_all, short
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import gradient_norms
from probe_kd.methods.objectives import Objective
from probe_kd.recipe.planner import Plan
from probe_kd.training.devices import memory_format
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.progress import Progress

MOST_TRIED = 16  # images of the batch that is tried before training
Norms = dict[str, dict[str, float]]  # of the gradient, by loss and parameter


def check_student(plan: Plan, accelerator: Accelerator, progress: Progress) -> None:
    """Say and refuse what `probe-kd check` does on a batch, before hours are spent on a teacher. Raises RunError."""
    models = Models(plan, accelerator)
    with one_step():
        trained = student_of(models)
        images, target = first_batch(models, trained, most=MOST_TRIED)
        reach = reach_of(models, trained, images, target)
        found = complaints(reach), untrained(models, trained, reach, images, target)
    accelerator.free_memory()
    wrong, remarks = broadcast_object_list([found])[0]  # so that all processes end, or none
    if wrong:
        raise for_all(RunError("; ".join(wrong)))
    if accelerator.is_main_process:
        for remark in remarks:
            progress.say(remark)


@contextmanager
def one_step() -> Iterator[None]:
    """Inside, what models and losses raise on real images is told. Raises RunError."""
    try:
        yield
    except (ProbeKDError, torch.OutOfMemoryError):
        raise
    except Exception as refusal:  # models of anybody fail in any way, on a batch of one image say
        raise RunError(f"a step on the first batch of images fails: {short(refusal)}") from refusal


def reach_of(models: Models, trained: TrainedModel, images: Tensor, target: Tensor) -> list[tuple[str, Norms]]:
    """Of each stage, the gradients that its losses give on these images."""
    found = []
    for phase in trained.phases:
        distiller = models.distiller(trained, phase)
        found.append((phase.name, gradient_norms(distiller.train(), images, target)))
        distiller.close()
    return found


def student_of(models: Models) -> TrainedModel:
    """The student before training, beside a teacher as it is before training, which is tried where it is trained."""
    for trained in models.in_turn():
        if trained.phases and trained.is_teacher:
            reach_of(models, trained, *first_batch(models, trained, most=MOST_TRIED))
        if trained.is_teacher and not models.plan.recipe.share:
            models.teacher = trained
        if trained.role == "student":
            return trained
    raise AssertionError("every recipe has a student")


def first_batch(models: Models, trained: TrainedModel, *, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images, as the loop gives them to the models, and class indices; the first few of a batch, or all of it.

    Raises DataError.
    """
    data, device = models.plan.recipe.data, models.accelerator.device
    # Without workers, which would read many batches more than this one.
    options = data.model_copy(update={"workers": 0, "batch_size": min(data.batch_size, most or data.batch_size)})
    batches = loader(models.plan.datasets.train, options, models.images_for(trained), training=True)
    placed = batches.on(device, memory_format=memory_format(models.plan.recipe, device))
    images, target, _ = next(readable(placed))
    return images, target


def untrained(
    models: Models, trained: TrainedModel, reach: Sequence[tuple[str, Norms]], images: Tensor, target: Tensor
) -> list[str]:
    """A remark on the student's parameters that its answer depends on, and no loss of any stage moves.

    It is no refusal: who trains hints alone means to train what is above them later.
    """
    answer = Distiller(trained.model, None, [Objective("cross_entropy")], student_input=trained.input)
    answer.to(models.accelerator.device)
    used = set(gradient_norms(answer.train(), images, target)["cross_entropy"])
    answer.close()
    missed = sorted(used - {name for _, norms in reach for loss in norms.values() for name in loss})
    names = ", ".join(missed[:6]) + (f" and {len(missed) - 6} more" if len(missed) > 6 else "")
    says = (
        f"no loss of any stage trains {names}, so its accuracy means nothing; add one that reads the student's answer"
    )
    return [f"{says}, `cross_entropy` say"] * bool(missed)


def complaints(reach: Sequence[tuple[str, Norms]]) -> list[str]:
    """What is wrong with the gradients of a first batch."""
    says = []
    for stage, norms in reach:
        for loss, found in norms.items():
            if not all(map(math.isfinite, found.values())):
                says.append(f"loss `{loss}` of stage `{stage}` has a gradient that is not finite")
            elif not any(found.values()):
                says.append(
                    f"loss `{loss}` of stage `{stage}` moves nothing; leave it out, or compare what can be trained"
                )
    return says


def too_large(refusal: Exception) -> str:
    """What to try where a device has no memory left."""
    return (
        f"out of memory: {short(refusal)}. Try a smaller `batch_size` with `grad_accum_steps`, `precision: bf16`, or "
        "`grad_checkpointing: true` of the student"
    )


def reached(models: Models, trained: TrainedModel, distiller: Distiller) -> set[str]:
    """The parameters that any loss reaches, by name, seen on images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *models.images_for(trained).size, generator=generator).to(models.accelerator.device)
    target = torch.zeros(2, dtype=torch.long, device=models.accelerator.device)
    return {name for found in gradient_norms(distiller.train(), images, target).values() for name in found}
