"""The picture of a run, which other tests draw once for all runs with the same columns (`frozen`)."""

from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frozen import draw_curves
from PIL import Image

TAKEN = {"role", "accuracy"}  # no loss


def rows(values: list[Any], losses: list[Any]) -> list[dict[str, Any]]:
    of_teacher = [{"role": "teacher", "accuracy": value} for value in values]
    return [*of_teacher, *({"role": "student", "accuracy": 0.5, "hint": loss} for loss in losses)]


def picture(path: Path, *data: Any, **options: str) -> np.ndarray[Any, Any]:
    draw_curves(rows(*data), path, TAKEN, **options)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("losses", [[nan, inf], [0.0, -1.0], [1e-300, 1e300], [1.0], []], ids=str)
def test_no_numbers_of_a_run_keep_its_curves_from_being_drawn(losses: list[float], tmp_path: Path) -> None:
    """And both halves show what they are of, whatever stands in the other."""
    seen = picture(tmp_path / "curves.png", [0.1, nan], losses)
    assert seen.shape == (480, 1320, 3)
    assert (seen[:, :600] < 128).any()
    assert (seen[:, 720:] < 128).any()


def test_the_curves_are_those_of_the_rows(tmp_path: Path) -> None:
    """Another accuracy changes the left half alone, another loss the right, and no headline leaves the left empty."""
    before = picture(tmp_path / "before.png", [0.1, 0.2, 0.9], [1.0, 0.5])
    measured = picture(tmp_path / "measured.png", [0.1, 0.8, 0.9], [1.0, 0.5])
    lost = picture(tmp_path / "lost.png", [0.1, 0.2, 0.9], [1.0, 0.7])
    assert (before != measured)[:, :600].any()
    assert not (before != measured)[:, 720:].any()
    assert not (before != lost)[:, :600].any()
    assert (before != lost)[:, 720:].any()
    assert (before != picture(tmp_path / "none.png", [0.1, 0.2, 0.9], [1.0, 0.5], headline=""))[:, :600].any()
