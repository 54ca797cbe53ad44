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
        └── Stopped     a run that was asked to stop, and has written a checkpoint

The message is written for the person who has to mend the cause: what is wrong, where, what was expected, the nearest
legal thing. The command line prints it and exits with status 2; a traceback is always a defect of ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches


class ProbeKDError(Exception):
    """The root: `except ProbeKDError` catches all that this package raises on purpose."""


class TapError(ProbeKDError):
    pass


class TraceError(ProbeKDError):
    pass


class WeightsError(ProbeKDError):
    pass


class MatchError(ProbeKDError):
    pass


class AdapterError(ProbeKDError):
    pass


class LossError(ProbeKDError):
    pass


class DataError(ProbeKDError):
    pass


class RunError(ProbeKDError):
    pass


class Stopped(RunError):
    pass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe. `line` and `column` count from 1; 0 when the problem has no single place.

    `source` names what it stands in, where that is not the recipe's own file but one that it extends, or an option.
    """

    message: str
    line: int = 0
    column: int = 0
    source: str = ""


class RecipeError(ProbeKDError):
    """All problems of one recipe at once, each as `file:line:column: message` with the offending line and a caret.

    `text` is that of the file `source`, or maps the name of each source to its text.
    """

    def __init__(self, source: str, problems: Sequence[Problem], text: str | Mapping[str, str] = "") -> None:
        self.source = source
        texts = {source: text} if isinstance(text, str) else text
        placed = [replace(problem, source=problem.source or source) for problem in problems]
        self.problems = tuple(sorted(placed, key=lambda it: (it.source != source, it.source, it.line, it.column)))
        super().__init__("\n".join(_show(problem, texts.get(problem.source, "")) for problem in self.problems))
        self._given = source, tuple(problems), dict(texts)

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[str, tuple[Problem, ...], Mapping[str, str]]]:
        """Made anew from what it was given: else a process that raises it to another breaks the pool they are in."""
        return type(self), self._given


def _show(problem: Problem, text: str) -> str:
    lines = text.split("\n")
    if not problem.line or problem.line > len(lines):
        return f"{problem.source}: {problem.message}"
    place = "" if problem.source.startswith("--") else f":{problem.line}:{problem.column}"
    caret = f"{' ' * (problem.column - 1)}^"
    return f"{problem.source}{place}: {problem.message}\n    {lines[problem.line - 1].rstrip()}\n    {caret}"


def demand(value: object, kind: type, what: str, error: type[ProbeKDError], expected: str) -> None:
    """Raise `error` where an argument is of another kind, before it fails somewhere deep with an AttributeError."""
    if not isinstance(value, kind):
        shown = repr(value).partition("\n")[0][:60]
        raise error(f"{what} is {shown} ({type(value).__name__}); expected {expected}")


MAX_WORD = 200


def nearest(word: str, legal: Iterable[str], count: int = 3) -> str:
    """The tail of a sentence, `; did you mean 'a' or 'b'?`, or an empty string when nothing legal is near."""
    short = [name for name in legal if len(name) <= MAX_WORD]  # comparing takes as long as both are, multiplied
    close = get_close_matches(word[:MAX_WORD], short, n=count, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(name) for name in close)}?"


def nearest_truth(value: object) -> str:
    """The same tail for what is no true or false: words that were truths in YAML before 1.2, and are text now."""
    truths = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
    word = truths.get(str(value).lower())
    return f"; did you mean {word}?" if word else ""
