"""Changing a model by name: `replace`, `share`, `share_weights`, `freeze`. Each returns what it displaced.

Three more change a model only inside a `with` block: `replaying` makes modules return an output computed before,
`detached` stops the gradient at parameters, and `buffers_aside` makes a forward change copies of the buffers.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from probe_kd.engine.patterns import glob
from probe_kd.errors import TapError, nearest


def get(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name. Raises TapError with the nearest names if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [other for other, _ in model.named_modules()]
        raise TapError(f"{type(model).__name__} has no module {name!r}{nearest(name, names)}") from None


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the module `name` by `module`, under every parent that holds it. Returns the old module."""
    if not name:
        raise TapError("the model itself cannot be replaced inside itself; name one of its modules")
    old = get(model, name)
    for parent in list(model.modules()):  # as they are now: the new module may hold the old one
        for child_name, child in list(
            parent._modules.items()
        ):  # not named_children(), which lists a shared module once
            if child is old:
                parent.add_module(child_name, module)
    return old


def share(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Make the student use modules of the teacher, given as `{student name: teacher name}`.

    Returns the student's old modules by name. Raises TapError if two modules differ in a layer, parameter or buffer,
    before anything is changed.
    """
    modules = {
        student_name: (get(student, student_name), get(teacher, teacher_name))
        for student_name, teacher_name in names.items()
    }
    for student_name, (student_module, teacher_module) in modules.items():
        difference = _first_difference(student_module, teacher_module)
        if difference:
            raise TapError(
                f"'{student_name}' of the student cannot be '{names[student_name]}' of the teacher: {difference}"
            )
    return {
        student_name: replace(student, student_name, teacher_module)
        for student_name, (_, teacher_module) in modules.items()
    }


def _first_difference(student: nn.Module, teacher: nn.Module) -> str:
    student_state, teacher_state = student.state_dict(), teacher.state_dict()
    for name in sorted(student_state.keys() | teacher_state.keys()):
        if name not in student_state or name not in teacher_state:
            return f"only the {'student' if name in student_state else 'teacher'} has '{name}'"
        if student_state[name].shape != teacher_state[name].shape:
            shapes = tuple(student_state[name].shape), tuple(teacher_state[name].shape)
            return f"'{name}' is {shapes[0]} in the student and {shapes[1]} in the teacher"
    # The same tensors do not make the same function: strides, activations and rates stand in the text form.
    for student_line, teacher_line in zip_longest(
        repr(student).splitlines(), repr(teacher).splitlines(), fillvalue="nothing"
    ):
        if student_line != teacher_line:
            return f"the student has {student_line.strip()} where the teacher has {teacher_line.strip()}"
    return ""


def share_weights(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Make convolutions and linear layers of the student use the teacher's parameters.

    `names` maps student names to teacher names. A name stands for all such layers inside that module. Everything else,
    such as norms, stays separate, as in Rocket Launching (Zhou et al. 2018, arXiv 1708.04106).

    Returns the student's old parameters by name. Raises TapError if the layers differ, before anything is changed.
    """
    shared: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    for student_name, teacher_name in names.items():
        student_layers, teacher_layers = (
            weight_layers(get(student, student_name)),
            weight_layers(get(teacher, teacher_name)),
        )
        if not student_layers:
            raise TapError(
                f"'{student_name}' of the student has no convolution or linear layer whose weights could be shared"
            )
        for layer in dict.fromkeys([*student_layers, *teacher_layers]):
            if layer not in student_layers or layer not in teacher_layers:
                side = "student" if layer in student_layers else "teacher"
                raise TapError(
                    f"'{student_name}' cannot share weights with '{teacher_name}': only the {side} has '{layer}'"
                )
        for layer, module in student_layers.items():
            for key, parameter in module.named_parameters(recurse=False):
                target = teacher_layers[layer]._parameters.get(key)
                if target is None or target.shape != parameter.shape:
                    teacher_shape = "absent" if target is None else tuple(target.shape)
                    raise TapError(
                        f"'{student_name}' cannot share weights with '{teacher_name}': '{_join(layer, key)}' is "
                        f"{tuple(parameter.shape)} in the student and {teacher_shape} in the teacher"
                    )
                shared[_join(student_name, layer, key)] = module, key, target
    displaced = {name: module.get_parameter(key) for name, (module, key, _) in shared.items()}
    for module, key, target in shared.values():
        module.register_parameter(key, target)
    return displaced


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers in a module, by name. The name of the module itself is `""`."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def prune_after(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a second model in which every module is an Identity, except the modules `names` and their ancestors.

    The named modules are the same objects. The containers above them are copied, so `model` does not change.
    """
    return _prune(model, "", set(names))


def _prune(module: nn.Module, name: str, names: set[str]) -> nn.Module:
    if name in names:
        return module
    pruned = copy.copy(module)
    pruned._parameters, pruned._buffers = dict(module._parameters), dict(module._buffers)
    pruned._modules = {}
    for key, child in module._modules.items():
        path = _join(name, key)
        leads = any(other == path or other.startswith(f"{path}.") for other in names)
        pruned._modules[key] = _prune(child, path, names) if leads and child is not None else nn.Identity()
    return pruned


@contextmanager
def replaying(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Make modules return these tensors inside the block instead of running their layers. Their hooks still run."""
    former = {module: module.__dict__.get("forward") for module in outputs}  # as accelerate leaves one
    for module, output in outputs.items():
        module.forward = _Replay(output)
    try:
        yield
    finally:
        for module, forward in former.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class _Replay:
    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.output


@contextmanager
def detached(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Detach these parameters of the model, under every name, so that no gradient reaches them inside the block."""
    parameter_ids = {id(parameter) for parameter in parameters}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in parameter_ids
    ]
    for module, key, parameter in places:
        module._parameters[key] = parameter.detach()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


@contextmanager
def buffers_aside(module: nn.Module) -> Iterator[None]:
    """Make a forward inside the block change copies of the buffers, so that running statistics are not updated twice.

    The copies replace the buffers inside the block. The buffers are never overwritten, which autograd would refuse.
    """
    places = [
        (part, key, buffer) for part in module.modules() for key, buffer in part._buffers.items() if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in places}
    for part, key, buffer in places:
        part._buffers[key] = copies[id(buffer)]
    try:
        yield
    finally:
        for part, key, buffer in places:
            part._buffers[key] = buffer


def in_pattern(name: str, pattern: str) -> bool:
    """Whether a parameter's name matches a glob, which may begin with `glob:`, or lies in the module of that name."""
    pattern = pattern.removeprefix("glob:")
    return glob(pattern)(name) or name.startswith(f"{pattern}.")


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Stop training the parameters whose names match a glob. Returns the names that were trainable before.

    Raises TapError for a pattern that matches nothing, before anything is frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    matching: list[str] = []
    for pattern in patterns:
        matches = [name for name in names if in_pattern(name, pattern)]
        if not matches:
            near = nearest(pattern, [*names, *(name for name, _ in model.named_modules() if name)])
            raise TapError(f"no parameter of {type(model).__name__} matches {pattern!r}{near}")
        matching += matches
    frozen = [name for name in dict.fromkeys(matching) if model.get_parameter(name).requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def norms_in(model: nn.Module, patterns: Collection[str]) -> list[nn.Module]:
    """Return the norms with running statistics in the layers that `freeze` takes by these patterns.

    A norm is one of them if its name matches, or all of its parameters do.
    """
    norms = []
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is None:
            continue
        parameters = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        is_named = any(in_pattern(name, pattern) for pattern in patterns)
        if is_named or (parameters and all(any(in_pattern(key, it) for it in patterns) for key in parameters)):
            norms.append(module)
    return norms
