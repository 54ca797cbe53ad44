"""The weights of a phase that are a share of the task's gradient, measured before its first step."""

import time

import torch

from probe_kd.errors import LossError, RunError, for_all
from probe_kd.methods.gradients import measure_shares
from probe_kd.training.loop import Loop
from probe_kd.training.progress import Progress
from probe_kd.training.trial import too_large


def measure_weights(loop: Loop, role: str, progress: Progress) -> None:
    """Measure them, if a loss has one, on the batches that the first steps of the phase will see.

    Nothing is trained: a run that resumes has them from its checkpoint, and one that was stopped before the first step
    measures the same. Raises RunError for a gradient that is zero or not finite.
    """
    distiller, started = loop.distiller, time.perf_counter()
    if distiller.shares is None:
        return
    distiller.train().set_epoch(0, loop.phase.epochs)
    try:
        with loop.accelerator.autocast():
            measure_shares(distiller, loop.first_batches())
    except LossError as refusal:
        raise for_all(RunError(f"stage `{loop.phase.name}`: {refusal}")) from refusal
    except torch.OutOfMemoryError as refusal:
        raise RunError(too_large(refusal)) from refusal
    seconds = time.perf_counter() - started
    progress.tell(f"{role}: {loop.phase.name}: {distiller.shares.describe()} (measured in {seconds:.1f} s)")
