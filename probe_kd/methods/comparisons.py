"""What one adapter and one call of a loss compare: a pair of layers, both ends of a flow, outputs, or all pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from probe_kd.engine.spec import Pair, Side, Tap
from probe_kd.errors import LossError, nearest
from probe_kd.methods.losses.table import Loss

_PARTS = {"cls": "class token", "pool": "mean", "drop": "grid"}  # what `tokens: all` compares


@dataclass(frozen=True)
class Comparison:
    """The input of one adapter: a pair of taps, the two ends of a flow, all pairs of taps, or one output with those of
    several teachers.

    `weight` is its weight in the objective. `is_mean` says that the student is compared with the mean of several
    teachers' probabilities.
    """

    pairs: tuple[Pair, ...]
    weight: float
    label: str
    is_mean: bool = False

    def __str__(self) -> str:
        return self.label

    def features(self, side: Side, features: Mapping[Tap, Tensor], *, several: bool) -> Any:
        """Select one model's input of the adapter: a tuple of all taps for `several`, otherwise the one feature."""
        values = tuple(features[getattr(pair, side)] for pair in self.pairs)
        return values if several or (side == "teacher" and self.is_mean) else values[0]

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of the teachers that are compared with; a single teacher may have an empty name."""
        return tuple(dict.fromkeys(pair.teacher.model for pair in self.pairs))


def of_outputs(student: Tap, teachers: Sequence[Tap], weights: Mapping[str, float]) -> Comparison:
    """The comparison of the student's output with a teacher's, or with the mean of several teachers'."""
    pairs = tuple(Pair(student, tap, weight=weights.get(tap.model, 1.0)) for tap in teachers)
    if len(pairs) == 1:
        return Comparison((Pair(student, teachers[0]),), pairs[0].weight, str(pairs[0]))
    names = ", ".join(tap.label for tap in teachers)
    return Comparison(pairs, 1.0, f"{student.label} <- mean of {names}", is_mean=True)


def of_layers(
    loss: Loss, pairs: Sequence[Pair], between: Sequence[Sequence[str | Tap]], weights: Mapping[str, float]
) -> Iterator[Comparison]:
    """The comparisons of a loss that reads pairs of layers. `weights` are those of the teachers.

    Raises LossError for a `between` that does not name two paired layers, and for a weight of one pair where a loss
    reads all of them at once.
    """
    if between:
        for ends in between:
            yield from _between(ends, pairs, weights)
    elif loss.reads == "flows":
        for pair in pairs:
            before = Pair(*(replace(tap, port="input", items=()) for tap in (pair.student, pair.teacher)))
            yield Comparison((before, pair), _weight_of(pair, weights), f"{pair}, from input to output")
    elif loss.reads == "all_pairs":
        yield from _all_at_once(loss, pairs, weights)
    else:
        names = [str(pair) for pair in pairs]
        for pair, name in zip(pairs, names, strict=True):
            several = names.count(name) > 1 and "tokens" in pair.adapter
            part = f", {_PARTS[pair.adapter['tokens']]}" if several else ""
            yield Comparison((pair,), _weight_of(pair, weights), name + part)


def _all_at_once(loss: Loss, pairs: Sequence[Pair], weights: Mapping[str, float]) -> Iterator[Comparison]:
    """All pairs with one teacher, for each teacher."""
    for pair in pairs:
        if pair.weight != 1:
            raise LossError(f"{loss.name!r} reads all pairs at once, so {pair} has no weight of its own; leave it out")
    for teacher in dict.fromkeys(pair.teacher.model for pair in pairs):
        own_pairs = tuple(pair for pair in pairs if pair.teacher.model == teacher)
        yield Comparison(own_pairs, weights.get(teacher, 1.0), ", ".join(map(str, own_pairs)))


def _between(ends: Sequence[str | Tap], pairs: Sequence[Pair], weights: Mapping[str, float]) -> Iterator[Comparison]:
    """The flow between two layers of the student; one for each teacher that both learn from."""
    pair_of = {(pair.student, pair.teacher.model): pair for pair in pairs}
    if len(ends) != 2:
        raise LossError(f"`between` takes two layers of the student at a time, got {len(ends)}")
    for end in ends:
        legal = list(dict.fromkeys(str(pair.student) for pair in pairs))
        if str(end) not in legal:
            raise LossError(f"`between` names '{end}', which is in no pair{nearest(str(end), legal)}; {legal} are")
    flows = [
        [pair_of[Tap.parse(end), teacher] for end in ends]
        for teacher in dict.fromkeys(pair.teacher.model for pair in pairs)
        if all((Tap.parse(end), teacher) in pair_of for end in ends)
    ]
    if not flows:
        raise LossError(f"`between` names '{ends[0]}' and '{ends[1]}', which learn from no teacher in common")
    for first, second in flows:
        yield Comparison((first, second), first.weight * _weight_of(second, weights), f"{first} to {second}")


def _weight_of(pair: Pair, weights: Mapping[str, float]) -> float:
    return pair.weight * weights.get(pair.teacher.model, 1.0)


def as_pairs(pairs: Any) -> Iterator[Pair]:
    """Convert Pairs, tuples of two names, or a mapping as in recipes. Raises LossError for anything else."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise LossError(
            f"pairs {pairs!r}: expected what `match(trace(student), trace(teacher))` gives, or pairs of names"
        )
    for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
        if not isinstance(pair, Pair) and (isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2):
            raise LossError(f"pair {pair!r}: expected a Pair, or (student layer, teacher layer)")
        yield pair if isinstance(pair, Pair) else Pair(*pair)
