"""The YAML file: its tree, its keys, its meaning, its schema, and one to begin with.

The names below are loaded when they are first used.
"""

from probe_kd.lazy import getter

_HOME = {
    "dump": "keys",
    "load": "keys",
    "parse": "keys",
    "plan": "planner",
}

__getattr__ = getter(__name__, _HOME)
