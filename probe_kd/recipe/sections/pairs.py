"""`pairs`: which layers of the student learn from which layers of the teacher."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from probe_kd.engine.matching import doubts, expand, find_pairs, is_pattern, listed
from probe_kd.engine.spec import Pair, Tap, Trace, Traces
from probe_kd.errors import TapError, nearest
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.recipe.keys import AutoPairs, LossOptions, PairOptions, Recipe, all_pairs
from probe_kd.recipe.loss_names import loss_of
from probe_kd.recipe.sections.mistakes import Mistake, noting
from probe_kd.recipe.sections.models import Models
from probe_kd.recipe.yaml_tree import KeyPath


@dataclass(frozen=True)
class Sides:
    """The layers that can be paired. `grown` is the student as it is trained, if it is a graft."""

    student: Trace
    teachers: Traces
    grown: Trace | None = None

    @property
    def body(self) -> str:
        """The prefix of the student's layers in the student as it is trained."""
        return "body." if self.grown else ""


@dataclass(frozen=True)
class Expansion:
    """A pair of patterns, and the pairs of layers that it matches. `loss` is the loss whose own pair it is."""

    student: str
    teacher: str
    pairs: tuple[Pair, ...]
    loss: str = ""

    def __str__(self) -> str:
        of_loss = f"{self.loss}: " if self.loss else ""
        pairs = ", ".join(map(str, self.pairs))
        return f"{of_loss}{self.student or 'output'}: {self.teacher or 'output'} is {pairs}"


