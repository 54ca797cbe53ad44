"""Changing a model by name: `replace`, `share`, `share_weights`, `freeze`. Each returns what it displaced.

Three more change a model for the time of a `with` block only: `replaying` lets modules give an output that is known
already, `detached` lets parameters pass no gradient, and `buffers_aside` lets a forward change copies of the buffers.
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
    """The module of that name; TapError with the nearest names when there is none."""
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
        for child_name, child in list(parent._modules.items()):  # not named_children(), which tells a module once
            if child is old:
                parent.add_module(child_name, module)
    return old


def share(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Make the student use modules of the teacher, given as `{student name: teacher name}`. Returns the student's
    old modules.

    Raises TapError at the first layer, parameter or buffer in which two modules differ, before anything is changed.
    """
    found = {
        student_name: (get(student, student_name), get(teacher, teacher_name))
        for student_name, teacher_name in names.items()
    }
    for student_name, (own, other) in found.items():
        difference = _first_difference(own, other)
        if difference:
            raise TapError(
                f"'{student_name}' of the student cannot be '{names[student_name]}' of the teacher: {difference}"
            )
    return {student_name: replace(student, student_name, other) for student_name, (_, other) in found.items()}


def _first_difference(own: nn.Module, other: nn.Module) -> str:
    student_state, teacher_state = own.state_dict(), other.state_dict()
    for name in sorted(student_state.keys() | teacher_state.keys()):
        if name not in student_state or name not in teacher_state:
            return f"only the {'student' if name in student_state else 'teacher'} has '{name}'"
        if student_state[name].shape != teacher_state[name].shape:
            shapes = tuple(student_state[name].shape), tuple(teacher_state[name].shape)
            return f"'{name}' is {shapes[0]} in the student and {shapes[1]} in the teacher"
    # The same tensors do not make the same function: strides, activations and rates stand in the text form.
    for mine, yours in zip_longest(repr(own).splitlines(), repr(other).splitlines(), fillvalue="nothing"):
        if mine != yours:
            return f"the student has {mine.strip()} where the teacher has {yours.strip()}"
    return ""


def share_weights(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Let convolutions and linear layers of the student use the teacher's parameters, `{student name: teacher name}`.

    A name stands for all such layers inside it. Everything else, norms above all, stays each model's own, as in Rocket
    Launching (Zhou et al. 2018, arXiv 1708.04106). Returns the student's old parameters by name.

    Raises TapError at the first difference, before anything is changed.
    """
    found: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    for student_name, teacher_name in names.items():
        own, other = weight_layers(get(student, student_name)), weight_layers(get(teacher, teacher_name))
        if not own:
            raise TapError(
                f"'{student_name}' of the student has no convolution or linear layer whose weights could be shared"
            )
        for layer in dict.fromkeys([*own, *other]):
            if layer not in own or layer not in other:
                side = "student" if layer in own else "teacher"
                raise TapError(
                    f"'{student_name}' cannot share weights with '{teacher_name}': only the {side} has '{layer}'"
                )
        for layer, module in own.items():
            for key, parameter in module.named_parameters(recurse=False):
                target = other[layer]._parameters.get(key)
                if target is None or target.shape != parameter.shape:
                    there = "absent" if target is None else tuple(target.shape)
                    raise TapError(
                        f"'{student_name}' cannot share weights with '{teacher_name}': '{_join(layer, key)}' is "
                        f"{tuple(parameter.shape)} in the student and {there} in the teacher"
                    )
                found[_join(student_name, layer, key)] = module, key, target
    displaced = {name: module.get_parameter(key) for name, (module, key, _) in found.items()}
    for module, key, target in found.values():
        module.register_parameter(key, target)
    return displaced


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers in a module, by name; its own is `""`."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def prune_after(model: nn.Module, kept: Collection[str]) -> nn.Module:
    """A second model of the same layers, in which what is neither in `kept` nor leads to it is an Identity.

    The kept modules are the very same objects; the containers above them are copied, so `model` stays as it was.
    """
    return _prune(model, "", set(kept))


def _prune(module: nn.Module, name: str, kept: set[str]) -> nn.Module:
    if name in kept:
        return module
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {}
    for key, child in module._modules.items():
        path = _join(name, key)
        leads = any(other == path or other.startswith(f"{path}.") for other in kept)
        twin._modules[key] = _prune(child, path, kept) if leads and child is not None else nn.Identity()
    return twin


@contextmanager
def replaying(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Modules that give these tensors instead of computing: in the block their hooks run, their layers do not."""
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
    """Some of the model's parameters, under every name, as constants: in the block no gradient enters them."""
    wanted = {id(parameter) for parameter in parameters}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in wanted
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
    """Inside, a forward changes copies of the buffers: running statistics are not counted twice.

    Copies stand in for the buffers, and are not copied back, since autograd refuses a buffer that was written again.
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
    """Whether a parameter's name matches a glob, or lies in the module of that name."""
    return glob(pattern)(name) or name.startswith(f"{pattern}.")


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Stop training the parameters whose names match a glob. Returns the names that were trainable before.

    Raises TapError for a pattern that matches nothing, before anything is frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    matching: list[str] = []
    for pattern in patterns:
        found = [name for name in names if in_pattern(name, pattern)]
        if not found:
            raise TapError(f"no parameter of {type(model).__name__} matches {pattern!r}{nearest(pattern, names)}")
        matching += found
    frozen = [name for name in dict.fromkeys(matching) if model.get_parameter(name).requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen
