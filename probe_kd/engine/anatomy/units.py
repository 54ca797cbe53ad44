"""A model as a sequence of units, the modules that one would write on one line of its diagram.

From the root down, a container is opened as long as it spans several strides.
"""

from itertools import pairwise

from probe_kd.engine.anatomy.encoder import MAIN_SHARE
from probe_kd.engine.anatomy.strides import SAME_STRIDE, stride_of
from probe_kd.engine.anatomy.structure import Structure

# A container that holds more of the model's compute is the model in a wrapper.
WHOLE_SHARE = 0.9


def units_in_order(structure: Structure, root: str, name: str) -> list[str]:
    """Return the units of a module that yield features, in the order in which they run. `root` is the encoder."""
    units = [unit for unit in _units(structure, root, name) if unit in structure.outputs]
    if not any("#" in unit for unit in units):
        return units
    return sorted(units, key=lambda unit: structure.entries.get(unit, structure.outputs[unit]).order)


def _units(structure: Structure, root: str, name: str) -> list[str]:
    units: list[str] = []
    for child in structure.called_children(name):
        opened = _opens(structure, root, child)
        units += _units(structure, root, child) if opened else _calls_of(structure, child)
    return units


def _calls_of(structure: Structure, name: str) -> list[str]:
    has_calls = name in structure.calls and structure.module(name).parameters
    return list(structure.calls[name].values()) if has_calls else [name]


def _opens(structure: Structure, root: str, name: str) -> bool:
    """Whether a container is a series of units, not one: its stride grows twice, or after its first part.

    What yields no feature itself is opened too: it is a wrapper, or the model in one.
    """
    if not structure.is_container(name):
        return False
    if _grows_after_a_block(structure, name) or _is_nested(structure, name):
        return True
    share = structure.modules[name].macs / max(structure.modules[root].macs, 1)
    if share <= MAIN_SHARE:
        return False
    if name not in structure.outputs or _wraps(structure, name, share):
        return True
    children = [child for child in structure.called_children(name) if child in structure.outputs]
    parts = [child for child in children if structure.is_container(child)] or children
    if len(parts) == 1 and _is_wrapped(structure, name, parts[0]):
        return _opens(structure, root, parts[0])
    return _grows_later(structure, name, parts) or (share > WHOLE_SHARE and len(parts) > 1)


def _grows_later(structure: Structure, name: str, parts: list[str]) -> bool:
    """Whether the stride grows twice from part to part of a module, or after the first of them."""
    start, end = structure.entry(name), structure.stride(name)
    strides = [structure.stride(part) for part in parts]
    on_trunk = [stride for stride in strides if start < stride * SAME_STRIDE and stride < end * SAME_STRIDE]
    grows = [new > old * SAME_STRIDE for old, new in pairwise([start, *on_trunk])]
    return sum(grows) > 1 or any(grows[1:])


def _grows_after_a_block(structure: Structure, name: str) -> bool:
    """Whether a module above the stem holds blocks that are alike, and its stride grows after the first of them."""
    series = structure.series_of(name)
    called_once = all(structure.modules[child].calls == 1 for child in series)
    if len(series) < 2 or not called_once or structure.entry(name) < SAME_STRIDE or name not in structure.outputs:
        return False
    if structure.stride(name) < SAME_STRIDE * structure.stride(series[0]):
        return False
    start = structure.modules[series[0]].last
    later = [child for child in structure.called_children(name) if structure.modules[child].first >= start]
    later = [child for child in later if child in structure.outputs and structure.modules[child].parameters]
    return any(
        structure.stride(child) > SAME_STRIDE * max(structure.entry(child), structure.stride(series[0]))
        for child in later
        if structure.outputs[child].grid != (1, 1)
    )


def _is_nested(structure: Structure, name: str) -> bool:
    """Whether a module goes down and up again, around or within one of its own class: a U-Net of nested blocks."""
    return len(structure.of_own_class(name)) > 1 and any(
        stride_of(spec) > SAME_STRIDE * max(structure.stride(name), structure.entry(name))
        for spec in structure.within(name)
    )


def _wraps(structure: Structure, name: str, share: float) -> bool:
    """Whether a module holds the model, and gives features of it beside or instead of its last.

    Such is the backbone that returns the ends of all its stages: its own output says nothing about its stride.
    """
    inside = [structure.stride(other) for other in structure.outputs if other.startswith(f"{name}.")]
    return share > WHOLE_SHARE and max(inside, default=0.0) > SAME_STRIDE * structure.stride(name)


def _is_wrapped(structure: Structure, name: str, part: str) -> bool:
    """Whether nearly all of a module is one part that holds several blocks."""
    whole = structure.modules[part].macs > WHOLE_SHARE * structure.modules[name].macs
    return whole and structure.holds_series(part)
