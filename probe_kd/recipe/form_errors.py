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

# What a value should have been, by pydantic's type of error.
_EXPECTED = {
    **dict.fromkeys(("model_type", "dict_type"), "a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "string_type": "text",
    "finite_number": "a finite number",
}


def form_problem(recipe: type[BaseModel], node: Node, error: Any) -> Problem:
    path, value = locate(node, error["loc"])
    last = error["loc"][-1] if error["loc"] else ""
    dotted, by_option = ".".join(map(str, path)), value.source.startswith("--set")
    if error["type"] == "extra_forbidden":
        legal = list(fields_at(recipe, error["loc"][:-1]))
        hint = nearest(str(last), legal) or f"; the keys here: {', '.join(legal)}"
        return value.problem((f"there is no `{dotted}`" if by_option else f"unknown key `{last}`") + hint)
    if error["type"] == "missing" and isinstance(last, str):
        field = fields_at(recipe, error["loc"][:-1]).get(last)
        expected = f"; expected {_expected_type(field.annotation)}" if field else ""
        siblings = locate(node, path[:-1])[1].value
        hint = nearest(str(path[-1]), {*siblings} - {path[-1]}) if by_option and isinstance(siblings, dict) else ""
        return value.problem(f"`{'.'.join(map(str, (*path, last)))}` is missing{hint or expected}")
    return value.problem(f"`{dotted}`: {complaint(error)}")


def is_misspelt_key(recipe: type[BaseModel], error: Any, errors: Sequence[Any]) -> bool:
    """Whether a key is missing only because it is misspelt, which is an error of its own."""
    *section, key = error["loc"] or ("",)
    unknown_keys = [other["loc"] for other in errors if other["type"] == "extra_forbidden"]
    misspelt = [str(loc[-1]) for loc in unknown_keys if list(loc[:-1]) == section]
    legal = list(fields_at(recipe, section)) if error["type"] == "missing" and misspelt else []
    return any(f"did you mean {key!r}" in nearest(name, legal) for name in misspelt if key in legal)


def complaint(error: Any) -> str:
    """The message of one error of pydantic, in the words of a recipe."""
    given, kind, context = error["input"], error["type"], error.get("ctx", {})
    shown = json.dumps(given) if isinstance(given, bool | None) else repr(given)
    got = "" if isinstance(given, dict | list) else f", got {shown}"
    if kind in _EXPECTED:
        got = got or (", got a mapping" if isinstance(given, dict) else ", got a list")
        return f"expected {_EXPECTED[kind]}{got}{nearest_truth(given) if kind.startswith('bool') else ''}"
    if kind == "literal_error":
        legal = context["expected"]
        hint = nearest(str(given), legal.split("'")[1::2])
        return f"expected {legal}{got}{hint}"
    if kind == "missing":
        return "a value is missing"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        return (
            f"expected {bound} {context.get('min_length', context.get('max_length'))}, got {context['actual_length']}"
        )
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected a number")
    return f"{message[:1].lower()}{message[1:]}{got}"


def fields_at(recipe: type[BaseModel], steps: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """The fields of a section. `steps` is the `loc` of pydantic's errors in it."""
    kind: Any = recipe
    for step in steps:
        kind = _inner_type(kind, step)
    kind = _inner_type(kind, None)
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return {field.alias or name: field for name, field in fields.items()}


def _inner_type(kind: Any, step: str | int | None) -> Any:
    """The type under a key, an index or the tag of a union's branch. With None, the type without Annotated and None."""
    origin, arguments = get_origin(kind), [branch for branch in get_args(kind) if branch is not type(None)]
    if origin in (Union, UnionType):
        matching = [
            branch
            for branch in arguments
            if any(isinstance(tag, Tag) and tag.tag == step for tag in get_args(branch)[1:])
        ]
        return matching[0] if matching else _inner_type(arguments[0], step)
    if origin is Annotated:
        return _inner_type(arguments[0], step)
    if step is None:
        return kind
    if origin in (dict, list, tuple):
        return arguments[-1]
    return kind.model_fields[step].annotation if step in getattr(kind, "model_fields", ()) else kind


def _expected_type(kind: Any) -> str:
    kind = _inner_type(kind, None)
    words = {int: "a whole number", float: "a number", str: "text"}
    return "a list" if get_origin(kind) in (list, tuple) else words.get(kind, "a mapping")
