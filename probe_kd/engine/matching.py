"""Match layers of a student to layers of a teacher, from two traces alone.

Nothing here knows an architecture by name. A model is read as a sequence of *units*, the modules that one would write
on one line of its diagram: from the root down, a container is opened as long as it spans several strides. A stage ends
with the last unit before the stride grows. A model of one stride, such as a plain vision transformer, has no such ends;
its blocks are counted instead.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from math import ceil, log2
from typing import Literal, TypeVar, get_args

from probe_kd.engine.patterns import expression, glob
from probe_kd.engine.spec import FeatureSpec, Layout, Pair, Tap, Trace
from probe_kd.errors import MatchError, TapError, demand, nearest

T = TypeVar("T")
Level = Literal["stage", "block"]

# Two strides are one stage unless they differ by more than this: convolutions without padding cut a few positions off.
SAME_STRIDE = 1.4
# A container that holds less of the model's compute is a stem, a head, or one block.
MAIN_SHARE = 0.25
# A container that holds more is the model in a wrapper.
WHOLE_SHARE = 0.9
# A tail that holds less than this prepares the classifier: a norm, a last convolution, a fusion of scales.
TAIL_SHARE = 0.01
ISOTROPIC_STAGES = 4


def stages(trace: Trace) -> list[FeatureSpec]:
    """Return the ends of the stages of a model, first to last. These are the usual layers for a hint.

    If the stride never grows after the stem, return four evenly spaced blocks, including the last.

    Raises MatchError if the model has no spatial features.
    """
    plan = _Anatomy(trace)
    ends = plan.ends
    if not ends:
        raise MatchError(
            f"{trace.model} at {'x'.join(map(str, trace.input_size))} yields no feature map or tokens of several "
            "positions that could be matched; give larger images or smaller patches, or name layers in `pairs` by hand"
        )
    chain = plan.chain
    if plan.isotropic and len(chain) > 1:
        return _spread(chain, min(ISOTROPIC_STAGES, len(chain)))
    return ends


def expand(trace: Trace, text: str, inside: str = "") -> tuple[Tap, ...]:
    """Return the taps that a name in a recipe stands for: a single tap, or all matches of a pattern in forward order.

    `glob:blocks.[0-3]` is a shell pattern for names of modules, in which `*` also matches dots. `re:layer[12]` is a
    regular expression of RE2 for a whole name. `@input` or `#1` after a pattern applies to each match. `inside` is the
    prefix of the searched modules, which the text leaves out.

    Raises TapError if the text is not a tap or pattern, if it matches no module, or if no match yields a tensor.
    """
    pattern = _PATTERN.fullmatch(text.strip())
    if pattern is None:
        tap = Tap.parse(text)
        tap = replace(tap, module=(inside + tap.module).removesuffix("."))
        trace[tap]
        return (tap,)
    matches = (glob if pattern["kind"] == "glob" else expression)(pattern["pattern"])
    names = [name.removeprefix(inside) for name in trace.modules if name.startswith(inside) and name != inside]
    matching = [name for name in names if matches(name)]
    if not matching:
        raise TapError(f"no module of {trace.model} matches {text!r}{nearest(pattern['pattern'], names)}")
    specs: list[FeatureSpec] = []
    silent: list[str] = []
    for name in matching:
        try:
            specs.append(trace[f"{Tap(inside + name)}{pattern['rest']}"])
        except TapError as refusal:
            silent.append(str(refusal))
    if not specs:
        raise TapError(f"{text!r} matches {listed(matching)}, and none of them yields a tensor there: {silent[0]}")
    return tuple(spec.tap for spec in sorted(specs, key=lambda spec: spec.order))


_PATTERN = re.compile(r"(?P<kind>glob|re):(?P<pattern>.*?)(?P<rest>(?:#[0-9]{1,9})?(?:@(?:input|output))?)", re.DOTALL)


def is_pattern(text: str) -> bool:
    return _PATTERN.fullmatch(text.strip()) is not None


def listed(names: Sequence[object], most: int = 12) -> str:
    """Join names for a message, and cut the list after `most` names."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def blocks(trace: Trace) -> list[FeatureSpec]:
    """Return the blocks that every stage repeats: residual, transformer or mixer blocks. A plain VGG has none."""
    return _Anatomy(trace).chain


