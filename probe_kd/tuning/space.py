"""What a study varies: the values that `tune` names, or those of the method, each found legal by planning.

Every value is planned by itself in the recipe as it stands, so that a mistake is found before anything is trained.
Values that only together make a recipe that cannot run are found when their trial is planned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from probe_kd.errors import ProbeKDError, Problem, RecipeError
from probe_kd.recipe.keys import Recipe, TuneOptions
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import Source, changed, mended
from probe_kd.recipe.sections.tune import check_tune, places_of, shown, value_at, with_value
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.tuning.feature_pairs import pairs_by_features, why_no_features

AS_WRITTEN = "as written"  # the label of the recipe's own pairs
MOST_PAIRS = 4  # of `from: match` without `num_pairs`
Prepare = Callable[[Recipe], Recipe]  # what is done to a recipe before it is planned


def without_tune(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"tune": None})


@dataclass(frozen=True)
class Parameter:
    """One value that a study varies.

    `low` and `high` bound a number, drawn by its logarithm if `log`, and a whole one if `whole`. Without bounds it is
    one of `choices`, whose labels stand for values of the recipe; the value None leaves the recipe as it is. `default`
    is what the recipe has: a number, or the label of a choice; None if it is none of those that are drawn.
    """

    path: str
    places: tuple[KeyPath, ...]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[tuple[str, Any], ...] = ()
    default: float | str | None = None

    def values(self, drawn: float | str) -> dict[KeyPath, Any]:
        """What is changed in the recipe for a drawn number, or the label of a choice."""
        value = dict(self.choices)[str(drawn)] if self.choices else drawn
        return {} if drawn == AS_WRITTEN else dict.fromkeys(self.places, value)

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(label for label, _ in self.choices)
        kind = ", by the logarithm" if self.log else ", whole numbers" if self.whole else ""
        return f"{self.low:g} to {self.high:g}{kind}"


@dataclass(frozen=True)
class Planner:
    """Plans a recipe with other values, on the images that `planned` has opened; `prepare` changes it before that.

    `measured` are the pairs of `from: features` by their labels, where the study has measured them before. `tell` is
    called with what takes long.
    """

    source: Source
    planned: Plan
    allow_import: tuple[str, ...] = ()
    prepare: Prepare = without_tune
    measured: Mapping[str, Any] | None = None
    tell: Callable[[str], None] = field(default=lambda text: None)

    def plan(self, values: Mapping[KeyPath, Any]) -> Plan:
        """Raises RecipeError if the recipe cannot run with these values."""
        other = changed(self.source, values, place=("tune",))
        other = replace(other, recipe=self.prepare(other.recipe))
        return plan(other, allow_import=self.allow_import, datasets=self.planned.datasets)


def space_of(planner: Planner) -> tuple[Parameter, ...]:
    """The values that the recipe's `tune` names. Raises RecipeError with all that make a recipe that cannot run."""
    source, reading = planner.source, _Reading(planner)
    options = source.recipe.tune or {}
    parameters = tuple(reading.parameter(path, value) for path, value in options.items())
    reading.try_bounds(parameters)
    if reading.problems:
        raise source.error(reading.problems)
    return parameters


def with_all_problems(
    source: Source, refusal: RecipeError, allow_import: Sequence[str], prepare: Prepare = without_tune
) -> RecipeError:
    """The error of a plan, with what is wrong with other values of `tune`, if the rest of the recipe can run."""
    if any(place[:1] != ("tune",) for place in source.broken):
        return refusal
    rest = mended(source)
    wrong = {place[1] for place, _ in check_tune(rest)}
    options = {path: value for path, value in (rest.recipe.tune or {}).items() if path not in wrong}
    try:
        planned = plan(replace(rest, recipe=prepare(without_tune(rest.recipe))), allow_import=allow_import)
    except RecipeError:
        return refusal
    varied = replace(rest, recipe=rest.recipe.model_copy(update={"tune": options}))
    try:
        space_of(Planner(varied, planned, tuple(allow_import), prepare))
    except RecipeError as more:
        return source.error([*refusal.problems, *more.problems])
    return refusal


def usual_space(planner: Planner, options: Mapping[str, TuneOptions]) -> tuple[Parameter, ...]:
    """Parameters for a recipe without `tune`: those of `options` whose values can stand in the recipe."""
    parameters: list[Parameter] = []
    for path, value in options.items():
        reading = _Reading(planner)
        parameter = reading.parameter(path, value)
        if parameter.choices:
            parameters += [parameter] * (len(parameter.choices) > 1)
            continue
        reading.try_bounds([parameter])
        parameters += [parameter] * (not reading.problems)
    return tuple(parameters)


