"""Match layers of a student to layers of a teacher, from two traces alone."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil, log2
from typing import Literal, TypeVar, get_args

from probe_kd.engine.anatomy.anatomy import Anatomy
from probe_kd.engine.anatomy.encoder import MAIN_SHARE
from probe_kd.engine.anatomy.strides import SAME_STRIDE, is_near, stride_of
from probe_kd.engine.patterns import expression, glob
from probe_kd.engine.spec import FeatureSpec, Layout, Pair, Tap, Trace
from probe_kd.errors import MatchError, MatchWarning, TapError, demand, nearest

T = TypeVar("T")
Level = Literal["stage", "block"]

ISOTROPIC_STAGES = 4
MOST_APART = 0.5  # of relative depth: more is told


def stages(trace: Trace) -> list[FeatureSpec]:
    """Return the ends of the stages of a model, first to last. These are the usual layers for a hint.

    If the stride never grows after the stem, return four evenly spaced blocks, including the last.

    Raises MatchError if the model has no spatial features.
    """
    return _stages(Anatomy(trace))


def _stages(plan: Anatomy) -> list[FeatureSpec]:
    ends, trace = plan.ends, plan.trace
    if not ends:
        raise MatchError(
            f"{trace.model} at {'x'.join(map(str, trace.input_size))} yields no feature map or tokens of several "
            f"positions that could be matched: {_what_was_seen(trace)}; {_what_would_help(trace)}"
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
    return Anatomy(trace).chain


def _what_was_seen(trace: Trace) -> str:
    """Say what the modules of a model yielded, and why nothing of it is a stage."""
    called = sum(module.calls > 0 for module in trace.modules.values())
    outputs = [spec for spec in trace.specs if spec.tap.port == "output"]
    kinds = Counter(_kind_of(spec) for spec in outputs)
    grids = {f"{spec.grid[0]}x{spec.grid[1]}" for spec in outputs if spec.grid is not None}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "no tensor"
    found = f", on grids of {', '.join(sorted(grids))}" if grids else ""
    return f"{called} modules ran and yielded {counts}{found}"


def _what_would_help(trace: Trace) -> str:
    """Advise on a model without stages: most often its images are too small, or stand in the batch as frames do."""
    outputs = [spec for spec in trace.specs if spec.tap.port == "output"]
    if 2 * sum(spec.layout is Layout.OTHER for spec in outputs) > len(outputs):
        return "match the module in it that reads single images"
    return "give larger images or smaller patches, or name layers in `pairs` by hand"


def _kind_of(spec: FeatureSpec) -> str:
    if spec.layout is Layout.NC:
        return "vectors (no positions)"
    if spec.layout is Layout.OTHER:
        return "tensors that are no features of single images (the batch is not their first axis)"
    if spec.grid is None:
        return f"{spec.layout} tokens in no grid"
    return f"{spec.layout} of one position" if spec.grid == (1, 1) else f"{spec.layout} on a grid, outside the encoder"


def match(
    student: Trace, teacher: Trace, *, level: Level = "stage", num_pairs: int | None = None, decoder: bool = False
) -> tuple[Pair, ...]:
    """Pair layers of a student with layers of a teacher.

    The pairs follow the order of both models, and no layer is used twice. `reason` of each pair says why it was chosen.

    Stage ends are paired by stride, or by relative depth if a model has only one stride. `level="block"` also pairs
    the blocks between two stage ends by relative depth. `num_pairs` keeps fewer pairs, evenly spaced, including the
    deepest. With `decoder`, the ends of the decoders' stages (of a U-Net, a feature pyramid) are paired by stride too.

    Warns with MatchWarning of what `doubts` says. Raises MatchError if a model has nothing to match, if there are fewer
    pairs than requested, or if a model has no decoder to pair.
    """
    sides = _anatomies(student, teacher, level)
    pairs = _find_pairs(*sides, level, num_pairs, decoder)
    for text in _doubts(pairs, *sides, complete=num_pairs is None):
        warnings.warn(text, MatchWarning, stacklevel=2)
    return pairs


def find_pairs(
    student: Trace, teacher: Trace, *, level: Level = "stage", num_pairs: int | None = None, decoder: bool = False
) -> tuple[Pair, ...]:
    """Return what `match` returns, without warnings, for those who show `doubts` themselves."""
    return _find_pairs(*_anatomies(student, teacher, level), level, num_pairs, decoder)


def _anatomies(student: Trace, teacher: Trace, level: Level) -> tuple[Anatomy, Anatomy]:
    if level not in get_args(Level):
        raise MatchError(f"level {level!r}: expected 'stage' or 'block'")
    for side, trace in (("student", student), ("teacher", teacher)):
        demand(trace, Trace, f"the {side}", MatchError, "a Trace, as trace(model) gives")
    return Anatomy(student), Anatomy(teacher)


def _find_pairs(
    student: Anatomy, teacher: Anatomy, level: Level, num_pairs: int | None, decoder: bool
) -> tuple[Pair, ...]:
    pairs = _stage_pairs(student, teacher)
    if level == "block":
        pairs = _block_pairs(student, teacher, pairs)
    of_decoder = _decoder_pairs(student, teacher) if decoder else []
    if num_pairs is None:
        return (*pairs, *of_decoder)
    if not 1 <= num_pairs <= len(pairs):
        raise MatchError(
            f"num_pairs {num_pairs}: {student.trace.model} and {teacher.trace.model} make {len(pairs)} pairs of "
            f"{level}s" + ("; level 'block' may make more" if level == "stage" and num_pairs > 0 else "")
        )
    return (*_spread(pairs, num_pairs), *of_decoder)


def doubts(pairs: Sequence[Pair], student: Trace, teacher: Trace, *, complete: bool = False) -> list[str]:
    """Say which pairs of layers can be compared, but are probably not what was meant.

    These are layers whose relative depths differ by more than half, the images themselves, and the model's output
    against a feature with positions. With `complete`, `pairs` are all that `match` found, and fewer of them than both
    models have stages are one more. A tap that a trace does not have is left out.
    """
    return _doubts(pairs, Anatomy(student), Anatomy(teacher), complete=complete)


def _doubts(pairs: Sequence[Pair], student: Anatomy, teacher: Anatomy, *, complete: bool) -> list[str]:
    texts: list[str] = []
    for pair in pairs:
        with suppress(TapError):
            texts += _doubts_of(pair, student, teacher)
    if complete:
        texts += [text for side in (student, teacher) for text in _without_grid(side)]
    if complete and pairs:
        counts = [len(_above_stem(_stages(side))) for side in (student, teacher)]
        if len(pairs) < min(counts):
            texts.append(
                f"{len(pairs)} pairs of {student.trace.model} and {teacher.trace.model}, which have {counts[0]} and "
                f"{counts[1]} stages; see the layers with `probe-kd inspect`, and name others in `pairs` by hand"
            )
    return texts


def _without_grid(side: Anatomy) -> Iterator[str]:
    """Say so if most of a model yields no positions, and its own output none that end a stage."""
    share = side.share_without_grid
    if share > MAIN_SHARE and not side.ends[-1].tap.is_output:
        yield (
            f"{share:.0%} of the compute of {side.trace.model} is in layers without positions (windows in the batch, "
            "groups or a selection of the tokens, vectors), and they are left out; see what the layers yield with "
            "`probe-kd inspect`"
        )


def _doubts_of(pair: Pair, student: Anatomy, teacher: Anatomy) -> Iterator[str]:
    specs = student.trace[pair.student.local], teacher.trace[pair.teacher.local]
    images = [_reads_the_images(spec, side.trace) for spec, side in zip(specs, (student, teacher), strict=True)]
    outputs = [spec.tensor == side.trace.output.tensor for spec, side in zip(specs, (student, teacher), strict=True)]
    for side, spec, other, is_image, is_output in zip(
        ("student", "teacher"), specs, reversed(specs), images, outputs, strict=True
    ):
        if is_image:
            yield f"pair {pair}: {side} tap '{spec.tap}' is the images themselves, and holds no feature"
        elif is_output and spec.layout is Layout.NC and other.spatial:
            yield f"pair {pair}: {side} tap '{spec.tap}' is the output of the model, and the other a feature map"
    if any(images) or any(outputs) or any(spec.layout is Layout.OTHER for spec in specs):
        return
    depths = student.depth(specs[0]), teacher.depth(specs[1])
    if abs(depths[0] - depths[1]) > MOST_APART:
        yield (
            f"pair {pair}: relative depths {depths[0]:.0%} and {depths[1]:.0%} differ by more than half; name a layer "
            "of similar depth in `pairs`"
        )


def _reads_the_images(spec: FeatureSpec, trace: Trace) -> bool:
    images = next((other for other in trace.specs if other.tap == Tap("", "input")), None)
    return images is not None and images.tensor == spec.tensor


def _stage_pairs(student: Anatomy, teacher: Anatomy) -> list[Pair]:
    """Pair stage ends by stride if both models have several strides, otherwise by relative depth."""
    student_layers, teacher_layers = _stages(student), _stages(teacher)
    if student.isotropic and teacher.isotropic:
        count = min(len(student_layers), len(teacher_layers))
        return [
            _pair(student, teacher, a, b)
            for a, b in zip(_spread(student_layers, count), _spread(teacher_layers, count), strict=True)
        ]
    if student.isotropic:
        return _nearest(student, teacher, student.chain, _above_stem(teacher_layers), Anatomy.depth)
    if teacher.isotropic:
        return _nearest(student, teacher, _above_stem(student_layers), teacher.chain, Anatomy.depth)
    return _nearest(student, teacher, _above_stem(student_layers), _above_stem(teacher_layers), _stride_then_depth)


def _above_stem(ends: list[FeatureSpec]) -> list[FeatureSpec]:
    """Drop the features of stride 1 and 2, which hold little more than edges, if at least two others remain."""
    deep = [spec for spec in ends if stride_of(spec) > 2 * SAME_STRIDE]
    return deep if len(deep) > 1 else ends


def _stride_then_depth(side: Anatomy, spec: FeatureSpec) -> float:
    """The place of a layer by its stride. Depth decides between layers of equal stride."""
    return log2(stride_of(spec)) + side.depth(spec) / 2


def _nearest(
    student: Anatomy,
    teacher: Anatomy,
    student_layers: Sequence[FeatureSpec],
    teacher_layers: Sequence[FeatureSpec],
    place: Callable[[Anatomy, FeatureSpec], float],
) -> list[Pair]:
    """Pair every layer of the shorter list with one at a similar place, and the last with the last."""
    student_places = [place(student, spec) for spec in student_layers]
    teacher_places = [place(teacher, spec) for spec in teacher_layers]
    return [
        _pair(student, teacher, student_layers[i], teacher_layers[j]) for i, j in _align(student_places, teacher_places)
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


def _decoder_pairs(student: Anatomy, teacher: Anatomy) -> list[Pair]:
    """Pair the stages of the decoders by stride. Raises MatchError if a model has none."""
    for side in (student, teacher):
        if not side.decoder:
            raise MatchError(f"{side.trace.model} has no decoder to pair: no layer after its stages yields a feature")
    return _nearest(student, teacher, student.decoder, teacher.decoder, lambda _, spec: -log2(stride_of(spec)))


def _block_pairs(student: Anatomy, teacher: Anatomy, anchors: Sequence[Pair]) -> list[Pair]:
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


def _pair(student: Anatomy, teacher: Anatomy, student_layer: FeatureSpec, teacher_layer: FeatureSpec) -> Pair:
    depths = f"depth {student.depth(student_layer):.0%} and {teacher.depth(teacher_layer):.0%}"
    others = _other_end(student, student_layer, "student") + _other_end(teacher, teacher_layer, "teacher")
    student_stride, teacher_stride = stride_of(student_layer), stride_of(teacher_layer)
    both = f"stride {student_stride:.3g} and {teacher_stride:.3g}"
    if not is_near(student_layer, teacher_layer):
        return Pair(student_layer.tap, teacher_layer.tap, reason=f"{depths}; {both}{others}")
    if f"{student_stride:.3g}" == f"{teacher_stride:.3g}":
        both = f"stride {student_stride:.3g}"
    return Pair(student_layer.tap, teacher_layer.tap, reason=f"{both}; {depths}{others}")


def _other_end(anatomy: Anatomy, spec: FeatureSpec, side: str) -> str:
    """Return the end of a reason that names the last stage's end in another reading."""
    other = anatomy.other_end if spec.tensor == anatomy.ends[-1].tensor else None
    if other is None:
        return ""
    place = "its last convolution" if other.order > spec.order else "before its last convolution"
    return f"; or '{other.tap}' of the {side}, {place}"


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` evenly spaced items, including the last."""
    return [items[ceil((index + 1) * len(items) / count) - 1] for index in range(count)]