def match(student: Trace, teacher: Trace, *, level: Level = "stage", num_pairs: int | None = None) -> tuple[Pair, ...]:
    """Pair layers of a student with layers of a teacher.

    The pairs follow the order of both models, and no layer is used twice. `reason` of each pair says why it was chosen.

    Stage ends are paired by stride, or by relative depth if a model has only one stride. `level="block"` also pairs
    the blocks between two stage ends by relative depth. `num_pairs` keeps fewer pairs, evenly spaced, including the
    deepest.

    Raises MatchError if a model has nothing to match, or if there are fewer pairs than requested.
    """
    if level not in get_args(Level):
        raise MatchError(f"level {level!r}: expected 'stage' or 'block'")
    for side, trace in (("student", student), ("teacher", teacher)):
        demand(trace, Trace, f"the {side}", MatchError, "a Trace, as trace(model) gives")
    student_anatomy, teacher_anatomy = _Anatomy(student), _Anatomy(teacher)
    pairs = _stage_pairs(student_anatomy, teacher_anatomy)
    if level == "block":
        pairs = _block_pairs(student_anatomy, teacher_anatomy, pairs)
    if num_pairs is None:
        return tuple(pairs)
    if not 1 <= num_pairs <= len(pairs):
        raise MatchError(
            f"num_pairs {num_pairs}: {student.model} and {teacher.model} make {len(pairs)} pairs of {level}s"
            + ("; level 'block' may make more" if level == "stage" and num_pairs > 0 else "")
        )
    return tuple(_spread(pairs, num_pairs))


