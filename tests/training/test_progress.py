"""What a log says while a run trains: enough lines, each with the step, the losses and the time left."""

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from probe_kd.training import progress as module
from probe_kd.training.progress import Progress


def _log(monkeypatch: pytest.MonkeyPatch, *, seconds_a_step: float, first: int = 0) -> list[tuple[float, str]]:
    """Two epochs of 100 steps on a clock of our own: (seconds, line) of all that is printed."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(Console(file=out, force_terminal=False, width=200))
    progress.begin("student: distil", 2, 100, 0, first)
    lines: list[tuple[float, str]] = []
    for epoch in (1, 2):
        for step in range(first + 1 if epoch == 1 else 1, 101):
            now[0] += seconds_a_step
            if progress.step(step, 32):
                progress.losses({"hint": 0.5, "loss": 1.25})
            lines += [(now[0], text) for text in out.getvalue().splitlines()[len(lines) :]]
        progress.epoch({"role": "student", "stage": "distil", "epoch": epoch, "accuracy": 0.5, "loss": 1.0, "lr": 0.1})
    return lines + [(now[0], text) for text in out.getvalue().splitlines()[len(lines) :]]


@pytest.mark.parametrize("seconds_a_step", [0.4, 7.0, 50.0])
def test_a_log_has_a_line_every_half_minute_with_step_loss_and_time_left(
    monkeypatch: pytest.MonkeyPatch, seconds_a_step: float
) -> None:
    lines = _log(monkeypatch, seconds_a_step=seconds_a_step)
    times = [0.0, *(when for when, _ in lines)]
    assert max(after - before for before, after in pairwise(times)) <= 30 + 1.1 * seconds_a_step
    within = [text for _, text in lines if "step" in text and "step 100/100 of epoch 2/2" not in text]
    assert within
    assert all(re.search(r"step \d+/100 of epoch [12]/2  .*hint 0\.5 loss 1\.25.* left$", text) for text in within)


def test_the_time_left_is_that_of_the_steps_left_also_after_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (0, 60):
        when, text = next(
            (when, text) for when, text in _log(monkeypatch, seconds_a_step=10.0, first=first) if "step" in text
        )
        step = first + when / 10
        assert text.startswith(f"student: distil  step {step:.0f}/100 of epoch 1/2")
        assert text.endswith(f"{module.duration(10 * (200 - step))} left"), text
