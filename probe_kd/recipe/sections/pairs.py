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
from probe_kd.recipe.yaml_tree import Path_


@dataclass(frozen=True)
class Expansion:
    """What a pair of patterns stands for."""

    student: str
    teacher: str
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return f"{self.student or 'output'}: {self.teacher or 'output'} is {', '.join(map(str, self.pairs))}"


@dataclass(frozen=True)
class Paired:
    """The pairs, None where they cannot be known: then a loss without pairs is not its own mistake.

    `lines` has what each line of `pairs` stands for, and `unknown` the pairs of layers that are not there.
    """

    pairs: tuple[Pair, ...] | None = ()
    lines: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    unknown: frozenset[Pair] = frozenset()

    @property
    def compared(self) -> list[Pair] | None:
        """Those that losses read: one of weight 0 is measured only."""
        return None if self.pairs is None else [pair for pair in self.pairs if pair.weight]

    def line_of(self, comparison: Comparison) -> Path_:
        """The line of `pairs` that says how the features are adapted; none where the loss says it."""
        pair = comparison.pairs[-1]
        return next((("pairs", key) for key, line in self.lines.items() if pair.adapter and pair in line), ())


def find_pairs(recipe: Recipe, models: Models, grown: Trace | None) -> tuple[Paired, list[Mistake]]:
    wanted, student, teacher = recipe.pairs, models.student, models.teacher
    if not wanted:
        return Paired(), []
    mistakes: list[Mistake] = []
    if recipe.teacher is None:
        mistakes.append((("pairs",), "there is no `teacher:` with layers to pair"))
    if student is None or teacher is None:
        return Paired(None), mistakes
    if isinstance(wanted, AutoPairs):
        with noting(mistakes, "pairs"):
            found = match(student, teacher, level=wanted.level, num_pairs=wanted.num_pairs)
            return Paired(found if grown is None else _above_the_cut(found, grown)), mistakes
        return Paired(None), mistakes
    lines: dict[str, list[Pair]] = {}
    unknown = set[Pair]()
    for name, given in wanted.items():
        options = given if isinstance(given, PairOptions) else PairOptions(teacher=given)
        lines[name], missing, others = _read_line(name, options, student, teacher, grown)
        unknown |= {*lines[name]} if missing else set()
        mistakes += others
    pairs = tuple(pair for line in lines.values() for pair in line)
    return Paired(pairs or None, lines, frozenset(unknown)), mistakes + list(_taken_twice(lines))


def _taken_twice(lines: Mapping[str, Sequence[Pair]]) -> Iterator[Mistake]:
    taken: dict[Tap, str] = {}
    for name, line in lines.items():
        for pair in line:
            if pair.student in taken:
                message = f"{str(pair.student)!r} is in two pairs: `{taken[pair.student]}` has it too"
                yield ("pairs", name), message
            taken.setdefault(pair.student, name)


def _read_line(
    name: str, options: PairOptions, student: Trace, teacher: Trace, grown: Trace | None
) -> tuple[list[Pair], bool, list[Mistake]]:
    """The pairs of one line of `pairs`, whether their layers are missing, and what is wrong with the line."""
    mistakes: list[Mistake] = []
    found: list[Sequence[Tap]] = []
    sides = ((grown or student, name, "body." if grown else ""), (teacher, options.teacher, ""))
    for trace_, text, inside in sides:
        with noting(mistakes, "pairs", name):
            taps = expand(trace_, text, inside)
            left = [tap for tap in taps if not (grown and inside and _is_idle(grown, tap))]
            if not left:
                raise TapError(f"{name!r}: the graft puts the teacher's layers in the place of these")
            found.append(left)
    how: dict[str, Any] = {"weight": options.weight, "adapter": options.adapter}
    if len(found) < 2:  # a loss may name it, and that is no second mistake
        with suppress(TapError):
            pair = Pair(Tap.parse(name), Tap.parse(options.teacher), **how)
            return [_in_body(pair) if grown else pair], True, mistakes
        return [], True, mistakes
    if len(found[0]) == len(found[1]):
        return [Pair(*taps, **how) for taps in zip(*found, strict=True)], False, mistakes
    texts = zip((name, options.teacher), found, strict=True)
    counts = "; and ".join(f"{text!r} finds {len(taps)}: {listed(taps)}" for text, taps in texts)
    message = f"both sides of a pair have to find equally many layers; {counts}"
    return [], False, [*mistakes, (("pairs", name), message)]


def check_use(recipe: Recipe, paired: Paired, stages: Sequence[Sequence[Objective]]) -> list[Mistake]:
    """Of pairs that are written down, whether they are in a loss, and their choices mean something there."""
    if sum(map(len, stages)) < sum(len(stage.losses) for stage in recipe.stages):
        return []  # a loss that could not be read might have them
    objectives = [objective for stage in stages for objective in stage]
    mistakes: list[Mistake] = []
    for name, line in paired.lines.items():
        users = [it for it in objectives if any({*line} & {*of.pairs} for of in it.comparisons)]
        if line and line[0].weight and not users:
            message = f"no loss compares {line[0]}; take it out, or write `weight: 0` to have it measured only"
            mistakes.append((("pairs", name), message))
        known = set[str]().union(*(objective.adaptable for objective in users))
        for key in line[0].adapter if line and users else ():
            if key not in known:
                names = ", ".join(f"`{it}`" for it in dict.fromkeys(objective.name for objective in users))
                message = f"`{key}` means nothing to the losses that compare this pair ({names}); leave it out"
                mistakes.append((("pairs", name, key), message))
    return mistakes


def expansions(recipe: Recipe, paired: Paired) -> Iterator[Expansion]:
    for name, line in paired.lines.items():
        given = recipe.pairs[name] if isinstance(recipe.pairs, dict) else name
        teacher = given.teacher if isinstance(given, PairOptions) else given
        if is_pattern(name) or is_pattern(teacher):
            yield Expansion(name, teacher, tuple(line))


def _is_idle(grown: Trace, tap: Tap) -> bool:
    """Whether the graft put nothing in the place of a layer, since the teacher's have done its work."""
    return grown.modules[tap.module].kind == "Idle"


def _in_body(pair: Pair) -> Pair:
    return replace(pair, student=replace(pair.student, module=f"body.{pair.student.module}"))


def _above_the_cut(pairs: Sequence[Pair], grown: Trace) -> tuple[Pair, ...]:
    """Of the pairs of the plain student, those whose layers are still there in the graft."""
    moved = [_in_body(pair) for pair in pairs]
    kinds = {name: module.kind for name, module in grown.modules.items()}
    return tuple(pair for pair in moved if kinds.get(pair.student.module, "Idle") != "Idle")