@dataclass(frozen=True)
class Paired:
    """The pairs. None if they could not be determined, so that a loss without pairs is no further mistake.

    `lines` maps the place of each entry of `pairs` to its pairs: the key path of the student's layer, with an index if
    its value is a list. `unknown` contains the pairs with layers that do not exist.
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
                return place
        return ()


@dataclass(frozen=True)
class AllPaired:
    """The pairs of the recipe, and those of each loss that has `pairs`, by the number of its stage and its name."""

    shared: Paired
    own: Mapping[tuple[int, str], Paired] = field(default_factory=dict)

    def of(self, index: int, name: str) -> Paired:
        """The pairs that a loss compares."""
        return self.own.get((index, name), self.shared)

    @property
    def is_known(self) -> bool:
        """Whether all pairs could be determined."""
        return all(paired.pairs is not None for paired in (self.shared, *self.own.values()))

    @property
    def lines(self) -> dict[KeyPath, Sequence[Pair]]:
        """The pairs of each entry of `pairs`, in the recipe and in its losses."""
        lines = dict(self.shared.lines)
        for paired in self.own.values():
            lines = {**paired.lines, **lines}  # a selection has lines of the recipe, but maybe not all of a line
        return lines


def find_all_pairs(recipe: Recipe, models: Models, grown: Trace | None) -> tuple[AllPaired, list[Mistake]]:
    sides = None
    if models.student is not None and models.traces is not None:
        sides = Sides(models.student, models.traces, grown)
    has_teacher = bool(recipe.teachers_by_name)
    shared, mistakes = _find_pairs(recipe.pairs, ("pairs",), sides, has_teacher=has_teacher)
    own: dict[tuple[int, str], Paired] = {}
    for index, stage in enumerate(recipe.stages):
        for name, loss in stage.losses.items():
            place: KeyPath = ("stages", index, "losses", name, "pairs")
            refusal = _why_no_pairs(loss)
            if refusal:
                mistakes.append((place, refusal))
            elif isinstance(loss.pairs, list):
                own[index, name], more = _select(loss.pairs, place, shared, sides)
                mistakes += more
            elif loss.pairs is not None:
                own[index, name], more = _find_own(loss.pairs, place, sides, has_teacher=has_teacher)
                mistakes += more
    return AllPaired(shared, own), mistakes


def _why_no_pairs(options: LossOptions) -> str:
    """Why a loss cannot have `pairs`; empty if it can, or has none."""
    loss = loss_of(options)
    if options.pairs is None or loss is None or loss.reads_layers:
        return ""
    keys = "`student`" if loss.reads == "labels" else "`student` and `teacher`"
    return (
        f"{options.loss!r} compares no pairs of layers, so `pairs` means nothing; leave it out (by {keys} it may read "
        "another output)"
    )


def _find_own(
    options: AutoPairs | Mapping[str, Any], place: KeyPath, sides: Sides | None, *, has_teacher: bool
) -> tuple[Paired, list[Mistake]]:
    """The pairs of a loss that names its own, of which at least one has a weight."""
    paired, mistakes = _find_pairs(options, place, sides, has_teacher=has_teacher)
    if paired.pairs and not paired.compared:
        message = "every pair of this loss weighs 0, so that it compares nothing; give one a weight above 0"
        return Paired(None), [*mistakes, (place, message)]
    return paired, mistakes


def _find_pairs(
    options: AutoPairs | Mapping[str, Any], place: KeyPath, sides: Sides | None, *, has_teacher: bool
) -> tuple[Paired, list[Mistake]]:
    """The pairs of the recipe or of a loss, whose `pairs` are at this place."""
    if not options:
        return Paired(), []
    mistakes: list[Mistake] = []
    if not has_teacher:
        mistakes.append((place, "there is no `teacher:` with layers to pair"))
    if sides is None:
        return Paired(None), mistakes
    if isinstance(options, AutoPairs):
        with noting(mistakes, *place):
            return Paired(_by_student(_match_all(options, sides))), mistakes
        return Paired(None), mistakes
    lines: dict[KeyPath, list[Pair]] = {}
    unknown = set[Pair]()
    for name, value in options.items():
        for index, pair_options in enumerate(all_pairs(value)):
            line: KeyPath = (*place, name, index) if isinstance(value, list) else (*place, name)
            lines[line], missing, more = _read_line(line, name, pair_options, sides)
            unknown |= {*lines[line]} if missing else set()
            mistakes += more
    pairs = _by_student(pair for line_pairs in lines.values() for pair in line_pairs)
    return Paired(pairs or None, lines, frozenset(unknown)), mistakes + list(_in_two_pairs(lines, len(place)))


def _select(names: Sequence[str], place: KeyPath, shared: Paired, sides: Sides | None) -> tuple[Paired, list[Mistake]]:
    """The pairs of the recipe whose layers of the student a loss names, or matches by a pattern."""
    if shared.pairs is None or sides is None:
        return Paired(None), []
    mistakes: list[Mistake] = []
    taps: dict[Tap, str] = {}
    for number, name in enumerate(names):
        with noting(mistakes, *place, number):
            selected = _selected(name, shared.pairs, sides)
            twice = next((taps[tap] for tap in selected if tap in taps), None)
            if twice is not None:
                raise TapError(f"{name!r} selects what {twice!r} selects already; leave one out")
            taps |= dict.fromkeys(selected, name)
    if mistakes:
        return Paired(None), mistakes
    pairs = tuple(pair for pair in shared.pairs if pair.student in taps and pair.weight)
    lines = {line: [pair for pair in own if pair in pairs] for line, own in shared.lines.items()}
    return Paired(pairs, {line: own for line, own in lines.items() if own}, shared.unknown), []


def _selected(name: str, pairs: Sequence[Pair], sides: Sides) -> list[Tap]:
    """The student's layers in pairs that a name or a pattern stands for. Raises TapError if there is none."""
    written = {pair.student: str(pair.student).removeprefix(sides.body) for pair in pairs}
    if is_pattern(name):
        matches = expand(sides.grown or sides.student, name, sides.body)
        taps = [tap for tap in written if tap in matches]
    else:
        taps = [tap for tap, text in written.items() if Tap.parse(text) == Tap.parse(name)]
    if not taps:
        legal = list(written.values())
        listed_pairs = f"; those of the recipe have {listed(legal)}" if legal else ", and the recipe has no `pairs`"
        near = "" if is_pattern(name) else nearest(name, legal)
        raise TapError(f"{name!r} is the student's layer of no pair{near}{listed_pairs}")
    weightless = [tap for tap in taps if not any(pair.weight for pair in pairs if pair.student == tap)]
    if weightless and not (is_pattern(name) and len(weightless) < len(taps)):
        raise TapError(f"{name!r} is in a pair of weight 0, which is only measured; give the pair a weight")
    return taps


