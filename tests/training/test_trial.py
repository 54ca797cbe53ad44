"""What is tried on a batch before training: `check` and `train` find the same."""

from pathlib import Path

import pytest
from conftest import TINY
from rich.console import Console
from running import HINT_ONLY, Quiet

from probe_kd import Distiller
from probe_kd.errors import LossError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.audit import audit
from probe_kd.training.progress import Progress
from probe_kd.training.run import train


def test_what_check_remarks_on_after_a_batch_training_does_too(tmp_path: Path) -> None:
    planned = plan(parse(HINT_ONLY.replace("epochs: 2", "epochs: 1")))
    found, display = audit(planned), Quiet()
    assert (found.wrong, len(found.remarks)) == ((), 1)
    assert found.remarks[0].startswith("no loss of any stage trains student.fc.bias")
    train(planned, tmp_path / "run", display)
    assert display.said == [*found.remarks]


def test_what_check_refuses_after_a_batch_training_refuses_before_anything_is_trained(tmp_path: Path) -> None:
    pairs = "  blocks.0: layer2\n  blocks.1: layer3\n"
    text = TINY.replace(pairs, "  patch_embed@input: {teacher: conv1@input, policy: never}\n")
    planned = plan(parse(text))
    with pytest.raises(LossError, match="no gradient reaches the student through 'patch_embed@input'") as checked:
        audit(planned)
    with pytest.raises(LossError) as trained:
        train(planned, tmp_path / "run", Progress(Console(quiet=True), quiet=True))
    assert str(trained.value) == str(checked.value)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_step_that_fails_is_told_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no kernel for this")

    planned = plan(parse(HINT_ONLY))
    monkeypatch.setattr(Distiller, "_step", fails)
    for run in (audit, lambda planned: train(planned, tmp_path / "run", Quiet())):
        with pytest.raises(RunError, match="a step on the first batch of images fails: no kernel for this"):
            run(planned)
    assert not (tmp_path / "run").exists()
