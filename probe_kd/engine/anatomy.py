"""A trace read as an anatomy: the encoder's units, its stages and blocks, and the decoder after them.

Nothing here knows an architecture by name. A model is read as a sequence of *units*, the modules that one would write
on one line of its diagram: from the root down, a container is opened as long as it spans several strides. A stage ends
with the last unit before the stride grows. A model of one stride, such as a plain vision transformer, has no such ends;
its blocks are counted instead.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from math import prod

from probe_kd.engine.spec import FeatureSpec, Layout, ModuleSpec, Trace

# Two strides are one stage unless they differ by more than this: convolutions without padding cut a few positions off.
SAME_STRIDE = 1.4
# A container that holds less of the model's compute is a stem, a head, or one block.
MAIN_SHARE = 0.25
# A container that holds more is the model in a wrapper.
WHOLE_SHARE = 0.9
# The encoder of a dense model holds more of its parameters, and more layers than a stem.
ENCODER_SHARE = 0.05
STEM_LAYERS = 4
# A tail that holds less than this prepares the classifier: a norm, a last convolution, a fusion of scales.
TAIL_SHARE = 0.01
# Classes that hold anything: two of one class need not be alike.
_GENERIC = ("Sequential", "ModuleList", "ModuleDict", "Module")
# One of several outputs of a module is its main one if a linear layer on it costs this many times more than on the
# first.
MAIN_BRANCH = 1.5


# Longer than other classes: every reading of a trace (units, stages, blocks) is made of the one before it.
class Anatomy:
    """A trace read as units, stages and blocks.

    A unit is the name of a module. Of a module with parameters that runs several times, each call is a unit, as in
    `block#1`.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.outputs: dict[str, FeatureSpec] = {}
        self.entries: dict[str, FeatureSpec] = {}  # the feature with which a module is entered
        self.calls: dict[str, dict[int, str]] = {}  # the units of a module that runs several times
        self._series: dict[str, list[str]] = {}
        self._called: dict[str, list[str]] = {}
        self._leaves_of: dict[str, list[str]] = {}
        self._features: dict[tuple[str, str], list[FeatureSpec]] = {}  # by module and port
        self._read_features()
        self.root = self._encoder_root()
        self.trunk = self._trunk()

    def _read_features(self) -> None:
        inputs: dict[tuple[str, int], list[FeatureSpec]] = {}  # by module and call
        outputs: dict[tuple[str, int], list[FeatureSpec]] = {}
        for spec in self.trace.specs:
            if spec.grid is None or spec.layout is Layout.OTHER:
                continue
            self._features.setdefault((spec.tap.module, spec.tap.port), []).append(spec)
            features = inputs if spec.tap.port == "input" else outputs
            features.setdefault((spec.tap.module, spec.tap.call or 0), []).append(spec)
        for (name, _), specs in inputs.items():
            self.entries.setdefault(name, _main(specs))
            self.entries[_unit(specs[0])] = _main(specs)
        for (name, call), specs in outputs.items():
            self.outputs[name] = _main(specs)  # of several calls the last, where the module's work ends
            if specs[0].calls > 1:
                self.outputs[_unit(specs[0])] = self.outputs[name]
                self.calls.setdefault(name, {})[call] = _unit(specs[0])

    def module(self, unit: str) -> ModuleSpec:
        return self.trace.modules[self.outputs[unit].tap.module if unit in self.outputs else unit]

    def stride(self, name: str) -> float:
        return self.outputs[name].reduction or 1.0

    def entry(self, name: str) -> float:
        """The stride at which a module is entered."""
        return (self.entries[name].reduction if name in self.entries else None) or 1.0

    def called_children(self, name: str) -> list[str]:
        """Return the modules that run directly under a module, in order. The items of a ModuleList count as direct."""
        if name not in self._called:
            called: list[str] = []
            for child in self.module(name).children:
                if child not in self.trace.modules:  # a module that is shared has one name only
                    continue
                called += [child] if self.trace.modules[child].calls else self.called_children(child)
            self._called[name] = sorted(called, key=lambda child: self.trace.modules[child].first)
        return self._called[name]

    def is_container(self, name: str) -> bool:
        return any(self.trace.modules[child].parameters for child in self.called_children(name))

    def opens(self, name: str) -> bool:
        """Whether a container is a series of units, not one: its stride grows twice, or after its first part.

        What yields no feature itself is opened too: it is a wrapper, or the model in one.
        """
        if not self.is_container(name):
            return False
        if self._grows_after_a_block(name) or self._is_nested(name):
            return True
        share = self.trace.modules[name].macs / max(self.trace.modules[self.root].macs, 1)
        if share <= MAIN_SHARE:
            return False
        if name not in self.outputs or self._wraps(name, share):
            return True
        start, end = self.entry(name), self.stride(name)
        children = [child for child in self.called_children(name) if child in self.outputs]
        parts = [child for child in children if self.is_container(child)] or children
        if len(parts) == 1 and self._is_wrapped(name, parts[0]):
            return self.opens(parts[0])
        strides = [self.stride(child) for child in parts]
        on_trunk = [stride for stride in strides if start < stride * SAME_STRIDE and stride < end * SAME_STRIDE]
        grows = [new > old * SAME_STRIDE for old, new in pairwise([start, *on_trunk])]
        grows_later = sum(grows) > 1 or any(grows[1:])
        return grows_later or (share > WHOLE_SHARE and len(parts) > 1)

    def _encoder_root(self) -> str:
        """Return the module whose stages are those of the model: the encoder of a dense model, otherwise the model."""
        name = ""
        while True:
            encoders = [child for child in self.called_children(name) if self._is_encoder(child, name)]
            if not encoders:
                return name
            name = encoders[0]

    def _is_encoder(self, name: str, parent: str) -> bool:
        """Whether a module reads the image, and a decoder or a dense head beside it reads what it yields.

        A decoder reads several of its features, or gives the model an output that is finer than the deepest of them. A
        pyramid reads one at each of three strides or more, in layers side by side. A dense head has no blocks, and
        gives the model a map. The encoder has layers and parameters that a stem has not, and nothing beside it is
        coarser, but for the small levels that a pyramid adds.
        """
        module = self.trace.modules[name]
        if module.parameters < ENCODER_SHARE * self.trace.parameters or not self._reads_image(name):
            return False
        inside = [spec for spec in self._within(name) if spec.grid != (1, 1)]
        if not inside or not self._has_blocks(name):
            return False
        siblings = [child for child in self.called_children(parent) if self.trace.modules[child].first >= module.last]
        deepest = max(spec.reduction or 1.0 for spec in inside)
        coarser = [other for other in siblings if other in self.outputs and self.stride(other) > deepest * SAME_STRIDE]
        produced = {spec.tensor for spec in self.trace.specs if self._lies_in(spec, name)}
        read = [spec for other in siblings for spec in self._at(other, "input") if spec.tensor in produced]
        is_pyramid = self._count_strides(read) > 2 and self._macs_of_stages(coarser) < MAIN_SHARE * module.macs
        if coarser and not is_pyramid:
            return False
        outputs = [spec.reduction for spec in self._at(parent, "output") if spec.reduction]
        heads = [other for other in siblings if self.trace.modules[other].parameters]
        return (
            is_pyramid
            or min(outputs, default=deepest) * SAME_STRIDE < deepest
            or any(len({spec.tensor for spec in self._at(other, "input")} & produced) > 1 for other in siblings)
            or (bool(outputs and heads) and not any(map(self._holds_series, heads)))
        )

    def _macs_of_stages(self, names: Sequence[str]) -> int:
        """The compute of what runs once; what runs at every stride is a head of a pyramid."""
        return sum(self.trace.modules[name].macs for name in names if self.trace.modules[name].calls == 1)

    def _count_strides(self, specs: Iterable[FeatureSpec]) -> int:
        strides = sorted({spec.reduction or 1.0 for spec in specs})
        return sum(new > SAME_STRIDE * old for old, new in pairwise([0.0, *strides]))

    def _holds_series(self, name: str) -> bool:
        return any(self._series_of(other) for other in self.trace.modules if f"{other}.".startswith(f"{name}."))

    def _at(self, name: str, port: str) -> list[FeatureSpec]:
        return self._features.get((name, port), [])

    def _within(self, name: str) -> list[FeatureSpec]:
        """The outputs of a module and of all modules in it."""
        return [spec for other, spec in self.outputs.items() if other == name or other.startswith(f"{name}.")]

    def _lies_in(self, spec: FeatureSpec, name: str) -> bool:
        inside = name == "" or f"{spec.tap.module}.".startswith(f"{name}.")
        return spec.tap.port == "output" and inside

    def _reads_image(self, name: str) -> bool:
        strides = [spec.reduction or 1.0 for spec in self._at(name, "input")]
        return bool(strides) and max(strides) < SAME_STRIDE

    def _has_blocks(self, name: str) -> bool:
        return self.is_container(name) and self._layer_count(name) > STEM_LAYERS

    def _is_wrapped(self, name: str, part: str) -> bool:
        """Whether nearly all of a module is one part that holds several blocks."""
        whole = self.trace.modules[part].macs > WHOLE_SHARE * self.trace.modules[name].macs
        return whole and self._holds_series(part)

    def _grows_after_a_block(self, name: str) -> bool:
        """Whether a module above the stem holds blocks that are alike, and its stride grows after the first of them."""
        series = self._series_of(name)
        called_once = all(self.trace.modules[child].calls == 1 for child in series)
        if len(series) < 2 or not called_once or self.entry(name) < SAME_STRIDE or name not in self.outputs:
            return False
        if self.stride(name) < SAME_STRIDE * self.stride(series[0]):
            return False
        start = self.trace.modules[series[0]].last
        later = [child for child in self.called_children(name) if self.trace.modules[child].first >= start]
        return any(
            self.stride(child) > SAME_STRIDE * max(self.entry(child), self.stride(series[0]))
            for child in later
            if child in self.outputs and self.trace.modules[child].parameters and self.outputs[child].grid != (1, 1)
        )

    def _is_nested(self, name: str) -> bool:
        """Whether a module goes down and up again, around or within one of its own class: a U-Net of nested blocks."""
        kind = self.module(name).kind
        others = self._by_kind[kind] if name in self.outputs and kind not in _GENERIC else []
        own_class = [
            other for other in others if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")
        ]
        return len(own_class) > 1 and any(
            (spec.reduction or 1.0) > SAME_STRIDE * max(self.stride(name), self.entry(name))
            for spec in self._within(name)
        )

    @cached_property
    def _by_kind(self) -> dict[str, list[str]]:
        """The modules that yield features, by their class."""
        names: dict[str, list[str]] = {}
        for name in self.outputs:
            if name in self.trace.modules:
                names.setdefault(self.trace.modules[name].kind, []).append(name)
        return names

    def _wraps(self, name: str, share: float) -> bool:
        """Whether a module holds the model, and gives features of it beside or instead of its last.

        Such is the backbone that returns the ends of all its stages: its own output says nothing about its stride.
        """
        inside = [self.stride(other) for other in self.outputs if other.startswith(f"{name}.")]
        return share > WHOLE_SHARE and max(inside, default=0.0) > SAME_STRIDE * self.stride(name)

    def units(self, name: str = "") -> list[str]:
        units: list[str] = []
        for child in self.called_children(name):
            units += self.units(child) if self.opens(child) else self._calls_of(child)
        return units

    def _calls_of(self, name: str) -> list[str]:
        return list(self.calls[name].values()) if name in self.calls and self.module(name).parameters else [name]

    def _units_in_order(self, name: str | None = None) -> list[str]:
        units = [unit for unit in self.units(self.root if name is None else name) if unit in self.outputs]
        if not any("#" in name for name in units):
            return units
        return sorted(units, key=lambda name: self.entries.get(name, self.outputs[name]).order)

    def _trunk(self) -> list[str]:
        """Return the units between the image and the classifier's pooling, in order. Their stride never shrinks."""
        trunk: list[str] = []
        units = self._main_branch(self._last_pass(self._units_in_order()))
        for index, name in enumerate(units):
            module = self.module(name)
            if (module.calls > 1 and not module.parameters) or self._passes_on(name):
                continue
            if self._pools_all(name, trunk):
                break
            if trunk and self.stride(name) * SAME_STRIDE < self.stride(trunk[-1]):
                if self._is_pyramid(units[index:], trunk):
                    break
                new = [unit for unit in units[index:] if not self._runs_again(unit, trunk)]
                if name not in new or not self._restarts(new, self.stride(trunk[-1])):
                    continue  # a side branch, a fusion of scales, a decoder
                trunk = [other for other in trunk if self.stride(other) < self.stride(name) * SAME_STRIDE]
            trunk.append(name)
        encoder = self._without_head(trunk)
        return self._without_class_attention(self._without_tails(encoder))

    def _last_pass(self, units: list[str]) -> list[str]:
        """Keep the last of several passes through all strides, as of one encoder that reads several images."""
        called = [name for name in units if name not in self.trace.modules]
        counts = {self.module(name).calls for name in called}
        last = [name for name in called if name == list(self.calls[self.module(name).name].values())[-1]]
        if len(counts) != 1 or len(last) < 2:
            return units
        start = units.index(last[0])
        earlier = [name for name in called if name not in last]
        returns = start > 0 and self.stride(last[0]) * SAME_STRIDE < self.stride(units[start - 1])
        if not returns or any(name in earlier for name in units[start:]):
            return units
        return [name for name in units if name not in earlier]

    def _passes_on(self, name: str) -> bool:
        """Whether a unit gives what it read, as `Identity` does."""
        return name in self.entries and self.entries[name].tensor == self.outputs[name].tensor

    def _runs_again(self, unit: str, trunk: Sequence[str]) -> bool:
        """Whether a unit is a later call of a module in the trunk."""
        return unit not in self.trace.modules and any(self.module(unit) is self.module(other) for other in trunk)

    def _main_branch(self, units: list[str]) -> list[str]:
        """Return the units of one branch if several read the image side by side: of the one with most of the compute.

        A branch begins with a unit that reads the image. What comes after the last branch counts as part of it.
        """
        channels, *_ = self.trace.input_size
        starts = [
            index
            for index, name in enumerate(units)
            if name in self.entries and self.entries[name].channels == channels and self.entry(name) < SAME_STRIDE
        ]
        if len(starts) < 2:
            return units
        branches = [units[start:end] for start, end in pairwise([*starts, len(units)])]
        macs = [sum(self.module(name).macs for name in branch) for branch in branches]
        return branches[macs.index(max(macs))]

    def _without_head(self, trunk: list[str]) -> list[str]:
        """Leave out what follows the encoder at its stride: a classifier of convolutions, the head of a dense task."""
        encoder = self._encoder_of_dense(trunk)
        while len(encoder) > 1 and self._is_classifier(encoder[-1], encoder[-2]):
            encoder.pop()
        return encoder

    def _encoder_of_dense(self, trunk: Sequence[str]) -> list[str]:
        """Leave out what follows the container of the stages, where the model's output has a finer grid than these."""
        output = self.outputs.get("")
        strides = [self.stride(name) for name in trunk]
        if self.root or output is None or not trunk or (output.reduction or 1.0) * SAME_STRIDE > max(strides):
            return list(trunk)
        deepest = next(name for name in trunk if self.stride(name) * SAME_STRIDE > max(strides))
        holders = [holder for holder in _holders(deepest) if self._spans_strides(holder, trunk)]
        if not holders:
            return self._without_branches(trunk)
        # Embeddings and blocks may stand in lists of their own.
        before = trunk[: trunk.index(deepest)]
        beside = [holder for name in before for holder in _holders(name) if self._spans_strides(holder, trunk)]
        outer = [holder for holder in beside if not f"{holders[0]}.".startswith(f"{holder}.")]
        prefixes = tuple(f"{holder}." for holder in [holders[0], *outer])
        last = max(index for index, name in enumerate(trunk) if name.startswith(prefixes))
        return list(trunk[: last + 1])

    def _spans_strides(self, holder: str, trunk: Sequence[str]) -> bool:
        inside = [self.stride(name) for name in trunk if name.startswith(f"{holder}.")]
        return max(inside, default=0.0) > SAME_STRIDE * min(inside, default=0.0)

    def _without_branches(self, trunk: Sequence[str]) -> list[str]:
        """Leave out what begins with several units that read the feature of the unit before them (ASPP)."""
        for index in range(1, len(trunk) - 1):
            reads_last = [
                name in self.entries and self.entries[name].tensor == self.outputs[trunk[index - 1]].tensor
                for name in trunk[index : index + 2]
            ]
            if all(reads_last) and is_near(self.outputs[trunk[index]], self.outputs[trunk[index - 1]]):
                return list(trunk[:index])
        return list(trunk)

    def _is_classifier(self, name: str, before: str) -> bool:
        """Whether the model's outputs are those of the last layer in a unit, which keeps the grid and not the width.

        Then this is a classifier of convolutions, or a linear one at every position, before the pooling (SqueezeNet).
        """
        layers = [part for part in self._leaves(name) if self.trace.modules[part].macs and part in self.outputs]
        if not layers or not self._has_width_of_output(layers[-1]):
            return False
        last = self.outputs[layers[-1]]
        later = any(
            module.parameters and module.calls and module.first >= self.trace.modules[layers[-1]].last
            for module in self.trace.modules.values()
        )
        nested = any(self.is_container(child) for child in self.called_children(name))
        keeps_grid = (last.reduction or 1.0) < SAME_STRIDE * self.stride(before)
        return not later and not nested and keeps_grid and last.channels != self.outputs[before].channels

    def _has_width_of_output(self, name: str) -> bool:
        outputs = [spec for spec in self.trace.specs if spec.tap.is_output]
        return not self.returned and any(spec.channels == self.outputs[name].channels for spec in outputs)

    def _without_tails(self, units: Sequence[str]) -> list[str]:
        """Cut every stage after its last block. A stem has no block, and is kept."""
        trimmed: list[str] = []
        for group in self._by_stage(units):
            final = group[-1] == units[-1]
            blocks = [index for index, name in enumerate(group) if not self._is_tail(name, final)]
            end = blocks[-1] + 1 if blocks else len(group)
            while end < len(group) and self._completes(group[end], group[blocks[-1]]):
                end += 1
            trimmed += group[:end]
        return trimmed

    def _by_stage(self, units: Sequence[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        for name in units:
            if groups and self.stride(name) < SAME_STRIDE * self.stride(groups[-1][-1]):
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def _restarts(self, units: Sequence[str], stride: float) -> bool:
        """Whether a second pass over the strides reaches the old one again (HRNet), or is most of the model."""
        macs = sum(self.module(name).macs for name in units)
        grows = any(self.stride(name) > SAME_STRIDE * self.stride(units[0]) for name in units)
        return any(self._near(name, [stride]) for name in units[1:] if self.is_container(name)) or (
            macs > self.trace.macs / 2 and grows
        )

    def _is_pyramid(self, units: Sequence[str], trunk: Sequence[str]) -> bool:
        """Whether units of several strides have one width, as in a feature pyramid, and those of the trunk have not."""
        later, before = ([self.outputs[name] for name in names if self.module(name).macs] for names in (units, trunk))
        later = [spec for spec in later if spec.grid != (1, 1)]
        widths, widths_before = ({spec.channels for spec in specs} for specs in (later, before))
        return len(widths) == 1 < len(widths_before) and self._count_strides(later) > 1

    def _pools_all(self, name: str, before: Sequence[str]) -> bool:
        """Whether a pooling, or a convolution as large as the map, leaves only one position."""
        grid = self.outputs[name].grid
        if not before or grid != (1, 1) or self.outputs[before[-1]].grid == grid:
            return False
        if name in self.entries and self.entries[name].grid == grid:  # it was pooled before
            return True
        return not self.module(name).parameters or self.stride(name) > 4 * SAME_STRIDE * self.stride(before[-1])

    def _is_tail(self, name: str, final: bool) -> bool:
        """Whether a unit is not a block: a norm, an activation, or one convolution that widens for the classifier.

        A single convolution in a series of stages counts as a stage, as the author of the model wrote it (MobileNetV3).
        So does a last one that does not widen, since it gathers what the blocks gave (Inception-ResNet).
        """
        if self._is_series(name):
            return False
        small = final and self.module(name).macs < TAIL_SHARE * self.trace.macs
        gathers = final and self._layer_count(name) == 1 and self._ends_encoder(name) and not self._widens(name)
        return small or (self._layer_count(name) < 2 and not gathers)

    def _ends_encoder(self, name: str) -> bool:
        """Whether only a classifier comes after a unit: the model yields no map, and what follows has less compute."""
        module = self.module(name)
        later = {other for other, spec in self.trace.modules.items() if spec.calls and spec.first >= module.last}
        macs = sum(self.trace.modules[other].macs for other in later if _parent(other) not in later)
        return module.calls == 1 and not self._at("", "output") and macs < module.macs

    def _widens(self, name: str) -> bool:
        return name not in self.entries or self.outputs[name].channels > self.entries[name].channels

    def _is_series(self, name: str) -> bool:
        """Whether this is a numbered series of numbered blocks."""
        return _numbered(name) and any(map(_numbered, self.called_children(name)))

    def _completes(self, name: str, block: str) -> bool:
        """Whether a unit is the norm or activation of a block that consists of bare convolutions (Xception)."""
        bare = all(self.trace.modules[part].macs for part in self._leaves(block))
        return bare and not self.module(name).macs

    def _leaves(self, name: str) -> list[str]:
        """Return the called modules in a module, itself included, that have no called children with parameters."""
        name = self.module(name).name
        if name not in self._leaves_of:
            module = self.trace.modules[name]
            own = [name] if module.calls and not self.is_container(name) else []
            inside = [self._leaves(child) for child in module.children if child in self.trace.modules]
            self._leaves_of[name] = [*own, *(leaf for leaves in inside for leaf in leaves)]
        return self._leaves_of[name]

    def _without_class_attention(self, trunk: list[str]) -> list[str]:
        """Drop the last blocks if they only add a class token (CaiT, Touvron et al. 2021): these are not a stage."""
        late = [name for name in trunk if self.outputs[name].prefix_tokens]
        early = [name for name in trunk if name not in late and self.is_container(name)]
        macs = {name: self.module(name).macs for name in trunk}
        few = sum(macs[name] for name in late) < 0.2 * sum(macs.values())
        apart = not {_parent(name) for name in late} & {_parent(name) for name in early}
        return [name for name in trunk if name not in late] if late and early and few and apart else trunk

    @cached_property
    def returned(self) -> list[FeatureSpec]:
        """The features of growing strides that an encoder gives to what comes after it, or returns.

        These are ends of stages by its author's word. Of several of one stride, the last. A pyramid has one width.
        """
        first: dict[int, FeatureSpec] = {}
        for spec in self.outputs.values():
            if self._lies_in(spec, self.root):
                first.setdefault(spec.tensor, spec)
        given = {spec.tensor for spec in self._given()}
        features: list[FeatureSpec] = []
        for spec in sorted((first[tensor] for tensor in given if tensor in first), key=lambda spec: spec.order):
            if features and is_near(spec, features[-1]):
                features.pop()
            features.append(spec)
        strides = [spec.reduction or 1.0 for spec in features]
        grows = all(new > SAME_STRIDE * old for old, new in pairwise(strides))
        is_pyramid = len({spec.channels for spec in features}) == 1
        return features if grows and len(features) > 2 and not is_pyramid else []

    def _comes_late(self, spec: FeatureSpec) -> bool:
        """Whether the next stage has ended when a feature is there: it is one of a pyramid, or normed at the end."""
        coarser = [
            self.outputs[name] for name in self.trunk if self.stride(name) > SAME_STRIDE * (spec.reduction or 1.0)
        ]
        return any(other.order < spec.order and self.is_container(other.tap.module) for other in coarser)

    def _given(self) -> list[FeatureSpec]:
        if not self.root:
            return self._at("", "output")
        end = self.trace.modules[self.root].last
        later = [name for name, module in self.trace.modules.items() if module.calls and module.first >= end]
        return [spec for name in later for spec in self._at(name, "input")]

    @cached_property
    def ends(self) -> list[FeatureSpec]:
        """The last unit of every stage, or what the encoder returns of the stage."""
        ends = self._structural_ends()
        for spec in self.returned:
            near = [end for end in ends if is_near(spec, end)]
            if not any(end.channels == spec.channels for end in near) and not self._comes_late(spec):
                ends = sorted([*(end for end in ends if end not in near), spec], key=lambda end: end.order)
        if ends and self.share_without_grid > MAIN_SHARE:
            late = [spec for spec in self._given() if spec.order > ends[-1].order and spec.grid != (1, 1)]
            coarse = [spec for spec in late if (spec.reduction or 1.0) * SAME_STRIDE > (ends[-1].reduction or 1.0)]
            ends = [*(end for end in ends if not is_near(end, coarse[-1])), coarse[-1]] if coarse else ends
        return ends

    @cached_property
    def share_without_grid(self) -> float:
        """The share of the encoder's compute, 0..1, in layers that yield no feature with positions."""
        parts = self.called_children(self.root)
        whole = sum(self.trace.modules[part].macs for part in parts)
        return sum(map(self._macs_without_grid, parts)) / max(whole, 1)

    def _macs_without_grid(self, name: str) -> int:
        if name in self.outputs:
            return 0
        parts = self.called_children(name)
        return sum(map(self._macs_without_grid, parts)) if parts else self.trace.modules[name].macs

    @cached_property
    def other_end(self) -> FeatureSpec | None:
        """The end of the last stage in another reading, before or after a last convolution that widens.

        Authors of one and the same model differ in whether this convolution belongs to the stage (MobileNetV2 of
        torchvision and of timm, MobileViT of timm and of transformers), so that no structure decides it.
        """
        if not self.trunk or self.outputs[self.trunk[-1]].tensor != self.ends[-1].tensor:
            return None
        last = self.trunk[-1]
        if self._layer_count(last) == 1:
            before = self.trunk[-2] if len(self.trunk) > 1 and self._widens(last) else last
            is_block = self._layer_count(before) > 1 and self._near(before, [self.stride(last)])
            return self.outputs[before] if is_block else None
        later = [name for name in self._units_in_order() if self.outputs[name].order > self.outputs[last].order]
        return next((self.outputs[name] for name in later if self._widens_end(name, self.outputs[last])), None)

    def _widens_end(self, name: str, end: FeatureSpec) -> bool:
        """Whether a unit is one convolution that widens the end of the last stage, and no classifier."""
        reads_end = name in self.entries and self.entries[name].channels == end.channels
        return (
            reads_end
            and self._layer_count(name) == 1
            and self._widens(name)
            and is_near(self.outputs[name], end)
            and not self._has_width_of_output(name)
        )

    def _structural_ends(self) -> list[FeatureSpec]:
        ends: list[FeatureSpec] = []
        pooled: list[FeatureSpec] = []  # the last end, and what was pooled from it
        for name in self.trunk:
            if pooled and self._pools(name, pooled):
                pooled.append(self.outputs[name])
                continue
            same_stride = bool(ends) and self.stride(name) < SAME_STRIDE * (ends[-1].reduction or 1.0)
            before = None if same_stride else self._end_inside(name)
            if same_stride or (ends and before is not None and is_near(ends[-1], before)):
                ends.pop()
            ends += [self.outputs[name]] if before is None else [before, self.outputs[name]]
            pooled = [ends[-1]]
        return ends

    def _end_inside(self, name: str) -> FeatureSpec | None:
        """Return the end of the stage before a block, where the block goes on with that stage before its stride grows.

        Such a block begins with layers that are alike, have the block's own width already, and hold most of its
        compute. Only then comes its convolution with a stride (Xception with pre-activation).
        """
        branch = max(self.called_children(name), key=lambda child: self.module(child).macs, default=name)
        series = self._series_of(branch) if self.repeats(name) else []
        before = [part for part in series if _is_same_stride(self.stride(part), self.entry(name))]
        later = [part for part in series if part not in before]
        macs = sum(self.module(part).macs for part in before)
        if len(before) < 2 or not later or 2 * macs < self.module(name).macs:
            return None
        end = self.outputs[before[-1]]
        return end if end.channels == self.outputs[name].channels else None

    def _pools(self, name: str, pooled: Sequence[FeatureSpec]) -> bool:
        """Whether a unit only pools the end of a stage, or what was pooled from it, and so is no end itself."""
        reads = name in self.entries and self.entries[name].tensor in {spec.tensor for spec in pooled}
        return reads and not self.module(name).parameters and self.outputs[name].grid != pooled[0].grid

    @cached_property
    def decoder(self) -> list[FeatureSpec]:
        """The last feature at each stride after the encoder, first to last, without the layer that gives the output."""
        end = self.outputs[self.trunk[-1]].order if self.trunk else 0
        later = [name for name in self._units_in_order("") if self.outputs[name].order > end]
        units = [name for name in later if self.module(name).parameters and not self._is_of_root(name)]
        layers = dict.fromkeys(self._layer_of_decoder(name, units) for name in units)
        features = [spec for name in layers for spec in self._features_of_decoder(name)]
        widths = [spec.channels for spec in self.trace.specs if spec.tap.is_output]
        if features and features[-1].channels in widths and not features[-1].tap.items:
            features.pop()
        ends: list[FeatureSpec] = []
        for spec in features:
            if ends and is_near(spec, ends[-1]):
                ends.pop()
            ends.append(spec)
        return ends

    def _is_of_root(self, unit: str) -> bool:
        """Whether a unit is the encoder, where this is a part of the model, or lies in it."""
        return self.root != "" and f"{self.module(unit).name}.".startswith(f"{self.root}.")

    def _layer_of_decoder(self, unit: str, units: Sequence[str]) -> str:
        """Return the outermost module around a unit that holds nothing but units of its own stride, or the unit itself.

        A layer with most of the compute is opened, as if it were the model in a wrapper. What gives the output at
        another width stays open: the output is no feature, and the layers before it are.
        """
        end = self.module(self.trunk[-1]).last if self.trunk else 0
        widths = [spec.channels for spec in self.trace.specs if spec.tap.is_output]
        parts = self.module(unit).name.split(".")
        for name in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            if name not in self.outputs or self.trace.modules[name].first < end:
                continue
            inside = [self.outputs[other] for other in units if f"{other}.".startswith(f"{name}.")]
            inside = [spec for spec in inside if spec.grid != (1, 1)]
            one_width = len({spec.channels for spec in inside}) == 1
            one_stride = all(is_near(spec, self.outputs[name]) for spec in inside)
            if one_stride and (one_width or self.outputs[name].channels not in widths):
                return name
        return unit

    def _features_of_decoder(self, name: str) -> list[FeatureSpec]:
        """Return the features of a unit of a decoder: all of its outputs, of its parts, or its only one."""
        own = [spec for spec in self.trace.specs if spec.tap.module == self.module(name).name and spec.spatial]
        own = [spec for spec in own if spec.tap.port == "output" and spec.grid != (1, 1)]
        if any(not is_near(spec, own[0]) for spec in own):
            return own
        parts = [part for part in self.called_children(name) if part in self.outputs]
        parts = [part for part in parts if self.module(part).parameters and self.outputs[part].grid != (1, 1)]
        if any(not is_near(self.outputs[part], self.outputs[parts[0]]) for part in parts):
            return [spec for part in parts for spec in self._features_of_decoder(part)]
        return [self.outputs[name]]

    @cached_property
    def isotropic(self) -> bool:
        """Whether (nearly) all blocks work at one stride."""
        chain = self.chain
        if len(chain) < 2:
            return False
        last = chain[-1].reduction or 1.0
        return all((spec.reduction or 1.0) * SAME_STRIDE > last for spec in chain)

    @cached_property
    def chain(self) -> list[FeatureSpec]:
        ends = {spec.tap.module for spec in self.ends}
        names: list[str] = []
        single: list[str] = []
        for unit in filter(self.is_container, self.trunk):
            inside = self._blocks_in(unit)
            shrinks = self.stride(unit) > 2 * SAME_STRIDE * self.entry(unit)
            one_stride = all(_is_same_stride(self.entry(block), self.stride(unit)) for block in inside)
            if shrinks and not one_stride and (inside == [unit] or self.entry(unit) < SAME_STRIDE):
                continue  # a stem, not a stage with its patch embedding
            names += inside
            if inside == [unit] and not self.repeats(unit):
                single.append(unit)
        strides = [self.stride(name) for name in names if name not in single]
        chain = [name for name in names if name not in single or (name in ends and not self._near(name, strides))]
        return [self.outputs[name] for name in self._without_parts(chain)]

    def _without_parts(self, chain: Sequence[str]) -> list[str]:
        """Keep the last of the modules of a block, where each block is a list of unlike modules, which has no output.

        Such is `layers = ModuleList([ModuleList([attention, mlp]), ...])`.
        """
        blocks: dict[str, list[str]] = {}
        for name in chain:
            holder = _parent(self.module(name).name)
            is_block = holder != "" and not self.trace.modules[holder].calls and _numbered(holder)
            blocks.setdefault(holder if is_block else name, []).append(name)
        parts = set[str]()
        for names in blocks.values():
            unlike = len({self.module(name).kind for name in names}) == len(names)
            parts.update(names[:-1] if unlike else ())
        return [name for name in chain if name not in parts]

    def repeats(self, name: str) -> bool:
        """Whether a module is one of a series of blocks: numbered, called several times, or one of several alike."""
        if name not in self.trace.modules:  # a call
            return self._layer_count(name) > 1
        return _numbered(name) or name in self._series_of(_parent(name))

    def _series_of(self, holder: str) -> list[str]:
        """Return the children of a container that are alike, each with two layers at least, in order.

        Modules of one class are alike. Those of torch itself, such as Sequential, have to hold the same classes.
        """
        if holder not in self._series:
            children = [child for child in self.called_children(holder) if child in self.outputs]
            alike: dict[object, list[str]] = {}
            for child in children:
                if self.is_container(child) and self._layer_count(child) > 1:
                    alike.setdefault(self._form(child), []).append(child)
            self._series[holder] = [child for series in alike.values() if len(series) > 1 for child in series]
        return self._series[holder]

    def _form(self, name: str) -> object:
        module = self.trace.modules[name]
        kinds = tuple(self.trace.modules[child].kind for child in module.children if child in self.trace.modules)
        return (module.kind, kinds) if module.kind in _GENERIC else module.kind

    def _layer_count(self, name: str) -> int:
        return sum(self.trace.modules[part].macs > 0 for part in self._leaves(name))

    def _near(self, name: str, strides: Sequence[float]) -> bool:
        return any(_is_same_stride(self.stride(name), stride) for stride in strides)

    def _blocks_in(self, name: str, *, in_block: bool = False) -> list[str]:
        """Return the numbered blocks that a container consists of, opened recursively, or the container itself."""
        children = [child for child in self.called_children(name) if self.is_container(child)]
        repeated = [child for child in children if _numbered(child)]
        in_block = in_block or self._is_block(name)
        if not repeated and not in_block:
            repeated = self._series_of(self.module(name).name)
        for series in (repeated, *([child] for child in children if child not in repeated)):
            if (
                series
                and not self._side_by_side(series)
                and all(child in self.outputs for child in series)
                and self._has_form_of(series[-1], name)
            ):
                opened = [block for child in series for block in self._blocks_in(child, in_block=in_block)]
                if len(series) > 1 or opened != series or self._is_same_tensor(series[0], name):
                    return opened
        return [name]

    def _side_by_side(self, names: Sequence[str]) -> bool:
        """Whether several modules all read one feature, as experts and the branches of ASPP do: no series of blocks."""
        read = {self.entries[name].tensor for name in names if name in self.entries}
        return len(names) > 1 and all(name in self.entries for name in names) and len(read) == 1

    def _is_block(self, name: str) -> bool:
        """Whether a module is one of a series in which some have one form, or alone in a list: a stage has its own."""
        holder = _parent(name)
        numbered = [child for child in self.called_children(holder) if _numbered(child)]
        series = [child for child in numbered or self._series_of(holder) if child in self.outputs]
        alike = any(self._has_form_of(child, before) for before, child in pairwise(series))
        return name in series and (len(series) == 1 or alike)

    def _has_form_of(self, child: str, name: str) -> bool:
        """Whether a child's output has the grid and channels of its parent's, and so lies on the trunk."""
        if name not in self.outputs:
            return False
        child_output, parent_output = self.outputs[child], self.outputs[name]
        return self._is_same_tensor(child, name) or (child_output.grid, child_output.channels) == (
            parent_output.grid,
            parent_output.channels,
        )

    def _is_same_tensor(self, child: str, name: str) -> bool:
        """Whether a numbered child yields the same tensor as its parent, so that it can replace it."""
        return _numbered(child) and self.outputs[child].tensor == self.outputs[name].tensor

    def depth(self, spec: FeatureSpec) -> float:
        """Return the relative depth of a feature, 0..1, in blocks, or in tensors of the forward if there are none."""
        chain = self.chain
        if len(chain) > 1:
            return sum(block.order <= spec.order for block in chain) / len(chain)
        end = self.ends[-1].order if self.ends else self.trace.output.order
        return min((spec.order + 1) / (end + 1), 1.0)


def _unit(spec: FeatureSpec) -> str:
    """The name of the call that a feature belongs to."""
    return spec.tap.module if spec.tap.call is None else f"{spec.tap.module}#{spec.tap.call}"


def is_near(spec: FeatureSpec, other: FeatureSpec) -> bool:
    """Whether two features have one stride."""
    return _is_same_stride(spec.reduction or 1.0, other.reduction or 1.0)


def _is_same_stride(some: float, other: float) -> bool:
    return max(some, other) < SAME_STRIDE * min(some, other)


def _main(specs: Sequence[FeatureSpec]) -> FeatureSpec:
    """Return the main output of several: the first, unless a branch beside it carries more of the compute."""
    costs = [prod(spec.grid or ()) * spec.channels**2 for spec in specs]
    main = specs[costs.index(max(costs))]
    return main if main.grid != specs[0].grid and max(costs) > MAIN_BRANCH * costs[0] else specs[0]


def _holders(name: str) -> list[str]:
    """The modules around a module by its name, the innermost first, without the model."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