# Three lines over 200: every reading of a trace (units, stages, blocks) is made of the one before it.
class _Anatomy:
    """A trace read as units, stages and blocks."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.outputs: dict[str, FeatureSpec] = {}
        self.entry: dict[str, float] = {}  # the stride at which a module is entered
        for spec in trace.specs:
            if spec.grid is None or spec.layout is Layout.OTHER:
                continue
            if spec.tap.port == "input":
                self.entry.setdefault(spec.tap.module, spec.reduction or 1.0)
            else:  # the first of several outputs: the others go to side branches
                self.outputs.setdefault(spec.tap.module, spec)
        self.trunk = self._trunk()

    def stride(self, name: str) -> float:
        return self.outputs[name].reduction or 1.0

    def called_children(self, name: str) -> list[str]:
        """Return the modules that run directly under a module, in order. The items of a ModuleList count as direct."""
        called: list[str] = []
        for child in self.trace.modules[name].children:
            if child not in self.trace.modules:  # a module that is shared has one name only
                continue
            called += [child] if self.trace.modules[child].calls else self.called_children(child)
        return sorted(called, key=lambda child: self.trace.modules[child].first)

    def is_container(self, name: str) -> bool:
        return any(self.trace.modules[child].parameters for child in self.called_children(name))

    def opens(self, name: str) -> bool:
        """Whether a container is a series of units, not one: its stride grows twice, or after its first part."""
        share = self.trace.modules[name].macs / max(self.trace.macs, 1)
        start, end = self.entry.get(name, 1.0), self.stride(name) if name in self.outputs else float("inf")
        children = [child for child in self.called_children(name) if child in self.outputs]
        parts = [child for child in children if self.is_container(child)] or children
        strides = [self.stride(child) for child in parts if self.stride(child) < end * SAME_STRIDE]  # no side branches
        grows = [new > old * SAME_STRIDE for old, new in pairwise([start, *strides])]
        grows_later = sum(grows) > 1 or any(grows[1:])
        return share > MAIN_SHARE and (grows_later or (share > WHOLE_SHARE and len(parts) > 1))

    def units(self, name: str = "") -> list[str]:
        units: list[str] = []
        for child in self.called_children(name):
            units += self.units(child) if self.opens(child) else [child]
        return units

    def _trunk(self) -> list[str]:
        """Return the units between the image and the classifier's pooling, in order. Their stride never shrinks."""
        trunk: list[str] = []
        units = [name for name in self.units() if name in self.outputs]
        for index, name in enumerate(units):
            module = self.trace.modules[name]
            if module.calls > 1 and not module.parameters:
                continue
            if self._pools_all(name, trunk):
                break
            if trunk and self.stride(name) * SAME_STRIDE < self.stride(trunk[-1]):
                if not self._restarts(units[index:], self.stride(trunk[-1])):
                    continue  # a side branch, a fusion of scales
                trunk = [other for other in trunk if self.stride(other) < self.stride(name) * SAME_STRIDE]
            trunk.append(name)
        return self._without_class_attention(self._without_tails(trunk))

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
        macs = sum(self.trace.modules[name].macs for name in units)
        return (
            any(self._near(name, [stride]) for name in units[1:] if self.is_container(name))
            or macs > self.trace.macs / 2
        )

    def _pools_all(self, name: str, before: Sequence[str]) -> bool:
        """Whether a pooling, or a convolution as large as the map, leaves only one position."""
        grid = self.outputs[name].grid
        if not before or grid != (1, 1) or self.outputs[before[-1]].grid == grid:
            return False
        return not self.trace.modules[name].parameters or self.stride(name) > 4 * SAME_STRIDE * self.stride(before[-1])

    def _is_tail(self, name: str, final: bool) -> bool:
        """Whether a unit is not a block: a norm, an activation, or one convolution that widens for the classifier.

        A single convolution in a series of stages counts as a stage, as the author of the model wrote it (MobileNetV3).
        """
        if self._is_series(name):
            return False
        small = final and self.trace.modules[name].macs < TAIL_SHARE * self.trace.macs
        return small or sum(self.trace.modules[part].macs > 0 for part in self._leaves(name)) < 2

    def _is_series(self, name: str) -> bool:
        """Whether this is a numbered series of numbered blocks."""
        return _numbered(name) and any(map(_numbered, self.called_children(name)))

    def _completes(self, name: str, block: str) -> bool:
        """Whether a unit is the norm or activation of a block that consists of bare convolutions (Xception)."""
        bare = all(self.trace.modules[part].macs for part in self._leaves(block))
        return bare and not self.trace.modules[name].macs

    def _leaves(self, name: str) -> list[str]:
        """Return the called modules in a module, itself included, that have no called children with parameters."""
        parts = [part for part in self.trace.modules if part == name or part.startswith(f"{name}.")]
        return [part for part in parts if self.trace.modules[part].calls and not self.is_container(part)]

    def _without_class_attention(self, trunk: list[str]) -> list[str]:
        """Drop the last blocks if they only add a class token (CaiT, Touvron et al. 2021): these are not a stage."""
        late = [name for name in trunk if self.outputs[name].prefix_tokens]
        early = [name for name in trunk if name not in late and self.is_container(name)]
        macs = {name: self.trace.modules[name].macs for name in trunk}
        few = sum(macs[name] for name in late) < 0.2 * sum(macs.values())
        apart = not {_parent(name) for name in late} & {_parent(name) for name in early}
        return [name for name in trunk if name not in late] if late and early and few and apart else trunk

    @cached_property
    def ends(self) -> list[FeatureSpec]:
        ends: list[FeatureSpec] = []
        for name in self.trunk:
            if ends and self.stride(name) < SAME_STRIDE * (ends[-1].reduction or 1.0):
                ends.pop()
            ends.append(self.outputs[name])
        return ends

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
            if self.stride(unit) > 2 * SAME_STRIDE * self.entry.get(unit, 1.0):
                continue  # a stem
            inside = self._blocks_in(unit)
            names += inside
            if inside == [unit] and not _numbered(unit):
                single.append(unit)
        strides = [self.stride(name) for name in names if name not in single]
        chain = [name for name in names if name not in single or (name in ends and not self._near(name, strides))]
        return [self.outputs[name] for name in chain]

    def _near(self, name: str, strides: Sequence[float]) -> bool:
        own = self.stride(name)
        return any(own < stride * SAME_STRIDE and stride < own * SAME_STRIDE for stride in strides)

    def _blocks_in(self, name: str) -> list[str]:
        """Return the numbered blocks that a container consists of, opened recursively, or the container itself."""
        children = [child for child in self.called_children(name) if self.is_container(child)]
        numbered = [child for child in children if _numbered(child)]
        for series in (numbered, *([child] for child in children if child not in numbered)):
            if series and all(child in self.outputs for child in series) and self._has_form_of(series[-1], name):
                opened = [block for child in series for block in self._blocks_in(child)]
                if len(series) > 1 or opened != series or self._is_same_tensor(series[0], name):
                    return opened
        return [name]

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
        return (spec.order + 1) / (self.trace.output.order + 1)


def _stage_pairs(student: _Anatomy, teacher: _Anatomy) -> list[Pair]:
    """Pair stage ends by stride if both models have several strides, otherwise by relative depth."""
    student_layers, teacher_layers = stages(student.trace), stages(teacher.trace)
    if student.isotropic and teacher.isotropic:
        count = min(len(student_layers), len(teacher_layers))
        return [
            _pair(student, teacher, a, b)
            for a, b in zip(_spread(student_layers, count), _spread(teacher_layers, count), strict=True)
        ]
    if student.isotropic:
        return _by_depth(student, teacher, student.chain, _above_stem(teacher_layers))
    if teacher.isotropic:
        return _by_depth(student, teacher, _above_stem(student_layers), teacher.chain)
    return _by_stride(student, teacher, _above_stem(student_layers), _above_stem(teacher_layers))


