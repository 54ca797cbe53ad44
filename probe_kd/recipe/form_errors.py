"""pydantic's errors in the words of a recipe: what is wrong at which line, and what was expected there.

`recipe` is the pydantic model of the whole recipe, whose fields are the keys that may be meant.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from probe_kd.errors import Problem, nearest, nearest_truth
from probe_kd.recipe.yaml_tree import Node, locate

# What pydantic asks for, in the words of a recipe.
_WANTED = {
    **dict.fromkeys(("model_type", "dict_type"), "a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "string_type": "text",
    "finite_number": "a finite number",
}


def form_problem(recipe: type[BaseModel], node: Node, error: Any) -> Problem:
    steps, here = locate(node, error["loc"])
    last = error["loc"][-1] if error["loc"] else ""
    where, by_option = ".".join(map(str, steps)), here.source.startswith("--set")
    if error["type"] == "extra_forbidden":
        legal = list(fields_at(recipe, error["loc"][:-1]))
        hint = nearest(str(last), legal) or f"; the keys here: {', '.join(legal)}"
        return here.problem((f"there is no `{where}`" if by_option else f"unknown key `{last}`") + hint)
    if error["type"] == "missing" and isinstance(last, str):
        field = fields_at(recipe, error["loc"][:-1]).get(last)
        wanted = f"; expected {_wanted(field.annotation)}" if field else ""
        beside = locate(node, steps[:-1])[1].value
        meant = nearest(str(steps[-1]), {*beside} - {steps[-1]}) if by_option and isinstance(beside, dict) else ""
        return here.problem(f"`{'.'.join(map(str, (*steps, last)))}` is missing{meant or wanted}")
    return here.problem(f"`{where}`: {complaint(error)}")


def is_echo(recipe: type[BaseModel], error: Any, errors: Sequence[Any]) -> bool:
    """Whether a key is missing only because it is written wrong, which is told."""
    *section, key = error["loc"] or ("",)
    others = [other["loc"] for other in errors if other["type"] == "extra_forbidden"]
    written = [str(loc[-1]) for loc in others if list(loc[:-1]) == section]
    legal = list(fields_at(recipe, section)) if error["type"] == "missing" and written else []
    return any(f"did you mean {key!r}" in nearest(name, legal) for name in written if key in legal)


def complaint(error: Any) -> str:
    """What one error of pydantic's says, without its names for things."""
    given, kind, context = error["input"], error["type"], error.get("ctx", {})
    word = json.dumps(given) if isinstance(given, bool | None) else repr(given)
    got = "" if isinstance(given, dict | list) else f", got {word}"
    if kind in _WANTED:
        got = got or (", got a mapping" if isinstance(given, dict) else ", got a list")
        return f"expected {_WANTED[kind]}{got}{nearest_truth(given) if kind.startswith('bool') else ''}"
    if kind == "literal_error":
        legal = context["expected"]
        near = nearest(str(given), legal.split("'")[1::2])
        return f"expected {legal}{got}{near}"
    if kind == "missing":
        return "a value is missing"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        return (
            f"expected {bound} {context.get('min_length', context.get('max_length'))}, got {context['actual_length']}"
        )
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected a number")
    return f"{message[:1].lower()}{message[1:]}{got}"


def fields_at(recipe: type[BaseModel], where: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """The keys of a section, by pydantic's steps to it."""
    here: Any = recipe
    for step in where:
        here = _below(here, step)
    here = _below(here, None)
    return here.model_fields if isinstance(here, type) and issubclass(here, BaseModel) else {}


def _below(kind: Any, step: str | int | None) -> Any:
    """The type of what is under a key, an index or a branch's tag; without a step, that of a section itself."""
    origin, inner = get_origin(kind), [it for it in get_args(kind) if it is not type(None)]
    if origin in (Union, UnionType):
        tagged = [it for it in inner if any(isinstance(tag, Tag) and tag.tag == step for tag in get_args(it)[1:])]
        return tagged[0] if tagged else _below(inner[0], step)
    if origin is Annotated:
        return _below(inner[0], step)
    if step is None:
        return kind
    if origin in (dict, list, tuple):
        return inner[-1]
    return kind.model_fields[step].annotation if step in getattr(kind, "model_fields", ()) else kind


def _wanted(kind: Any) -> str:
    kind = _below(kind, None)
    words = {int: "a whole number", float: "a number", str: "text"}
    return "a list" if get_origin(kind) in (list, tuple) else words.get(kind, "a mapping")
