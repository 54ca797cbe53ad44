"""The ends of the stages of a model: the last unit of each before the stride grows, or what the encoder returns.

A model of one stride, such as a plain vision transformer, has no such ends; its blocks are counted instead.
"""

from collections.abc import Sequence

from probe_kd.engine.anatomy.encoder import MAIN_SHARE, Encoder, has_width_of_output, share_without_grid
from probe_kd.engine.anatomy.strides import SAME_STRIDE, is_near, is_same_stride, stride_of
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.anatomy.units import units_in_order
from probe_kd.engine.spec import FeatureSpec


def stage_ends(structure: Structure, encoder: Encoder, trunk: Sequence[str]) -> list[FeatureSpec]:
    """Return the last unit of every stage, or what the encoder returns of the stage."""
    ends = _structural_ends(structure, trunk)
    for spec in encoder.returned:
        near = [end for end in ends if is_near(spec, end)]
        if not any(end.channels == spec.channels for end in near) and not _comes_late(structure, trunk, spec):
            ends = sorted([*(end for end in ends if end not in near), spec], key=lambda end: end.order)
    if ends and share_without_grid(structure, encoder) > MAIN_SHARE:
        late = [spec for spec in encoder.given if spec.order > ends[-1].order and spec.grid != (1, 1)]
        coarse = [spec for spec in late if stride_of(spec) * SAME_STRIDE > stride_of(ends[-1])]
        ends = [*(end for end in ends if not is_near(end, coarse[-1])), coarse[-1]] if coarse else ends
    return ends


def _structural_ends(structure: Structure, trunk: Sequence[str]) -> list[FeatureSpec]:
    ends: list[FeatureSpec] = []
    pooled: list[FeatureSpec] = []  # the last end, and what was pooled from it
    for name in trunk:
        if pooled and _pools(structure, name, pooled):
            pooled.append(structure.outputs[name])
            continue
        same_stride = bool(ends) and structure.stride(name) < SAME_STRIDE * stride_of(ends[-1])
        before = None if same_stride else _end_inside(structure, name)
        if same_stride or (ends and before is not None and is_near(ends[-1], before)):
            ends.pop()
        ends += [structure.outputs[name]] if before is None else [before, structure.outputs[name]]
        pooled = [ends[-1]]
    return ends


def _pools(structure: Structure, name: str, pooled: Sequence[FeatureSpec]) -> bool:
    """Whether a unit only pools the end of a stage, or what was pooled from it, and so is no end itself."""
    reads = any(structure.reads(name, spec) for spec in pooled)
    return reads and not structure.module(name).parameters and structure.outputs[name].grid != pooled[0].grid


def _end_inside(structure: Structure, name: str) -> FeatureSpec | None:
    """Return the end of the stage before a block, where the block goes on with that stage before its stride grows.

    Such a block begins with layers that are alike, have the block's own width already, and hold most of its compute.
    Only then comes its convolution with a stride (Xception with pre-activation).
    """
    children = structure.called_children(name)
    branch = max(children, key=lambda child: structure.module(child).macs, default=name)
    series = structure.series_of(branch) if structure.repeats(name) else []
    before = [part for part in series if is_same_stride(structure.stride(part), structure.entry(name))]
    later = [part for part in series if part not in before]
    macs = sum(structure.module(part).macs for part in before)
    if len(before) < 2 or not later or 2 * macs < structure.module(name).macs:
        return None
    end = structure.outputs[before[-1]]
    return end if end.channels == structure.outputs[name].channels else None


def _comes_late(structure: Structure, trunk: Sequence[str], spec: FeatureSpec) -> bool:
    """Whether the next stage has ended when a feature is there: it is one of a pyramid, or normed at the end."""
    coarser = [structure.outputs[name] for name in trunk if structure.stride(name) > SAME_STRIDE * stride_of(spec)]
    return any(other.order < spec.order and structure.is_container(other.tap.module) for other in coarser)


def other_end(structure: Structure, encoder: Encoder, trunk: Sequence[str], end: FeatureSpec) -> FeatureSpec | None:
    """Return the end of the last stage in another reading, before or after a last convolution that widens.

    `end` is that of the last stage, and the trunk is not empty.
    Authors of one and the same model differ in whether this convolution belongs to the stage (MobileNetV2 of
    torchvision and of timm, MobileViT of timm and of transformers), so that no structure decides it.
    """
    if structure.outputs[trunk[-1]].tensor != end.tensor:
        return None
    last = trunk[-1]
    if structure.layer_count(last) == 1:
        before = trunk[-2] if len(trunk) > 1 and structure.widens(last) else last
        is_block = structure.layer_count(before) > 1 and structure.near(before, [structure.stride(last)])
        return structure.outputs[before] if is_block else None
    units = units_in_order(structure, encoder.name, encoder.name)
    later = [name for name in units if structure.outputs[name].order > structure.outputs[last].order]
    widening = (name for name in later if _widens_end(structure, encoder, name, structure.outputs[last]))
    return next((structure.outputs[name] for name in widening), None)


def _widens_end(structure: Structure, encoder: Encoder, name: str, end: FeatureSpec) -> bool:
    """Whether a unit is one convolution that widens the end of the last stage, and no classifier."""
    reads_end = name in structure.entries and structure.entries[name].channels == end.channels
    return (
        reads_end
        and structure.layer_count(name) == 1
        and structure.widens(name)
        and is_near(structure.outputs[name], end)
        and not has_width_of_output(structure, encoder, name)
    )
