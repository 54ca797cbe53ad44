"""The arms of a benchmark compute the same before they are timed. No time is asserted."""

import importlib
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cache
import growth
import loop
import losses
import pytest
import torch
import yaml

import recipes

everything = importlib.import_module("all")


@pytest.mark.parametrize("name", ["step", "input", "gpu"])
def test_what_make_gpu_runs_passes_at_toy_size(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--quick"])
    importlib.import_module(name).main()
    said = capsys.readouterr().out
    assert said.startswith("## ")
    assert len(re.findall(r"^\|.*\|$", said, re.MULTILINE)) > 2 * said.count("## "), "a table without rows"


@pytest.mark.parametrize("name", ["fitnets", "fsp"])
def test_whole_recipes_are_those_of_torchdistill(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchdistill")
    tree: dict[str, Any] = recipes.shipped(name)
    tree["data"] |= {"batch_size": 16, "fraction": 0.03}
    with ExitStack() as stack:
        ours = recipes.Ours(tree, tmp_path, stack)
        for cut in (False, True):
            recipes.agree(ours, recipes.Theirs(ours, cut=cut))


def test_the_loop_by_hand_is_that_of_a_stage(tmp_path: Path) -> None:
    tree = yaml.safe_load(loop.RECIPE)
    tree["data"]["fraction"] = 0.1
    with ExitStack() as stack:
        loop.agree(recipes.Ours(tree, tmp_path, stack))


def test_an_epoch_is_read_from_the_cache(tmp_path: Path) -> None:
    with ExitStack() as stack:
        kept = cache._made(
            cache.LOSSES["hints of three layers"],
            tmp_path / "kept",
            stack,
            SimpleNamespace(quick=True, workers=0, size=32),
            cached=True,
        )
        cache._read(kept, stack)
        cache.agree(kept)


def test_what_grows_is_the_same_by_hand_and_in_a_distiller() -> None:
    name, *_, by_hand, ours = growth.row(growth.QUICK[0], 1, "cpu")  # which says by itself whether they agree
    assert by_hand == ours, f"MiB that one more of {name} costs"
    assert growth.line([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx((2.0, 1.0))
    assert [list(growth.paired(growth.VITS, count).pairs) for count in (1, 3)] == [
        ["blocks.23"],
        ["blocks.7", "blocks.15", "blocks.23"],
    ]


@pytest.mark.parametrize("dtype", losses.DTYPES.values(), ids=losses.DTYPES)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_is_the_same_written_plainly(name: str, dtype: torch.dtype) -> None:
    losses.arms_of(name, losses.QUICK, dtype)  # which says by itself whether they agree


def test_one_script_measured_again_replaces_its_own_sections_only() -> None:
    page = (Path(__file__).parents[1] / "benchmarks" / "results.md").read_text(encoding="utf-8")
    for name in ("cache", "step", "peers"):
        new = everything.replaced(page, name, f"## New\n\n`python benchmarks/{name}.py`\n\n| 1 |\n")
        assert everything.replaced(new, name, "## New\n\nagain\n").count("## New") == 1
        gone = {line for line in page.splitlines() if line.startswith("`python")} - set(new.splitlines())
        assert all(line.startswith(f"`python benchmarks/{name}.py") for line in gone)
        assert new.count("\n## ") == page.count("\n## ") - page.count(f"`python benchmarks/{name}.py") + 1
    assert everything.replaced(page, "cache", "## A cached teacher\n").startswith(page.partition("## ")[0])
    assert everything.replaced("# B\n\n## a\n\n1\n", "zoo", "## zoo\n\n2\n") == "# B\n\n## a\n\n1\n\n## zoo\n\n2\n"
    assert everything.replaced("# B\n\n## zoo\n\nIt failed\n", "zoo", "## Z\n") == "# B\n\n## Z\n"
