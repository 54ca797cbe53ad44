"""`pairs`: which layers of the student learn from which layers of the teacher."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from probe_kd.engine.matching import expand, is_pattern, listed, match
from probe_kd.engine.spec import Pair, Tap, Trace, Traces
from probe_kd.errors import TapError
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.recipe.keys import AutoPairs, PairOptions, Recipe, all_pairs
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

    `lines` maps the place of each entry of `pairs` to its pairs: the student's layer, and an index if its value is a
    list. `unknown` contains the pairs with layers that do not exist.
    """

    pairs: tuple[Pair, ...] | None = ()
    lines: Mapping[KeyPath, Sequence[Pair]] = field(default_factory=dict)
    unknown: frozenset[Pair] = frozenset()

    @property
    def compared(self) -> list[Pair] | None:
        """The pairs that losses read. A pair of weight 0 is only measured."""
        return None if self.pairs is None else [pair for pair in self.pairs if pair.weight]

    def line_of(self, comparison: Comparison) -> KeyPath:
        """The line of `pairs` that sets the adapter of a comparison; empty if only the loss does."""
        pair = comparison.pairs[-1]
        for place, line in self.lines.items():
            if any(own.adapter and (own.student, own.teacher) == (pair.student, pair.teacher) for own in line):
                return ("pairs", *place)
        return ()


def find_pairs(recipe: Recipe, models: Models, grown: Trace | None) -> tuple[Paired, list[Mistake]]:
    options, student, teachers = recipe.pairs, models.student, models.traces
    if not options:
        return Paired(), []
    mistakes: list[Mistake] = []
    if not recipe.teachers_by_name:
        mistakes.append((("pairs",), "there is no `teacher:` with layers to pair"))
    if student is None or teachers is None:
        return Paired(None), mistakes
    if isinstance(options, AutoPairs):
        with noting(mistakes, "pairs"):
            return Paired(_by_student(_match_all(options, student, teachers, grown))), mistakes
        return Paired(None), mistakes
    lines: dict[KeyPath, list[Pair]] = {}
    unknown = set[Pair]()
    for name, value in options.items():
        for index, pair_options in enumerate(all_pairs(value)):
            place: KeyPath = (name, index) if isinstance(value, list) else (name,)
            lines[place], missing, more = _read_line(place, pair_options, student, teachers, grown)
            unknown |= {*lines[place]} if missing else set()
            mistakes += more
    pairs = _by_student(pair for line in lines.values() for pair in line)
    return Paired(pairs or None, lines, frozenset(unknown)), mistakes + list(_in_two_pairs(lines))


