"""The recipe of a trial: fewer epochs, measured on held-out training images, with a teacher that is trained already."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.options import DataOptions
from probe_kd.errors import RunError
from probe_kd.recipe.keys import LabelledSet, LossOptions, Recipe, ScheduleOptions, StageOptions, TeacherOptions
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.training.state import weights_name

HOLDOUT = 0.2  # of the training images, where the recipe has none
SHARE = 0.25  # of the recipe's epochs that a trial has
OTHER_FOLD = 1  # of the runs that compare, whose held-out images no trial was scored on


def scored_on_held_out(recipe: Recipe) -> Recipe:
    """The recipe measured on held-out training images alone: neither `val_split` nor `test_split` is opened.

    Without `holdout`, a fifth of the training images is held out. Where the recipe trains on a `fraction` of them, it
    still trains on as many images as before, if there are that many.
    """
    data, update = recipe.data, {"val_split": "none", "test_split": None}
    if not data.holdout:
        update |= {"holdout": HOLDOUT, "fraction": min(1.0, data.fraction / (1 - HOLDOUT))}  # type: ignore[dict-item]
    changes: dict[str, Any] = {"data": data.model_copy(update=update), "baseline": False, "trackers": [], "tune": None}
    if recipe.evaluate is not None:
        probes = {name: _held_out_set(probe) for name in recipe.probes if (probe := getattr(recipe.evaluate, name))}
        changes["evaluate"] = recipe.evaluate.model_copy(update=probes)
    return recipe.model_copy(update={**changes, "checkpoint_hist": 1, "recovery_interval": 0})


def _held_out_set(probe: LabelledSet) -> LabelledSet:
    """A labelled set, also measured on held-out images of its own training images; unnamed, it is that of the other."""
    if not probe.is_named:
        return probe
    update = {"val_split": "none", "test_split": None, "holdout": probe.holdout or HOLDOUT, "every": None}
    return probe.model_copy(update=update)


def epochs_of(recipe: Recipe) -> int:
    """The epochs of all stages."""
    return sum(stage.epochs for stage in recipe.stages)


def trial_epochs(recipe: Recipe, requested: int | None) -> int:
    """The epochs of a trial: as many as were requested, or a quarter of the recipe's, and at least one of each stage.

    Raises RunError for more than the recipe has, or fewer than its stages.
    """
    most, least = epochs_of(recipe), len(recipe.stages)
    if requested is None:
        return max(least, ceil(SHARE * most))
    if not least <= requested <= most:
        stages = f"{least} stages" if least > 1 else "1 stage"
        raise RunError(
            f"--epochs {requested}: the recipe has {stages} and {most} epochs, so a trial has {least} to {most}"
        )
    return requested


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with so many epochs, shared out over its stages; warm-ups and schedules shrink as their stages do."""
    share = epochs / epochs_of(recipe)
    if share == 1:
        return recipe
    counts = [max(1, round(share * stage.epochs)) for stage in recipe.stages]
    counts[-1] = max(1, counts[-1] + epochs - sum(counts))
    stages = [_shortened_stage(stage, count) for stage, count in zip(recipe.stages, counts, strict=True)]
    return recipe.model_copy(update={"stages": stages})


def _shortened_stage(stage: StageOptions, epochs: int) -> StageOptions:
    share, scheduler = epochs / stage.epochs, stage.scheduler
    update = {
        "warmup_epochs": scheduler.warmup_epochs * share,
        "decay_epochs": scheduler.decay_epochs * share,
        "decay_milestones": sorted({max(1, round(share * number)) for number in scheduler.decay_milestones}),
    }
    losses = {name: _shortened_loss(loss, share) for name, loss in stage.losses.items()}
    return stage.model_copy(
        update={"epochs": epochs, "losses": losses, "scheduler": scheduler.model_copy(update=update)}
    )


def _shortened_loss(loss: LossOptions, share: float) -> LossOptions:
    """The loss with shorter schedules, of its weight and of its options."""
    update: dict[str, Any] = {}
    if isinstance(loss.weight, ScheduleOptions) and loss.weight.epochs:
        update["weight"] = loss.weight.model_copy(update={"epochs": share * loss.weight.epochs})
    for key, value in (loss.model_extra or {}).items():
        if isinstance(value, Mapping) and value.get("epochs"):
            update[key] = {**value, "epochs": share * value["epochs"]}
    return loss.model_copy(update=update) if update else loss


def trained_teachers(planned: Plan, folder: Path | None, cache: Path | None) -> dict[str, TeacherOptions]:
    """The teachers by name: with the weights in the folder in which they were trained, and with a cache."""
    teachers: dict[str, TeacherOptions] = {}
    for name, teacher in planned.teachers.items():
        update: dict[str, Any] = {}
        if folder is not None and teacher.options.train is not None:
            weights = str(folder / weights_name(role_of_teacher(name)))
            kwargs = dict(teacher.trace.model_kwargs)
            update = {"train": None, "pretrained": False, "new_classifier": False}
            update |= {"checkpoint": weights, "model_kwargs": kwargs}
        if cache is not None and not teacher.options.cache:
            update["cache"] = str(cache)
        teachers[name] = teacher.options.model_copy(update=update)
    return teachers


def with_teachers(recipe: Recipe, teachers: Mapping[str, TeacherOptions]) -> Recipe:
    """The recipe with other options of its teachers, by name; that of `teacher` has an empty name."""
    if not teachers:
        return recipe
    return recipe.model_copy(update={"teachers": dict(teachers)} if recipe.teachers else {"teacher": teachers[""]})


def why_no_cache(recipe: Recipe) -> str:
    """Why the teacher is asked anew in every trial; empty if what it says can be stored."""
    if not recipe.teachers_by_name:
        return "there is no teacher"
    if recipe.share:
        return "the teacher trains with the student"
    return "mixup and cutmix make images that no cache has seen" if recipe.data.mixes else ""


def cache_bytes(plans: list[Plan]) -> float:
    """About how many bytes the caches of these plans hold together, at four bytes a number."""
    sizes: dict[tuple[str, str], float] = {}
    for planned in plans:
        images = len(planned.datasets.train)  # type: ignore[arg-type]
        for name, teacher in planned.teachers.items():
            for target, numbers, views in planned.stored_targets(teacher):
                sizes[name, target] = max(sizes.get((name, target), 0.0), 4.0 * numbers * images * views)
    return sum(sizes.values())


def other_images(data: DataOptions) -> Datasets | None:
    """The images of the runs that compare, of which others are held out than of the trials; None if all were.

    Raises DataError.
    """
    return open_datasets(data, fold=OTHER_FOLD) if data.holdout <= 0.5 else None
