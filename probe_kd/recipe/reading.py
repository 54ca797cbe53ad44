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
from probe_kd.recipe.form_errors import fields_at, form_problem, is_echo
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.yaml_tree import (
    MAX_LEVELS,
    Node,
    Path_,
    flaws,
    locate,
    merged,
    node_of,
    read_yaml,
    replaced,
)

MAX_FILES = 8  # that extend each other
_STEP = r'(?:"[^"]*"|[^=".]+)'  # of a path: a key, in quotes where it has dots


@dataclass(frozen=True)
class Source:
    """A recipe with the files and options that it came from, which know the place of every key.

    `form` are its mistakes of form, where it was read with `tolerant`: then `recipe` is what is left without them, and
    `broken` has the places that are not as they were written.
    """

    recipe: Recipe
    name: str
    node: Node
    texts: Mapping[str, str]
    form: tuple[Problem, ...] = ()
    broken: tuple[Path_, ...] = ()

    def problem(self, where: Path_, message: str) -> Problem:
        return locate(self.node, where)[1].problem(message)

    def error(self, problems: Sequence[Problem]) -> RecipeError:
        return RecipeError(self.name, list(dict.fromkeys(problems)), self.texts)


def load(path: str | Path, seed: int | None = None, sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """Read a recipe file, and those that it extends.

    `sets` change it, each as `stages.0.epochs=5`, with a value in YAML; `seed` replaces its own.

    Raises RecipeError with every problem of form: YAML, keys, types, bounds. With `tolerant`, they are in `form` of
    what is returned, as long as a recipe is left without them, so that `plan` can tell what else is wrong beside them.
    """
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as refusal:
        raise RecipeError(str(path), [Problem(f"cannot read the recipe: {reason(refusal)}{_beside(path)}")]) from None
    source = parse(text, str(path), sets, tolerant=tolerant)
    return source if seed is None else replace(source, recipe=source.recipe.model_copy(update={"seed": seed}))


def _beside(path: str | Path) -> str:
    """The recipe that may have been meant."""
    name = Path(path).name
    try:
        return nearest(name, [file.name for file in Path(path).absolute().parent.glob("*.y*ml") if file.name != name])
    except (OSError, ValueError):  # a path that no system takes
        return ""


def parse(text: str, name: str = "recipe", sets: Sequence[str] = (), *, tolerant: bool = False) -> Source:
    """`load` from text; what it extends lies beside the file `name`. Nothing that it names is imported or built."""
    reading = _Reading(name)
    node = reading.file(text.removeprefix("\ufeff"), name, ())
    for option in sets:
        node = reading.option(node, option)
    recipe, form, broken = reading.recipe(node, tolerant=tolerant)
    return Source(recipe, name, node, reading.texts, tuple(form), tuple(broken))


class _Reading:
    """The files and options of one recipe while they are read: their texts, and what is wrong with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.texts: dict[str, str] = {}
        self.problems: list[Problem] = []

    def stop(self, *problems: Problem) -> NoReturn:
        raise RecipeError(self.name, list(dict.fromkeys([*self.problems, *problems])), self.texts)

    def noted(self, tree: Any, name: str, text: str, under: Path_ = ()) -> Node:
        """What was read, with its places; it stands at `under` in the recipe."""
        self.texts[name] = text
        node = node_of(tree, name)
        for where, message in flaws(tree, under):
            self.problems.append(locate(node, where[len(under) :])[1].problem(message))
        return node

    def file(self, text: str, name: str, chain: Sequence[str]) -> Node:
        """A file on top of what it extends; `chain` are the files that extend it."""
        node = self.noted(read_yaml(text, name), name, text)
        if not isinstance(node.value, dict):
            self.stop(node.problem("expected a mapping with `student`, `data` and `stages`"))
        values = dict(node.value)
        base = values.pop("extends", None)
        node = replace(node, value=values)
        return node if base is None else merged(self._base(base, [*chain, name]), node)

    def _base(self, base: Node, chain: Sequence[str]) -> Node:
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
            self.stop(base.problem(f"cannot read {str(path)!r}: {reason(refusal)}{_beside(path)}"))
        self._check_is_recipe(base, text, str(path))
        return self.file(text, str(path), chain)

    def _check_is_recipe(self, base: Node, text: str, name: str) -> None:
        """Of a file that is none, nothing is shown: a recipe from somebody could name any that its reader may read."""
        try:
            keys = list(map(str, read_yaml(text, name)))
        except (RecipeError, TypeError):  # TypeError: it holds a number, or nothing
            keys = []
        legal = ["extends", *Recipe.model_fields]
        meant = [key for key in keys if key in legal or nearest(key, legal)]
        if not keys or meant != keys or not {*keys} & {*legal}:
            where = quote(name)
            self.stop(base.problem(f"`extends`: {name!r} is no recipe; `probe-kd check {where}` says more of one"))

    def option(self, node: Node, option: str) -> Node:
        """The recipe with one value set, as `stages.0.epochs=5` says."""
        found = re.fullmatch(rf"({_STEP}(?:\.{_STEP})*)=(.*)", option, re.DOTALL)
        if found is None:
            self.stop(Problem("expected KEY=VALUE, as in `stages.0.epochs=5`", source=f"--set {option}"))
        path, name = found[1], f"--set {found[1]}"
        before = " " * (len(path) + 1)  # so that columns are those of the whole option
        steps = [step.strip('"') for step in re.findall(_STEP, path)]
        if len(steps) > MAX_LEVELS or CONTROL.search(path):
            expected = f"a path of at most {MAX_LEVELS} keys, in one line of text"
            self.stop(Problem(f"expected {expected}, got {ascii(path)[:80]}", source="--set"))
        value = self.noted(read_yaml(before + found[2], name, option), name, option, tuple(steps))
        if steps[0] == "extends":
            self.stop(value.problem("a file says itself what it extends, before anything is set"))
        try:
            return replaced(node, steps, value)
        except KeyError as refusal:
            self.problems.append(value.problem(refusal.args[0]))
            return node

    def recipe(self, node: Node, *, tolerant: bool) -> tuple[Recipe, list[Problem], list[Path_]]:
        """Strictly: text is no number, and neither is true. With the mistakes of form, where they are tolerated."""
        values = node.plain
        recipe, errors = _validated(values)
        found = [form_problem(Recipe, node, error) for error in errors if not is_echo(Recipe, error, errors)]
        flawed = {(problem.source, problem.line, problem.column) for problem in self.problems}
        form = [it for it in found if (it.source, it.line, it.column) not in flawed]
        if not (errors or self.problems):
            assert recipe is not None
            return recipe, [], []
        broken: list[Path_] = []
        if tolerant and not self.problems:
            recipe, broken = _without(node, values, errors)
        if recipe is None or self.problems:
            self.stop(*form or [Problem("this is no recipe")] * (not self.problems))
        return recipe, form, broken


def _validated(values: Any) -> tuple[Recipe | None, list[Any]]:
    """The recipe, or pydantic's errors. As JSON, since only there a list is a tuple as well."""
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as refusal:
        # Half characters are no JSON, and flaws already.
        errors = [error for error in refusal.errors() if error["type"] != "json_invalid"]
        return None, errors or [{"type": "none", "loc": (), "msg": "this is no recipe", "input": None}]


def _without(node: Node, values: Any, errors: Sequence[Any]) -> tuple[Recipe | None, list[Path_]]:
    """The recipe without what is wrong in it, None where none is left, and the places that were changed."""
    broken: list[Path_] = []
    done: list[Path_] = []
    for _ in range(3):  # what is left after a mistake may be another
        for error in reversed(errors):
            steps, _ = locate(node, error["loc"])
            if any(steps[: len(place)] == place for place in done):  # it went with what was around it
                continue
            done.append(steps)
            if not _mend(values, steps, error):  # of what is missing, the section is left out
                return None, broken
            legal = fields_at(Recipe, error["loc"][:-1]) if error["type"] == "extra_forbidden" else {}
            meant = [(*steps[:-1], key) for key in legal if f"'{key}'" in nearest(str(steps[-1]), legal)]
            broken += [steps, *meant]
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


def _mend(values: Any, steps: Path_, error: Any) -> bool:
    """Put something legal in the place of a mistake, or nothing. False where that would change what else is meant."""
    *way, last = steps or ("",)
    for step in way:
        values = values[step]
    if not steps or isinstance(values, list) or last not in values:  # without an item, the others have other places
        return False
    key, beside = _BOUNDS.get(error["type"], ("", 0))
    if key:
        values[last] = error["ctx"][key] + beside
    else:
        del values[last]
    return True
