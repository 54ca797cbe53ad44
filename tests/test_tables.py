"""What the commands print, against what it is computed from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Command
from running import planned


def test_check_says_what_does_not_run_and_how_much_a_cache_will_hold(
    command: Command,
    tmp_path: Path,
) -> None:
    text = TINY.replace("  train: {epochs: 1}", "  train: {epochs: 1}\n  cache: C").replace(
        "  hflip", "  views: 2\n  hflip"
    )
    (tmp_path / "r.yaml").write_text(text)
    result = command("check", "r.yaml", "--json")
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)["not_run"]
    assert [(row["stage"], row["side"], row["last"]) for row in rows] == [
        ("hint", "student", "blocks.1"),
        ("hint", "teacher", "layer3"),
    ]
    assert {"layer4", "fc"} <= set(rows[1]["modules"])
    teacher = planned(TINY).teacher
    assert teacher is not None
    above = sum(teacher.modules[name].macs for name in ("layer4", "fc"))
    assert rows[1]["share"] == pytest.approx(above / teacher.macs, rel=1e-6)
    shown = command("check", "r.yaml").stdout
    assert "layer4" in shown
    # the hint in one epoch sees view 0, the task in two views 1 and 0
    numbers = [teacher[name].shape[1:] for name in ("layer2", "layer3")]
    size = 4 * 359 * (sum(torch.Size(shape).numel() for shape in numbers) + 2 * 10)
    assert f"will hold up to {size / 1e9:.3g} GB:" in shown
