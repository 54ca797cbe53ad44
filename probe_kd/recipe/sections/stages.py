"""`stages` and `teacher.train`: optimizers, schedules and `keep`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from probe_kd.data.datasets import Datasets
from probe_kd.engine.arguments import check_truths, optimizer_parameters
from probe_kd.engine.models import build_on_meta
from probe_kd.engine.spec import Trace
from probe_kd.engine.surgery import in_pattern
from probe_kd.errors import RunError, TapError, nearest, short
from probe_kd.recipe.keys import OptimizerOptions, Recipe, SchedulerOptions
from probe_kd.recipe.sections.losses import check_loss_weights
from probe_kd.recipe.sections.mistakes import Mistake, noting, teacher_place
from probe_kd.recipe.yaml_tree import KeyPath


def check_stages(recipe: Recipe, student: Trace | None) -> list[Mistake]:
    mistakes = _check_optimizers(recipe)
    for index, stage in enumerate(recipe.stages):
        if stage.keep == "best" and not (recipe.data.holdout or len(recipe.data.splits) == 3):
            message = (
                "`keep: best` chooses by images that give no final figure; give `data: {holdout: 0.1}`, or both "
                "`val_split` and `test_split`"
            )
            mistakes.append((("stages", index, "keep"), message))
        mistakes += check_loss_weights(index, stage)
        if student is not None and stage.optimizer.lr_scale:
            mistakes += _check_lr_scale(index, stage.optimizer, student)
    return mistakes


def _check_lr_scale(index: int, optimizer: OptimizerOptions, student: Trace) -> list[Mistake]:
    names = [name for name, _ in build_on_meta(student.model, student.model_kwargs).named_parameters()]
    mistakes: list[Mistake] = []
    for pattern in optimizer.lr_scale if names else ():
        with noting(mistakes, "stages", index, "optimizer", "lr_scale", pattern):
            if not any(in_pattern(name, pattern) for name in names):
                modules = list(dict.fromkeys([name.rpartition(".")[0] for name in names] + names))
                raise TapError(f"no parameter of the student matches {pattern!r}{nearest(pattern, modules)}")
    return mistakes


def _with_optimizer(recipe: Recipe) -> list[tuple[KeyPath, Any]]:
    """The stages and `train` of each teacher, each with its place in the recipe."""
    stages: list[tuple[KeyPath, Any]] = [(("stages", index), stage) for index, stage in enumerate(recipe.stages)]
    for name, teacher in recipe.teachers_by_name.items():
        if teacher.train:
            stages.append(((*teacher_place(name), "train"), teacher.train))
    return stages


def _check_optimizers(recipe: Recipe) -> list[Mistake]:
    """Check optimizers and schedules. timm has the names of the optimizers."""
    from timm.optim import list_optimizers

    optimizers = list_optimizers()
    mistakes: list[Mistake] = []
    for place, stage in _with_optimizer(recipe):
        name = stage.optimizer.opt
        if name.lower() not in optimizers:
            mistakes.append(
                ((*place, "optimizer", "opt"), f"timm has no optimizer {name!r}{nearest(name, optimizers)}")
            )
        else:
            with noting(mistakes, *place, "optimizer", *(["opt_args"] if stage.optimizer.opt_args else [])):
                _try_optimizer(stage.optimizer)
        misfits = _out_of_reach(stage.scheduler, stage.epochs)
        mistakes += [((*place, "scheduler", key), message) for key, message in misfits]
    return mistakes


def _try_optimizer(options: OptimizerOptions) -> None:
    """Do one update of a few numbers, to see errors of the optimizer before training. Raises RunError."""
    from timm.optim import create_optimizer_v2

    weights = [nn.Parameter(torch.ones(shape, device="cpu")) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    rates = {"lr": options.lr, "weight_decay": options.weight_decay, "momentum": options.momentum}
    check_truths(f"optimizer `{options.opt}`", optimizer_parameters(options.opt), options.opt_args, RunError)
    try:
        create_optimizer_v2([{"params": weights}], opt=options.opt, **rates, **options.opt_args).step()
    except Exception as refusal:  # optimizers of timm, torch and others raise many types of errors
        given = ", ".join(f"{key}={value!r}" for key, value in options.opt_args.items())
        raise RunError(f"optimizer `{options.opt}` does not take {given or 'these values'}: {short(refusal)}") from None


def _out_of_reach(options: SchedulerOptions, epochs: int) -> Iterator[tuple[str, str]]:
    """(key, message) of every part of a schedule that `epochs` epochs never reach."""
    if options.warmup_epochs >= epochs:
        yield "warmup_epochs", f"{options.warmup_epochs:g} epochs of warm-up leave nothing of {epochs} epochs"
    if options.sched == "step" and options.decay_epochs >= epochs:
        yield (
            "decay_epochs",
            f"a step every {options.decay_epochs:g} epochs is never taken in {epochs}; see `decay_epochs`",
        )
    if options.sched == "multistep" and min(options.decay_milestones, default=epochs) >= epochs:
        yield "decay_milestones", f"no milestone of {options.decay_milestones} lies within the {epochs} epochs"


def check_warmup(recipe: Recipe, datasets: Datasets | None) -> list[Mistake]:
    """Refuse a stage whose updates all lie in the warm-up: it would train next to nothing, without a sign of it."""
    if datasets is None:
        return []
    images, batch = len(datasets.train), recipe.data.batch_size  # type: ignore[arg-type]
    batches = images // batch if images > batch else 1
    mistakes: list[Mistake] = []
    for place, stage in _with_optimizer(recipe):
        updates = -(-batches // getattr(stage, "grad_accum_steps", 1))
        warmup = stage.scheduler.warmup_epochs
        if 0 < warmup < stage.epochs and warmup * updates > stage.epochs * updates - 1:
            message = (
                f"all {stage.epochs * updates} updates ({images} images, {batch} a batch) lie in the warm-up of "
                f"{warmup:g} epochs, at next to no learning rate; set `warmup_epochs: 0`, more `epochs`, or a "
                "smaller `data.batch_size`"
            )
            mistakes.append(((*place, "scheduler", "warmup_epochs"), message))
    return mistakes
