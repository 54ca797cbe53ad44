"""Every error this package raises on purpose.

    ProbeKDError
    ├── TapError        a tap that cannot be parsed, found, or captured
    ├── TraceError      a model that cannot be built or run for tracing
    ├── WeightsError    a checkpoint that cannot be read, or does not fit the model
    ├── MatchError      two traces with nothing to pair
    ├── AdapterError    two features that no adapter can bring together
    ├── LossError       a loss called with what it cannot compare
    ├── DataError       images or labels that cannot be read, or do not fit the models
    ├── RecipeError     a recipe that cannot be run; carries every problem found, with its line
    └── RunError        a run that cannot start, or cannot go on
        ├── Stopped     a run that was asked to stop, and has written a checkpoint
        └── PeerLost    a run of several processes of which another one has ended

`MatchWarning` is a warning of Python's `warnings`: pairs that can be trained, but are probably not what was meant.

The message is written for the person who has to mend the cause: what is wrong, where, what was expected, the nearest
legal thing. The command line prints it and exits with status 2; a traceback is always a defect of ours.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TypeVar

# What a terminal obeys instead of showing it, and halves of characters, which cannot be printed at all.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def visible(text: str) -> str:
    """Replace each control character of a text by a symbol, so that it is safe to print: `\x1b` becomes `␛`.

    Line ends and tabs are kept. Names of files and layers, values of a recipe, and messages of other libraries may come
    from anybody. Control characters in them could hide lines, rename the window, or run commands.
    """
    return CONTROL.sub(_picture, text.replace("\r\n", "\n").replace("\r", "\u240d"))


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


class ProbeKDError(Exception):
    """The root: `except ProbeKDError` catches all that this package raises on purpose.

    Its text is free of control characters. `in_all_processes` is true where every process of a run raises the same, so
    that only the first has to show it.
    """

    in_all_processes = False

    def __str__(self) -> str:
        return visible(super().__str__())


Error = TypeVar("Error", bound=ProbeKDError)


def for_all(error: Error) -> Error:
    """Mark an error as one that every process of a run raises, and return it."""
    error.in_all_processes = True
    return error


class TapError(ProbeKDError):
    pass


class TraceError(ProbeKDError):
    pass


class WeightsError(ProbeKDError):
    pass


class MatchError(ProbeKDError):
    pass


class MatchWarning(UserWarning):
    """A pair of layers that can be compared, but is probably not what was meant."""


class AdapterError(ProbeKDError):
    pass


class LossError(ProbeKDError):
    pass


class DataError(ProbeKDError):
    """`key` names the key of a recipe's `data:` section that caused the error, if it is a single one."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class RunError(ProbeKDError):
    pass


class Stopped(RunError):
    pass


class PeerLost(RunError):
    pass


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe. `line` and `column` count from 1, and are 0 if the problem has no single place.

    `source` names the file that the recipe extends, or the option, if the problem is not in the recipe's own file.
    """

    message: str
    line: int = 0
    column: int = 0
    source: str = ""


class RecipeError(ProbeKDError):
    """All problems of one recipe, each as `file:line:column: message` with the offending line and a caret.

    `text` is the text of the file `source`, or maps the name of each source to its text.
    """

    in_all_processes = True

    def __init__(self, source: str, problems: Sequence[Problem], text: str | Mapping[str, str] = "") -> None:
        self.source = source
        texts = {source: text} if isinstance(text, str) else text
        placed = [replace(problem, source=problem.source or source) for problem in problems]
        self.problems = tuple(
            sorted(placed, key=lambda item: (item.source != source, item.source, item.line, item.column))
        )
        super().__init__("\n".join(_show(problem, texts.get(problem.source, "")) for problem in self.problems))
        self._arguments = source, tuple(problems), dict(texts)

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[str, tuple[Problem, ...], Mapping[str, str]]]:
        """Rebuild from the constructor's arguments. Otherwise an error breaks a pool of processes."""
        return type(self), self._arguments


def _show(problem: Problem, text: str) -> str:
    lines = text.split("\n")
    source = problem.source.replace("\n", "\u240a")
    place = "" if problem.source.startswith("--") or not problem.line else f":{problem.line}:{problem.column}"
    if not problem.line or problem.line > len(lines) or not text:
        return f"{source}{place}: {problem.message}"
    line, column = _around(lines[problem.line - 1].rstrip(), problem.column)
    return f"{source}{place}: {problem.message}\n    {line}\n    {' ' * (column - 1)}^"


def _around(line: str, column: int, most: int = 200) -> tuple[str, int]:
    """Return the part of a long line around a column, and the column in that part."""
    start = max(0, min(column - most // 2, len(line) - most))
    return line[start : start + most], column - start


def demand(value: object, kind: type, name: str, error: type[ProbeKDError], expected: str) -> None:
    """Raise `error` if `value` is not a `kind`, before it causes an AttributeError deep inside."""
    if not isinstance(value, kind):
        shown = repr(value).partition("\n")[0][:60]
        raise error(f"{name} is {shown} ({type(value).__name__}); expected {expected}")


MAX_WORD = 200


def nearest(word: str, legal: Iterable[str], count: int = 3) -> str:
    """Return the end of a sentence, `; did you mean 'a' or 'b'?`, or an empty string if no legal word is near."""
    short = [
        name for name in legal if len(name) <= MAX_WORD
    ]  # the time to compare grows with the product of the lengths
    close = get_close_matches(word[:MAX_WORD], short, n=count, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(name) for name in close)}?"


def nearest_truth(value: object) -> str:
    """Return the same end of a sentence for words that YAML before 1.2 read as true or false."""
    truths = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
    word = truths.get(str(value).lower())
    return f"; did you mean {word}?" if word else ""


def short(error: BaseException) -> str:
    """Return the message of another library's error in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
