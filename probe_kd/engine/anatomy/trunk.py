"""The trunk: the units between the image and the classifier's pooling, in order. Their stride never shrinks."""

from collections.abc import Sequence
from itertools import pairwise

from probe_kd.engine.anatomy.encoder import Encoder
from probe_kd.engine.anatomy.heads import without_class_attention, without_head
from probe_kd.engine.anatomy.strides import SAME_STRIDE, count_strides
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.anatomy.tails import without_tails
from probe_kd.engine.anatomy.units import units_in_order


def find_trunk(structure: Structure, encoder: Encoder) -> list[str]:
    """Return the units whose strides never shrink, without a head, and every stage without what follows its blocks."""
    units = _last_pass(structure, units_in_order(structure, encoder.name, encoder.name))
    trunk = _growing(structure, _main_branch(structure, units))
    trunk = without_head(structure, encoder, trunk)
    return without_class_attention(structure, without_tails(structure, trunk))


def _growing(structure: Structure, units: Sequence[str]) -> list[str]:
    """Return the units up to the classifier's pooling, without those that lead back to smaller strides."""
    trunk: list[str] = []
    for index, name in enumerate(units):
        module = structure.module(name)
        if (module.calls > 1 and not module.parameters) or structure.reads(name, structure.outputs[name]):
            continue  # a module without a place of its own, or one that gives what it read, as `Identity` does
        if _pools_all(structure, name, trunk):
            break
        if trunk and structure.stride(name) * SAME_STRIDE < structure.stride(trunk[-1]):
            if _is_pyramid(structure, units[index:], trunk):
                break
            new = [unit for unit in units[index:] if not _runs_again(structure, unit, trunk)]
            if name not in new or not _restarts(structure, new, structure.stride(trunk[-1])):
                continue  # a side branch, a fusion of scales, a decoder
            trunk = [other for other in trunk if structure.stride(other) < structure.stride(name) * SAME_STRIDE]
        trunk.append(name)
    return trunk


def _last_pass(structure: Structure, units: list[str]) -> list[str]:
    """Keep the last of several passes through all strides, as of one encoder that reads several images."""
    called = [name for name in units if name not in structure.modules]
    counts = {structure.module(name).calls for name in called}
    last = [name for name in called if name == list(structure.calls[structure.module(name).name].values())[-1]]
    if len(counts) != 1 or len(last) < 2:
        return units
    start = units.index(last[0])
    earlier = [name for name in called if name not in last]
    returns = start > 0 and structure.stride(last[0]) * SAME_STRIDE < structure.stride(units[start - 1])
    if not returns or any(name in earlier for name in units[start:]):
        return units
    return [name for name in units if name not in earlier]


def _main_branch(structure: Structure, units: list[str]) -> list[str]:
    """Return the units of one branch if several read the image side by side: of the one with most of the compute.

    A branch begins with a unit that reads the image. What comes after the last branch counts as part of it.
    """
    channels, *_ = structure.trace.input_size
    starts = [
        index
        for index, name in enumerate(units)
        if name in structure.entries
        and structure.entries[name].channels == channels
        and structure.entry(name) < SAME_STRIDE
    ]
    if len(starts) < 2:
        return units
    branches = [units[start:end] for start, end in pairwise([*starts, len(units)])]
    macs = [sum(structure.module(name).macs for name in branch) for branch in branches]
    return branches[macs.index(max(macs))]


def _pools_all(structure: Structure, name: str, before: Sequence[str]) -> bool:
    """Whether a pooling, or a convolution as large as the map, leaves only one position."""
    grid = structure.outputs[name].grid
    if not before or grid != (1, 1) or structure.outputs[before[-1]].grid == grid:
        return False
    if name in structure.entries and structure.entries[name].grid == grid:  # it was pooled before
        return True
    shrinks = structure.stride(name) > 4 * SAME_STRIDE * structure.stride(before[-1])
    return not structure.module(name).parameters or shrinks


def _is_pyramid(structure: Structure, units: Sequence[str], trunk: Sequence[str]) -> bool:
    """Whether units of several strides have one width, as in a feature pyramid, and those of the trunk have not."""
    later, before = (
        [structure.outputs[name] for name in names if structure.module(name).macs] for names in (units, trunk)
    )
    later = [spec for spec in later if spec.grid != (1, 1)]
    widths, widths_before = ({spec.channels for spec in specs} for specs in (later, before))
    return len(widths) == 1 < len(widths_before) and count_strides(later) > 1


def _runs_again(structure: Structure, unit: str, trunk: Sequence[str]) -> bool:
    """Whether a unit is a later call of a module in the trunk."""
    is_call = unit not in structure.modules
    return is_call and any(structure.module(unit) is structure.module(other) for other in trunk)


def _restarts(structure: Structure, units: Sequence[str], stride: float) -> bool:
    """Whether a second pass over the strides reaches the old one again (HRNet), or is most of the model."""
    macs = sum(structure.module(name).macs for name in units)
    grows = any(structure.stride(name) > SAME_STRIDE * structure.stride(units[0]) for name in units)
    return any(structure.near(name, [stride]) for name in units[1:] if structure.is_container(name)) or (
        macs > structure.trace.macs / 2 and grows
    )
