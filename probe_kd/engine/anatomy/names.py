"""What the name of a module says: what it lies in, and whether it is numbered."""

from collections.abc import Iterable


def inside(names: Iterable[str], holder: str) -> list[str]:
    """Return those of some names that are a module or lie in it. In "", the model, lies only itself."""
    prefix = f"{holder}."
    return [name for name in names if f"{name}.".startswith(prefix)]


def holders_of(name: str) -> list[str]:
    """The modules around a module by its name, the innermost first, without the model."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