def _by_student(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs in the order of the resolved recipe, which lists the teachers' layers of each layer of the student.

    The adapters of a run are saved by their number, and read with the resolved recipe.
    """
    of_student: dict[Tap, list[Pair]] = {}
    for pair in pairs:
        of_student.setdefault(pair.student, []).append(pair)
    return tuple(pair for own_pairs in of_student.values() for pair in own_pairs)


def _match_all(options: AutoPairs, student: Trace, teachers: Traces, grown: Trace | None) -> Iterator[Pair]:
    """The pairs that `match` finds with each teacher. Raises MatchError."""
    for name, trace_ in teachers.by_model.items():
        pairs = match(student, trace_, level=options.level, num_pairs=options.num_pairs)
        pairs = tuple(replace(pair, teacher=replace(pair.teacher, model=name)) for pair in pairs)
        yield from pairs if grown is None else _above_the_cut(pairs, grown)


def _in_two_pairs(lines: Mapping[KeyPath, Sequence[Pair]]) -> Iterator[Mistake]:
    """One layer of the student may learn from several teachers, but from one layer of each."""
    line_of: dict[tuple[Tap, str], KeyPath] = {}
    for place, line in lines.items():
        for pair in line:
            key = pair.student, pair.teacher.model
            if key in line_of:
                other = f"`{line_of[key][0]}`" if line_of[key][0] != place[0] else "the same line"
                of_teacher = f" with {key[1]}" if key[1] else ""
                yield ("pairs", *place), f"{str(pair.student)!r} is in two pairs{of_teacher}: {other} has it too"
            line_of.setdefault(key, place)


def _read_line(
    place: KeyPath, options: PairOptions, student: Trace, teachers: Traces, grown: Trace | None
) -> tuple[list[Pair], bool, list[Mistake]]:
    """The pairs of one line of `pairs`, whether layers are missing, and the mistakes in the line."""
    mistakes: list[Mistake] = []
    taps_of_sides: list[Sequence[Tap]] = []
    name = str(place[0])
    with noting(mistakes, "pairs", *place):
        taps = expand(grown or student, name, "body." if grown else "")
        present = [tap for tap in taps if not (grown and _is_idle(grown, tap))]
        if not present:
            raise TapError(f"{name!r}: the graft puts the teacher's layers in the place of these")
        taps_of_sides.append(present)
    with noting(mistakes, "pairs", *place):
        taps_of_sides.append(_expand_teacher(teachers, options.teacher))
    keywords: dict[str, Any] = {"weight": options.weight, "adapter": options.adapter}
    if len(taps_of_sides) < 2:  # a loss that names it is no second mistake
        with suppress(TapError):
            pair = Pair(Tap.parse(name), teachers.named(Tap.parse(options.teacher)), **keywords)
            return [_in_body(pair) if grown else pair], True, mistakes
        return [], True, mistakes
    if len(taps_of_sides[0]) == len(taps_of_sides[1]):
        return [Pair(*taps, **keywords) for taps in zip(*taps_of_sides, strict=True)], False, mistakes
    texts = zip((name, options.teacher), taps_of_sides, strict=True)
    counts = "; and ".join(f"{text!r} finds {len(taps)}: {listed(taps)}" for text, taps in texts)
    message = f"both sides of a pair have to find equally many layers; {counts}"
    return [], False, [*mistakes, (("pairs", *place), message)]


def _expand_teacher(teachers: Traces, text: str) -> tuple[Tap, ...]:
    """The teacher's taps that a name or a pattern stands for, as in `dino:glob:blocks.*`. Raises TapError."""
    name, _, pattern = text.strip().partition(":")
    if is_pattern(text):
        name, pattern = "", text.strip()
    elif not is_pattern(pattern):
        tap = teachers.named(Tap.parse(text))
        teachers[tap]
        return (tap,)
    names = tuple(teachers.by_model)
    if not name and len(names) > 1:
        listed_names = ", ".join(names)
        raise TapError(
            f"{text!r} does not say whose layers; the teachers: {listed_names}; write '{names[0]}:{pattern}'"
        )
    if name and names == ("",):
        raise TapError(f"{text!r} names a teacher, and `teacher` is a single one without a name; write {pattern!r}")
    whose = teachers.named(Tap("", model=name)).model
    return tuple(replace(tap, model=whose) for tap in expand(teachers.by_model[whose], pattern))


def check_use(recipe: Recipe, paired: Paired, stages: Sequence[Sequence[Objective]]) -> list[Mistake]:
    """Check that a loss compares each written pair, and that the pair's adapter keys apply to this loss."""
    if sum(map(len, stages)) < sum(len(stage.losses) for stage in recipe.stages):
        return []  # a loss with mistakes might compare them
    objectives = [objective for stage in stages for objective in stage]
    mistakes: list[Mistake] = []
    for place, line in paired.lines.items():
        users = [
            objective
            for objective in objectives
            if any({*line} & {*comparison.pairs} for comparison in objective.comparisons)
        ]
        if line and line[0].weight and not users:
            message = f"no loss compares {line[0]}; take it out, or write `weight: 0` to have it measured only"
            mistakes.append((("pairs", *place), message))
        adaptable = set[str]().union(*(objective.adaptable for objective in users))
        for key in line[0].adapter if line and users else ():
            if key not in adaptable:
                names = ", ".join(f"`{loss}`" for loss in dict.fromkeys(objective.name for objective in users))
                message = f"`{key}` means nothing to the losses that compare this pair ({names}); leave it out"
                mistakes.append((("pairs", *place, key), message))
    return mistakes


def expansions(recipe: Recipe, paired: Paired) -> Iterator[Expansion]:
    for place, line in paired.lines.items():
        name, *rest = map(str, place)
        values = all_pairs(recipe.pairs[name]) if isinstance(recipe.pairs, dict) else [PairOptions(teacher=name)]
        teacher = values[int(rest[0]) if rest else 0].teacher
        if is_pattern(name) or is_pattern(teacher) or is_pattern(teacher.partition(":")[2]):
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
