"""What is tried on a batch before training: `check` and `train` find the same."""

from pathlib import Path

import pytest
from conftest import TINY
from rich.console import Console
from running import HINT_ONLY, Quiet

from probe_kd import Distiller, Loss, Objective
from probe_kd.errors import LossError, RunError
from probe_kd.recipe.keys import OptimizerOptions, SchedulerOptions
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.audit import audit
from probe_kd.training.phase import Phase
from probe_kd.training.progress import Progress
from probe_kd.training.run import train
from probe_kd.training.trial import complaints, silent_losses


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


def test_a_gradient_of_zero_is_an_error_unless_the_loss_of_that_stage_is_custom() -> None:
    """Also where another stage has a custom loss of the same name."""
    custom = Objective(Loss(lambda student, teacher: (student - teacher).square().mean(), "outputs"), "own")
    of_stages = {"a": custom, "b": Objective("logits", "own")}
    phases = [
        Phase(stage, 1, (objective,), OptimizerOptions(), SchedulerOptions()) for stage, objective in of_stages.items()
    ]
    reach = [(phase.name, {"own": {"student.fc.weight": 0.0}}) for phase in phases]
    (error,) = complaints(phases, reach)
    (remark,) = silent_losses(phases, reach)
    assert error.startswith("loss `own` of stage `b` moves nothing")
    assert remark.startswith("loss `own` of stage `a` has a gradient of zero")
