"""Plain data from an untrusted YAML file, in bounded time and memory, without running code."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from probe_kd.errors import CONTROL, Problem, RecipeError

KeyPath = tuple[str | int, ...]

# A recipe has about 150 nodes and 6 levels. At these limits the parser takes a few seconds.
MAX_NODES = 10_000
MAX_LEVELS = 32
MAX_INT = 2**53  # floats hold every whole number up to it, and timm's schedules compute in floats


def read_yaml(text: str, name: str, shown: str | None = None) -> Any:
    """Parse a YAML document into ruamel's maps and lists, which know the lines of their keys.

    Raises RecipeError, which quotes `shown` instead of the text, if given.
    """
    try:
        problem = _bad_character(text) or _beyond_limits(YAML().parse(text))
        if problem is None:
            return YAML(typ="rt").load(text)
    except MarkedYAMLError as refusal:
        message = " ".join(str(part) for part in (refusal.context, refusal.problem) if part)
        problem = Problem(f"not YAML: {message}", *_place(refusal.problem_mark))
    except Exception as refusal:  # the parser raises many types of errors
        problem = Problem(f"not YAML: {' '.join(str(refusal).split()) or type(refusal).__name__}")
    raise RecipeError(name, [problem], text if shown is None else shown)


def _bad_character(text: str) -> Problem | None:
    match = CONTROL.search(text)
    if match is None:
        return None
    before = text[: match.start()].split("\n")
    return Problem(f"character {match[0]!a} does not belong in a text", len(before), len(before[-1]) + 1)


def _beyond_limits(events: Iterable[Any]) -> Problem | None:
    """Why a document must not be built. Events are counted one by one, so that a YAML bomb is never expanded."""
    total = 0
    finished: dict[str, tuple[int, int]] = {}  # nodes and levels of each anchor
    unfinished: list[tuple[str, int]] = []  # open collections: anchor, and number of nodes before it
    heights = [0]
    for event in events:
        anchor, height = getattr(event, "anchor", None) or "", 0
        message = _why_forbidden(event, finished)
        if message:
            return Problem(message, *_place(event.start_mark))
        if isinstance(event, CollectionStartEvent):
            unfinished.append((anchor, total))
            heights.append(0)
            total += 1
        elif isinstance(event, CollectionEndEvent):
            (anchor, nodes_before), height = unfinished.pop(), heights.pop()
            finished[anchor] = total - nodes_before, height
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


def _why_forbidden(event: Any, finished: Mapping[str, Any]) -> str:
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
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        return [node.plain for node in self.value] if isinstance(self.value, list) else self.value


def node_of(tree: Any, source: str, line: int = 1, column: int = 1) -> Node:
    """Convert ruamel's maps and lists, whose `lc` has the lines, to Nodes."""
    marks, value = getattr(tree, "lc", None), tree

    def inner(item: Any, key: Any, place: Callable[[Any], tuple[int, int]]) -> Node:
        has_own_line = marks is not None and key in (marks.data or ())  # what `<<` merges has no line of its own
        return node_of(item, source, *(_from_one(place(key)) if has_own_line else (line, column)))

    if isinstance(tree, Mapping):
        value = {str(key): inner(item, key, marks.key) for key, item in tree.items()} if marks else {}
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        value = [inner(item, index, marks.item) for index, item in enumerate(tree)] if marks else []
    elif tree is not None:
        value = next((kind(tree) for kind in (bool, int, float, str) if isinstance(tree, kind)), str(tree))
    return Node(value, source, line, column)


