"""Try a loss of ours on a few numbers, so that options which it does not take are refused before any model runs."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap
from probe_kd.errors import LossError
from probe_kd.methods.losses.table import Loss

_SHAPES: dict[str, tuple[int, ...]] = {  # of one image
    "labels": (3,),
    "outputs": (3,),
    "features": (3, 2, 2),
    "vectors": (3,),
    "maps": (3, 2, 2),
    "grams": (3, 3),
    "flows": (3, 3),
    "all_pairs": (3, 2, 2),
}


def try_loss(loss: Loss, name: str, options: Mapping[str, Any], *, batch: int = 2, dense: bool = False) -> None:
    """Call a loss of ours on a batch of made-up numbers. Raises LossError for options that it does not take.

    `dense` are maps of logits, as of segmentation. The state of the random numbers does not change.
    """
    shape = (batch, *(_SHAPES["maps"] if dense else _shape_of(loss, options)))
    student = torch.arange(prod(shape), dtype=torch.float32, device="cpu").sin().reshape(shape)
    teacher = student.cos()
    classes = torch.arange(batch, device="cpu") % shape[1]
    if loss.reads == "labels":
        teacher = teacher.abs() if loss.multilabel else classes
    also = [classes if argument == "labels" else torch.arange(batch, device="cpu") for argument in loss.also]
    try:
        if loss.builds_module:
            with torch.random.fork_rng(devices=[]):
                _module_of(loss, shape, options)(*_sides(loss, student, teacher), *also)
        else:
            loss.function(*_sides(loss, student, teacher), *also, **options)
    except LossError:
        raise
    except Exception as error:  # torch raises errors of many types
        values = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise LossError(f"{name!r} does not take {values}: {' '.join(str(error).split())}") from None


def _sides(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Any, Any]:
    return ((student, student), (teacher, teacher)) if loss.reads == "all_pairs" else (student, teacher)


def _module_of(loss: Loss, shape: tuple[int, ...], options: Mapping[str, Any]) -> nn.Module:
    grid = (shape[2], shape[3]) if len(shape) == 4 else None
    spec = FeatureSpec(Tap("layer"), Layout.NCHW if grid else Layout.NC, shape, channels=shape[1], grid=grid)
    specs = (spec, spec) if loss.reads == "all_pairs" else spec
    needed = {"classifier": nn.Linear(shape[1], shape[1]), "num_images": shape[0]}
    module: nn.Module = loss.function(specs, specs, **options, **{key: needed[key] for key in loss.needs})
    return module


def _shape_of(loss: Loss, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of one image's output or feature. An output has as many classes as an option has numbers."""
    lengths = [len(value) for value in options.values() if isinstance(value, list | tuple) and value]
    return (lengths[0],) if lengths and loss.reads in ("labels", "outputs") else _SHAPES[loss.reads]
