"""One epoch of a phase: its updates, the checkpoints between them, and the signals to stop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from probe_kd.errors import DataError, ProbeKDError, RunError, Stopped, short
from probe_kd.training.loop import Loop
from probe_kd.training.processes import is_peer_lost
from probe_kd.training.saving import Saver
from probe_kd.training.state import Row, TrainState
from probe_kd.training.trial import too_large

ASK_EVERY = 20  # updates after which several processes ask each other whether to stop


@dataclass
class Epochs:
    """Trains single epochs. Whoever stops it goes on from the last checkpoint."""

    saver: Saver
    signals: list[int]  # the signals to stop so far

    def train(self, loop: Loop, epoch: int) -> Row:
        """Train one epoch, or what is left of it. Returns the figures for its row."""
        state, started = self.saver.state, time.perf_counter()
        first, seconds_before = state.step, state.seconds
        if not first:  # otherwise the checkpoint has restored the generators
            set_seed(self.seed_of(loop.phase.age + epoch), device_specific=True)
        loop.sums = {
            name: torch.tensor(value, device=self.saver.accelerator.device) for name, value in state.sums.items()
        }
        try:
            with _explained(state, self.saver.folder):
                for done in loop.run(epoch, first):
                    state.seconds = seconds_before + time.perf_counter() - started
                    self._after_update(loop, done)
        except DataError:
            self._save_what_is_done(loop)
            raise
        seconds = time.perf_counter() - started
        state.seconds, state.step, state.sums = seconds_before + seconds, 0, {}
        loop.average_over_processes()
        images = (loop.steps - first) * self.saver.plan.recipe.data.batch_size * self.saver.accelerator.num_processes
        return {"images_per_second": round(images / seconds, 1), "lr": loop.rate, **self._means(loop, loop.steps)}

    def seed_of(self, age: int) -> int:
        """The seed of an epoch's random numbers, after `age` epochs of the recipe."""
        return (self.saver.plan.recipe.seed * 1_000_003 + age + 1) % 2**31

    def _after_update(self, loop: Loop, done: int) -> None:
        """Show the progress, save a checkpoint and stop, if it is time to."""
        recipe, processes = self.saver.plan.recipe, self.saver.accelerator.num_processes
        if self.saver.progress.step(done, recipe.data.batch_size * processes):
            self.saver.progress.losses({name: float(total) / done for name, total in sorted(loop.sums.items())})
        update = -(-done // loop.phase.grad_accum_steps)
        mid_epoch = done < loop.steps  # the end of an epoch saves by itself, after it is measured
        is_due = update % ASK_EVERY == 0 or not mid_epoch
        stop_requested = bool(self.signals) if processes == 1 else is_due and self._any_stop_requested()
        if stop_requested and not mid_epoch:
            # As the end of the epoch does: a checkpoint has the batch statistics of one process.
            loop.average_over_processes()
        interval = max(1, recipe.recovery_interval // loop.phase.grad_accum_steps)
        if stop_requested or (mid_epoch and recipe.recovery_interval and update % interval == 0):
            self._save_what_is_done(loop, together=True)
        if stop_requested:
            raise Stopped(f"stopped by {signal.Signals(self.signals[0] if self.signals else signal.SIGTERM).name}")

    def _any_stop_requested(self) -> bool:
        stop_requested = torch.tensor(float(bool(self.signals)), device=self.saver.accelerator.device)
        return float(self.saver.accelerator.reduce(stop_requested, "sum")) > 0

    def _save_what_is_done(self, loop: Loop, *, together: bool = False) -> None:
        """Save a checkpoint in the middle of an epoch; with several processes only if all of them call this."""
        if not together and self.saver.accelerator.num_processes > 1:
            return
        if loop.finished is not None:
            self.saver.state.step, self.saver.state.sums = loop.finished, self._means(loop, 1)
            self.saver.save(loop)

    def _means(self, loop: Loop, count: int) -> dict[str, float]:
        """The mean losses of all processes over `count` batches. Raises RunError for a loss that is not finite."""
        totals = {name: self.saver.accelerator.reduce(total, "mean") for name, total in sorted(loop.sums.items())}
        means = {name: float(total) / count for name, total in totals.items()}
        not_finite = [name for name, mean in means.items() if not math.isfinite(mean) and name != "loss"]
        if not_finite:
            change = f"{means[not_finite[0]]} in epoch {self.saver.state.epoch + 1}"
            raise RunError(no_number(f"{', '.join(map(repr, not_finite))} of {self.saver.state.role}", change))
        return means


@contextmanager
def _explained(state: TrainState, folder: Path) -> Iterator[None]:
    """Turn any error of models, optimizers and devices in an update into a RunError."""
    try:
        yield
    except torch.OutOfMemoryError as refusal:
        raise RunError(too_large(refusal)) from refusal
    except ProbeKDError:
        raise
    except Exception as refusal:
        if is_peer_lost(refusal):
            raise
        raise RunError(
            f"an update of {state.role} in epoch {state.epoch + 1} fails: {short(refusal)}. The last checkpoint in "
            f"{folder} is whole; `probe-kd -v train` shows where it fails"
        ) from refusal


def no_number(what: str, became: str) -> str:
    return f"{what} became {became}; try a smaller `lr`, `clip_grad: 1.0`, `normalize: layer`, or `precision: bf16`"
