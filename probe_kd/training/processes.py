"""The processes of a run: how they begin together and lose each other, and the signals that ask them to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, get_cpu_distributed_information

from probe_kd.errors import PeerLost, ProbeKDError, RunError, for_all, short
from probe_kd.files.run_folder import is_abandoned
from probe_kd.recipe.keys import Recipe
from probe_kd.training.devices import cuda_settings, mixed_precision
from probe_kd.training.progress import Progress

TRACKERS = "trackers"
T = TypeVar("T")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate reads them


@contextmanager
def accelerating(recipe: Recipe, folder: Path | None = None) -> Iterator[Accelerator]:
    """Create the accelerator of a run from its recipe. Raises RunError for settings that are not available."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"mixed_precision": mixed_precision(recipe, device_type)}
    if folder is not None and recipe.trackers:
        options |= {"log_with": list(recipe.trackers), "project_dir": str(folder / TRACKERS)}
    with ExitStack() as stack:
        stack.enter_context(cuda_settings(recipe))
        try:
            accelerator = stack.enter_context(own_accelerator(**options))
        except (ValueError, ImportError) as refusal:  # fp16 without a GPU, say
            raise RunError(f"accelerate cannot begin with precision {recipe.precision}: {short(refusal)}") from refusal
        distributed_type = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise RunError(
                f"accelerate is set to {distributed_type}, which cuts a model's parameters up and gathers them layer "
                "by layer; captured layers, shared weights and a teacher beside the student do not survive that. Run "
                "with plain DDP (`accelerate launch --multi_gpu`, or torchrun), with `grad_checkpointing: true` and "
                "`teacher: {shard: true}` where memory is short"
            )
        yield accelerator


@contextmanager
def own_accelerator(**options: Any) -> Iterator[Accelerator]:
    """Create an Accelerator, and reset accelerate's global state at the end.

    The state is not reset if the caller had initialised it before. Several processes on a machine without GPUs
    communicate by gloo. Raises RunError if a launcher started several processes that accelerate cannot connect.
    """
    is_first = not AcceleratorState._shared_state
    launched = launched_processes()
    # Gradients that are views of the buckets in which they are exchanged are not held twice.
    options["kwargs_handlers"] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if launched > 1 and not torch.accelerator.is_available():
        options["cpu"] = True  # without it, or ACCELERATE_USE_CPU, accelerate overlooks what torchrun has set
    try:
        try:
            accelerator = Accelerator(**options)
        except RuntimeError as refusal:  # of torch.distributed
            raise RunError(f"cannot bring {launched} processes together: {short(refusal)}") from refusal
        if launched not in (1, accelerator.num_processes):
            raise for_all(
                RunError(
                    f"{launched} processes were started (WORLD_SIZE), but accelerate counts "
                    f"{accelerator.num_processes}, so that each would train by itself; start them by torchrun or "
                    "`accelerate launch`, one for each device, or unset WORLD_SIZE"
                )
            )
        yield accelerator
    finally:
        if is_first:
            GradientState._reset_state()
            AcceleratorState._reset_state()


def launched_processes() -> int:
    """The number of processes that torchrun, accelerate launch or mpirun started. Raises RunError if it is unclear."""
    try:
        environment = get_cpu_distributed_information()
    except ValueError:
        raise RunError("RANK and WORLD_SIZE have to be whole numbers; unset them, or start by torchrun") from None
    if environment.world_size > 1 and not any(name in os.environ for name in RANKS):
        raise RunError(
            f"WORLD_SIZE says that this is one of {environment.world_size} processes, and RANK is not there to say "
            "which; start them by torchrun or `accelerate launch`, or unset WORLD_SIZE"
        )
    return max(int(environment.world_size), 1)


def by_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do some work in the first process, and return its result in all of them, or raise its error if it is of ours."""
    result: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            result = [work()]
        except ProbeKDError as refusal:
            result = [refusal]
    result = broadcast_object_list(result)
    if isinstance(result[0], ProbeKDError):
        raise for_all(result[0])
    first: T = result[0]
    return first


@contextmanager
def with_peers(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Turn torch's errors after another process of the run has ended into PeerLost.

    Only the first process reports it, or a remaining one if the first was killed.
    """
    try:
        yield
    except Exception as refusal:
        if accelerator.num_processes == 1 or not is_peer_lost(refusal):
            raise
        peer_lost = PeerLost(
            f"another of the {accelerator.num_processes} processes of this run has ended or was killed, so this one "
            f"ends too. The last checkpoint in {folder} is whole; go on by --resume"
        )
        peer_lost.in_all_processes = not accelerator.is_main_process and not is_abandoned(folder)
        raise peer_lost from refusal


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error means that another process has ended; gloo has no exception type for it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "Connection closed"))


@contextmanager
def listening(progress: Progress, then: str = "stopping after this update, with a checkpoint") -> Iterator[list[int]]:
    """Yield a list that collects the signals to stop. A second Ctrl-C does not wait for the end of the update.

    `then` says what happens after the first.
    """
    signals: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signals:
            raise KeyboardInterrupt
        signals.append(number)
        progress.say(f"{signal.Signals(number).name}: {then}")

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield signals
        return
    former_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)


def own_images(accelerator: Accelerator, count: int) -> int:
    """How many of this process's `count` images of a batch count: the last batch is padded with repeated images."""
    if accelerator.num_processes == 1:
        return count
    first, end = (count * (accelerator.process_index + more) for more in (0, 1))
    places = accelerator.gather_for_metrics(torch.arange(first, end, device=accelerator.device))
    return int(((places >= first) & (places < end)).sum())
