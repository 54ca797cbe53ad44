"""Losses against public implementations, by the golden numbers that these gave, and the page that says so."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from golden_losses import golden, largest_errors, names
from pages import script_of

from probe_kd.methods.losses.table import LOSSES

DOCS = Path(__file__).parents[3] / "docs"
IMPLEMENTATIONS = [
    pytest.param(name, implementation, id=f"{name}-{implementation['source']}-{implementation['function']}")
    for name in names()
    for implementation in golden(name)["implementations"]
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_of("certificates")


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_a_loss_is_that_of_public_code_or_its_note_says_why_not(name: str, implementation: Any) -> None:
    value, gradient = largest_errors(name, implementation)
    if implementation.get("agrees", True):
        assert max(value, gradient) < 1e-5
    else:
        assert max(value, gradient) > 1e-5, "it agrees, and the page says that it does not"
        assert implementation["note"]


def test_every_loss_has_a_certificate_or_says_that_nobody_can_be_compared_with() -> None:
    assert set(names()) == set(LOSSES)
    for name in names():
        file = golden(name)
        assert bool(file["implementations"]) != bool(file.get("none")), name
        for implementation in file["implementations"]:
            assert re.fullmatch("[0-9a-f]{40}", implementation["commit"]), name
            factors = {case.get("factor", 1.0) for case in implementation["cases"]}
            assert factors == {1.0} or implementation["note"], f"{name}: a factor is explained in `note`"


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert (DOCS / "certificates.md").read_text(encoding="utf-8") == script.page(), "run `make certificates`"
