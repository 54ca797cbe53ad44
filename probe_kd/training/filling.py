"""The caches of a recipe's frozen teachers filled without training: every image in every view that the stages show."""

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from probe_kd.console import size
from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_keys import DEPENDS_ON
from probe_kd.data.loading import load, loader, readable, seed_of_view
from probe_kd.errors import RunError, Stopped, for_all
from probe_kd.methods.distiller import Distiller
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.training.devices import memory_format
from probe_kd.training.loop import compile_distiller
from probe_kd.training.machines import check_machines, check_shared
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating, by_first, listening
from probe_kd.training.progress import Progress
from probe_kd.training.teacher_cache import opened_cache, stored_targets

FLUSH_EVERY = 30.0  # seconds of work that are lost if the process is killed


@dataclass(frozen=True)
class StageFill:
    """What one stage of the student reads from caches: the caches by the names of the teachers, and the views."""

    phase: Phase
    caches: dict[str, TeacherCache]
    views: tuple[int, ...]


def fill_caches(plan: Plan, progress: Progress, *, views: int | None = None) -> None:
    """Fill the caches of a recipe's frozen teachers with what its stages read; rows that are there are kept.

    These are the views that the stages show, or the first `views` of each image. The size is told before it begins.
    After SIGTERM or SIGINT, what is done is written and Stopped is raised; another call goes on from there.

    Raises RunError if no teacher has a cache or one with a cache is still to be trained, if the recipe bounds the views
    in no way, if another process writes the cache, and if the disk has no room; DataError if images cannot be read.
    """
    _check(plan.recipe, views)
    then = "stopping after this batch; what is done is kept"
    with accelerating(plan.recipe) as accelerator, listening(progress, then) as signals, ExitStack() as cleanup:
        check_machines(plan, accelerator)
        models = Models(plan, accelerator)
        trained = _student(models)
        fills = _open(models, trained, views, progress, cleanup)
        for folder in {cache.folder: None for fill in fills for cache in fill.caches.values()}:
            check_shared(accelerator, folder / DEPENDS_ON, "the teacher's cache")
        by_first(accelerator, lambda: _make_room(fills, plan.recipe.seed, progress))
        for fill in fills:
            _fill(models, trained, fill, progress, signals)
            accelerator.wait_for_everyone()


def _check(recipe: Recipe, views: int | None) -> None:
    """Raise RunError for a recipe whose caches cannot be filled before training."""
    cached = {name: options for name, options in recipe.teachers_by_name.items() if options.cache}
    if not cached:
        key = "teachers.NAME.cache" if recipe.teachers else "teacher.cache"
        raise for_all(RunError(f"no teacher of the recipe has a `cache`; name its folder, as in --set {key}=FOLDER"))
    for name, options in cached.items():
        if options.train is not None:
            key = f"teachers.{name}" if name else "teacher"
            raise for_all(
                RunError(
                    f"the {role_of_teacher(name)} is still to be trained (`train`). Train it first (`probe-kd train`), "
                    f"and name its weights: --set {key}.train=null --set {key}.checkpoint=RUN/teacher.safetensors"
                )
            )
    own = recipe.data.num_views
    if own is None and views is None:
        raise for_all(
            RunError(
                "every epoch of the recipe shows new views, so its cache would hold as many as there are epochs; set "
                "`data: {views: 4}`, or fill those of the first epochs by --views 4"
            )
        )
    if own is not None and views is not None and views > own:
        raise for_all(RunError(f"--views {views}: the recipe shows {own} of each image; give at most these"))


def _student(models: Models) -> TrainedModel:
    for trained in models.in_turn():
        if trained.is_teacher:
            models.add_teacher(trained)
        if trained.role == "student":
            return trained
    raise AssertionError("every recipe has a student")


def _open(
    models: Models, trained: TrainedModel, views: int | None, progress: Progress, cleanup: ExitStack
) -> list[StageFill]:
    """Open the caches of all stages. A teacher's cache is locked once, for all of them."""
    locked: dict[str, TeacherCache] = {}
    fills = []
    for phase in trained.phases:
        distiller, caches = models.distiller(trained, phase), dict[str, TeacherCache]()
        for name, options in models.plan.recipe.teachers_by_name.items():
            if not (options.cache and distiller.targets_of(name)):
                continue
            taps = stored_targets(models, name, trained, distiller)
            if name not in locked:
                locked[name] = opened_cache(models, name, trained, taps, progress)
                cleanup.callback(locked[name].close)
            first = locked[name]
            caches[name] = TeacherCache(first.folder, taps, first.count, first.writes, first.about)
        distiller.close()
        fills += [StageFill(phase, caches, _views_of(phase, models.plan.recipe, views))] * bool(caches)
    if not fills:
        raise for_all(RunError("no loss of any stage reads a teacher that has a `cache`, so there is nothing to store"))
    if any(not cache.writes for cache in locked.values()):
        raise for_all(RunError("the cache cannot be filled now; wait for the end of the run that writes it"))
    return fills


def _views_of(phase: Phase, recipe: Recipe, views: int | None) -> tuple[int, ...]:
    """The views that a stage shows, or the first `views`."""
    if views is not None:
        return tuple(range(views))
    count = recipe.data.num_views
    assert count is not None
    return tuple(sorted({age % count for age in range(phase.age, phase.age + phase.epochs)}))


