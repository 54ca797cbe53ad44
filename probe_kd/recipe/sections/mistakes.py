"""The mistakes in a section: places in the recipe, each with a message."""

from collections.abc import Iterator
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
