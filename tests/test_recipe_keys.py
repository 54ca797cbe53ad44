"""docs/recipe_keys.md is what its script makes of the schema, and has every key."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from pages import script_of

from probe_kd.methods.losses.table import LOSSES
from probe_kd.recipe.schema import schema

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_of("recipe_keys")


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert (DOCS / "recipe_keys.md").read_text(encoding="utf-8") == script.page(), "run `make recipe-keys`"


def test_every_key_of_the_schema_is_on_the_page() -> None:
    """Without the script: each key of each section, and each option of each loss, is the first cell of some row."""
    rows = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "recipe_keys.md").read_text(encoding="utf-8"), re.MULTILINE))
    sections = {name: it for name, it in schema()["$defs"].items() if not name.startswith("Part")}
    keys = {key for section in sections.values() for key in section["properties"]}
    assert keys | {option for loss in LOSSES.values() for option in loss.options} == rows


def test_every_option_of_every_loss_is_described_and_no_other(script: ModuleType) -> None:
    assert set(script.LOSS_OPTIONS) == {f"{name}.{option}" for name, loss in LOSSES.items() for option in loss.options}
