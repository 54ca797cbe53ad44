"""The YAML file: its keys, reading and writing it, its check, its schema, and a first recipe.

The names below are loaded when they are first used.
"""

from probe_kd.lazy import getter

_HOME = {
    "dump": "writing",
    "load": "reading",
    "parse": "reading",
    "plan": "planner",
}

__getattr__ = getter(__name__, _HOME)
