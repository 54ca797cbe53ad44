"""A frozen model whose parameters are divided among the processes of a run, by torch's `fully_shard`."""

import sys
from collections import Counter

import torch
from torch import nn

from probe_kd.engine.spec import Trace

# Of the model's parameters. What a unit holds is whole in every process while the unit runs.
LARGEST_UNIT = 1 / 8
# A smaller module is no unit of its own, because every unit is gathered by itself.
SMALLEST_UNIT = 1 / 256


def units(model: nn.Module, trace: Trace) -> list[str]:
    """The modules of a model that are gathered one by one: the outermost ones that hold at most an eighth of it.

    A layer may hold more, as it cannot be divided. A module that the model does not call is no unit, because nothing
    would gather it; nor is one with a parameter that another module holds too.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [name for name in names if owners[id(model.get_parameter(name))] > 1]

    def below(name: str) -> list[str]:
        module = trace.modules[name]
        inside = [unit for child in module.children if child in trace.modules for unit in below(child)]
        is_shared = any(parameter.startswith(f"{name}.") for parameter in shared)
        if not (name and module.calls) or is_shared or module.parameters < SMALLEST_UNIT * trace.parameters:
            return inside
        return inside if inside and module.parameters > LARGEST_UNIT * trace.parameters else [name]

    return below("")


def shard(model: nn.Module, trace: Trace, device: torch.device) -> None:
    """Divide the parameters of a frozen model among all processes, and bring its buffers to the device.

    Every process calls this with the same weights, and from then on runs the model as often as the others do. A unit is
    brought to the device before it is divided, so that the whole model is never there. Parameters without axes stay
    whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    scalars = {parameter for parameter in model.requires_grad_(False).parameters() if parameter.ndim == 0}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.contiguous()  # channels last is not
    for scalar in scalars:
        scalar.data = scalar.data.to(device)
    for name in units(model, trace):
        fully_shard(model.get_submodule(name), mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def why_unsupported() -> str:
    """Why no model can be sharded with this torch; empty if one can."""
    if not torch.distributed.is_available():
        return "this torch was built without `torch.distributed`; install another build, or leave it out"
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        return f"torch {torch.__version__} cannot leave a forward of a sharded model early; upgrade to torch 2.14"
    return ""


def is_sharded(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a second, and whoever shards a model has it
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def end_forward(model: nn.Module) -> None:
    """Free what a forward without gradients gathered of a sharded model, also if an exception left the forward.

    torch frees it at the end of each module, which an exception never reaches, and remembers every forward until a
    backward pass.
    """
    if is_sharded(model) and not torch.is_grad_enabled():
        model.reset_iter_state()  # type: ignore[operator]
