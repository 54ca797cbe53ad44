"""Small things that the tests share."""

import csv
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import frozen  # noqa: F401
import pytest
import torch

from probe_kd.cli import main

# Not of this process: a fork of one whose autograd has made its threads cannot train. The server has none.
apart = multiprocessing.get_context("forkserver")
apart.set_forkserver_preload(["pytest", "frozen"])


def begin(target: Callable[..., Any], *arguments: Any, **keywords: Any) -> BaseProcess:
    """A process of the server, which has imported all that runs need, so that it begins in milliseconds.

    Before Python 3.12.3 a server gets no `sys.path` (gh-117378), and leaves out without a word what it does not find.
    """
    process = apart.Process(target=target, args=arguments, kwargs=keywords)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


TINY = """\
student:
  model: vit_tiny_patch16_224
  model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}
teacher:
  model: resnet10t
  train: {epochs: 1}
data:
  dataset: sklearn/digits
  input_size: [3, 16, 16]
  fraction: 0.25
  batch_size: 64
  hflip: 0.0
pairs:
  blocks.0: layer2
  blocks.1: layer3
baseline: true
stages:
  - name: hint
    epochs: 1
    losses:
      hint: {loss: hint, normalize: layer}
  - name: task
    epochs: 2
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, temperature: 2.0, weight: 0.5}
"""

# With a narrow teacher and no jitter, for tests of runs rather than of recipes: a run costs less than half, and a
# checkpoint a tenth.
NARROW = TINY.replace("model: resnet10t\n", "model: resnet10t\n  model_kwargs: {channels: [8, 16, 24, 32]}\n").replace(
    "hflip: 0.0\n", "hflip: 0.0\n  color_jitter: 0.0\n"
)
WHOLE = TINY.replace("fraction: 0.25\n  batch_size: 64", "batch_size: 256")  # with all images

ROCKET = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}
teacher: {model: resnet18, model_kwargs: {channels: [8, 16, 24, 32], stem_width: 32, stem_type: deep_tiered}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], fraction: 0.25, batch_size: 128, hflip: 0.0, color_jitter: 0.0}
share: {form: weights, modules: interval}
stages:
  - epochs: 2
    losses:
      light: {loss: cross_entropy}
      booster: {loss: cross_entropy, of: teacher}
      hint: {loss: logits, reduction: sum, weight: 0.03}
"""
_TEACHER = next(line for line in ROCKET.splitlines() if line.startswith("teacher"))
TRUNK = ROCKET.replace("form: weights, modules: interval", "form: trunk, at: layer1").replace(
    _TEACHER, "teacher: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32], layers: [1, 2, 2, 2]}}"
)
GRAFT = ROCKET.replace("form: weights, modules: interval", "form: graft, at: {blocks.0: layer1}").replace(
    "student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}",
    "student: {model: vit_tiny_patch16_224, model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, "
    "num_heads: 2}}",
)


def record(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The workers of pytest-xdist fill the cores already; and one thread adds in one order."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that runs in a second: two stages, a teacher to train, a baseline."""
    path = tmp_path / "tiny.yaml"
    path.write_text(NARROW)
    return path


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


def forget_modules_of(folder: Path) -> None:
    """Modules of a user that a command has imported from this folder: another test has others of the same name."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`command("inspect", "resnet18")` as in a shell in `tmp_path`, without the seconds of a new process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["probe-kd", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    yield call
    forget_modules_of(tmp_path)


def pytest_collection_finish() -> None:
    """No collection looks at the tests themselves, of which there are thousands (as `frozen` does for the imports)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen_after() -> Iterator[None]:
    """Nor at what the tests of a file have imported and built."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no process is left with one of them while the others have nothing to do."""
    items.sort(key=lambda item: item.path.stem != "test_pages" and "training" not in item.path.parts)