def plain_node(value: Any, place: Node) -> Node:
    """A plain value as Nodes, as if it were written at the place of another."""
    if isinstance(value, Mapping):
        value = {str(key): plain_node(item, place) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [plain_node(item, place) for item in value]
    return replace(place, value=value)


def with_plain(node: Node, plain: Any) -> Node:
    """The tree with plain values in place of its own, of which some may be left out, at the places of its own."""
    if isinstance(plain, Mapping):
        return replace(node, value={key: with_plain(node.value[key], item) for key, item in plain.items()})
    if isinstance(plain, list):
        return replace(node, value=[with_plain(*both) for both in zip(node.value, plain, strict=True)])
    return replace(node, value=plain)


def read_value(text: str, name: str) -> Any:
    """Parse the value of a command-line option into dicts, lists and scalars. Raises RecipeError."""
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
    """`over` merged into `under`: mappings recursively, key by key; `over` replaces any other value."""
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    base = under.value
    changes = {key: merged(base[key], node) if key in base else node for key, node in over.value.items()}
    return replace(over, value={**base, **changes})


def replaced(node: Node, steps: Sequence[str], new: Node, prefix: str = "") -> Node:
    """A copy of the tree with another value at a path. Missing mappings on the path are created.

    Raises KeyError with a message for a path that cannot exist.
    """
    if not steps:
        return new
    if isinstance(node.value, list):
        count, legal = len(node.value), f"`{prefix}.0` to `{prefix}.{len(node.value) - 1}`"
        if not re.fullmatch("[0-9]{1,4}", steps[0]) or int(steps[0]) >= count:
            raise KeyError(f"there is no `{prefix}.{steps[0]}`: `{prefix}` is a list" + (f", {legal}" if count else ""))
        index = int(steps[0])
        inner = replaced(node.value[index], steps[1:], new, f"{prefix}.{index}")
        return replace(node, value=[*node.value[:index], inner, *node.value[index + 1 :]])
    if node.value is not None and not isinstance(node.value, dict):
        word = str(node.value).lower() if isinstance(node.value, bool) else repr(node.value)
        raise KeyError(f"`{prefix}` is {word}, and nothing is under it; set it as a whole: `{prefix}={{...}}`")
    mapping = node.value or {}
    # Names of layers contain dots, so the longest existing key is tried first.
    joined = [(".".join(steps[:count]), steps[count:]) for count in range(len(steps), 1, -1)]
    key, rest = next(((key, rest) for key, rest in joined if key in mapping), (steps[0], steps[1:]))
    inner = replaced(mapping.get(key, replace(new, value=None)), rest, new, f"{prefix}.{key}".lstrip("."))
    return replace(node, value={**mapping, key: inner})


def flaws(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """(path, message) of every value that no recipe may contain, whatever its key."""
    name = ".".join(map(str, path))
    if isinstance(node, Mapping):
        if len({str(key) for key in node}) < len(node):
            yield path, f"`{name}`: two keys here are written alike"
        for key, value in node.items():
            yield from list(flaws(str(key), (*path, "a key"))) or flaws(value, (*path, str(key)))
    elif isinstance(node, str):
        if CONTROL.search(node) or len(node.splitlines()) > 1:
            yield path, f"`{name}`: expected one line of text, got {ascii(node)[:80]}"
    elif isinstance(node, Sequence):
        for index, item in enumerate(node):
            yield from flaws(item, (*path, index))
    elif isinstance(node, float) and not math.isfinite(node):
        yield path, f"`{name}`: expected a finite number, got {float(node)}"
    elif isinstance(node, int) and abs(node) > MAX_INT:
        yield path, f"`{name}`: this number is too large"


def locate(node: Node, path: KeyPath) -> tuple[KeyPath, Node]:
    """The steps of `path` that exist in the document, and the node at the last of them.

    The other steps are keys that are missing, or inserted by pydantic, such as the branch of a union.
    """
    existing: list[str | int] = []
    for step in path:
        inner = node.value
        is_item = isinstance(inner, list) and isinstance(step, int) and step < len(inner)
        if is_item or (isinstance(inner, dict) and step in inner):
            node = inner[step]
            existing.append(step)
    return tuple(existing), node


def _from_one(place: tuple[int, int]) -> tuple[int, int]:
    return place[0] + 1, place[1] + 1


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)
