"""The mistakes in a section: places in the recipe, each with a message."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from probe_kd.errors import ProbeKDError
from probe_kd.recipe.yaml_tree import KeyPath

Mistake = tuple[KeyPath, str]


@contextmanager
def noting(mistakes: list[Mistake], *place: str | int) -> Iterator[None]:
    """Append an error of the block to the mistakes, at this place of the recipe, instead of raising it."""
    try:
        yield
    except ProbeKDError as refusal:
        mistakes.append((place, str(refusal)))


def of_teacher(name: str, mistakes: Iterable[Mistake]) -> list[Mistake]:
    """The mistakes of `teacher`, at the place and with the name of one of several teachers."""
    if not name:
        return list(mistakes)
    return [
        ((*teacher_place(name), *place[1:]), naming(name, text)) if place[:1] == ("teacher",) else (place, text)
        for place, text in mistakes
    ]


def teacher_place(name: str) -> KeyPath:
    """The place of a teacher in the recipe; a single one has no name."""
    return ("teachers", name) if name else ("teacher",)


def naming(name: str, sentence: str) -> str:
    """The sentence with the name of the teacher, if there are several."""
    return sentence.replace("the teacher", f"the teacher {name}".rstrip())
