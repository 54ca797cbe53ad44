"""Read a recipe file: what it extends, what `--set` changes, and every error of form at once, each with its line.

`load` reads a file into a Recipe, which `planner.plan` checks against models and data. Nothing in a recipe is code: it
is read as plain YAML, and a function that it names as a model is imported only where the caller allows its package.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from pydantic import ValidationError

from probe_kd.errors import CONTROL, Problem, RecipeError, nearest
from probe_kd.files.atomic import read_text, reason
from probe_kd.recipe.form_errors import fields_at, form_problem, is_misspelt_key
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.yaml_tree import (
    MAX_LEVELS,
    KeyPath,
    Node,
    flaws,
    locate,
    merged,
    node_of,
    plain_node,
    read_yaml,
    replaced,
    with_plain,
)

MAX_FILES = 8  # files that extend each other
_STEP = r'(?:"[^"]*"|[^=".]+)'  # one key of a path, in quotes if it has dots


@dataclass(frozen=True)
class Source:
    """A recipe, and the files and options that it was read from, with the line of every key.

    `form` lists the errors of form of a recipe that was read with `tolerant`. Then `recipe` is the rest of the recipe,
    without these errors, and `broken` lists the places where it differs from the file.
    """

    recipe: Recipe
    name: str
    node: Node
    texts: Mapping[str, str]
    form: tuple[Problem, ...] = ()
    broken: tuple[KeyPath, ...] = ()

    def problem(self, place: KeyPath, message: str) -> Problem:
        return locate(self.node, place)[1].problem(message)

    def error(self, problems: Sequence[Problem]) -> RecipeError:
        return RecipeError(self.name, list(dict.fromkeys(problems)), self.texts)


def load(path: str | Path, seed: int | None = None, sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """Read a recipe file, and the files that it extends.

    Each of `sets` changes one value, as in `stages.0.epochs=5`, and is written in YAML. `seed` replaces the recipe's.

    Raises RecipeError with all errors of form: YAML, keys, types, bounds. With `tolerant`, `form` of the returned
    Source lists them instead, if a recipe is left without them, so that `plan` can report the errors of meaning too.
    """
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as refusal:
        raise RecipeError(
            str(path), [Problem(f"cannot read the recipe: {reason(refusal)}{_similar_file(path)}")]
        ) from None
    source = parse(text, str(path), sets, tolerant=tolerant)
    return source if seed is None else replace(source, recipe=source.recipe.model_copy(update={"seed": seed}))


def changed(source: Source, values: Mapping[KeyPath, Any], *, place: KeyPath = ()) -> Source:
    """A recipe with other values at these places, as `--set` would write them; errors are shown at `place`.

    Raises RecipeError for values that cannot stand there.
    """
    node, shown_at = source.node, locate(source.node, place)[1]
    reading = _Reading(source.name)
    reading.texts = dict(source.texts)
    for steps, value in values.items():
        try:
            node = replaced(node, list(map(str, steps)), plain_node(value, shown_at))
        except KeyError as refusal:
            reading.problems.append(shown_at.problem(refusal.args[0]))
    recipe, _, _ = reading.recipe(node, tolerant=False)
    seeded = recipe.model_copy(update={"seed": source.recipe.seed})  # which an option may have replaced
    return Source(seeded, source.name, node, source.texts)


def mended(source: Source) -> Source:
    """The recipe without the errors of form with which it was read, and the file as if these were not in it."""
    if not source.form:
        return source
    values = source.node.plain
    _, errors = _validated(values)
    _without_errors(source.node, values, errors)
    return replace(source, node=with_plain(source.node, values), form=(), broken=())


def _similar_file(path: str | Path) -> str:
    """A hint at the recipe in the same folder with the most similar name; empty if there is none."""
    name = Path(path).name
    try:
        return nearest(name, [file.name for file in Path(path).absolute().parent.glob("*.y*ml") if file.name != name])
    except (OSError, ValueError):  # a path that no system takes
        return ""


def parse(text: str, name: str = "recipe", sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """Read a recipe from text, as `load` does. `extends` is relative to the folder of `name`.

    Imports and builds nothing that the recipe names.
    """
    reading = _Reading(name)
    node = reading.file(text.removeprefix("\ufeff"), name, ())
    for option in sets:
        node = reading.option(node, option)
    recipe, form, broken = reading.recipe(node, tolerant=tolerant)
    return Source(recipe, name, node, reading.texts, tuple(form), tuple(broken))


class _Reading:
    """The texts of the files and options of one recipe, and the problems in them so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.texts: dict[str, str] = {}
        self.problems: list[Problem] = []

    def stop(self, *problems: Problem) -> NoReturn:
        raise RecipeError(self.name, list(dict.fromkeys([*self.problems, *problems])), self.texts)

    def add_text(self, tree: Any, name: str, text: str, under: KeyPath = ()) -> Node:
        """Keep a text to quote in errors, and return its tree as Nodes. `under` is its place in the recipe."""
        self.texts[name] = text
        node = node_of(tree, name)
        for place, message in flaws(tree, under):
            self.problems.append(locate(node, place[len(under) :])[1].problem(message))
        return node

    def file(self, text: str, name: str, chain: Sequence[str]) -> Node:
        """Merge a file into the one that it extends. `chain` lists the files that extend this one."""
        node = self.add_text(read_yaml(text, name), name, text)
        if not isinstance(node.value, dict):
            self.stop(node.problem("expected a mapping with `student`, `data` and `stages`"))
        values = dict(node.value)
        base = values.pop("extends", None)
        node = replace(node, value=values)
        return node if base is None else merged(self._read_base(base, [*chain, name]), node)

    def _read_base(self, base: Node, chain: Sequence[str]) -> Node:
        if not isinstance(base.value, str):
            self.stop(base.problem("`extends`: expected the path of a recipe, from this one's folder"))
        path = Path(chain[-1]).parent / base.value
        try:
            if os.path.realpath(path) in map(os.path.realpath, chain):
                self.stop(base.problem(f"`extends` goes round: {' -> '.join([*chain, str(path)])}"))
            if len(chain) == MAX_FILES:
                self.stop(base.problem(f"more than {MAX_FILES} files extend each other: {' -> '.join(chain)}"))
            text = read_text(path)
        except (OSError, ValueError) as refusal:
            self.stop(base.problem(f"cannot read {str(path)!r}: {reason(refusal)}{_similar_file(path)}"))
        self._check_is_recipe(base, text, str(path))
        return self.file(text, str(path), chain)

    def _check_is_recipe(self, base: Node, text: str, name: str) -> None:
        """Stop at a file that is not a recipe, and quote nothing of it: a stranger's recipe may name a private file."""
        try:
            keys = list(map(str, read_yaml(text, name)))
        except (RecipeError, TypeError):  # TypeError: it holds a number, or nothing
            keys = []
        legal = ["extends", *Recipe.model_fields]
        recipe_keys = [key for key in keys if key in legal or nearest(key, legal)]
        if not keys or recipe_keys != keys or not {*keys} & {*legal}:
            argument = quote(name)
            self.stop(base.problem(f"`extends`: {name!r} is no recipe; `probe-kd check {argument}` says more of one"))

    def option(self, node: Node, option: str) -> Node:
        """Set one value of the recipe, as in `stages.0.epochs=5`."""
        match = re.fullmatch(rf"({_STEP}(?:\.{_STEP})*)=(.*)", option, re.DOTALL)
        if match is None:
            self.stop(Problem("expected KEY=VALUE, as in `stages.0.epochs=5`", source=f"--set {option}"))
        path, name = match[1], f"--set {match[1]}"
        indent = " " * (len(path) + 1)  # so that columns count from the start of the option
        steps = [step.strip('"') for step in re.findall(_STEP, path)]
        if len(steps) > MAX_LEVELS or CONTROL.search(path):
            expected = f"a path of at most {MAX_LEVELS} keys, in one line of text"
            self.stop(Problem(f"expected {expected}, got {ascii(path)[:80]}", source="--set"))
        value = self.add_text(read_yaml(indent + match[2], name, option), name, option, tuple(steps))
        if steps[0] == "extends":
            self.stop(value.problem("a file says itself what it extends, before anything is set"))
        try:
            return replaced(node, steps, value)
        except KeyError as refusal:
            self.problems.append(value.problem(refusal.args[0]))
            return node

    def recipe(self, node: Node, *, tolerant: bool) -> tuple[Recipe, list[Problem], list[KeyPath]]:
        """Validate strictly: neither text nor `true` is a number. Returns the recipe, `form` and `broken` of Source."""
        values = node.plain
        recipe, errors = _validated(values)
        form_problems = [
            form_problem(Recipe, node, error) for error in errors if not is_misspelt_key(Recipe, error, errors)
        ]
        flawed = {(problem.source, problem.line, problem.column) for problem in self.problems}
        form = [problem for problem in form_problems if (problem.source, problem.line, problem.column) not in flawed]
        if not (errors or self.problems):
            assert recipe is not None
            return recipe, [], []
        broken: list[KeyPath] = []
        if tolerant and not self.problems:
            recipe, broken = _without_errors(node, values, errors)
        if recipe is None or self.problems:
            self.stop(*form or [Problem("this is no recipe")] * (not self.problems))
        return recipe, form, broken