def _by_student(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs in the order of the resolved recipe, which lists the teachers' layers of each layer of the student.

    The adapters of a run are saved by their number, and read with the resolved recipe.
    """
    of_student: dict[Tap, list[Pair]] = {}
    for pair in pairs:
        of_student.setdefault(pair.student, []).append(pair)
    return tuple(pair for own_pairs in of_student.values() for pair in own_pairs)


def _match_all(options: AutoPairs, sides: Sides) -> Iterator[Pair]:
    """The pairs that `match` finds with each teacher. Raises MatchError."""
    for name, trace_ in sides.teachers.by_model.items():
        pairs = find_pairs(sides.student, trace_, level=options.level, num_pairs=options.num_pairs)
        pairs = tuple(replace(pair, teacher=replace(pair.teacher, model=name)) for pair in pairs)
        yield from pairs if sides.grown is None else _above_the_cut(pairs, sides.grown)


def _in_two_pairs(lines: Mapping[KeyPath, Sequence[Pair]], start: int) -> Iterator[Mistake]:
    """One layer of the student may learn from several teachers, but from one layer of each.

    `start` is the index of the student's layer in the key paths of the lines.
    """
    line_of: dict[tuple[Tap, str], KeyPath] = {}
    for place, line in lines.items():
        for pair in line:
            key = pair.student, pair.teacher.model
            if key in line_of:
                other = f"`{line_of[key][start]}`" if line_of[key][start] != place[start] else "the same line"
                of_teacher = f" with {key[1]}" if key[1] else ""
                yield place, f"{str(pair.student)!r} is in two pairs{of_teacher}: {other} has it too"
            line_of.setdefault(key, place)


def _read_line(place: KeyPath, name: str, options: PairOptions, sides: Sides) -> tuple[list[Pair], bool, list[Mistake]]:
    """The pairs of one line of `pairs`, whether layers are missing, and the mistakes in the line."""
    mistakes: list[Mistake] = []
    taps_of_sides: list[Sequence[Tap]] = []
    teachers, grown = sides.teachers, sides.grown
    with noting(mistakes, *place):
        taps = expand(grown or sides.student, name, sides.body)
        present = [tap for tap in taps if not (grown and _is_idle(grown, tap))]
        if not present:
            raise TapError(f"{name!r}: the graft puts the teacher's layers in the place of these")
        taps_of_sides.append(present)
    with noting(mistakes, *place):
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
    return [], False, [*mistakes, (place, message)]


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


def check_use(recipe: Recipe, paired: AllPaired, stages: Sequence[Sequence[Objective]]) -> list[Mistake]:
    """Check that a loss compares each written pair, and that the pair's adapter keys apply to this loss."""
    are_known = all(of_loss.pairs is not None for of_loss in paired.own.values())
    if not are_known or sum(map(len, stages)) < sum(len(stage.losses) for stage in recipe.stages):
        return []  # a loss with mistakes might compare them
    mistakes: list[Mistake] = []
    for place, line in paired.lines.items():
        users = [
            objective
            for index, objectives in enumerate(stages)
            for objective in objectives
            if place in paired.of(index, objective.name).lines
            and any({*line} & {*comparison.pairs} for comparison in objective.comparisons)
        ]
        if line and line[0].weight and not users:
            who = "no loss compares" if place[0] == "pairs" else f"loss `{place[3]}` does not compare"
            message = f"{who} {line[0]}; take it out, or write `weight: 0` to have it measured only"
            mistakes.append((place, message))
        adaptable = set[str]().union(*(objective.adaptable for objective in users))
        for key in line[0].adapter if line and users else ():
            if key not in adaptable:
                names = ", ".join(f"`{loss}`" for loss in dict.fromkeys(objective.name for objective in users))
                message = f"`{key}` means nothing to the losses that compare this pair ({names}); leave it out"
                mistakes.append(((*place, key), message))
    return mistakes


def expansions(recipe: Recipe, paired: AllPaired) -> Iterator[Expansion]:
    for place, line in paired.lines.items():
        of_loss = place[0] != "pairs"
        stage, loss = (recipe.stages[int(place[1])], str(place[3])) if of_loss else (None, "")
        options = stage.losses[loss].pairs if stage else recipe.pairs
        name, *rest = map(str, place[5:] if of_loss else place[1:])
        values = all_pairs(options[name]) if isinstance(options, dict) else [PairOptions(teacher=name)]
        teacher = values[int(rest[0]) if rest else 0].teacher
        if is_pattern(name) or is_pattern(teacher) or is_pattern(teacher.partition(":")[2]):
            yield Expansion(name, teacher, tuple(line), loss)


def pair_remarks(pairs: Sequence[Pair], student: Trace, teachers: Mapping[str, Trace]) -> list[str]:
    """Say which pairs are probably not what was meant."""
    return [
        text
        for name, teacher in teachers.items()
        for text in doubts([pair for pair in pairs if pair.teacher.model == name], student, teacher)
    ]


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
