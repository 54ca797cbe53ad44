"""How a run is saved and resumed: checkpoints, the best epoch, and the final weights.

This file decides what a checkpoint contains. `checkpoints.py` makes sure that it is whole or absent.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probe_kd.engine.models import portable
from probe_kd.engine.weights import check_state, load_weights, own_tensors, save_weights
from probe_kd.errors import RunError, for_all, short
from probe_kd.files.run_folder import Claim, check_inputs, recording
from probe_kd.measures import not_losses
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.writing import inputs_of
from probe_kd.training import checkpoints
from probe_kd.training.loop import Loop
from probe_kd.training.models import TrainedModel
from probe_kd.training.processes import is_peer_lost
from probe_kd.training.progress import Progress
from probe_kd.training.records import write_metrics, write_timm_summary
from probe_kd.training.state import JOURNAL, TrainState, weights_name
from probe_kd.version import __version__

AVERAGE = "average.safetensors"
BEST, BEST_AVERAGE = "best.safetensors", "best-average.safetensors"


@dataclass
class Saver:
    """Writes into the folder of a run, and restores its checkpoints.

    In a phase that keeps the best epoch, `best` holds the weights of the best epoch so far, and `best_average` the
    moving average of the same epoch.
    """

    plan: Plan
    accelerator: Accelerator
    state: TrainState
    progress: Progress
    folder: Path
    checkpoint: Path | None = None  # to go on from, until it is restored
    claimed: Claim | None = None  # in the process that writes
    best: dict[str, Tensor] = field(default_factory=dict)
    best_average: dict[str, Tensor] = field(default_factory=dict)

    def save(self, loop: Loop) -> None:
        """Write a checkpoint. Raises RunError if it cannot be written; the previous checkpoint stays valid."""
        accelerator = self.accelerator
        for cache in loop.caches.values():
            cache.flush()
        try:
            if self.claimed is not None:
                self.claimed.check()
            partial: list[Any] = [checkpoints.begin(self.folder) if accelerator.is_main_process else None]
            broadcast_object_list(partial)
            # Not as safetensors: of a tensor that two models share, it would leave out one name, and not always the
            # same one. The file is read with `weights_only`.
            accelerator.save_state(str(partial[0]), safe_serialization=False)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                self._commit(partial[0], loop)
        except Exception as refusal:  # torch and safetensors raise their own errors for a full disk
            if isinstance(refusal, RunError) or is_peer_lost(refusal):
                raise
            self._check_there()
            previous = "; the one before it is whole" if checkpoints.any_whole(self.folder) else ""
            raise RunError(
                f"cannot write a checkpoint to {self.folder}: {short(refusal)}{previous}. Make room, and go on with "
                "--resume"
            ) from refusal
        accelerator.wait_for_everyone()

    def check_inputs(self) -> None:
        """Raise RunError if a file that the recipe names has changed during the run."""
        if self.accelerator.is_main_process:
            advice = "It changed while the run went on: put the former file back, and go on by --resume"
            check_inputs(self.folder, filter(os.path.exists, inputs_of(self.plan.recipe)), advice)

    def _check_there(self) -> None:
        """Raise RunError if the folder has vanished, which explains why it could not be written."""
        (self.claimed or Claim(self.folder)).check()

    def _commit(self, partial: Path, loop: Loop) -> None:
        self.state.write(partial / JOURNAL)
        if self.best:
            save_file(self.best, partial / BEST)
        if self.best_average:
            save_file(self.best_average, partial / BEST_AVERAGE)
        if loop.average is not None:
            save_weights(loop.average.module, partial / AVERAGE, {})
        checkpoints.commit(partial, self.plan.recipe.checkpoint_hist)
        write_metrics(self.state.rows, self.folder / "metrics.csv")
        write_timm_summary(self.state.rows, self.folder / "summary.csv", not_losses(self.plan.recipe.loss_names))

    def restore(self, loop: Loop) -> None:
        assert self.checkpoint is not None
        check_state(self.checkpoint)
        former_processes = len(list(self.checkpoint.glob("random_states_*.pkl")))
        self._share_out(loop, former_processes)
        self.best, self.best_average = (
            load_file(self.checkpoint / name) if (self.checkpoint / name).exists() else {}
            for name in (BEST, BEST_AVERAGE)
        )
        if loop.average is not None:
            load_weights(loop.average.module, self.checkpoint / AVERAGE)
        try:
            self.accelerator.load_state(str(self.checkpoint))  # last, since it restores the random numbers
        except Exception as refusal:  # of another version of timm, say, by which the model has other layers
            if is_peer_lost(refusal):
                raise
            raise for_all(
                RunError(
                    f"the checkpoint {self.checkpoint} does not fit what the recipe builds now: {short(refusal)}. Go "
                    "on with the versions of timm, torch and accelerate that it was begun with, or begin anew by "
                    "--overwrite"
                )
            ) from refusal
        if former_processes != self.accelerator.num_processes:  # the checkpoint has no random states for some of these
            set_seed((self.plan.recipe.seed * 1_000_003 + self.state.step) % 2**31, device_specific=True)
        self.checkpoint = None

    def _share_out(self, loop: Loop, former_processes: int) -> None:
        """Resume at the same image if the number of processes has changed.

        Raises RunError if the images done in the epoch are not a whole number of updates of these processes.
        """
        state, processes = self.state, self.accelerator.num_processes
        if former_processes == processes:
            return
        step, remainder = divmod(state.step * former_processes, processes)
        if remainder or step % loop.phase.grad_accum_steps:
            raise for_all(
                RunError(
                    f"{former_processes} processes had done {state.step} batches each of epoch {state.epoch + 1}, "
                    f"which {processes} cannot go on with at the same image; resume with {former_processes} processes, "
                    "which may be stopped at the end of an epoch"
                )
            )
        scale = step / state.step if state.step else 1.0
        state.step, state.sums = step, {name: total * scale for name, total in state.sums.items()}
        if self.accelerator.is_main_process:
            self.progress.say(f"going on with {processes} processes instead of {former_processes}, at the same image")

    def keep_if_best(self, loop: Loop, value: float) -> None:
        """Keep the present weights if their value, a held-out loss say, is the lowest of the phase so far."""
        if self.state.best is None or not value >= self.state.best:  # also after a loss of NaN
            self.state.best = value
            self.best = own_tensors(loop.distiller)
            self.best_average = own_tensors(loop.average.module) if loop.average is not None else {}

    def take_best(self, loop: Loop) -> bool:
        """Restore the weights and the moving average of the best epoch. Return whether the phase kept one."""
        if not self.best:
            return False
        loop.distiller.load_state_dict(self.best)
        if loop.average is not None and self.best_average:
            loop.average.module.load_state_dict(self.best_average)
        self.best, self.best_average = {}, {}
        return True

    def write_weights(self, trained: TrainedModel, end: str = "") -> str:
        trace_, name = trained.trace, weights_name(trained.role, end)
        model, kwargs = portable(trace_.model, trace_.model_kwargs)
        metadata = {"model": model, "model_kwargs": kwargs, "probe_kd": __version__}
        if self.accelerator.is_main_process:
            self.write(trained.model, name, metadata | _graft_metadata(self.plan, trained))
        return name

    def write(self, model: nn.Module, name: str, metadata: Mapping[str, Any]) -> None:
        with self.writing(), recording(self.folder, name) as path:
            save_weights(model, path, metadata)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise RunError if the folder has vanished or cannot be written to."""
        try:
            if self.claimed is not None:
                self.claimed.check()
            yield
        except OSError as refusal:
            self._check_there()
            raise RunError(
                f"cannot write to {self.folder}: {refusal.strerror}. Mend that, and go on by --resume from the last "
                "checkpoint"
            ) from refusal


def _graft_metadata(plan: Plan, trained: TrainedModel) -> dict[str, Any]:
    """The metadata from which `load_student` builds a graft, which is not a model of timm."""
    share = plan.recipe.share
    if not (share and share.form == "graft" and plan.teacher and trained.role == "student"):
        return {}
    sides = {"student": (plan.student, share.cut[0]), "teacher": (plan.teacher, share.cut[1])}
    arguments = {side: portable(trace_.model, trace_.model_kwargs) for side, (trace_, _) in sides.items()}
    return {
        "graft": {
            side: {
                "model": arguments[side][0],
                "model_kwargs": arguments[side][1],
                "input_size": list(trace_.input_size),
                "at": str(at),
            }
            for side, (trace_, at) in sides.items()
        }
    }
