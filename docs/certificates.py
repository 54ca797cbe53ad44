"""Write docs/certificates.md, losses beside public code: `make certificates`.

It compares ours with the golden numbers in tests/methods/losses/golden, which public code gave.
tests/methods/losses/test_certificates.py fails when the page is not what this script
writes.
"""

import sys
from collections.abc import Iterator, Mapping
from math import ceil, log10
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden_losses import golden, largest_errors
from probe_kd.methods.losses.table import LOSSES

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Losses beside public code

<!-- Written by docs/certificates.py from tests/methods/losses/golden. Run `make certificates` after a change. -->

Each loss was given the same inputs, in float64, as public code that implements it. The numbers which that code gave,
the value and the gradient at the student's input, are stored in `tests/methods/losses/golden` with the seed of the
inputs, and the tests compare ours with them. None of the code is part of this package.

The columns of errors have the largest relative error over all cases. Where two implementations differ by a constant
factor, ours is multiplied by it first, and the remark names it. *Differs* means that the other code computes something
else: the figure is the relative difference, and the remark explains it. Besides, each loss is compared with its paper's
equation, written out in float64, over random sizes and scales; [Methods](methods.md) has the equations."""


def page() -> str:
    lines = [
        INTRODUCTION,
        "",
        "| loss | public code | licence | cases | error of the value | of the gradient | remark |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for name in LOSSES for row in _rows(name)),
    ]
    return "\n".join(lines) + "\n"


def _rows(name: str) -> Iterator[tuple[str, ...]]:
    file = golden(name)
    for implementation in file["implementations"]:
        errors = largest_errors(name, implementation)
        shown = _bound if implementation.get("agrees", True) else _difference
        yield (
            f"`{name}`",
            f"{_link(implementation)} `{implementation['function']}`",
            implementation["licence"],
            str(len(implementation["cases"])),
            *map(shown, errors),
            implementation.get("note", ""),
        )
    if not file["implementations"]:
        yield (f"`{name}`", "none", "", "", "", "", file["none"])


def _link(implementation: Mapping[str, Any]) -> str:
    source, commit, path = (implementation[key] for key in ("source", "commit", "path"))
    return f"[{source}](https://github.com/{source}/blob/{commit}/{path})"


def _bound(error: float) -> str:
    """The power of ten that an error is below. Rounding, which differs by machine, is below 1e-10."""
    return f"< 1e{max(-10, ceil(log10(error)) if error > 0 else -10)}"


def _difference(error: float) -> str:
    return f"differs, {error:.1g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
