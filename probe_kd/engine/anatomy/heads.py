"""What follows the encoder at its stride and is no part of it: a classifier, the head of a dense task."""

from collections.abc import Sequence

from probe_kd.engine.anatomy.encoder import Encoder, has_width_of_output
from probe_kd.engine.anatomy.names import holders_of, parent_of
from probe_kd.engine.anatomy.strides import SAME_STRIDE, is_near, stride_of
from probe_kd.engine.anatomy.structure import Structure


def without_head(structure: Structure, encoder: Encoder, trunk: Sequence[str]) -> list[str]:
    """Leave out a classifier of convolutions at the end of a trunk, and the head of a dense task."""
    units = _encoder_of_dense(structure, encoder, trunk)
    while len(units) > 1 and _is_classifier(structure, encoder, units[-1], units[-2]):
        units.pop()
    return units


def without_class_attention(structure: Structure, trunk: list[str]) -> list[str]:
    """Drop the last blocks if they only add a class token (CaiT, Touvron et al. 2021): these are not a stage."""
    late = [name for name in trunk if structure.outputs[name].prefix_tokens]
    early = [name for name in trunk if name not in late and structure.is_container(name)]
    macs = {name: structure.module(name).macs for name in trunk}
    few = sum(macs[name] for name in late) < 0.2 * sum(macs.values())
    apart = not {parent_of(name) for name in late} & {parent_of(name) for name in early}
    return [name for name in trunk if name not in late] if late and early and few and apart else trunk


def _encoder_of_dense(structure: Structure, encoder: Encoder, trunk: Sequence[str]) -> list[str]:
    """Leave out what follows the container of the stages, where the model's output has a finer grid than these."""
    output = structure.outputs.get("")
    strides = [structure.stride(name) for name in trunk]
    if encoder.name or output is None or not trunk or stride_of(output) * SAME_STRIDE > max(strides):
        return list(trunk)
    deepest = next(name for name in trunk if structure.stride(name) * SAME_STRIDE > max(strides))
    holders = [holder for holder in holders_of(deepest) if _spans_strides(structure, holder, trunk)]
    if not holders:
        return _without_branches(structure, trunk)
    # Embeddings and blocks may stand in lists of their own.
    before = trunk[: trunk.index(deepest)]
    beside = [holder for name in before for holder in holders_of(name) if _spans_strides(structure, holder, trunk)]
    outer = [holder for holder in beside if not f"{holders[0]}.".startswith(f"{holder}.")]
    prefixes = tuple(f"{holder}." for holder in [holders[0], *outer])
    last = max(index for index, name in enumerate(trunk) if name.startswith(prefixes))
    return list(trunk[: last + 1])


def _spans_strides(structure: Structure, holder: str, trunk: Sequence[str]) -> bool:
    inside = [structure.stride(name) for name in trunk if name.startswith(f"{holder}.")]
    return max(inside, default=0.0) > SAME_STRIDE * min(inside, default=0.0)


def _without_branches(structure: Structure, trunk: Sequence[str]) -> list[str]:
    """Leave out what begins with several units that read the feature of the unit before them (ASPP)."""
    for index in range(1, len(trunk) - 1):
        before = structure.outputs[trunk[index - 1]]
        both_read = all(structure.reads(name, before) for name in trunk[index : index + 2])
        if both_read and is_near(structure.outputs[trunk[index]], before):
            return list(trunk[:index])
    return list(trunk)


def _is_classifier(structure: Structure, encoder: Encoder, name: str, before: str) -> bool:
    """Whether the model's outputs are those of the last layer in a unit, which keeps the grid and not the width.

    Then this is a classifier of convolutions, or a linear one at every position, before the pooling (SqueezeNet).
    """
    layers = [part for part in structure.leaves(name) if structure.modules[part].macs and part in structure.outputs]
    if not layers or not has_width_of_output(structure, encoder, layers[-1]):
        return False
    last = structure.outputs[layers[-1]]
    end = structure.modules[layers[-1]].last
    later = any(module.parameters and module.calls and module.first >= end for module in structure.modules.values())
    nested = any(structure.is_container(child) for child in structure.called_children(name))
    keeps_grid = stride_of(last) < SAME_STRIDE * structure.stride(before)
    return not later and not nested and keeps_grid and last.channels != structure.outputs[before].channels
