"""Runs for tests: trained here or in two processes, stopped, damaged, compared."""

import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import apart, begin, record
from rich.console import Console
from safetensors.torch import load_file

from probe_kd.data.loading import DataOptions, loader
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import RunError, Stopped
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.training import checkpoints
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

HINT_ONLY = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}
teacher: {model: resnet18, model_kwargs: {channels: [8, 16, 24, 48]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 256, hflip: 0.0, holdout: 0.2}
pairs: {layer2: layer2}
stages:
  - name: hint
    epochs: 2
    losses: {hint: {loss: hint, activation: tap}}
    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.5}
"""
STEADY = {"images_per_second"}  # of the columns, what time decides


class Quiet(Progress):
    """Keeps what it has to say."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True), quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    tell = say


class After(Quiet):
    """Does something once, at the end of so many epochs, or after so many updates of all."""

    def __init__(self, what: Callable[[], Any], *, epochs: int = 0, updates: int = 0) -> None:
        super().__init__()
        self.what, self.epochs_left, self.updates_left = what, epochs, updates

    def epoch(self, row: dict[str, Any]) -> None:
        self.epochs_left -= 1
        if self.epochs_left == 0:
            self.what()

    def step(self, done: int, images: int) -> bool:
        self.updates_left -= 1
        if self.updates_left == 0:
            self.what()
        return False


@cache
def planned(text: str) -> Plan:
    return plan(parse(text))


def run(text: str, folder: Path, display: Progress | None = None, **options: bool) -> None:
    torch.set_num_threads(1)
    train(planned(text), folder, display or Quiet(), **options)


def same(one: Path, two: Path) -> None:
    """The same weights to the bit, and the same metrics."""
    files = {file.name for file in one.glob("*.safetensors")}
    assert files == {file.name for file in two.glob("*.safetensors")}
    for file in files:
        ours, theirs = load_file(one / file), load_file(two / file)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file
    rows = [[{k: v for k, v in row.items() if k not in STEADY} for row in record(folder)] for folder in (one, two)]
    assert rows[0] == rows[1]


def count(folder: Path) -> int:
    try:
        names = [Path(name).stem for name in os.listdir(folder / checkpoints.FOLDER)]
    except FileNotFoundError:  # not there yet, or deleted by a run that ends
        return 0
    return max((int(name) for name in names if name.isdigit()), default=0)


def stop() -> None:
    raise KeyboardInterrupt


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _one_of(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...], queue: Any) -> None:
    """What torchrun sets on a machine without GPUs, and then the work."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # what the imports found out
    try:
        work(*arguments)
        queue.put("done")
    except (RunError, Stopped) as refusal:
        queue.put(f"{type(refusal).__name__}: {refusal}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start(work: Callable[..., None], *arguments: Any) -> tuple[list[Any], Any]:
    queue, port = apart.Queue(), free_port()
    return [begin(_one_of, rank, port, work, arguments, queue) for rank in (0, 1)], queue


def finish(processes: list[Any], queue: Any) -> list[str]:
    said = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return said


def run_by_two(text: str, folder: Path, **options: bool) -> list[str]:
    planned(text)
    return finish(*start(run_with, text, folder, options))


def run_with(text: str, folder: Path, options: dict[str, bool]) -> None:
    run(text, folder, **options)


def close(one: Path, two: Path, tolerance: float) -> None:
    """The same losses, and the same weights but for rounding."""
    rows = [[{k: v for k, v in row.items() if k not in STEADY} for row in record(folder)] for folder in (one, two)]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows, strict=True):
        for key in ours:
            if key in ("loss", "task", "soft", "hint", "lr") and ours[key]:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=tolerance), key
            elif "accuracy" in key or key == "agreement":
                assert abs(float(ours[key] or 0) - float(theirs[key] or 0)) <= 1 / 360 + 1e-9, key
    for name, tensor in load_file(one / "student.safetensors").items():
        other = load_file(two / "student.safetensors")[name]
        torch.testing.assert_close(tensor, other, rtol=0.02, atol=2e-4, msg=name)


def epoch_of(dataset: Any, age: int, seed: int = 0, **options: Any) -> list[torch.Tensor]:
    wanted = DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8), **{"batch_size": 16, **options})
    batches = loader(dataset, wanted, InputSpec((3, 8, 8)), training=True, seed=seed)
    batches.sampler.begin(age)  # type: ignore[attr-defined]
    parts = list(zip(*batches, strict=True))
    return [torch.cat(part) for part in parts]
