"""`check` measures a cache beside its teacher, and leaves nothing of it behind."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import NARROW, Command
from torch import Tensor

from probe_kd.data.cache import TeacherCache
from probe_kd.tables import cache_cost_lines
from probe_kd.training.cache_cost import CacheCost


def test_check_tells_if_a_cache_would_be_slower_than_the_teacher(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(NARROW.replace("  train:", "  cache: new/cache\n  train:"))
    find = TeacherCache.find
    read: list[int] = []

    def slow(self: TeacherCache, indices: Tensor) -> Any:
        time.sleep(0.5)
        features = find(self, indices)
        assert features is not None
        read.append(len(features[0]))
        return features

    monkeypatch.setattr(TeacherCache, "find", slow)
    result = command("check", "r.yaml", "--json")
    assert result.returncode == 0, result.stderr
    costs = [
        CacheCost(**{k: v for k, v in row.items() if k != "is_slower"}) for row in json.loads(result.stdout)["caches"]
    ]
    assert [(cost.stage, cost.images) for cost in costs] == [("hint", 64), ("task", 64)]
    assert read == [64] * 12
    assert all(cost.is_slower and cost.memory > 0.5 > cost.asked > 0 for cost in costs)
    assert all("would be slower than the teacher: leave" in line for line in cache_cost_lines(costs))
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_cache_that_memory_cannot_hold_is_judged_by_the_disk() -> None:
    def line(**more: Any) -> str:
        cost = {"stage": "a", "teacher": "", "images": 8, "memory": 0.1, "disk": 0.4, "asked": 0.2, "size": 5 * 10**12}
        (text,) = cache_cost_lines([CacheCost(**{**cost, **more})])
        return text

    assert line(fits=True).endswith("200 ms from the teacher itself")
    assert "slower than the teacher, since 5e+03 GB do not fit into memory" in line(fits=False)
    assert "slower than the teacher: leave" in line(fits=True, memory=0.3)
