"""`stages.N.freeze`: which layers of the student a stage does not train."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from probe_kd.engine.models import build_on_meta
from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import Tap, Trace
from probe_kd.engine.surgery import freeze, in_pattern
from probe_kd.engine.weights import backbone
from probe_kd.errors import TapError
from probe_kd.methods.objectives import Objective
from probe_kd.recipe.keys import Recipe, StageOptions
from probe_kd.recipe.sections.mistakes import Mistake, noting


@dataclass(frozen=True)
class Frozen:
    """The layers of the student that one stage freezes, as names and globs, and how many parameters it trains."""

    layers: tuple[str, ...] = ()
    trains: int = 0
    of: int = 0


def find_frozen(
    recipe: Recipe, student: Trace | None, objectives: Sequence[Sequence[Objective]]
) -> tuple[list[Frozen], list[Mistake]]:
    """Resolve and check `freeze` of all stages."""
    frozen, mistakes = [Frozen() for _ in recipe.stages], list[Mistake]()
    for index, stage in enumerate(recipe.stages):
        if stage.freeze is None or student is None:
            continue
        with noting(mistakes, "stages", index, "freeze"):
            if recipe.share is not None:
                raise TapError("`freeze`: with `share` the models have parameters in common; leave it out")
            model = build_on_meta(student.model, student.model_kwargs)
            frozen[index] = _freeze(model, stage)
            _check_losses(model, student, objectives[index] if index < len(objectives) else (), stage)
            _check_rates(frozen[index], stage)
    return frozen, mistakes


def _freeze(model: nn.Module, stage: StageOptions) -> Frozen:
    """Freeze layers of a model without weights. Raises TapError if nothing matches, or nothing is left to train."""
    layers = [stage.freeze] if isinstance(stage.freeze, str) else list(stage.freeze or ())
    if stage.freeze == "backbone":
        layers = backbone(model)
    freeze(model, layers)
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trains:
        raise TapError("`freeze`: all of the student is frozen; leave out what the stage should train")
    return Frozen(tuple(layers), trains, sum(parameter.numel() for parameter in model.parameters()))


def _check_losses(model: nn.Module, student: Trace, objectives: Sequence[Objective], stage: StageOptions) -> None:
    """Raise TapError for a loss that reads a layer before which all is frozen."""
    taps: dict[Tap, str] = {}
    for objective in objectives:
        with suppress(TapError):  # of a layer that is not there, which is reported where it is named
            taps |= {student[tap].tap: objective.name for tap in objective.taps[0]}
    features = Probe(model.train(), [student[tap] for tap in taps])(torch.zeros(2, *student.input_size, device="meta"))
    for tap, name in taps.items():
        if not features[tap].requires_grad:
            raise TapError(
                f"`freeze`: loss `{name}` of stage `{stage.name}` reads {str(tap) or 'the output'!r}, and all layers "
                "before it are frozen, so it trains nothing; freeze less, or leave the loss out"
            )


def _check_rates(frozen: Frozen, stage: StageOptions) -> None:
    """Raise TapError for a learning rate of layers that are frozen."""
    for pattern in stage.optimizer.lr_scale:
        if any(in_pattern(pattern, layer) for layer in frozen.layers):
            raise TapError(f"`freeze`: {pattern!r} is frozen and has an `lr_scale`; leave out one of the two")
