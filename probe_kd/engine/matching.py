"""Which layer of the student learns from which layer of the teacher, found from two traces alone.

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
    """The ends of the stages, first to last: what a person would choose for a hint.

    Where the stride never grows after the stem, four blocks at equal distances, the last block among them.

    Raises MatchError for a model without spatial features.
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
    """The taps of one model that a name in a recipe means: one, or all that a pattern finds, in the order they come.

    `glob:blocks.[0-3]` is a shell's pattern over the names of modules, in which `*` also passes dots, and
    `re:layer[12]` a regular expression of RE2 for a whole name; `@input` or `#1` after either goes to each. `inside` is
    the prefix of the modules in question, which the text leaves out.

    Raises TapError for what is no tap or pattern, and where it finds no module, or none that yields a tensor there.
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        tap = Tap.parse(text)
        tap = replace(tap, module=(inside + tap.module).removesuffix("."))
        trace[tap]
        return (tap,)
    fits = (glob if found["kind"] == "glob" else expression)(found["pattern"])
    names = [name.removeprefix(inside) for name in trace.modules if name.startswith(inside) and name != inside]
    named = [name for name in names if fits(name)]
    if not named:
        raise TapError(f"no module of {trace.model} matches {text!r}{nearest(found['pattern'], names)}")
    seen: list[FeatureSpec] = []
    silent: list[str] = []
    for name in named:
        try:
            seen.append(trace[f"{inside}{name}{found['rest']}"])
        except TapError as refusal:
            silent.append(str(refusal))
    if not seen:
        raise TapError(f"{text!r} matches {listed(named)}, and none of them yields a tensor there: {silent[0]}")
    return tuple(spec.tap for spec in sorted(seen, key=lambda spec: spec.order))


_PATTERN = re.compile(r"(?P<kind>glob|re):(?P<pattern>.*?)(?P<rest>(?:#[0-9]{1,9})?(?:@(?:input|output))?)", re.DOTALL)


def is_pattern(text: str) -> bool:
    return _PATTERN.fullmatch(text.strip()) is not None


def listed(names: Sequence[object], most: int = 12) -> str:
    """Names in a message, which no pattern makes endless."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def blocks(trace: Trace) -> list[FeatureSpec]:
    """The blocks that are repeated in every stage: residual, transformer, mixer blocks; none in a plain VGG."""
    return _Anatomy(trace).chain


