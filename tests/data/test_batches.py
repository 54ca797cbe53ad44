"""What comes out of a loader: the bits of timm's transforms, whoever reads the images and wherever."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from probe_kd.data.batches import MOST_WORKERS, worker_count
from probe_kd.data.loading import DataOptions, loader
from probe_kd.engine.spec import InputSpec

SIZE = InputSpec((3, 16, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
OPTIONS = DataOptions(input_size=SIZE.size, batch_size=4, reprob=0.5, aa="rand-m9")


def pictures(count: int) -> Sequence[Any]:
    noise = np.random.default_rng(0).integers(0, 255, (count, 20, 18, 3), dtype="uint8")
    return [(Image.fromarray(pixels), index % 3) for index, pixels in enumerate(noise)]


def epochs(workers: int) -> list[tuple[torch.Tensor, ...]]:
    batches = loader(pictures(10), OPTIONS.model_copy(update={"workers": workers}), SIZE, training=True)  # type: ignore[arg-type]
    found = []
    for age in (0, 1):
        batches.sampler.begin(age)  # type: ignore[attr-defined]
        found += list(batches)
    return found


def test_workers_that_live_over_epochs_give_what_this_process_gives() -> None:
    for one, other in zip(epochs(0), epochs(2), strict=True):
        assert all(map(torch.equal, one, other))


def test_batches_that_are_skipped_are_those_at_the_beginning_and_the_memory_format_changes_no_bit() -> None:
    batches = loader(pictures(10), OPTIONS, SIZE, training=True)  # type: ignore[arg-type]
    whole, last = list(batches), list(batches.skip(1))
    assert len(whole) == 2
    assert len(last) == 1
    batches.memory_format = torch.channels_last
    image = next(iter(batches))[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image, whole[0][0])
    assert torch.equal(last[0][0], whole[1][0])


@pytest.mark.parametrize(
    ("available", "cores", "processes", "batches", "expected"),
    [
        (False, 8, 1, 99, 0),
        (True, 8, 1, 99, 8),
        (True, 8, 4, 99, 2),
        (True, 8, 16, 99, 1),
        (True, 8, 1, 12, 6),
        (True, 8, 1, 3, 1),
        (True, 96, 1, 99, MOST_WORKERS),
    ],
)
def test_workers_are_the_cores_beside_a_gpu_shared_by_its_processes(
    available: bool, cores: int, processes: int, batches: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: available)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count("auto", batches) == expected
    assert [worker_count(wanted, 3) for wanted in (0, 2, 200)] == [0, 2, 3]
