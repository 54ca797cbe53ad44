"""The teacher's cache of one phase: which features it holds, and what they depend on."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from probe_kd.data.cache import Stored, TeacherCache, key_of
from probe_kd.engine.models import portable
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError
from probe_kd.methods.distiller import Distiller
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.progress import Progress

# The keys of `data` that do not change the training images.
UNSEEN = {
    *("batch_size", "workers", "memory", "views", "download", "root", "num_classes"),
    *("val_split", "test_split", "on_error", "labels", "sampler"),
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
    options, accelerator = models.plan.recipe.teachers_by_name[name], models.accelerator
    targets = distiller.targets_of(name)
    if options.cache is None or not targets:
        return None
    image_input = models.images_for(trained)
    # The shapes and precisions of the targets are measured, and not guessed.
    with torch.no_grad(), accelerator.autocast():
        features = distiller.teacher_targets(torch.zeros(2, *image_input.size, device=accelerator.device), [name])
    comparing = [item for item in distiller.objectives if item.resolved.reads == "outputs"]
    outputs = {str(tap.local) for item in comparing for tap in item.teacher_taps if tap.model == name}
    # Without the teacher's name, under which another recipe may not know it.
    taps = [
        Stored(
            target.name,
            tuple(feature.shape[1:]),
            feature.dtype,
            options.cache_top_k if target.name in outputs else None,
        )
        for target, feature in zip(targets.values(), features, strict=True)
    ]
    opened: list[Any] = [None]
    cache = TeacherCache(Path(options.cache), taps, len(models.plan.datasets.train))  # type: ignore[arg-type]
    if accelerator.is_main_process:
        depends_on = _depends_on(models, models.teachers[name], image_input)
        key, depends = key_of(models.teachers[name].model, models.plan.datasets.train, depends_on)
        cache.folder = cache.folder / key
        try:
            opened = [(cache.folder, cache.lock())]
            (cache.folder / "depends-on.json").write_text(depends, encoding="utf-8")
        except OSError as refusal:
            raise RunError(f"cannot write the teacher's cache {cache.folder}: {refusal.strerror}") from refusal
    cache.folder, cache.writes = broadcast_object_list(opened)[0]
    if not cache.writes:
        progress.say(f"another run writes the teacher's cache in {cache.folder}; this one only reads it")
    return cache


def _depends_on(models: Models, teacher: TrainedModel, image_input: InputSpec) -> dict[str, Any]:
    """All settings on which a teacher's targets depend."""
    recipe = models.plan.recipe
    data = recipe.data.model_dump(mode="json", exclude=UNSEEN)
    model, kwargs = portable(teacher.trace.model, teacher.trace.model_kwargs)
    return {
        "model": model,
        "model_kwargs": kwargs,
        "seed": None if recipe.data.no_aug else recipe.seed,
        "views": {**data, "given": asdict(image_input), "teacher": asdict(teacher.input)},
        "precision": str(models.accelerator.mixed_precision),
        "device": models.accelerator.device.type,
    }


def tell_of_damage(cache: TeacherCache, progress: Progress) -> None:
    if cache.damaged:
        progress.say(
            f"{cache.damaged} rows of the teacher's cache in {cache.folder} were damaged, and were computed anew; "
            "look after that disk"
        )
