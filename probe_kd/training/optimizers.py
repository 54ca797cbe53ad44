"""timm's optimizers and schedules, made from the options of a recipe."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from probe_kd.engine.surgery import in_pattern
from probe_kd.methods.distiller import Distiller
from probe_kd.recipe.keys import OptimizerOptions
from probe_kd.training.phase import Phase


def make_optimizer(distiller: Distiller, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Make timm's optimizer of all trained parameters, without weight decay on biases and norms."""
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    decay, groups, grouped_ids = options.weight_decay, [], set[int]()
    for model in filter(None, (distiller.student, distiller.teacher)):
        for group in _groups(model, options):
            # Parameters that both models share are in the first group only.
            new_parameters = [parameter for parameter in group["params"] if id(parameter) not in grouped_ids]
            grouped_ids |= {id(parameter) for parameter in new_parameters}
            groups += _scaled({**group, "params": new_parameters}, distiller.student, options.lr_scale)
    for own in (distiller.adapters, distiller.losses):
        groups += param_groups_weight_decay(own, decay)
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups,
        opt=options.opt,
        lr=options.lr,
        weight_decay=decay,
        momentum=options.momentum,
        **_fused(options, (parameter for group in groups for parameter in group["params"])),
        **options.opt_args,
    )
    return optimizer


def _fused(options: OptimizerOptions, parameters: Iterable[nn.Parameter]) -> dict[str, bool]:
    """Choose the fused kernel of an optimizer if torch has it and `opt_args` do not choose (`fused`, `foreach`).

    A loop over the parameters takes as long as the backward of a small model.
    """
    from timm.optim import get_optimizer_class

    try:
        optimizer_class = get_optimizer_class(options.opt, bind_defaults=False)
    except Exception:  # timm reports unknown names itself, and makes optimizers of two names, such as `lookahead_adamw`
        return {}
    chosen = {"fused", "foreach", "differentiable"} & options.opt_args.keys()
    device_types = {parameter.device.type for parameter in parameters}
    is_fusable = optimizer_class in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    is_supported = is_fusable and device_types <= {"cpu", "cuda"}
    return {"fused": True} if is_supported and not chosen else {}


def _groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: set[str] = getattr(model, "no_weight_decay", set)()  # timm models name them
    arguments: dict[str, Any] = {"weight_decay": options.weight_decay, "no_weight_decay_list": exempt}
    if options.layer_decay is None:
        return list(param_groups_weight_decay(model, **arguments))
    return list(param_groups_layer_decay(model, **arguments, layer_decay=options.layer_decay))


def _scaled(group: dict[str, Any], student: nn.Module, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Split a group by the scale of the learning rate. timm's schedulers read `lr_scale`."""
    # In a graft, the student's layers have the prefix `body.`; the recipe names them without it.
    names = {id(parameter): name.removeprefix("body.") for name, parameter in student.named_parameters()}
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        matching_scales = [
            scale for pattern, scale in scales.items() if in_pattern(names.get(id(parameter), ""), pattern)
        ]
        parts.setdefault(matching_scales[-1] if matching_scales else 1.0, []).append(parameter)
    group_scale = group.get("lr_scale", 1.0)
    return [{**group, "params": part, "lr_scale": group_scale * scale} for scale, part in parts.items()]


def make_scheduler(optimizer: torch.optim.Optimizer, phase: Phase, updates: int) -> Any:
    """Make timm's schedule of the learning rate, which depends only on the number of the update.

    `updates` is the number of updates per epoch.
    """
    from timm.scheduler import create_scheduler_v2

    options = phase.scheduler.model_dump()
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=phase.epochs, step_on_epochs=False, updates_per_epoch=updates, **options
    )
    return schedule
