"""`pairs`: which layers of the student learn from which layers of the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from probe_kd.engine.matching import expand, is_pattern, listed, match
from probe_kd.engine.spec import Pair, Tap, Trace
from probe_kd.errors import TapError
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.recipe.keys import AutoPairs, PairOptions, Recipe
from probe_kd.recipe.sections.mistakes import Mistake, noting
from probe_kd.recipe.sections.models import Models
from probe_kd.recipe.yaml_tree import KeyPath


@dataclass(frozen=True)
class Expansion:
    """A pair of patterns, and the pairs of layers that it matches."""

    student: str
    teacher: str
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return f"{self.student or 'output'}: {self.teacher or 'output'} is {', '.join(map(str, self.pairs))}"


@dataclass(frozen=True)
class Paired:
    """The pairs. None if they could not be determined, so that a loss without pairs is no further mistake.

    `lines` maps each line of `pairs` to its pairs. `unknown` contains the pairs with layers that do not exist.
    """

    pairs: tuple[Pair, ...] | None = ()
    lines: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    unknown: frozenset[Pair] = frozenset()

    @property
    def compared(self) -> list[Pair] | None:
        """The pairs that losses read. A pair of weight 0 is only measured."""
        return None if self.pairs is None else [pair for pair in self.pairs if pair.weight]

    def line_of(self, comparison: Comparison) -> KeyPath:
        """The line of `pairs` that sets the adapter of a comparison; empty if only the loss does."""
        pair = comparison.pairs[-1]
        for key, line in self.lines.items():
            if any(own.adapter and (own.student, own.teacher) == (pair.student, pair.teacher) for own in line):
                return "pairs", key
        return ()


def find_pairs(recipe: Recipe, models: Models, grown: Trace | None) -> tuple[Paired, list[Mistake]]:
    options, student, teacher = recipe.pairs, models.student, models.teacher
    if not options:
        return Paired(), []
    mistakes: list[Mistake] = []
    if recipe.teacher is None:
        mistakes.append((("pairs",), "there is no `teacher:` with layers to pair"))
    if student is None or teacher is None:
        return Paired(None), mistakes
    if isinstance(options, AutoPairs):
        with noting(mistakes, "pairs"):
            pairs = match(student, teacher, level=options.level, num_pairs=options.num_pairs)
            return Paired(pairs if grown is None else _above_the_cut(pairs, grown)), mistakes
        return Paired(None), mistakes
    lines: dict[str, list[Pair]] = {}
    unknown = set[Pair]()
    for name, value in options.items():
        pair_options = value if isinstance(value, PairOptions) else PairOptions(teacher=value)
        lines[name], missing, more = _read_line(name, pair_options, student, teacher, grown)
        unknown |= {*lines[name]} if missing else set()
        mistakes += more
    pairs = tuple(pair for line in lines.values() for pair in line)
    return Paired(pairs or None, lines, frozenset(unknown)), mistakes + list(_in_two_pairs(lines))


def _in_two_pairs(lines: Mapping[str, Sequence[Pair]]) -> Iterator[Mistake]:
    line_of: dict[Tap, str] = {}
    for name, line in lines.items():
        for pair in line:
            if pair.student in line_of:
                message = f"{str(pair.student)!r} is in two pairs: `{line_of[pair.student]}` has it too"
                yield ("pairs", name), message
            line_of.setdefault(pair.student, name)


def _read_line(
    name: str, options: PairOptions, student: Trace, teacher: Trace, grown: Trace | None
) -> tuple[list[Pair], bool, list[Mistake]]:
    """The pairs of one line of `pairs`, whether layers are missing, and the mistakes in the line."""
    mistakes: list[Mistake] = []
    taps_of_sides: list[Sequence[Tap]] = []
    sides = ((grown or student, name, "body." if grown else ""), (teacher, options.teacher, ""))
    for trace_, text, prefix in sides:
        with noting(mistakes, "pairs", name):
            taps = expand(trace_, text, prefix)
            present = [tap for tap in taps if not (grown and prefix and _is_idle(grown, tap))]
            if not present:
                raise TapError(f"{name!r}: the graft puts the teacher's layers in the place of these")
            taps_of_sides.append(present)
    keywords: dict[str, Any] = {"weight": options.weight, "adapter": options.adapter}
    if len(taps_of_sides) < 2:  # a loss that names it is no second mistake
        with suppress(TapError):
            pair = Pair(Tap.parse(name), Tap.parse(options.teacher), **keywords)
            return [_in_body(pair) if grown else pair], True, mistakes
        return [], True, mistakes
    if len(taps_of_sides[0]) == len(taps_of_sides[1]):
        return [Pair(*taps, **keywords) for taps in zip(*taps_of_sides, strict=True)], False, mistakes
    texts = zip((name, options.teacher), taps_of_sides, strict=True)
    counts = "; and ".join(f"{text!r} finds {len(taps)}: {listed(taps)}" for text, taps in texts)
    message = f"both sides of a pair have to find equally many layers; {counts}"
    return [], False, [*mistakes, (("pairs", name), message)]


def check_use(recipe: Recipe, paired: Paired, stages: Sequence[Sequence[Objective]]) -> list[Mistake]:
    """Check that a loss compares each written pair, and that the pair's adapter keys apply to this loss."""
    if sum(map(len, stages)) < sum(len(stage.losses) for stage in recipe.stages):
        return []  # a loss with mistakes might compare them
    objectives = [objective for stage in stages for objective in stage]
    mistakes: list[Mistake] = []
    for name, line in paired.lines.items():
        users = [
            objective
            for objective in objectives
            if any({*line} & {*comparison.pairs} for comparison in objective.comparisons)
        ]
        if line and line[0].weight and not users:
            message = f"no loss compares {line[0]}; take it out, or write `weight: 0` to have it measured only"
            mistakes.append((("pairs", name), message))
        adaptable = set[str]().union(*(objective.adaptable for objective in users))
        for key in line[0].adapter if line and users else ():
            if key not in adaptable:
                names = ", ".join(f"`{loss}`" for loss in dict.fromkeys(objective.name for objective in users))
                message = f"`{key}` means nothing to the losses that compare this pair ({names}); leave it out"
                mistakes.append((("pairs", name, key), message))
    return mistakes


def expansions(recipe: Recipe, paired: Paired) -> Iterator[Expansion]:
    for name, line in paired.lines.items():
        value = recipe.pairs[name] if isinstance(recipe.pairs, dict) else name
        teacher = value.teacher if isinstance(value, PairOptions) else value
        if is_pattern(name) or is_pattern(teacher):
            yield Expansion(name, teacher, tuple(line))


def _is_idle(grown: Trace, tap: Tap) -> bool:
    """Whether the graft replaced this layer of the student, whose work the teacher's layers do."""
    return grown.modules[tap.module].kind == "Idle"


def _in_body(pair: Pair) -> Pair:
    return replace(pair, student=replace(pair.student, module=f"body.{pair.student.module}"))


def _above_the_cut(pairs: Sequence[Pair], grown: Trace) -> tuple[Pair, ...]:
    """The pairs of the plain student whose layers the graft keeps, with their names in the graft."""
    moved = [_in_body(pair) for pair in pairs]
    kinds = {name: module.kind for name, module in grown.modules.items()}
    return tuple(pair for pair in moved if kinds.get(pair.student.module, "Idle") != "Idle")