class _Reading:
    """Reads the options of `tune` one by one, and keeps what is wrong with them."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.source = planner, planner.source
        self.problems: list[Problem] = []
        self.paths: set[str] = set()  # that have one

    def parameter(self, path: str, options: TuneOptions) -> Parameter:
        places = places_of(self.source.recipe, path)
        assert not isinstance(places, str)  # the plan has found it
        if options.source is not None:
            return self._of_pairs(path, options)
        current = [value_at(self.source.recipe, place) for place in places]
        default = current[0] if all(value == current[0] for value in current) else None
        if options.values is not None:
            return self._of_values(path, places, options.values, default)
        low, high = options.log or options.range or (0.0, 0.0)
        whole = options.range is not None and isinstance(low, int) and isinstance(high, int)
        is_inside = isinstance(default, int | float) and not isinstance(default, bool) and low <= default <= high
        kind: dict[str, Any] = {"log": options.log is not None, "whole": whole}
        bounds = (low, high) if whole else (float(low), float(high))
        return Parameter(path, tuple(places), *bounds, **kind, default=default if is_inside else None)

    def _of_values(self, path: str, places: Sequence[KeyPath], values: Sequence[Any], default: Any) -> Parameter:
        """A choice among values. One that cannot stand in the recipe is a problem, and left out."""
        choices = {shown(value): value for value in values}
        if len(choices) < len(values):
            self.problem(path, f"`{path}` has a value twice; leave one out")
        legal = {label: value for label, value in choices.items() if self.can(path, dict.fromkeys(places, value))}
        label = next((label for label, value in legal.items() if value == default), None)
        return Parameter(path, tuple(places), choices=tuple(legal.items()), default=label)

    def _of_pairs(self, path: str, options: TuneOptions) -> Parameter:
        """The pairs as they are written, and all others that `match` or the features of the models make."""
        found = self._by_features(path, options) if options.source == "features" else self._by_match(path, options)
        return Parameter(path, (("pairs",),), choices=((AS_WRITTEN, None), *found.items()), default=AS_WRITTEN)

    def _by_features(self, path: str, options: TuneOptions) -> dict[str, Any]:
        """The pairs and their `normalize` by their labels; those that the study has measured before, if it has."""
        if self.planner.measured is not None:
            return dict(self.planner.measured)
        least, most = options.num_pairs or (1, MOST_PAIRS)
        why = why_no_features(self.planner.planned)
        if why:
            self.problem(path, why)
            return {}
        self.planner.tell("measuring the features of student and teacher on training images")
        try:
            found = pairs_by_features(self.source.recipe, self.planner.planned, range(least, most + 1))
        except ProbeKDError as refusal:
            self.problem(path, with_value(path, {"from": "features", "num_pairs": [least, most]}, refusal))
            return {}
        return {shown(pairs): pairs for pairs in found if self.can(path, {("pairs",): pairs})}

    def _by_match(self, path: str, options: TuneOptions) -> dict[str, Any]:
        """The pairs that `match` finds and the recipe does not have, by their labels."""
        least, most = options.num_pairs or (1, MOST_PAIRS)
        choices: dict[str, Any] = {}
        seen = [self.planner.planned.resolved.pairs]
        for level in options.level or ["stage"]:
            refusals = []
            for number in range(least, most + 1):
                try:
                    pairs = self.planner.plan({("pairs",): {"level": level, "num_pairs": number}}).resolved
                except ProbeKDError as refusal:  # fewer pairs than that
                    refusals.append(refusal)
                    continue
                written = pairs.model_dump(mode="json", exclude_none=True)["pairs"]
                if pairs.pairs not in seen:
                    seen.append(pairs.pairs)
                    choices[shown(written)] = written
            if len(refusals) > most - least:
                self.problem(path, with_value(path, {"from": "match", "num_pairs": [least, most]}, refusals[0]))
        return choices

    def try_bounds(self, parameters: Sequence[Parameter]) -> None:
        """Plan the recipe with all numbers at their least and at their greatest; one by one, where that is refused."""
        numbers = [parameter for parameter in parameters if not parameter.choices]
        for bound in ("low", "high") if numbers else ():
            values = {place: getattr(parameter, bound) for parameter in numbers for place in parameter.places}
            try:
                self.planner.plan(values)
            except ProbeKDError:
                for parameter in numbers:
                    self.can(parameter.path, dict.fromkeys(parameter.places, getattr(parameter, bound)))

    def can(self, path: str, values: Mapping[KeyPath, Any]) -> bool:
        """Whether the recipe can run with these values; it is a problem if not."""
        try:
            self.planner.plan(values)
        except ProbeKDError as refusal:
            self.problem(path, with_value(path, next(iter(values.values())), refusal))
            return False
        return True

    def problem(self, path: str, message: str) -> None:
        """Add the first problem of a path."""
        if path not in self.paths:
            self.paths.add(path)
            self.problems.append(self.source.problem(("tune", path), message))


def all_values(parameters: Sequence[Parameter], drawn: Mapping[str, float | str]) -> dict[KeyPath, Any]:
    """What is changed in the recipe for the drawn values of a trial, by their paths."""
    return {
        place: value
        for parameter in parameters
        if parameter.path in drawn
        for place, value in parameter.values(drawn[parameter.path]).items()
    }


def lines_of(parameters: Sequence[Parameter]) -> list[str]:
    """One line for every parameter: its path, what is drawn, and what the recipe has."""
    return [f"  {parameter.path}: {parameter}{_own(parameter)}" for parameter in parameters]


def _own(parameter: Parameter) -> str:
    if parameter.default == AS_WRITTEN:
        return ""
    return f"; the recipe has {'another' if parameter.default is None else shown(parameter.default)}"
