"""The facts of a traced model: which modules ran, what they read and yielded, what holds what, and what repeats."""

from collections.abc import Sequence
from functools import cached_property
from math import prod

from probe_kd.engine.anatomy.names import inside, is_numbered, parent_of
from probe_kd.engine.anatomy.strides import is_same_stride, stride_of
from probe_kd.engine.spec import FeatureSpec, Layout, ModuleSpec, Trace

# Classes that hold anything: two of one class need not be alike.
_GENERIC = ("Sequential", "ModuleList", "ModuleDict", "Module")
# One of several outputs of a module is its main one if a linear layer on it costs this many times more than on the
# first.
MAIN_BRANCH = 1.5


class Structure:
    """The modules of a trace, and the features that they read and yield. Only features with positions count.

    A unit is the name of a module. Of a module with parameters that runs several times, each call is a unit, as in
    `block#1`. What is looked up more than once is remembered; nothing else changes.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.modules = trace.modules
        self.outputs: dict[str, FeatureSpec] = {}
        self.entries: dict[str, FeatureSpec] = {}  # the feature with which a unit is entered
        self.calls: dict[str, dict[int, str]] = {}  # the units of a module that runs several times
        self._series: dict[str, list[str]] = {}
        self._called: dict[str, list[str]] = {}
        self._leaves: dict[str, list[str]] = {}
        self._features: dict[tuple[str, str], list[FeatureSpec]] = {}  # by module and port
        self._read_features()

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
        return self.modules[self.outputs[unit].tap.module if unit in self.outputs else unit]

    def features(self, name: str, port: str) -> list[FeatureSpec]:
        """All features at the input or output of a module."""
        return self._features.get((name, port), [])

    def stride(self, unit: str) -> float:
        return stride_of(self.outputs[unit])

    def entry(self, unit: str) -> float:
        """The stride at which a unit is entered."""
        return stride_of(self.entries[unit]) if unit in self.entries else 1.0

    def near(self, unit: str, strides: Sequence[float]) -> bool:
        """Whether a unit yields one of these strides."""
        return any(is_same_stride(self.stride(unit), stride) for stride in strides)

    def reads(self, unit: str, feature: FeatureSpec) -> bool:
        return unit in self.entries and self.entries[unit].tensor == feature.tensor

    def widens(self, unit: str) -> bool:
        return unit not in self.entries or self.outputs[unit].channels > self.entries[unit].channels

    def called_children(self, unit: str) -> list[str]:
        """Return the modules that run directly under a module, in order. The items of a ModuleList count as direct."""
        if unit not in self._called:
            called: list[str] = []
            for child in self.module(unit).children:
                if child not in self.modules:  # a module that is shared has one name only
                    continue
                called += [child] if self.modules[child].calls else self.called_children(child)
            self._called[unit] = sorted(called, key=lambda child: self.modules[child].first)
        return self._called[unit]

    def is_container(self, unit: str) -> bool:
        return any(self.modules[child].parameters for child in self.called_children(unit))

    def within(self, name: str) -> list[FeatureSpec]:
        """The outputs of a module and of all modules in it."""
        return [self.outputs[other] for other in inside(self.outputs, name)]

    def leaves(self, unit: str) -> list[str]:
        """Return the called modules in a module, itself included, that have no called children with parameters."""
        name = self.module(unit).name
        if name not in self._leaves:
            module = self.modules[name]
            own = [name] if module.calls and not self.is_container(name) else []
            parts = [self.leaves(child) for child in module.children if child in self.modules]
            self._leaves[name] = [*own, *(leaf for leaves in parts for leaf in leaves)]
        return self._leaves[name]

    def layer_count(self, unit: str) -> int:
        return sum(self.modules[part].macs > 0 for part in self.leaves(unit))

    def series_of(self, holder: str) -> list[str]:
        """Return the children of a container that are alike, each with two layers at least, in order.

        Modules of one class are alike. Those of torch itself, such as Sequential, have to hold the same classes.
        """
        if holder not in self._series:
            children = [child for child in self.called_children(holder) if child in self.outputs]
            alike: dict[object, list[str]] = {}
            for child in children:
                if self.is_container(child) and self.layer_count(child) > 1:
                    alike.setdefault(self._form(child), []).append(child)
            self._series[holder] = [child for series in alike.values() if len(series) > 1 for child in series]
        return self._series[holder]

    def holds_series(self, name: str) -> bool:
        return any(self.series_of(other) for other in inside(self.modules, name))

    def repeats(self, unit: str) -> bool:
        """Whether a unit is one of a series of blocks: numbered, called several times, or one of several alike."""
        if unit not in self.modules:  # a call
            return self.layer_count(unit) > 1
        return is_numbered(unit) or unit in self.series_of(parent_of(unit))

    def of_own_class(self, name: str) -> list[str]:
        """The modules around and in a module, itself included, that have its class and yield features."""
        kind = self.module(name).kind
        others = self._by_kind[kind] if name in self.outputs and kind not in _GENERIC else []
        prefix = f"{name}."
        return [other for other in others if f"{other}.".startswith(prefix) or prefix.startswith(f"{other}.")]

    @cached_property
    def _by_kind(self) -> dict[str, list[str]]:
        """The modules that yield features, by their class."""
        names: dict[str, list[str]] = {}
        for name in self.outputs:
            if name in self.modules:
                names.setdefault(self.modules[name].kind, []).append(name)
        return names

    def _form(self, name: str) -> object:
        module = self.modules[name]
        kinds = tuple(self.modules[child].kind for child in module.children if child in self.modules)
        return (module.kind, kinds) if module.kind in _GENERIC else module.kind


def _unit(spec: FeatureSpec) -> str:
    """The name of the call that a feature belongs to."""
    return spec.tap.module if spec.tap.call is None else f"{spec.tap.module}#{spec.tap.call}"


def _main(specs: Sequence[FeatureSpec]) -> FeatureSpec:
    """Return the main output of several: the first, unless a branch beside it carries more of the compute."""
    costs = [prod(spec.grid or ()) * spec.channels**2 for spec in specs]
    main = specs[costs.index(max(costs))]
    return main if main.grid != specs[0].grid and max(costs) > MAIN_BRANCH * costs[0] else specs[0]