def _make_room(fills: Sequence[StageFill], seed: int, progress: Progress) -> None:
    """Tell the size of all files, and reserve the space of those that are new. Raises RunError if there is none."""
    files: dict[tuple[Path, str], dict[Path, int]] = {}
    for fill in fills:
        for cache in fill.caches.values():
            for tap in cache.taps:
                of_tap = files.setdefault((cache.folder, tap.tap), {})
                of_tap |= {cache.path(tap, view): tap.bytes * cache.count for view in fill.views}
    for folder in dict.fromkeys(folder for folder, _ in files):
        progress.tell(f"the teacher's cache in {folder}:")
        for name, sizes in ((name, [*paths.values()]) for (place, name), paths in files.items() if place == folder):
            progress.tell(f"  {name or repr('')}: {len(sizes)} views x {size(sizes[0])} = {size(sum(sizes))}")
    everything = {path: count for paths in files.values() for path, count in paths.items()}
    new = {path: count for path, count in everything.items() if not path.exists()}
    _check_disks(new)
    progress.tell(f"  in all {size(sum(everything.values()))}, of which {size(sum(new.values()))} are new")
    for fill in fills:
        for cache in fill.caches.values():
            for view in fill.views:
                cache.prepare(view, seed_of_view(seed, view))


def _check_disks(new: dict[Path, int]) -> None:
    needed: dict[int, tuple[Path, int]] = {}
    for path, count in new.items():
        folder = next(place for place in path.parents if place.exists())
        device = folder.stat().st_dev
        needed[device] = folder, needed.get(device, (folder, 0))[1] + count
    for folder, count in needed.values():
        free = shutil.disk_usage(folder).free
        if count > free:
            raise RunError(
                f"the cache needs {size(count)} more, and the disk of {folder} has {size(free)} free; make room, name "
                "a `cache` on another disk, or set fewer `data.views`, or `cache_top_k`"
            )


def _fill(models: Models, trained: TrainedModel, fill: StageFill, progress: Progress, signals: list[int]) -> None:
    """Fill what one stage reads, view by view."""
    distiller, options = models.distiller(trained, fill.phase), models.plan.recipe.torchcompile
    batch_size = _batch_size(models)
    count = len(models.plan.datasets.train)  # type: ignore[arg-type]
    of_teacher = options is not None and options.target == "teacher"
    compile_distiller(distiller.train(), options if of_teacher else None)
    with ExitStack() as cleanup:
        cleanup.callback(progress.end)
        cleanup.callback(distiller.close)
        cleanup.callback(torch.compiler.reset) if of_teacher else None
        for cache in fill.caches.values():
            cleanup.callback(cache.close)
        progress.begin(f"cache: {fill.phase.name}", len(fill.views), -(-count // batch_size), 0, unit="view")
        asked = 0
        for number, view in enumerate(fill.views, 1):
            asked += _fill_view(models, trained, distiller, fill.caches, view, progress, signals)
            progress.epoch({"epoch": number})
        total = count * len(fill.views)
        progress.tell(f"{fill.phase.name}: {asked} images asked of the teacher, {total - asked} were in the cache")


def _fill_view(
    models: Models,
    trained: TrainedModel,
    distiller: Distiller,
    caches: dict[str, TeacherCache],
    view: int,
    progress: Progress,
    signals: list[int],
) -> int:
    """Ask the teachers for the images of a view that are not there. Returns the number of these images."""
    missing = {name: set(cache.missing(view).tolist()) for name, cache in caches.items()}
    images = sorted(set[int]().union(*missing.values()))
    batch_size = _batch_size(models)
    count = len(models.plan.datasets.train)  # type: ignore[arg-type]
    all_steps, steps = -(-count // batch_size), -(-len(images) // batch_size)
    last_flush = time.monotonic()
    progress.step(all_steps - steps, 0)
    for step, (pixels, _, indices) in enumerate(_batches(models, trained, images, view), 1):
        for name, cache in caches.items():
            if not missing[name].isdisjoint(indices.tolist()):
                with torch.no_grad(), models.accelerator.autocast():
                    features = distiller.teacher_targets(pixels, [name])
                cache.keep(indices, features)
        if signals or time.monotonic() - last_flush > FLUSH_EVERY:
            for cache in caches.values():
                cache.flush()
            last_flush = time.monotonic()
        if signals:
            raise Stopped(f"stopped by {signal.Signals(signals[0]).name}")
        done = min(all_steps - steps + step * models.accelerator.num_processes, all_steps)
        if progress.step(done, batch_size):
            progress.losses({})
    for cache in caches.values():
        cache.flush()
    return len(images)


def _batches(
    models: Models, trained: TrainedModel, images: Sequence[int], view: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """This process's share of batches of these images in a view.

    All have the size of a batch of the training, since that can decide the last bit of what a model gives: the last is
    filled up with other images.
    """
    accelerator, recipe, dataset = models.accelerator, models.plan.recipe, models.plan.datasets.train
    batch_size = _batch_size(models)
    chunks = [list(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    if chunks and (lacking := batch_size - len(chunks[-1])):
        last = set(chunks[-1])
        others = (index for index in range(len(dataset)) if index not in last)  # type: ignore[arg-type]
        chunks[-1] += [index for index, _ in zip(others, range(lacking), strict=False)]
    own = [index for chunk in chunks[accelerator.process_index :: accelerator.num_processes] for index in chunk]
    if not own:
        return
    options = recipe.data.model_copy(update={"batch_size": batch_size})
    batches = loader(dataset, options, models.images_for(trained), training=True, seed=recipe.seed, only=own)
    batches.sampler.begin(view)  # type: ignore[attr-defined]
    load(batches)
    yield from readable(batches.on(accelerator.device, memory_format=memory_format(recipe, accelerator.device)))


def _batch_size(models: Models) -> int:
    return min(models.plan.recipe.data.batch_size, len(models.plan.datasets.train))  # type: ignore[arg-type]
