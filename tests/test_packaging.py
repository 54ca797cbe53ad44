"""What is built and published agrees with what is in the repository. `make wheel` tries the wheel itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from probe_kd.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no checkout")
def test_no_file_of_the_repository_is_ignored() -> None:
    """Hatch leaves out of the wheel, and ruff passes over, what .gitignore names: `data/` was `probe_kd/data/` too."""
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-per-directory=.gitignore"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git does not read this checkout: {done.stderr}")
    assert done.stdout.split() == []


def test_the_citation_has_the_version() -> None:
    assert YAML(typ="safe").load(ROOT / "CITATION.cff")["version"] == __version__


def test_the_workflow_runs_targets_that_there_are() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"check", "test", "wheel", "docs"} == set(re.findall(r"make ([a-z-]+)", text)) <= targets
    for matrix in YAML(typ="safe").load(text)["jobs"]["test"]["strategy"]["matrix"]["include"]:
        assert (ROOT / matrix["constraint"]).exists()