def _above_stem(ends: list[FeatureSpec]) -> list[FeatureSpec]:
    """Drop the features of stride 1 and 2, which hold little more than edges, if at least two others remain."""
    deep = [spec for spec in ends if (spec.reduction or 1.0) > 2 * SAME_STRIDE]
    return deep if len(deep) > 1 else ends


def _by_depth(
    student: _Anatomy, teacher: _Anatomy, student_layers: Sequence[FeatureSpec], teacher_layers: Sequence[FeatureSpec]
) -> list[Pair]:
    """Pair every layer of the shorter list with one of similar depth, and the last with the last."""
    return [
        _pair(student, teacher, student_layers[i], teacher_layers[j])
        for i, j in _align(
            [student.depth(spec) for spec in student_layers],
            [teacher.depth(spec) for spec in teacher_layers],
        )
    ]


def _by_stride(
    student: _Anatomy, teacher: _Anatomy, student_layers: Sequence[FeatureSpec], teacher_layers: Sequence[FeatureSpec]
) -> list[Pair]:
    """Pair layers of similar stride. Depth decides between layers of equal stride."""
    return [
        _pair(student, teacher, student_layers[i], teacher_layers[j])
        for i, j in _align(
            [log2(spec.reduction or 1.0) + student.depth(spec) / 2 for spec in student_layers],
            [log2(spec.reduction or 1.0) + teacher.depth(spec) / 2 for spec in teacher_layers],
        )
    ]


def _align(student_places: Sequence[float], teacher_places: Sequence[float]) -> list[tuple[int, int]]:
    """Return monotone, unique pairs of positions that use all of the shorter list and have the smallest total distance.

    The last is always paired with the last, because the classifier reads it.
    """
    if len(student_places) > len(teacher_places):
        return [(i, j) for j, i in _align(teacher_places, student_places)]
    short, long = len(student_places), len(teacher_places)
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {(0, j): (0.0, []) for j in range(long + 1)}
    for i in range(1, short + 1):
        for j in range(i, long + 1):
            cost, path = best[i - 1, j - 1]
            paired = (cost + abs(student_places[i - 1] - teacher_places[j - 1]), [*path, (i - 1, j - 1)])
            skipped = best.get((i, j - 1))
            best[i, j] = paired if skipped is None or paired[0] <= skipped[0] else skipped
    if short == 0:
        return []
    _, path = best[short - 1, long - 1]
    return [*path, (short - 1, long - 1)]


def _block_pairs(student: _Anatomy, teacher: _Anatomy, anchors: Sequence[Pair]) -> list[Pair]:
    """Pair the blocks between two paired stage ends by relative depth, and keep the pairs of ends."""
    pairs: list[Pair] = []
    low = (-1, -1)
    for anchor in anchors:
        ends = student.trace[anchor.student], teacher.trace[anchor.teacher]
        between = [
            [spec for spec in side.chain if start < spec.order < end.order and spec.tensor != end.tensor]
            for side, start, end in zip((student, teacher), low, ends, strict=True)
        ]
        shares = [[(index + 1) / (len(side) + 1) for index in range(len(side))] for side in between]
        inner = _align([*shares[0], 1.0], [*shares[1], 1.0])[:-1]
        pairs += [_pair(student, teacher, between[0][i], between[1][j]) for i, j in inner]
        pairs.append(anchor)
        low = (ends[0].order, ends[1].order)
    return pairs


def _pair(student: _Anatomy, teacher: _Anatomy, student_layer: FeatureSpec, teacher_layer: FeatureSpec) -> Pair:
    depths = f"depth {student.depth(student_layer):.0%} and {teacher.depth(teacher_layer):.0%}"
    student_stride, teacher_stride = student_layer.reduction or 1.0, teacher_layer.reduction or 1.0
    if student_stride < SAME_STRIDE * teacher_stride and teacher_stride < SAME_STRIDE * student_stride:
        strides = (
            f"stride {student_stride:.3g}"
            if f"{student_stride:.3g}" == f"{teacher_stride:.3g}"
            else f"stride {student_stride:.3g} and {teacher_stride:.3g}"
        )
        return Pair(student_layer.tap, teacher_layer.tap, reason=f"{strides}; {depths}")
    return Pair(
        student_layer.tap, teacher_layer.tap, reason=f"{depths}; stride {student_stride:.3g} and {teacher_stride:.3g}"
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` evenly spaced items, including the last."""
    return [items[ceil((index + 1) * len(items) / count) - 1] for index in range(count)]