def match(student: Trace, teacher: Trace, *, level: Level = "stage", num_pairs: int | None = None) -> tuple[Pair, ...]:
    """Pair layers of a student with layers of a teacher. Pairs are in the order of both models, no layer is used
    twice, and each pair has its reason.

    Stage ends are paired by stride, or by relative depth if a model has only one stride. `level="block"` also pairs
    the blocks between two stage ends by relative depth. `num_pairs` keeps fewer pairs, evenly spaced, including the
    deepest.

    Raises MatchError if a model has nothing to match, or if there are fewer pairs than requested.
    """
    if level not in get_args(Level):
        raise MatchError(f"level {level!r}: expected 'stage' or 'block'")
    for side, given in (("student", student), ("teacher", teacher)):
        demand(given, Trace, f"the {side}", MatchError, "a Trace, as trace(model) gives")
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
        """What runs directly under a module, in order; a ModuleList does not run, its items do."""
        found: list[str] = []
        for child in self.trace.modules[name].children:
            if child not in self.trace.modules:  # a module that is shared has one name only
                continue
            found += [child] if self.trace.modules[child].calls else self.called_children(child)
        return sorted(found, key=lambda child: self.trace.modules[child].first)

    def is_container(self, name: str) -> bool:
        return any(self.trace.modules[child].parameters for child in self.called_children(name))

    def opens(self, name: str) -> bool:
        """Whether a container is no unit but a series of them: its stride grows twice, or after its first part."""
        share = self.trace.modules[name].macs / max(self.trace.macs, 1)
        start, end = self.entry.get(name, 1.0), self.stride(name) if name in self.outputs else float("inf")
        children = [child for child in self.called_children(name) if child in self.outputs]
        parts = [child for child in children if self.is_container(child)] or children
        strides = [self.stride(child) for child in parts if self.stride(child) < end * SAME_STRIDE]  # no side branches
        grows = [new > old * SAME_STRIDE for old, new in pairwise([start, *strides])]
        grows_later = sum(grows) > 1 or any(grows[1:])
        return share > MAIN_SHARE and (grows_later or (share > WHOLE_SHARE and len(parts) > 1))

    def units(self, name: str = "") -> list[str]:
        found: list[str] = []
        for child in self.called_children(name):
            found += self.units(child) if self.opens(child) else [child]
        return found

    def _trunk(self) -> list[str]:
        """The units on the way from the image to the classifier's pooling, in order, the stride never shrinking."""
        found: list[str] = []
        units = [name for name in self.units() if name in self.outputs]
        for index, name in enumerate(units):
            module = self.trace.modules[name]
            if module.calls > 1 and not module.parameters:
                continue
            if self._pools_all(name, found):
                break
            if found and self.stride(name) * SAME_STRIDE < self.stride(found[-1]):
                if not self._begins_anew(units[index:], self.stride(found[-1])):
                    continue  # a side branch, a fusion of scales
                found = [other for other in found if self.stride(other) < self.stride(name) * SAME_STRIDE]
            found.append(name)
        return self._without_class_attention(self._without_tails(found))

    def _without_tails(self, units: Sequence[str]) -> list[str]:
        """Every stage up to its last block; a stem has none, and stays as it is."""
        kept: list[str] = []
        for group in self._by_stage(units):
            final = group[-1] == units[-1]
            blocks = [index for index, name in enumerate(group) if not self._is_tail(name, final)]
            end = blocks[-1] + 1 if blocks else len(group)
            while end < len(group) and self._completes(group[end], group[blocks[-1]]):
                end += 1
            kept += group[:end]
        return kept

    def _by_stage(self, units: Sequence[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        for name in units:
            if groups and self.stride(name) < SAME_STRIDE * self.stride(groups[-1][-1]):
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def _begins_anew(self, rest: Sequence[str], stride: float) -> bool:
        """Whether a second pass over the strides reaches the old one again (HRNet), or is most of the model."""
        macs = sum(self.trace.modules[name].macs for name in rest)
        return (
            any(self._near(name, [stride]) for name in rest[1:] if self.is_container(name))
            or macs > self.trace.macs / 2
        )

    def _pools_all(self, name: str, before: Sequence[str]) -> bool:
        """Whether only one position is left, by a pooling or by a convolution as large as the map."""
        grid = self.outputs[name].grid
        if not before or grid != (1, 1) or self.outputs[before[-1]].grid == grid:
            return False
        return not self.trace.modules[name].parameters or self.stride(name) > 4 * SAME_STRIDE * self.stride(before[-1])

    def _is_tail(self, name: str, final: bool) -> bool:
        """Whether a unit is no block: a norm, an activation, one convolution that widens for the classifier.

        One convolution in a series of stages is a stage to the model's author (MobileNetV3), so to us.
        """
        if self._is_series(name):
            return False
        small = final and self.trace.modules[name].macs < TAIL_SHARE * self.trace.macs
        return small or sum(self.trace.modules[part].macs > 0 for part in self._leaves(name)) < 2

    def _is_series(self, name: str) -> bool:
        """Whether this is a numbered series of numbered blocks."""
        return _numbered(name) and any(map(_numbered, self.called_children(name)))

    def _completes(self, name: str, block: str) -> bool:
        """Whether a norm or an activation belongs to the bare convolutions before it, which have none (Xception)."""
        bare = all(self.trace.modules[part].macs for part in self._leaves(block))
        return bare and not self.trace.modules[name].macs

    def _leaves(self, name: str) -> list[str]:
        """The layers in a module that have parameters or work to do, or the module itself."""
        parts = [part for part in self.trace.modules if part == name or part.startswith(f"{name}.")]
        return [part for part in parts if self.trace.modules[part].calls and not self.is_container(part)]

    def _without_class_attention(self, trunk: list[str]) -> list[str]:
        """Last blocks that add a class token and change nothing else (CaiT, Touvron et al. 2021) are no stage."""
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
        found: list[str] = []
        lone: list[str] = []
        for unit in filter(self.is_container, self.trunk):
            if self.stride(unit) > 2 * SAME_STRIDE * self.entry.get(unit, 1.0):
                continue  # a stem
            inside = self._blocks_in(unit)
            found += inside
            if inside == [unit] and not _numbered(unit):
                lone.append(unit)
        strides = [self.stride(name) for name in found if name not in lone]
        kept = [name for name in found if name not in lone or (name in ends and not self._near(name, strides))]
        return [self.outputs[name] for name in kept]

    def _near(self, name: str, strides: Sequence[float]) -> bool:
        own = self.stride(name)
        return any(own < stride * SAME_STRIDE and stride < own * SAME_STRIDE for stride in strides)

    def _blocks_in(self, name: str) -> list[str]:
        """The numbered containers of which `name` is a series, opened as far as that goes; or `name` itself."""
        children = [child for child in self.called_children(name) if self.is_container(child)]
        numbered = [child for child in children if _numbered(child)]
        for series in (numbered, *([child] for child in children if child not in numbered)):
            if series and all(child in self.outputs for child in series) and self._ends_as(series[-1], name):
                opened = [block for child in series for block in self._blocks_in(child)]
                if len(series) > 1 or opened != series or self._is(series[0], name):
                    return opened
        return [name]

    def _ends_as(self, child: str, name: str) -> bool:
        """Whether a child's output has the form of its parent's: it is the trunk there, not a branch."""
        if name not in self.outputs:
            return False
        own, whole = self.outputs[child], self.outputs[name]
        return self._is(child, name) or (own.grid, own.channels) == (whole.grid, whole.channels)

    def _is(self, child: str, name: str) -> bool:
        """Whether a numbered child yields the very tensor of its parent, so that it stands for it."""
        return _numbered(child) and self.outputs[child].tensor == self.outputs[name].tensor

    def depth(self, spec: FeatureSpec) -> float:
        """How deep a feature lies, 0..1, counted in blocks; in compute where there are none."""
        chain = self.chain
        if len(chain) > 1:
            return sum(block.order <= spec.order for block in chain) / len(chain)
        return (spec.order + 1) / (self.trace.output.order + 1)


def _stage_pairs(student: _Anatomy, teacher: _Anatomy) -> list[Pair]:
    """By stride where both have several, otherwise by relative depth."""
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
    """Without the features of stride 1 and 2, which hold little more than edges, where enough others remain."""
    deep = [spec for spec in ends if (spec.reduction or 1.0) > 2 * SAME_STRIDE]
    return deep if len(deep) > 1 else ends


def _by_depth(
    student: _Anatomy, teacher: _Anatomy, student_layers: Sequence[FeatureSpec], teacher_layers: Sequence[FeatureSpec]
) -> list[Pair]:
    """Every layer of the shorter list with the one of the longer that lies as deep, the last with the last."""
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
    """Equal strides first; what is left between two such pairs, by the nearest stride."""
    return [
        _pair(student, teacher, student_layers[i], teacher_layers[j])
        for i, j in _align(
            [log2(spec.reduction or 1.0) + student.depth(spec) / 2 for spec in student_layers],
            [log2(spec.reduction or 1.0) + teacher.depth(spec) / 2 for spec in teacher_layers],
        )
    ]


def _align(student_places: Sequence[float], teacher_places: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs of positions, monotone and unique, that use all of the shorter list and differ least in sum.

    The last is always paired with the last: it is what the classifier sees.
    """
    if len(student_places) > len(teacher_places):
        return [(i, j) for j, i in _align(teacher_places, student_places)]
    short, long = len(student_places), len(teacher_places)
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {(0, j): (0.0, []) for j in range(long + 1)}
    for i in range(1, short + 1):
        for j in range(i, long + 1):
            cost, path = best[i - 1, j - 1]
            taken = (cost + abs(student_places[i - 1] - teacher_places[j - 1]), [*path, (i - 1, j - 1)])
            left_out = best.get((i, j - 1))
            best[i, j] = taken if left_out is None or taken[0] <= left_out[0] else left_out
    if short == 0:
        return []
    _, path = best[short - 1, long - 1]
    return [*path, (short - 1, long - 1)]


def _block_pairs(student: _Anatomy, teacher: _Anatomy, anchors: Sequence[Pair]) -> list[Pair]:
    """The blocks between two paired stage ends by relative depth, and the ends themselves."""
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
    own, other = student_layer.reduction or 1.0, teacher_layer.reduction or 1.0
    if own < SAME_STRIDE * other and other < SAME_STRIDE * own:
        strides = f"stride {own:.3g}" if f"{own:.3g}" == f"{other:.3g}" else f"stride {own:.3g} and {other:.3g}"
        return Pair(student_layer.tap, teacher_layer.tap, reason=f"{strides}; {depths}")
    return Pair(student_layer.tap, teacher_layer.tap, reason=f"{depths}; stride {own:.3g} and {other:.3g}")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many of them at equal distances, the last one included."""
    return [items[ceil((index + 1) * len(items) / count) - 1] for index in range(count)]
