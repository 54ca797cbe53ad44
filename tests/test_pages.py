"""Pages that are read from top to bottom are run from top to bottom, in one folder."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import forget_modules_of

from probe_kd import LOSSES
from probe_kd.cli import main

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def run_by_shell(text: str) -> None:
    """A block with a loop, or with another command than ours or Python, as it stands."""
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", text], check=True, env=os.environ | {"PATH": found, "OMP_NUM_THREADS": "1"})


def lines_of(text: str) -> list[str]:
    """The lines of a block, each with those that go on with it."""
    return text.replace("\\\n", " ").splitlines()


def run_here(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`probe-kd ...` or `python FILE`, without the seconds of a new process."""
    if line.startswith("python "):
        runpy.run_path(line.removeprefix("python "), run_name="__main__")
        return
    command, _, file = line.partition(" > ")
    monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, line
    assert not file or not Path(file.strip()).exists()


def test_every_loss_stands_in_the_tables_and_in_the_reference() -> None:
    methods, values, reference = (
        (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in ("methods", "loss_values", "reference")
    )
    for name, loss in LOSSES.items():
        assert f"| `{name}` | {', '.join((loss.reads, *loss.also))} |" in methods
        assert f"`{name}`" in values, name
        assert f"::: {loss.function.__module__}.{loss.function.__name__}\n" in reference


@pytest.mark.parametrize("page", ["tutorial", "howto", "custom_losses"])
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert len(blocks) > 3
    monkeypatch.syspath_prepend(tmp_path)
    for language, title, text in blocks:
        if title:
            (tmp_path / title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{page}.md", "exec"), {"__name__": "__main__"})
        elif all(line.startswith(("probe-kd ", "python ")) for line in lines_of(text)):
            for line in lines_of(text):
                run_here(line, monkeypatch)
        else:
            run_by_shell(text)
    for file in tmp_path.glob("*.py"):
        compile(file.read_text(), file.name, "exec")
    forget_modules_of(tmp_path)
