"""What the models see, and what a teacher gave for it: images, data sets, loaders, the cache.

The names below are loaded when they are first used.
"""

from probe_kd.lazy import getter

_HOME = {
    "DataOptions": "options",
    "open_datasets": "datasets",
    "loader": "loading",
}

__getattr__ = getter(__name__, _HOME)
