"""Plain data out of a YAML file that nobody vouches for: in bounded time and memory, and none of it is code."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from probe_kd.errors import CONTROL, Problem, RecipeError

Path_ = tuple[str | int, ...]

# Recipes have 150 nodes and 6 levels; the parser takes a few seconds where all of these are used up.
MAX_NODES = 10_000
MAX_LEVELS = 32
MAX_INT = 2**53  # up to it a float knows every whole number, and timm's schedules compute in floats


def read_yaml(text: str, name: str, shown: str | None = None) -> Any:
    """What a YAML document holds, which knows the lines of its keys. Raises RecipeError, which shows `shown`."""
    try:
        problem = _bad_character(text) or _too_much(YAML().parse(text))
        if problem is None:
            return YAML(typ="rt").load(text)
    except MarkedYAMLError as refusal:
        message = " ".join(str(part) for part in (refusal.context, refusal.problem) if part)
        problem = Problem(f"not YAML: {message}", *_place(refusal.problem_mark))
    except Exception as refusal:  # on what is not YAML, the parser fails in many ways
        problem = Problem(f"not YAML: {' '.join(str(refusal).split()) or type(refusal).__name__}")
    raise RecipeError(name, [problem], text if shown is None else shown)


def _bad_character(text: str) -> Problem | None:
    found = CONTROL.search(text)
    if found is None:
        return None
    before = text[: found.start()].split("\n")
    return Problem(f"character {found[0]!a} does not belong in a text", len(before), len(before[-1]) + 1)


def _too_much(events: Iterable[Any]) -> Problem | None:
    """What forbids to build a document. Its events come one by one, so a bomb is left before it goes off."""
    total = 0
    finished: dict[str, tuple[int, int]] = {}  # how many nodes and levels an anchor names
    unfinished: list[tuple[str, int]] = []  # collections: their anchors, and the nodes before them
    heights = [0]
    for event in events:
        anchor, height = getattr(event, "anchor", None) or "", 0
        forbidden = _forbidden(event, finished)
        if forbidden:
            return Problem(forbidden, *_place(event.start_mark))
        if isinstance(event, CollectionStartEvent):
            unfinished.append((anchor, total))
            heights.append(0)
            total += 1
        elif isinstance(event, CollectionEndEvent):
            (anchor, before), height = unfinished.pop(), heights.pop()
            finished[anchor] = total - before, height
        elif isinstance(event, AliasEvent):
            nodes, height = finished[anchor]
            total += nodes
        elif isinstance(event, ScalarEvent):
            total += 1
            finished[anchor] = 1, 0
        else:
            continue
        if not isinstance(event, CollectionStartEvent):
            heights[-1] = max(heights[-1], height + 1)
        if total > MAX_NODES or len(unfinished) + height > MAX_LEVELS:
            limit = f"{MAX_NODES} values" if total > MAX_NODES else f"{MAX_LEVELS} levels"
            return Problem(f"more than {limit}: this is no recipe", *_place(event.start_mark))
    return None


def _forbidden(event: Any, finished: Mapping[str, Any]) -> str:
    if isinstance(event, AliasEvent):
        return "" if event.anchor in finished else f"`*{event.anchor}`: no `&{event.anchor}` ends before it"
    anchor = getattr(event, "anchor", None)
    if anchor and anchor in finished:
        return f"`&{anchor}` is there twice"
    if isinstance(event, DocumentStartEvent):
        return "a line of `%`: a recipe is YAML 1.2 without directives" if event.version or event.tags else ""
    tag = getattr(event, "tag", None)
    shown = str(tag).replace("tag:yaml.org,2002:", "!!")
    return f"tag `{shown}`: a recipe is plain data, without tags; leave it out" if tag else ""


@dataclass(frozen=True)
class Node:
    """A value of a document, and where it was written: the place of its key or list item, from 1.

    `value` is a dict or a list of Nodes, or a scalar. `source` names the file.
    """

    value: Any
    source: str
    line: int = 1
    column: int = 1

    def problem(self, message: str) -> Problem:
        return Problem(message, self.line, self.column, self.source)

    @property
    def plain(self) -> Any:
        """In dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        return [node.plain for node in self.value] if isinstance(self.value, list) else self.value


