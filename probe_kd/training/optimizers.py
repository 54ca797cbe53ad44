"""timm's optimizers and schedules, as a recipe and its models want them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from probe_kd.engine.surgery import in_pattern
from probe_kd.methods.distiller import Distiller
from probe_kd.recipe.keys import OptimizerOptions
from probe_kd.training.phase import Phase


def make_optimizer(distiller: Distiller, options: OptimizerOptions) -> torch.optim.Optimizer:
    """timm's optimizer over all that trains, without weight decay on biases and norms."""
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    decay, groups, seen = options.weight_decay, [], set[int]()
    for model in filter(None, (distiller.student, distiller.teacher)):
        for group in _groups(model, options):
            fresh = [parameter for parameter in group["params"] if id(parameter) not in seen]  # shared by both
            seen |= {id(parameter) for parameter in fresh}
            groups += _scaled({**group, "params": fresh}, distiller.student, options.lr_scale)
    groups += param_groups_weight_decay(distiller.adapters, decay)
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
    """All parameters in one kernel, where torch has it: a loop over them takes as long as a small model's backward.

    Unless `opt_args` say how they are gone through: `fused: false`, or `foreach: true`.
    """
    from timm.optim import get_optimizer_class

    try:
        kind = get_optimizer_class(options.opt, bind_defaults=False)
    except Exception:  # timm has its own words for it, and makes what has two names, as `lookahead_adamw`
        return {}
    told = {"fused", "foreach", "differentiable"} & options.opt_args.keys()
    places = {parameter.device.type for parameter in parameters}
    known = kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) and places <= {"cpu", "cuda"}
    return {"fused": True} if known and not told else {}


def _groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: set[str] = getattr(model, "no_weight_decay", set)()  # timm models name them
    arguments: dict[str, Any] = {"weight_decay": options.weight_decay, "no_weight_decay_list": exempt}
    if options.layer_decay is None:
        return list(param_groups_weight_decay(model, **arguments))
    return list(param_groups_layer_decay(model, **arguments, layer_decay=options.layer_decay))


def _scaled(group: dict[str, Any], student: nn.Module, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """The group, divided by how its learning rate is scaled; timm's schedulers read `lr_scale`."""
    # The layers that a graft keeps of the plain student go by the names that they have in it.
    names = {id(parameter): name.removeprefix("body.") for name, parameter in student.named_parameters()}
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        found = [scale for pattern, scale in scales.items() if in_pattern(names.get(id(parameter), ""), pattern)]
        parts.setdefault(found[-1] if found else 1.0, []).append(parameter)
    own = group.get("lr_scale", 1.0)
    return [{**group, "params": part, "lr_scale": own * scale} for scale, part in parts.items()]


def make_scheduler(optimizer: torch.optim.Optimizer, phase: Phase, updates: int) -> Any:
    """timm's schedule of the learning rate over so many updates an epoch, set anew for each from its number alone."""
    from timm.scheduler import create_scheduler_v2

    options = phase.scheduler.model_dump()
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=phase.epochs, step_on_epochs=False, updates_per_epoch=updates, **options
    )
    return schedule
