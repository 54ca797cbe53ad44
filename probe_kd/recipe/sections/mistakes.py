"""What a section finds wrong: places in the recipe, each with a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from probe_kd.errors import ProbeKDError
from probe_kd.recipe.yaml_tree import Path_

Mistake = tuple[Path_, str]


@contextmanager
def noting(mistakes: list[Mistake], *where: str | int) -> Iterator[None]:
    """Turn an error inside into a mistake at this place of the recipe, and go on after it."""
    try:
        yield
    except ProbeKDError as refusal:
        mistakes.append((where, str(refusal)))
