"""The blocks that the stages of a model repeat: residual, transformer or mixer blocks, first to last."""

from collections.abc import Collection, Sequence
from itertools import pairwise

from probe_kd.engine.anatomy.names import is_numbered, parent_of
from probe_kd.engine.anatomy.strides import SAME_STRIDE, is_same_stride
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.spec import FeatureSpec


def block_chain(structure: Structure, trunk: Sequence[str], ends: Sequence[FeatureSpec]) -> list[FeatureSpec]:
    """Return the features of the blocks in a trunk whose stages have these ends."""
    names: list[str] = []
    single: list[str] = []
    for unit in filter(structure.is_container, trunk):
        blocks = _blocks_in(structure, unit)
        if _is_stem(structure, unit, blocks):
            continue
        names += blocks
        if blocks == [unit] and not structure.repeats(unit):
            single.append(unit)
    chain = _without_single(structure, names, single, {spec.tap.module for spec in ends})
    return [structure.outputs[name] for name in _without_parts(structure, chain)]


def _is_stem(structure: Structure, unit: str, blocks: Sequence[str]) -> bool:
    """Whether a unit is a stem, not a stage with its patch embedding."""
    entry, stride = structure.entry(unit), structure.stride(unit)
    one_stride = all(is_same_stride(structure.entry(block), stride) for block in blocks)
    return stride > 2 * SAME_STRIDE * entry and not one_stride and (blocks == [unit] or entry < SAME_STRIDE)


def _without_single(
    structure: Structure, names: Sequence[str], single: Collection[str], ends: Collection[str]
) -> list[str]:
    """Leave out units that repeat nothing, unless one ends a stage that has no other block."""
    strides = [structure.stride(name) for name in names if name not in single]
    return [name for name in names if name not in single or (name in ends and not structure.near(name, strides))]


def _without_parts(structure: Structure, chain: Sequence[str]) -> list[str]:
    """Keep the last of the modules of a block, where each block is a list of unlike modules, which has no output.

    Such is `layers = ModuleList([ModuleList([attention, mlp]), ...])`.
    """
    blocks: dict[str, list[str]] = {}
    for name in chain:
        holder = parent_of(structure.module(name).name)
        is_block = holder != "" and not structure.modules[holder].calls and is_numbered(holder)
        blocks.setdefault(holder if is_block else name, []).append(name)
    parts = set[str]()
    for names in blocks.values():
        unlike = len({structure.module(name).kind for name in names}) == len(names)
        parts.update(names[:-1] if unlike else ())
    return [name for name in chain if name not in parts]


def _blocks_in(structure: Structure, name: str, *, in_block: bool = False) -> list[str]:
    """Return the numbered blocks that a container consists of, opened recursively, or the container itself."""
    children = [child for child in structure.called_children(name) if structure.is_container(child)]
    repeated = [child for child in children if is_numbered(child)]
    in_block = in_block or _is_block(structure, name)
    if not repeated and not in_block:
        repeated = structure.series_of(structure.module(name).name)
    for series in (repeated, *([child] for child in children if child not in repeated)):
        if (
            series
            and not _side_by_side(structure, series)
            and all(child in structure.outputs for child in series)
            and _has_form_of(structure, series[-1], name)
        ):
            opened = [block for child in series for block in _blocks_in(structure, child, in_block=in_block)]
            if len(series) > 1 or opened != series or _is_same_tensor(structure, series[0], name):
                return opened
    return [name]


def _side_by_side(structure: Structure, names: Sequence[str]) -> bool:
    """Whether several modules all read one feature, as experts and the branches of ASPP do: no series of blocks."""
    read = {structure.entries[name].tensor for name in names if name in structure.entries}
    return len(names) > 1 and all(name in structure.entries for name in names) and len(read) == 1


def _is_block(structure: Structure, name: str) -> bool:
    """Whether a module is one of a series in which some have one form, or alone in a list: a stage has its own."""
    holder = parent_of(name)
    numbered = [child for child in structure.called_children(holder) if is_numbered(child)]
    series = [child for child in numbered or structure.series_of(holder) if child in structure.outputs]
    alike = any(_has_form_of(structure, child, before) for before, child in pairwise(series))
    return name in series and (len(series) == 1 or alike)


def _has_form_of(structure: Structure, child: str, name: str) -> bool:
    """Whether a child's output has the grid and channels of its parent's, and so lies on the trunk."""
    if name not in structure.outputs:
        return False
    output, parent_output = structure.outputs[child], structure.outputs[name]
    one_form = (output.grid, output.channels) == (parent_output.grid, parent_output.channels)
    return one_form or _is_same_tensor(structure, child, name)


def _is_same_tensor(structure: Structure, child: str, name: str) -> bool:
    """Whether a numbered child yields the same tensor as its parent, so that it can replace it."""
    return is_numbered(child) and structure.outputs[child].tensor == structure.outputs[name].tensor
