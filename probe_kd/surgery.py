"""Changing a model by name: `replace`, `share`, `freeze`. Each returns what it displaced, so that it can be undone."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from probe_kd.errors import TapError, nearest


def get(model: nn.Module, name: str) -> nn.Module:
    """The module of that name; TapError with the nearest names when there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [other for other, _ in model.named_modules()]
        raise TapError(f"{type(model).__name__} has no module {name!r}{nearest(name, names)}") from None


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` in the place of `name`, under every parent that holds the old one. Returns the old module."""
    if not name:
        raise TapError("the model itself cannot be replaced inside itself; name one of its modules")
    old = get(model, name)
    for parent in list(model.modules()):  # as they are now: the new module may hold the old one
        for child_name, child in list(parent._modules.items()):  # not named_children(), which tells a module once
            if child is old:
                parent.add_module(child_name, module)
    return old


def share(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Let the student use the teacher's modules, `{student name: teacher name}`. Returns the student's old modules.

    Raises TapError at the first parameter or buffer in which two modules differ, before anything is changed.
    """
    found = {ours: (get(student, ours), get(teacher, theirs)) for ours, theirs in names.items()}
    for ours, (own, other) in found.items():
        difference = _first_difference(own, other)
        if difference:
            raise TapError(f"'{ours}' of the student cannot be '{names[ours]}' of the teacher: {difference}")
    return {ours: replace(student, ours, other) for ours, (_, other) in found.items()}


def _first_difference(own: nn.Module, other: nn.Module) -> str:
    ours, theirs = own.state_dict(), other.state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"only the {'student' if name in ours else 'teacher'} has '{name}'"
        if ours[name].shape != theirs[name].shape:
            return (
                f"'{name}' is {tuple(ours[name].shape)} in the student and {tuple(theirs[name].shape)} in the teacher"
            )
    return ""


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Stop training the parameters whose names match a glob. Returns the names that were trainable before.

    Raises TapError for a pattern that matches nothing, before anything is frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    matching: list[str] = []
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            raise TapError(f"no parameter of {type(model).__name__} matches {pattern!r}{nearest(pattern, names)}")
        matching += found
    frozen = [name for name in dict.fromkeys(matching) if model.get_parameter(name).requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen
