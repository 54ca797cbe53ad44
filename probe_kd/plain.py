"""Plain data out of a YAML file that nobody vouches for: in bounded time and memory, and none of it is code."""

import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from probe_kd.errors import Problem, RecipeError

Path_ = tuple[str | int, ...]

# Recipes have 2 kB, 150 nodes and 6 levels; the parser takes a few seconds where all of these are used up.
MAX_BYTES = 250_000
MAX_NODES = 10_000
MAX_LEVELS = 32
MAX_INT = 2**53  # up to it a float knows every whole number, and timm's schedules compute in floats

# What a terminal obeys instead of showing it, and halves of characters, which cannot be printed at all.
_CONTROL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, or ValueError for what is no file, no text, or larger than MAX_BYTES."""
    if not stat.S_ISREG(path.stat().st_mode):  # nobody waits for a FIFO, or for the end of /dev/zero
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        found = file.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1000} kB")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        line = found.count(b"\n", 0, refusal.start) + 1
        raise ValueError(f"its line {line} is not UTF-8 text") from None


def reason(error: Exception) -> str:
    """Why a file was not read or written, without its name."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def read_yaml(text: str, name: str) -> Any:
    """The mapping that a YAML document holds, which knows the lines of its keys. Raises RecipeError."""
    try:
        problem = _bad_character(text) or _too_much(YAML().parse(text))
        if problem is None:
            tree = YAML(typ="rt").load(text)
            if isinstance(tree, Mapping):
                return tree
            problem = Problem("expected a mapping with `student`, `data` and `stages`", 1, 1)
    except MarkedYAMLError as refusal:
        message = " ".join(str(part) for part in (refusal.context, refusal.problem) if part)
        problem = Problem(f"not YAML: {message}", *_place(refusal.problem_mark))
    except Exception as refusal:  # on what is not YAML, the parser fails in many ways
        problem = Problem(f"not YAML: {' '.join(str(refusal).split()) or type(refusal).__name__}")
    raise RecipeError(name, [problem], text)


def _bad_character(text: str) -> Problem | None:
    found = _CONTROL.search(text)
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


def plain(node: Any) -> Any:
    """The tree in dicts, lists and scalars."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [plain(item) for item in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return None if node is None else str(node)


def flaws(node: Any, where: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """(place, message) of every value that no recipe can mean."""
    name = ".".join(map(str, where))
    if isinstance(node, Mapping):
        if len({str(key) for key in node}) < len(node):
            yield where, f"`{name}`: two keys here are written alike"
        for key, value in node.items():
            yield from list(flaws(str(key), (*where, "a key"))) or flaws(value, (*where, str(key)))
    elif isinstance(node, str):
        if _CONTROL.search(node) or len(node.splitlines()) > 1:
            yield where, f"`{name}`: expected one line of text, got {ascii(node)[:80]}"
    elif isinstance(node, Sequence):
        for index, item in enumerate(node):
            yield from flaws(item, (*where, index))
    elif isinstance(node, float) and not math.isfinite(node):
        yield where, f"`{name}`: expected a finite number, got {float(node)}"
    elif isinstance(node, int) and abs(node) > MAX_INT:
        yield where, f"`{name}`: this number is too large"


def locate(tree: Any, where: Path_) -> tuple[Path_, int, int]:
    """What of `where` the file has, with its line and column, from 1: of the last key, or of the list item.

    The rest are steps that pydantic puts in, such as the branch of a union, and what is missing.
    """
    found: list[str | int] = []
    line, column = 1, 1
    node: Any = tree  # ruamel's maps and lists, which keep their lines in `lc`
    for step in where:
        if hasattr(node, "keys"):
            key = next((key for key in node if str(key) == str(step)), None)
            if key is None:
                continue
            if key in node.lc.data:  # what `<<` merges in has no line here
                line, column = _from_one(node.lc.key(key))
            node = node[key]
        elif hasattr(node, "append") and isinstance(step, int) and step < len(node):
            line, column = _from_one(node.lc.item(step))
            node = node[step]
        else:
            continue
        found.append(step)
    return tuple(found), line, column


def _from_one(place: tuple[int, int]) -> tuple[int, int]:
    return place[0] + 1, place[1] + 1


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)
