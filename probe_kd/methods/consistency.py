"""Which models, objectives and gradient blocks a Distiller takes together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from probe_kd.engine.tracing import refuse_lazy
from probe_kd.errors import LossError, demand
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.methods.targets import module_key
from probe_kd.methods.teachers import Block


def check_models(student: nn.Module, teachers: Mapping[str, nn.Module]) -> None:
    """Raise LossError for a model that is no module, and TraceError for one whose parameters have no shape yet."""
    for side, model in (("student", student), *((f"teacher {name}".strip(), teachers[name]) for name in teachers)):
        demand(model, nn.Module, f"the {side}", LossError, "an nn.Module, as timm.create_model(name) gives")
        refuse_lazy(model, f"the {side}")


def check_objectives(
    objectives: Sequence[Objective], teachers: Mapping[str, nn.Module], block: Block | None, sharing: Sharing | None
) -> None:
    for objective in objectives:
        demand(objective, Objective, "an objective", LossError, 'an Objective, such as Objective("soft_targets")')
    if not objectives:
        raise LossError("a Distiller needs at least one objective")
    names = [module_key(objective.name)[:-1] for objective in objectives]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise LossError(f"two objectives are named {', '.join(map(repr, duplicates))}; give each a name of its own")
    comparing = [objective.name for objective in objectives if objective.needs_teacher]
    if not teachers and (comparing or block):
        raise LossError(f"{', '.join(map(repr, comparing)) or 'block'} need a teacher, and there is none")
    if block is not None:
        _check_block(objectives, teachers, block)
    elif sharing or any(objective.of == "teacher" for objective in objectives):
        raise LossError(
            "the teacher is frozen, so it neither shares nor learns; give a gradient `block` to train it too"
        )


def _check_block(objectives: Sequence[Objective], teachers: Mapping[str, nn.Module], block: Block) -> None:
    if block not in get_args(Block):
        raise LossError(f"block {block!r}: expected one of {', '.join(map(repr, get_args(Block)))}")
    if "" not in teachers:
        raise LossError(
            f"a gradient `block` trains a single teacher, and {', '.join(teachers)} have names; give the model itself "
            "as `teacher`, or leave `block` out"
        )
    if not any(objective.of == "teacher" for objective in objectives):
        raise LossError(
            "the teacher trains too, and no objective is its own; add one of the labels with `of='teacher'`"
        )


def refuse_shared(student: nn.Module, teacher: nn.Module, name: str, *, frozen: bool) -> None:
    """Raise LossError if the models are one object, or if the student shares a tensor with a frozen teacher."""
    side = f"teacher {name}".strip()
    if student is teacher:
        raise LossError(f"the student and the {side} are one object; give copy.deepcopy(model) as one of them")
    if not frozen:
        return
    teacher_names = {_place(tensor): key for key, tensor in _tensors(teacher)}
    for key, tensor in _tensors(student):
        if _place(tensor) in teacher_names:
            raise LossError(
                f"'{key}' of the student is '{teacher_names[_place(tensor)]}' of the {side}, which is frozen, and "
                "would be trained with the student; give the student a copy (copy.deepcopy), or train both by a "
                "gradient `block`"
            )
    teacher_modules = {id(module): key for key, module in teacher.named_modules()}
    for key, module in student.named_modules():
        if id(module) in teacher_modules and "drop" in type(module).__name__.lower():
            raise LossError(
                f"'{key}' of the student is '{teacher_modules[id(module)]}' of the {side}; give it one of its own"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(tensor: Tensor) -> tuple[str, int]:
    """Identify a tensor by its memory, which two parameters may share, or by its object on the meta device."""
    if tensor.device.type == "meta" or not tensor.numel():
        return "object", id(tensor)
    return str(tensor.device), tensor.data_ptr()
