"""Everything the README and the docs show is run, or at least read by the code that they speak of."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from pages import PAGES, ROOT, blocks, commands
from PIL import Image
from typer.main import get_command

from probe_kd.cli import app, main
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse

WITHOUT_WEIGHTS = [line for line in commands("match") if "--by features" not in line]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's folder of images, where one stands."""
    for split in ("train", "validation"):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.new("RGB", (48, 40), colour).save(tmp_path / "photos" / split / name / f"{split}.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=lambda value: value.partition("\n")[0][:30])
def test_every_python_block_runs(place: str, text: str) -> None:
    names = {"__name__": "__main__"}
    for file in re.findall(r"with (\w+\.py) above it", text.partition("\n")[0]):
        exec(next(other for _, other in blocks("python") if other.startswith(f"# {file}:")), names)
    exec(compile(text, place, "exec"), names)
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)  # what a block sets is set for the whole process


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: value.partition("\n")[0][:30])
def test_every_recipe_is_one_that_would_be_trained(place: str, text: str) -> None:
    assert plan(parse(text, str(ROOT / place))).comparisons  # what it extends, from the root


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("line", commands("inspect") + WITHOUT_WEIGHTS + commands("init"))
def test_every_command_that_only_reads_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr().out
    written = list(tmp_path.glob("*.yaml"))
    assert len(written) == ("-o" in shlex.split(line))
    if line.startswith("probe-kd init"):
        assert parse(written[0].read_text()).recipe.stages
        return
    if written:
        assert plan(parse(written[0].read_text())).pairs
    assert "stages.3" in shown or "blocks.11" in shown


@pytest.mark.parametrize("verb", ["check", "train", "tune", "match", "eval", "export", "compare", "schema"])
def test_every_other_command_has_these_options(verb: str) -> None:
    """tests/test_pages.py runs each of them; here, that what other pages show of them is understood."""
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    whole = [line for _, text in blocks("sh") for line in text.splitlines() if f"probe_kd.cli {verb} " in line]
    lines = commands(verb) + [line[line.index("probe_kd.cli") :] for line in whole]
    assert lines or verb == "compare"
    for line in lines:
        assert command.make_context(verb, shlex.split(line, comments=True)[2:]).params


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_the_page(page: Path) -> None:
    """88 columns are what the site shows without scrolling, at a width of 1280 (docs/style.css)."""
    fences = re.findall(r"^```.*?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for text in fences for line in text.splitlines() if len(line) > 88] == []


def test_something_was_found() -> None:
    assert len(blocks("python")) >= 2
    assert blocks("yaml")
    assert commands("inspect")
    assert commands("match")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M)
    }
    assert {"quickstart", "test"} <= named <= targets