def node_of(tree: Any, source: str, line: int = 1, column: int = 1) -> Node:
    """What ruamel's maps and lists hold, which keep their lines in `lc`."""
    marks, value = getattr(tree, "lc", None), tree

    def inner(item: Any, key: Any, place: Callable[[Any], tuple[int, int]]) -> Node:
        own = marks is not None and key in (marks.data or ())  # what `<<` merges in has no line here
        return node_of(item, source, *(_from_one(place(key)) if own else (line, column)))

    if isinstance(tree, Mapping):
        value = {str(key): inner(item, key, marks.key) for key, item in tree.items()} if marks else {}
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        value = [inner(item, index, marks.item) for index, item in enumerate(tree)] if marks else []
    elif tree is not None:
        value = next((kind(tree) for kind in (bool, int, float, str) if isinstance(tree, kind)), str(tree))
    return Node(value, source, line, column)


def read_value(text: str, name: str) -> Any:
    """A value of an option, in dicts, lists and scalars. Raises RecipeError."""
    tree = read_yaml(text, name)
    node = node_of(tree, name)
    problems = [node.problem(message.replace("``: ", "")) for _, message in flaws(tree)]
    if isinstance(tree, str) and (tree == "None" or re.fullmatch(r"\(.*\)", tree)):
        problems.append(
            node.problem(f"{tree!r} is text here: the value is YAML, `null` for none and `[7, 7]` for several")
        )
    if problems:
        raise RecipeError(name, problems, text)
    return node.plain


def merged(under: Node, over: Node) -> Node:
    """Mappings key by key, all the way down; anything else is replaced."""
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    known = under.value
    news = {key: merged(known[key], node) if key in known else node for key, node in over.value.items()}
    return replace(over, value={**known, **news})


def replaced(node: Node, steps: Sequence[str], new: Node, done: str = "") -> Node:
    """With another value at a path; mappings on the way to it are made where there are none.

    Raises KeyError with a message for a path that leads nowhere.
    """
    if not steps:
        return new
    if isinstance(node.value, list):
        count, legal = len(node.value), f"`{done}.0` to `{done}.{len(node.value) - 1}`"
        if not re.fullmatch("[0-9]{1,4}", steps[0]) or int(steps[0]) >= count:
            raise KeyError(f"there is no `{done}.{steps[0]}`: `{done}` is a list" + (f", {legal}" if count else ""))
        index = int(steps[0])
        inner = replaced(node.value[index], steps[1:], new, f"{done}.{index}")
        return replace(node, value=[*node.value[:index], inner, *node.value[index + 1 :]])
    if node.value is not None and not isinstance(node.value, dict):
        word = str(node.value).lower() if isinstance(node.value, bool) else repr(node.value)
        raise KeyError(f"`{done}` is {word}, and nothing is under it; set it as a whole: `{done}={{...}}`")
    known = node.value or {}
    # Names of layers hold dots: what is there already is found by them.
    joined = [(".".join(steps[:count]), steps[count:]) for count in range(len(steps), 1, -1)]
    key, rest = next(((key, rest) for key, rest in joined if key in known), (steps[0], steps[1:]))
    inner = replaced(known.get(key, replace(new, value=None)), rest, new, f"{done}.{key}".lstrip("."))
    return replace(node, value={**known, key: inner})


def flaws(node: Any, where: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """(place, message) of every value that no recipe can mean."""
    name = ".".join(map(str, where))
    if isinstance(node, Mapping):
        if len({str(key) for key in node}) < len(node):
            yield where, f"`{name}`: two keys here are written alike"
        for key, value in node.items():
            yield from list(flaws(str(key), (*where, "a key"))) or flaws(value, (*where, str(key)))
    elif isinstance(node, str):
        if CONTROL.search(node) or len(node.splitlines()) > 1:
            yield where, f"`{name}`: expected one line of text, got {ascii(node)[:80]}"
    elif isinstance(node, Sequence):
        for index, item in enumerate(node):
            yield from flaws(item, (*where, index))
    elif isinstance(node, float) and not math.isfinite(node):
        yield where, f"`{name}`: expected a finite number, got {float(node)}"
    elif isinstance(node, int) and abs(node) > MAX_INT:
        yield where, f"`{name}`: this number is too large"


def locate(node: Node, where: Path_) -> tuple[Path_, Node]:
    """What of `where` the document has, and the last of it.

    The rest are steps that pydantic puts in, such as the branch of a union, and what is missing.
    """
    found: list[str | int] = []
    for step in where:
        inner = node.value
        is_item = isinstance(inner, list) and isinstance(step, int) and step < len(inner)
        if is_item or (isinstance(inner, dict) and step in inner):
            node = inner[step]
            found.append(step)
    return tuple(found), node


def _from_one(place: tuple[int, int]) -> tuple[int, int]:
    return place[0] + 1, place[1] + 1


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)
