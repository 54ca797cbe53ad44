"""What follows the last block of a stage and is no block: a norm, an activation, a convolution for the classifier."""

from collections.abc import Sequence

from probe_kd.engine.anatomy.names import is_numbered, parent_of
from probe_kd.engine.anatomy.strides import SAME_STRIDE
from probe_kd.engine.anatomy.structure import Structure

# A tail that holds less than this prepares the classifier: a norm, a last convolution, a fusion of scales.
TAIL_SHARE = 0.01


def without_tails(structure: Structure, units: Sequence[str]) -> list[str]:
    """Cut every stage after its last block. A stem has no block, and is kept."""
    trimmed: list[str] = []
    for group in _by_stage(structure, units):
        final = group[-1] == units[-1]
        blocks = [index for index, name in enumerate(group) if not _is_tail(structure, name, final)]
        end = blocks[-1] + 1 if blocks else len(group)
        while end < len(group) and _completes(structure, group[end], group[blocks[-1]]):
            end += 1
        trimmed += group[:end]
    return trimmed


def _by_stage(structure: Structure, units: Sequence[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in units:
        if groups and structure.stride(name) < SAME_STRIDE * structure.stride(groups[-1][-1]):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _is_tail(structure: Structure, name: str, final: bool) -> bool:
    """Whether a unit is not a block: a norm, an activation, or one convolution that widens for the classifier.

    A single convolution in a series of stages counts as a stage, as the author of the model wrote it (MobileNetV3).
    So does a last one that does not widen, since it gathers what the blocks gave (Inception-ResNet).
    """
    if _is_series(structure, name):
        return False
    layers = structure.layer_count(name)
    small = final and structure.module(name).macs < TAIL_SHARE * structure.trace.macs
    gathers = final and layers == 1 and _ends_encoder(structure, name) and not structure.widens(name)
    return small or (layers < 2 and not gathers)


def _is_series(structure: Structure, name: str) -> bool:
    """Whether this is a numbered series of numbered blocks."""
    return is_numbered(name) and any(map(is_numbered, structure.called_children(name)))


def _ends_encoder(structure: Structure, name: str) -> bool:
    """Whether only a classifier comes after a unit: the model yields no map, and what follows has less compute."""
    module = structure.module(name)
    later = {other for other, spec in structure.modules.items() if spec.calls and spec.first >= module.last}
    macs = sum(structure.modules[other].macs for other in later if parent_of(other) not in later)
    return module.calls == 1 and not structure.features("", "output") and macs < module.macs


def _completes(structure: Structure, name: str, block: str) -> bool:
    """Whether a unit is the norm or activation of a block that consists of bare convolutions (Xception)."""
    bare = all(structure.modules[part].macs for part in structure.leaves(block))
    return bare and not structure.module(name).macs
