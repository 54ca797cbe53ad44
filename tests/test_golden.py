"""What `inspect`, `match` and `check` print, to the letter, in a wide terminal and in 80 columns.

Where a change of the text is meant: `PROBE_KD_GOLDEN=write python -m pytest tests/test_golden.py`, and read the diff.
"""

import io
import os
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from probe_kd import cli

GOLDEN = Path(__file__).parent / "golden"
ROOT = GOLDEN.parents[1]
COMMANDS = {
    "inspect": "inspect resnet18",
    "inspect_tokens": "inspect deit_tiny_patch16_224 --glob 'blocks.1*' --input-size 224x192",
    "match": "match --student vit_tiny_patch16_224 --teacher resnet50",
    "check": "check recipes/fitnets.yaml --no-batch",
}


def print_on(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    for commands in ("models", "recipes"):
        monkeypatch.setattr(f"probe_kd.cli.{commands}.make_console", lambda: console)


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_text_is_as_it_was(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = io.StringIO()
    console = Console(file=paper, width=columns, force_terminal=False)
    print_on(console, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["probe-kd", *shlex.split(COMMANDS[name])])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = "".join(f"{line.rstrip()}\n" for line in paper.getvalue().splitlines())
    assert max(map(len, text.splitlines())) <= columns
    file = GOLDEN / f"{name}_{columns}.txt"
    if os.environ.get("PROBE_KD_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    paper = io.StringIO()
    print_on(Console(file=paper, width=200, force_terminal=True), monkeypatch)
    monkeypatch.setattr(sys, "argv", ["probe-kd", "inspect", "resnet10t"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b[1m" in paper.getvalue()  # bold is no colour
    assert "\x1b[3" not in paper.getvalue().replace("\x1b[3m", "")  # 3m is italic, 30 to 37 are colours
    assert "\x1b[1;3" not in paper.getvalue()
