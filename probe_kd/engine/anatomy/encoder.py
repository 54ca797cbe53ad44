"""The encoder of a model: the module whose stages are those of the model, and what it gives to the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from probe_kd.engine.anatomy.strides import SAME_STRIDE, count_strides, is_near, stride_of
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.spec import FeatureSpec

# A container that holds less of the model's compute is a stem, a head, or one block.
MAIN_SHARE = 0.25
# The encoder of a dense model holds more of its parameters, and more layers than a stem.
ENCODER_SHARE = 0.05
STEM_LAYERS = 4


@dataclass(frozen=True)
class Encoder:
    """A module by its name, "" for the model itself, and the features that it gives to what comes after it, or returns.

    `returned` are those of growing strides, which are ends of stages by its author's word.
    """

    name: str
    given: tuple[FeatureSpec, ...]
    returned: tuple[FeatureSpec, ...]


def find_encoder(structure: Structure) -> Encoder:
    """Return the encoder of a dense model, otherwise the model."""
    name = ""
    while True:
        encoders = [child for child in structure.called_children(name) if _is_encoder(structure, child, name)]
        if not encoders:
            break
        name = encoders[0]
    given = _given(structure, name)
    return Encoder(name, tuple(given), tuple(_returned(structure, name, given)))


def _is_encoder(structure: Structure, name: str, parent: str) -> bool:
    """Whether a module reads the image, and a decoder or a dense head beside it reads what it yields.

    The encoder has layers and parameters that a stem has not.
    """
    if structure.modules[name].parameters < ENCODER_SHARE * structure.trace.parameters:
        return False
    if not _reads_image(structure, name):
        return False
    features = [spec for spec in structure.within(name) if spec.grid != (1, 1)]
    if not features or not _has_blocks(structure, name):
        return False
    return _feeds_the_rest(structure, name, parent, max(stride_of(spec) for spec in features))


def _feeds_the_rest(structure: Structure, name: str, parent: str, deepest: float) -> bool:
    """Whether what runs after a module, beside it, is a decoder, a pyramid or a dense head on its features.

    A decoder reads several of its features, or gives the model an output that is finer than the deepest of them. A
    pyramid reads one at each of three strides or more, in layers side by side. A dense head has no blocks, and gives
    the model a map. Nothing beside the encoder is coarser, but for the small levels that a pyramid adds.
    """
    module = structure.modules[name]
    siblings = [child for child in structure.called_children(parent) if structure.modules[child].first >= module.last]
    coarser = [
        other for other in siblings if other in structure.outputs and structure.stride(other) > deepest * SAME_STRIDE
    ]
    produced = {spec.tensor for spec in _outputs_in(structure.trace.specs, name)}
    inputs = [structure.features(other, "input") for other in siblings]
    read = [spec for specs in inputs for spec in specs if spec.tensor in produced]
    if count_strides(read) > 2 and _macs_of_stages(structure, coarser) < MAIN_SHARE * module.macs:
        return True
    if coarser:
        return False
    outputs = [spec.reduction for spec in structure.features(parent, "output") if spec.reduction]
    if min(outputs, default=deepest) * SAME_STRIDE < deepest:
        return True
    if any(len({spec.tensor for spec in specs} & produced) > 1 for specs in inputs):
        return True
    heads = [other for other in siblings if structure.modules[other].parameters]
    return bool(outputs and heads) and not any(map(structure.holds_series, heads))


def _reads_image(structure: Structure, name: str) -> bool:
    strides = [stride_of(spec) for spec in structure.features(name, "input")]
    return bool(strides) and max(strides) < SAME_STRIDE


def _has_blocks(structure: Structure, name: str) -> bool:
    return structure.is_container(name) and structure.layer_count(name) > STEM_LAYERS


def _outputs_in(specs: Iterable[FeatureSpec], name: str) -> list[FeatureSpec]:
    """Return those of some features that a module yields, or one in it. In "", the model, lies everything."""
    outputs = [spec for spec in specs if spec.tap.port == "output"]
    prefix = f"{name}."
    return [spec for spec in outputs if name == "" or f"{spec.tap.module}.".startswith(prefix)]


def _macs_of_stages(structure: Structure, names: Sequence[str]) -> int:
    """The compute of what runs once; what runs at every stride is a head of a pyramid."""
    return sum(structure.modules[name].macs for name in names if structure.modules[name].calls == 1)


def _given(structure: Structure, name: str) -> list[FeatureSpec]:
    """The features that run out of a module: inputs of all that runs later, or outputs of the model."""
    if not name:
        return structure.features("", "output")
    end = structure.modules[name].last
    later = [other for other, module in structure.modules.items() if module.calls and module.first >= end]
    return [spec for other in later for spec in structure.features(other, "input")]


def _returned(structure: Structure, name: str, given: Sequence[FeatureSpec]) -> list[FeatureSpec]:
    """Return the given features of growing strides. Of several of one stride, the last. A pyramid has one width."""
    first: dict[int, FeatureSpec] = {}
    for spec in _outputs_in(structure.outputs.values(), name):
        first.setdefault(spec.tensor, spec)
    tensors = {spec.tensor for spec in given}
    features: list[FeatureSpec] = []
    for spec in sorted((first[tensor] for tensor in tensors if tensor in first), key=lambda spec: spec.order):
        if features and is_near(spec, features[-1]):
            features.pop()
        features.append(spec)
    strides = [stride_of(spec) for spec in features]
    grows = all(new > SAME_STRIDE * old for old, new in pairwise(strides))
    is_pyramid = len({spec.channels for spec in features}) == 1
    return features if grows and len(features) > 2 and not is_pyramid else []


def has_width_of_output(structure: Structure, encoder: Encoder, unit: str) -> bool:
    """Whether a unit is as wide as an output of a model that returns no stages, and so may be a classifier."""
    outputs = [spec for spec in structure.trace.specs if spec.tap.is_output]
    return not encoder.returned and any(spec.channels == structure.outputs[unit].channels for spec in outputs)


def share_without_grid(structure: Structure, encoder: Encoder) -> float:
    """The share of the encoder's compute, 0..1, in layers that yield no feature with positions."""
    parts = structure.called_children(encoder.name)
    whole = sum(structure.modules[part].macs for part in parts)
    return sum(_macs_without_grid(structure, part) for part in parts) / max(whole, 1)


def _macs_without_grid(structure: Structure, name: str) -> int:
    if name in structure.outputs:
        return 0
    parts = structure.called_children(name)
    if not parts:
        return structure.modules[name].macs
    return sum(_macs_without_grid(structure, part) for part in parts)