def _validated(values: Any) -> tuple[Recipe | None, list[Any]]:
    """The recipe, or pydantic's errors. Validates JSON, because only there a list is strictly a tuple as well."""
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as refusal:
        # Lone surrogates are not JSON. `flaws` has reported them already.
        errors = [error for error in refusal.errors() if error["type"] != "json_invalid"]
        return None, errors or [{"type": "none", "loc": (), "msg": "this is no recipe", "input": None}]


def _without_errors(node: Node, values: Any, errors: Sequence[Any]) -> tuple[Recipe | None, list[KeyPath]]:
    """Remove or repair each error. Returns the recipe, None if that fails, and the places that were changed."""
    broken: list[KeyPath] = []
    repaired: list[KeyPath] = []
    for _ in range(3):  # what is left after a mistake may be another
        for error in reversed(errors):
            steps, _ = locate(node, error["loc"])
            if any(steps[: len(place)] == place for place in repaired):  # removed with the section around it
                continue
            repaired.append(steps)
            if not _repair(values, steps, error):  # for a missing key, `steps` lead to its section
                return None, broken
            legal = fields_at(Recipe, error["loc"][:-1]) if error["type"] == "extra_forbidden" else {}
            suggestions = [(*steps[:-1], key) for key in legal if f"'{key}'" in nearest(str(steps[-1]), legal)]
            broken += [steps, *suggestions]
        recipe, errors = _validated(values)
        if recipe is not None:
            return recipe, broken
    return None, broken


# A number out of bounds becomes the bound, or the next whole number inside.
_BOUNDS = {
    "greater_than_equal": ("ge", 0),
    "greater_than": ("gt", 1),
    "less_than_equal": ("le", 0),
    "less_than": ("lt", -1),
}


def _repair(values: Any, steps: KeyPath, error: Any) -> bool:
    """Bring a number into its bounds, or remove any other wrong value. False for what cannot be removed alone."""
    *parents, last = steps or ("",)
    for step in parents:
        values = values[step]
    if not steps or isinstance(values, list) or last not in values:  # without an item, the indices of the others change
        return False
    bound, offset = _BOUNDS.get(error["type"], ("", 0))
    if bound:
        values[last] = error["ctx"][bound] + offset
    else:
        del values[last]
    return True
