"""The teacher's cache of one phase: which features it holds, and what they depend on."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_keys import DEPENDS_ON, as_text, depends_on, differences_beside, fingerprint, key_of
from probe_kd.data.cache_rows import Stored
from probe_kd.engine.models import portable
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError
from probe_kd.methods.distiller import Distiller
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.progress import Progress

# The keys of `data` that do not change what the teacher sees. The images themselves are in the key by their contents.
UNSEEN = {
    *("batch_size", "workers", "memory", "views", "download", "root", "num_classes", "mean", "std"),
    *("dataset", "train_split", "val_split", "test_split", "on_error", "labels", "sampler"),
}


def open_caches(
    models: Models, trained: TrainedModel, distiller: Distiller, progress: Progress, cleanup: ExitStack
) -> dict[str, TeacherCache]:
    """Open the caches of the frozen teachers that the phase uses, by the names of the teachers.

    They are closed with `cleanup`, which then tells of damaged rows.
    """
    caches: dict[str, TeacherCache] = {}
    for name in models.teachers:
        cache = open_cache(models, name, trained, distiller, progress)
        if cache is not None:
            cleanup.callback(cache.close)
            cleanup.callback(tell_of_damage, cache, progress)
            caches[name] = cache
    return caches


def open_cache(
    models: Models, name: str, trained: TrainedModel, distiller: Distiller, progress: Progress
) -> TeacherCache | None:
    """Open a teacher's cache if the recipe has one and the phase reads this teacher; otherwise return None."""
    options = models.plan.recipe.teachers_by_name[name]
    if options.cache is None or not distiller.targets_of(name):
        return None
    return opened_cache(models, name, trained, stored_targets(models, name, trained, distiller), progress)


def stored_targets(models: Models, name: str, trained: TrainedModel, distiller: Distiller) -> list[Stored]:
    """What a cache stores of a teacher for this phase: shapes and precisions are measured, and not guessed."""
    options, accelerator = models.plan.recipe.teachers_by_name[name], models.accelerator
    with torch.no_grad(), accelerator.autocast():
        images = torch.zeros(2, *models.images_for(trained).size, device=accelerator.device)
        features = distiller.teacher_targets(images, [name])
    comparing = [item for item in distiller.objectives if item.resolved.reads == "outputs"]
    outputs = {str(tap.local) for item in comparing for tap in item.teacher_taps if tap.model == name}
    # Without the teacher's name, under which another recipe may not know it.
    return [
        Stored(
            target.name,
            tuple(feature.shape[1:]),
            feature.dtype,
            options.cache_top_k if target.name in outputs else None,
        )
        for target, feature in zip(distiller.targets_of(name).values(), features, strict=True)
    ]


def opened_cache(
    models: Models, name: str, trained: TrainedModel, taps: Sequence[Stored], progress: Progress
) -> TeacherCache:
    """Open the cache of a teacher, and tell of one that could be meant and is not used. Raises RunError."""
    parent = Path(str(models.plan.recipe.teachers_by_name[name].cache))
    opened: list[Any] = [None]
    cache = TeacherCache(parent, taps, len(models.plan.datasets.train))  # type: ignore[arg-type]
    if models.accelerator.is_main_process:
        images, times = fingerprint(models.plan.datasets.train)
        dependencies = _depends_on(models, name, trained, images)
        cache.folder = parent / key_of(dependencies)
        cache.about = _metadata(cache.folder.name, dependencies, models.images_for(trained), times)
        _tell_of_others(cache, dependencies, progress)
        opened = [(cache.folder, _lock(cache, dependencies), cache.about)]
    cache.folder, cache.writes, cache.about = broadcast_object_list(opened)[0]
    if not cache.writes:
        progress.say(
            f"the teacher's cache in {cache.folder} is written by another run, or is read-only: it is only read"
        )
    return cache


def _lock(cache: TeacherCache, dependencies: Mapping[str, Any]) -> bool:
    """Lock the folder of a cache, and write what it depends on. Raises RunError where a new one cannot be made."""
    file = cache.folder / DEPENDS_ON
    try:
        writes = cache.lock()
        if writes:
            file.write_text(as_text(dependencies), encoding="utf-8")
    except OSError as refusal:
        raise RunError(f"cannot write the teacher's cache {cache.folder}: {refusal.strerror}") from refusal
    return writes


def _depends_on(models: Models, name: str, trained: TrainedModel, digest: str) -> dict[str, Any]:
    """All on which a teacher's targets depend, but for the rounding of another student's normalisation.

    `digest` is that of the training images.
    """
    recipe, teacher, images = models.plan.recipe, models.teachers[name], models.images_for(trained)
    data = recipe.data.model_dump(mode="json", exclude=UNSEEN)
    model, kwargs = portable(teacher.trace.model, teacher.trace.model_kwargs)
    # Random erasing leaves the student's mean.
    erased = {"erased": asdict(images)["mean"]} if recipe.data.reprob else {}
    about = {
        "model": model,
        "model_kwargs": kwargs,
        "seed": None if recipe.data.no_aug else recipe.seed,
        "views": {**data, "size": images.size, "teacher_input": asdict(teacher.input), **erased},
        "precision": str(models.accelerator.mixed_precision),
        "device": models.accelerator.device.type,
    }
    return depends_on(teacher.model, digest, about)


def _metadata(key: str, dependencies: Mapping[str, Any], images: InputSpec, times: str) -> dict[str, str]:
    """The metadata of new files: whose rows they are, the normalisation from which the teacher's was computed, and a
    digest of the times of the image files.
    """
    return {
        "key": key,
        "teacher": dependencies["teacher"],
        "images": dependencies["images"],
        "normalisation": json.dumps([images.mean, images.std]),
        "times": times,
    }


def _tell_of_others(cache: TeacherCache, dependencies: Mapping[str, Any], progress: Progress) -> None:
    """Tell of a cache of the same teacher and images that is not used, and of rows that have another rounding."""
    existing = cache.metadata
    if not existing and (other := differences_beside(cache.folder, dependencies)):
        folder, differences = other
        progress.tell(
            f"{folder} holds a cache of this teacher and these images, but it was made with {differences}: it is not "
            f"used, and a new one begins in {cache.folder}"
        )
    if existing.get("normalisation", cache.about["normalisation"]) != cache.about["normalisation"]:
        progress.tell(
            f"the cache in {cache.folder} was begun for a student whose images are normalised by other means and "
            "deviations: its rows are what the teacher gives here but for rounding"
        )
    if any(other.get("times", cache.about["times"]) != cache.about["times"] for other in cache.all_metadata()):
        progress.say(
            f"the image files have other times than when the cache in {cache.folder} was begun: they are a copy, or "
            "were edited. Rows of edited images are no longer what the teacher gives: delete that folder, unless they "
            "are a copy"
        )


def tell_of_damage(cache: TeacherCache, progress: Progress) -> None:
    if cache.damaged:
        progress.say(
            f"{cache.damaged} rows of the teacher's cache in {cache.folder} were damaged, and were computed anew; "
            "look after that disk"
        )
