"""What the models see, and what a teacher gave for it: images, data sets, loaders, the cache.

The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "DataOptions": "datasets",
    "open_datasets": "datasets",
    "loader": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
