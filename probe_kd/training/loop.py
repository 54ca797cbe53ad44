"""The loop of one phase: batches, updates, averages. `run.py` measures, saves and reports between them.

It is the loop of timm's training script: the same order of operations, and the same parts of timm.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_rows import RowReader, lengthen, shorten
from probe_kd.data.loading import Views, load, loader, mixer, readable, seed_of_view
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError, for_all
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import follow_shares
from probe_kd.methods.targets import CachedTargets
from probe_kd.recipe.keys import CompileOptions, Recipe
from probe_kd.training.devices import memory_format
from probe_kd.training.optimizers import make_optimizer, make_scheduler
from probe_kd.training.phase import Phase

StepArguments = tuple[Tensor, Tensor | None, CachedTargets | None, Tensor | None]


class Loop:
    """The Distiller, optimizer, schedule and batches of one phase, prepared by accelerate. `run` trains one epoch.

    `sums` are the losses of the current epoch, summed over the batches of this process. `average` is timm's ModelEmaV3
    of the student, if the recipe has `model_ema`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        distiller: Distiller,
        phase: Phase,
        *,
        images: Dataset[Any],
        image_input: InputSpec,
        num_classes: int,
        balanced: Any = None,
        averaged: bool = False,
        caches: Mapping[str, TeacherCache] | None = None,
    ) -> None:
        self.caches = caches or {}
        self.accelerator, self.distiller, self.phase = accelerator, distiller, phase
        rows = row_readers(self.caches, recipe, phase)
        batches = loader(
            images, recipe.data, image_input, training=True, seed=recipe.seed, balanced=balanced, rows=rows
        )
        assert isinstance(batches.sampler, Views)
        self.views = batches.sampler
        self.average = _average(distiller.student, recipe) if averaged else None
        optimizer = make_optimizer(distiller, phase.optimizer)
        self.compiled = recipe.torchcompile is not None
        compile_distiller(distiller, recipe.torchcompile)
        self.module, self.optimizer = accelerator.prepare(distiller, optimizer)
        self.batches = batches.prepare(accelerator, memory_format(recipe, accelerator.device))
        self.steps: int = len(self.batches)
        if not self.steps:
            raise for_all(_no_whole_batch(images, recipe.data.batch_size, accelerator.num_processes))
        self.updates = -(-self.steps // phase.grad_accum_steps)  # of an epoch
        self.schedule = make_scheduler(self.optimizer, phase, self.updates)
        self.mix, self.unlabelled = mixer(recipe.data, num_classes), recipe.data.labels == "none"
        self.sums: dict[str, Tensor] = {}
        # Images whose targets were read from the cache of a teacher, or computed for it, by its name.
        self.recalled, self.computed = Counter[str](), Counter[str]()
        self.finished: int | None = None  # batches done; None while an update is incomplete

    def run(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Train one epoch from batch `first` on. Yield the number of batches done after every update of the weights.

        At its end, the caches are on the disk. Raises DataError if a batch cannot be read.
        """
        self._begin(self.phase.age + epoch)
        self.module.train()
        self.finished = first
        for step, batch in enumerate(readable(self.batches.skip(first)), first):
            if self._step(epoch, step, *self._arguments(*batch)):
                yield step + 1
        for cache in self.caches.values():
            cache.flush()

    def first_batches(self) -> Iterator[StepArguments]:
        """The arguments of the steps of the phase's first epoch, for what is measured before them."""
        self._begin(self.phase.age)
        for batch in readable(self.batches):
            yield self._arguments(*batch)

    def _arguments(
        self, images: Tensor, target: Tensor, indices: Tensor, rows: Mapping[str, list[Tensor]] | None = None
    ) -> StepArguments:
        """The arguments of the step on a batch: mixed images, labels, cached targets, and the images' numbers."""
        if self.mix is not None:
            images, target = self.mix(images, target)
        index = indices.to(images.device) if self.distiller.reads_index else None
        return images, None if self.unlabelled else target, self._targets(images, indices, rows or {}), index

    def _begin(self, age: int) -> None:
        self.views.begin(age)
        load(self.batches)
        for cache in self.caches.values():
            if cache.writes and self.accelerator.is_main_process:
                cache.prepare(self.views.view, self.views.view_seed)
        if self.caches:
            self.accelerator.wait_for_everyone()
        for cache in self.caches.values():
            cache.begin(self.views.view)

    def _targets(self, images: Tensor, indices: Tensor, rows: Mapping[str, list[Tensor]]) -> CachedTargets | None:
        """The targets of the teachers with a cache for these images. The other teachers run in the step.

        `rows` are what the loader has read from the caches.
        """
        if not self.caches:
            return None
        targets: dict[str, Tensor] = {}
        for name, cache in self.caches.items():
            features = self._targets_of(name, cache, images, indices, rows.get(name))
            targets |= zip(self.distiller.targets_of(name), features, strict=True)
        in_order = [targets[name] for name in self.distiller.targets if name in targets]
        return in_order if len(in_order) == len(self.distiller.targets) else targets

    def _targets_of(
        self, name: str, cache: TeacherCache, images: Tensor, indices: Tensor, rows: list[Tensor] | None
    ) -> list[Tensor]:
        """A teacher's targets for these images: read from its cache, or computed and stored in it."""
        if rows is None:  # some were damaged, or not there when the loader looked
            rows = cache.rows(indices)
        if rows is not None:
            self.recalled[name] += len(indices)
            return cache.features([row.to(images.device) for row in rows])
        self.computed[name] += len(indices)
        with self.accelerator.autocast():
            features = self.distiller.teacher_targets(images, [name])
        return cache.keep(indices, features)

    def check_caches(self) -> None:
        """Compare a few cached targets of each teacher with its own. Raises RunError if they differ."""
        for name, cache in self.caches.items():
            self._check_cache(name, cache)

    @torch.no_grad()
    def _check_cache(self, name: str, cache: TeacherCache) -> None:
        self.views.begin(self.phase.age)
        indices, cached = cache.some(self.views.view, 8)
        if not len(indices):
            return
        images, *_ = self.batches.take(self.views.of(indices.tolist()))
        with self.accelerator.autocast():
            features = self.distiller.teacher_targets(images, [name])
        for tap, cached_feature, feature in zip(cache.taps, cached, features, strict=True):
            expected = lengthen(shorten(feature, tap.top_k), tap.shape[-1]) if tap.top_k else feature
            deviation = _deviation(cached_feature, expected)
            if not deviation < (1e-3 if tap.dtype == torch.float32 else 3e-2):
                raise RunError(
                    f"the teacher's cache in {cache.folder} holds at `{tap.tap}` what is {float(deviation):.1%} "
                    "away from what the teacher gives for the same images; something that it depends on has changed "
                    "without its noticing. Delete that folder"
                )

    def _step(
        self,
        epoch: int,
        step: int,
        images: Tensor,
        target: Tensor | None,
        cached_targets: CachedTargets | None,
        index: Tensor | None,
    ) -> bool:
        """Run the forward and backward of one batch. Return whether the weights were updated."""
        self.finished = None
        accumulated = self.phase.grad_accum_steps
        in_full_groups = self.steps - self.steps % accumulated
        # The last group may be smaller, with the same weight.
        group = accumulated if step < in_full_groups else self.steps % accumulated
        updates = (step + 1) % accumulated == 0 or step + 1 == self.steps
        update = epoch * self.updates + step // accumulated
        if step % accumulated == 0:
            self.schedule.step_update(update)
        self.distiller.set_epoch(epoch + step / self.steps, self.phase.epochs)
        with self.accelerator.autocast():
            follow_shares(self.distiller, epoch * self.steps + step, images, target, cached_targets, index)
        with nullcontext() if updates else self.accelerator.no_sync(self.module):
            result = self.module(images, target, cached_targets, index)
            self.accelerator.backward(result["loss"] / group)
        for name in result.keys() - {"output"}:
            self.sums[name] = self.sums.get(name, 0.0) + result[name].detach()
        if updates:
            self._update(update)
            self.finished = step + 1
        return updates

    def _update(self, update: int) -> None:
        if self.phase.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.phase.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.distiller.student, step=update + 1)

    def average_over_processes(self) -> None:
        """Average the batch norm statistics of the processes at the end of an epoch, as timm does."""
        from timm.utils import distribute_bn

        if self.accelerator.num_processes > 1:
            for model in filter(None, (self.distiller, self.average)):
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def close(self) -> None:
        """Discard compiled code: the next stage reads other layers, which it would not notice."""
        if self.compiled:
            self.distiller._compiled_call_impl = None
            torch.compiler.reset()

    @property
    def rate(self) -> float:
        """The largest learning rate, of the parameters that are not scaled down."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))


def row_readers(caches: Mapping[str, TeacherCache], recipe: Recipe, phase: Phase) -> dict[str, RowReader]:
    """What reads the rows of the caches where the loader of a phase reads the images, by the names of the teachers."""
    count = recipe.data.num_views
    views = {age % count if count else age for age in range(phase.age, phase.age + phase.epochs)}
    by_seed = {seed_of_view(recipe.seed, view): view for view in views}
    return {
        name: RowReader(cache.folder, cache.taps, cache.count, cache.writes, by_seed) for name, cache in caches.items()
    }


def compile_distiller(distiller: Distiller, options: CompileOptions | None) -> None:
    """Compile in place, after the hooks are attached."""
    if options is None:
        return
    if options.target == "step":
        distiller.compile(backend=options.backend, mode=options.mode)
    else:
        distiller.compile_models(options.target, backend=options.backend, mode=options.mode)


def _no_whole_batch(images: Dataset[Any], size: int, processes: int) -> RunError:
    return RunError(
        f"{len(images)} training images are no whole batch of {size} for each of {processes} processes; "  # type: ignore[arg-type]
        "take a smaller `batch_size`, or fewer processes"
    )


def _deviation(cached_feature: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference as a share of what is expected, on the host."""
    difference = (cached_feature.float() - expected.float().cpu()).norm()
    deviation: Tensor = difference / expected.float().norm().cpu().clamp_min(1e-12)
    return deviation


def _average(student: nn.Module, recipe: Recipe) -> Any:
    from timm.utils import ModelEmaV3

    if recipe.model_ema is None:
        return None
    return ModelEmaV3(student, decay=recipe.model_ema.decay, use_warmup=recipe.model_ema.warmup)
