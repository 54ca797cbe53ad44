"""The YAML file: its tree, its keys, its meaning, its schema, and one to begin with.

The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "dump": "keys",
    "load": "keys",
    "parse": "keys",
    "plan": "planner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
