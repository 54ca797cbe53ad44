"""The decoder of a dense model: what comes after the encoder, stride by stride."""

from collections.abc import Sequence

from probe_kd.engine.anatomy.encoder import Encoder
from probe_kd.engine.anatomy.names import inside
from probe_kd.engine.anatomy.strides import is_near
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.anatomy.units import units_in_order
from probe_kd.engine.spec import FeatureSpec


def decoder_ends(structure: Structure, encoder: Encoder, trunk: Sequence[str]) -> list[FeatureSpec]:
    """Return the last feature at each stride after the encoder, first to last, without the layer of the output."""
    units = _units_after(structure, encoder, trunk)
    start = structure.module(trunk[-1]).last if trunk else 0
    layers = dict.fromkeys(_layer_around(structure, name, units, start) for name in units)
    features = [spec for name in layers for spec in _features_of(structure, name)]
    if features and features[-1].channels in _output_widths(structure) and not features[-1].tap.items:
        features.pop()
    ends: list[FeatureSpec] = []
    for spec in features:
        if ends and is_near(spec, ends[-1]):
            ends.pop()
        ends.append(spec)
    return ends


def _units_after(structure: Structure, encoder: Encoder, trunk: Sequence[str]) -> list[str]:
    """The units with parameters that run after a trunk. Where the encoder is a part of the model, none of its own."""
    end = structure.outputs[trunk[-1]].order if trunk else 0
    later = [name for name in units_in_order(structure, encoder.name, "") if structure.outputs[name].order > end]
    units = [name for name in later if structure.module(name).parameters]
    return [name for name in units if not (encoder.name and inside([structure.module(name).name], encoder.name))]


def _output_widths(structure: Structure) -> list[int]:
    return [spec.channels for spec in structure.trace.specs if spec.tap.is_output]


def _layer_around(structure: Structure, unit: str, units: Sequence[str], start: int) -> str:
    """Return the outermost module around a unit that holds nothing but units of its own stride, or the unit itself.

    It begins after `start`, where the trunk ends. A layer with most of the compute is opened, as if it were the model
    in a wrapper. What gives the output at another width stays open: the output is no feature, and the layers before it
    are.
    """
    widths = _output_widths(structure)
    parts = structure.module(unit).name.split(".")
    for name in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if name not in structure.outputs or structure.modules[name].first < start:
            continue
        features = [structure.outputs[other] for other in inside(units, name)]
        features = [spec for spec in features if spec.grid != (1, 1)]
        one_width = len({spec.channels for spec in features}) == 1
        one_stride = all(is_near(spec, structure.outputs[name]) for spec in features)
        if one_stride and (one_width or structure.outputs[name].channels not in widths):
            return name
    return unit


def _features_of(structure: Structure, name: str) -> list[FeatureSpec]:
    """Return the features of a unit of a decoder: all of its outputs, of its parts, or its only one."""
    own = [spec for spec in structure.trace.specs if spec.tap.module == structure.module(name).name and spec.spatial]
    own = [spec for spec in own if spec.tap.port == "output" and spec.grid != (1, 1)]
    if any(not is_near(spec, own[0]) for spec in own):
        return own
    parts = [part for part in structure.called_children(name) if part in structure.outputs]
    parts = [part for part in parts if structure.module(part).parameters and structure.outputs[part].grid != (1, 1)]
    if any(not is_near(structure.outputs[part], structure.outputs[parts[0]]) for part in parts):
        return [spec for part in parts for spec in _features_of(structure, part)]
    return [structure.outputs[name]]
