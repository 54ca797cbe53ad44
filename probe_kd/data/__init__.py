"""Images, data sets, loaders, and the cache of teacher outputs.

The names below are loaded on first use.
"""

from probe_kd.lazy import getter

_HOME = {
    "DataOptions": "options",
    "open_datasets": "datasets",
    "loader": "loading",
}

__getattr__ = getter(__name__, _HOME)
