"""`tune`: which values of the recipe `probe-kd tune` may vary, and what stands at each of these paths.

A path is spelt as that of `--set`, but for two things. A loss goes by its name, `losses.hint.weight`, in all stages
that have it; and a key of the stages alone, `optimizer.lr`, is set in every stage.
"""

import re
from collections.abc import Iterator, Mapping
from inspect import signature
from itertools import combinations
from typing import Any

from pydantic import BaseModel

from probe_kd.errors import ProbeKDError, RecipeError, nearest
from probe_kd.recipe.keys import (
    AverageOptions,
    LossOptions,
    OptimizerOptions,
    Recipe,
    SchedulerOptions,
    TuneOptions,
)
from probe_kd.recipe.loss_names import loss_of
from probe_kd.recipe.reading import Source, changed
from probe_kd.recipe.sections.mistakes import Mistake
from probe_kd.recipe.yaml_tree import KeyPath

_OF_LOSSES = ("weight", "policy", "tokens", "normalize", "projector", "activation", "grid", "pairs")
_OF_STAGES: dict[str, type[BaseModel]] = {"optimizer": OptimizerOptions, "scheduler": SchedulerOptions}
_NUMBERS_OF_STAGES = ("clip_grad", "grad_accum_steps", "teacher_dropping")


def check_tune(source: Source) -> list[Mistake]:
    """What is wrong with the paths and the bounds of `tune`, without a plan of what they lead to."""
    mistakes: list[Mistake] = []
    all_places: dict[str, list[KeyPath]] = {}
    for path, options in (source.recipe.tune or {}).items():
        places = places_of(source.recipe, path)
        if isinstance(places, str):
            mistakes.append((("tune", path), places))
            continue
        all_places[path] = places
        if options.source is not None and path != "pairs":
            message = f"`from: {options.source}` finds pairs, for the path `pairs`; give `{path}` its `values`"
            mistakes.append((("tune", path), message))
            continue
        refusals = (why_not(source, path, dict.fromkeys(places, value)) for value in ends_of(options))
        first = next(filter(None, refusals), "")
        mistakes += [(("tune", path), first)] if first else []
    return mistakes + list(_set_twice(all_places))


def ends_of(options: TuneOptions) -> list[Any]:
    """The values that may stand at a path; of a range, its bounds."""
    if options.values is not None:
        return options.values
    return list(options.log or options.range or ())


def why_not(source: Source, path: str, values: Mapping[KeyPath, Any]) -> str:
    """Why these values cannot stand in the recipe by their form; empty if they can."""
    try:
        changed(source, values, place=("tune", path))
    except RecipeError as refusal:
        return with_value(path, next(iter(values.values())), refusal)
    return ""


def with_value(path: str, value: Any, refusal: ProbeKDError) -> str:
    """The message for a value of `tune` that makes a recipe that is refused."""
    first = refusal.problems[0].message if isinstance(refusal, RecipeError) else str(refusal)
    return f"`{path}: {shown(value)}` makes a recipe that cannot run: {first}"


def shown(value: Any) -> str:
    """A value as in YAML, in one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def places_of(recipe: Recipe, path: str) -> list[KeyPath] | str:
    """The places in the recipe that a path of `tune` names; a message if there are none."""
    legal = legal_paths(recipe)
    known = next((prefix for prefix in _prefixes(path) if prefix in legal), None)
    if known is None:
        return f"`{path}` cannot be varied{_why_fixed(path) or nearest(path, legal) or _what_can(path, recipe)}"
    rest = [step.strip('"') for step in re.findall(r'"[^"]*"|[^".]+', path[len(known) :])]
    return [(*place, *rest) for place in legal[known]]


def _prefixes(path: str) -> Iterator[str]:
    """The path, and all that it lies under."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _why_fixed(path: str) -> str:
    """Why what a path leads to is the same in all trials; empty if it may be varied, or is not there."""
    section = path.partition(".")[0]
    if section in ("student", "teacher", "teachers", "data", "evaluate"):
        beside = ", but for `data.batch_size`" * (section == "data")
        return f": what `{section}` says is the same for all trials{beside}, so that these can be compared"
    return ": a trial has as many epochs as --epochs says" if path.endswith(".epochs") else ""


def _what_can(path: str, recipe: Recipe) -> str:
    """What may be varied, for a path that is like none of these."""
    if path.startswith("losses."):
        return f"; the losses here: {', '.join(sorted(recipe.loss_names)) or 'none'}"
    return f"; what can: losses.NAME.KEY, {', '.join(_OF_STAGES)}, {', '.join(_NUMBERS_OF_STAGES)}, pairs"


def legal_paths(recipe: Recipe) -> dict[str, list[KeyPath]]:
    """Every path that may be varied, with its places in the recipe."""
    paths: dict[str, list[KeyPath]] = {"pairs": [("pairs",)]} if recipe.teachers_by_name else {}
    for index, stage in enumerate(recipe.stages):
        for name, options in stage.losses.items():
            for key in _keys_of(options):
                _enter(paths, index, ("losses", name, key))
        for section, fields in _OF_STAGES.items():
            for key in fields.model_fields:
                _enter(paths, index, (section, key))
        for key in _NUMBERS_OF_STAGES:
            _enter(paths, index, (key,))
    if recipe.model_ema is not None:
        paths |= {f"model_ema.{key}": [("model_ema", key)] for key in AverageOptions.model_fields}
    paths["data.batch_size"] = [("data", "batch_size")]
    return paths


def _enter(paths: dict[str, list[KeyPath]], index: int, keys: tuple[str, ...]) -> None:
    """Add the place of a key in one stage, under the path of all stages and under that of this stage."""
    place: KeyPath = ("stages", index, *keys)
    for path in (".".join(keys), ".".join(map(str, place))):
        paths.setdefault(path, []).append(place)


def _keys_of(options: LossOptions) -> list[str]:
    loss = loss_of(options)
    own = list(loss.options) if loss is not None else list(options.model_extra or ())
    return [*_OF_LOSSES, *(key for key in own if key not in _OF_LOSSES)]


def _set_twice(all_places: Mapping[str, list[KeyPath]]) -> Iterator[Mistake]:
    """Paths that lead to one place, or to a place under another."""
    for (path, places), (other, other_places) in combinations(all_places.items(), 2):
        both = next((place for place in places for twin in other_places if _is_under(place, twin)), None)
        if both is not None:
            yield ("tune", other), f"`{path}` and `{other}` both set `{'.'.join(map(str, both))}`; leave one out"


def _is_under(place: KeyPath, other: KeyPath) -> bool:
    """Whether one of two places is the other, or lies under it."""
    shortest = min(len(place), len(other))
    return place[:shortest] == other[:shortest]


def value_at(recipe: Recipe, place: KeyPath) -> Any:
    """The value at a place as in YAML, also where it is a default; None if nothing is there."""
    value: Any = recipe.model_dump(mode="json", exclude={"tune"})
    for number, step in enumerate(place):
        if isinstance(value, Mapping) and step not in value:
            return _default_of_loss(recipe, place) if place[2:3] == ("losses",) and number == 4 else None
        if not isinstance(value, Mapping | list):
            return None
        value = value[step]  # type: ignore[index]
    return value


def _default_of_loss(recipe: Recipe, place: KeyPath) -> Any:
    """The default of an option of a loss, which is that of its function."""
    loss = loss_of(recipe.stages[int(place[1])].losses[str(place[3])])
    parameter = signature(loss.function).parameters.get(str(place[4])) if loss is not None else None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
