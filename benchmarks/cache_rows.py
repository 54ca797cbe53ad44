"""How long a training step waits for a batch with its rows from a teacher's cache, beside the batch alone.

    python benchmarks/cache_rows.py

The step itself sleeps, as the process that trains does while a GPU computes. Rows are read by that process after the
images, or with them by whoever reads the images.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from measure import Spread, command, options, section
from torch.utils.data import Subset

from probe_kd.data.batches import Batches
from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_rows import RowReader, Stored
from probe_kd.data.loading import DataOptions, Views, loader, open_datasets, seed_of_view
from probe_kd.engine.spec import InputSpec

BATCH, BATCHES, STEP = 128, 6, 0.1  # images; batches of an epoch; seconds
SEEN = InputSpec((3, 32, 32))
Wait = Callable[[int], list[float]]  # the seconds that each step of an epoch waits, by its number


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--kilobytes", type=int, nargs="*", default=[16, 200], help="a row")
    wishes = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for kilobytes in wishes.kilobytes:
        with tempfile.TemporaryDirectory() as folder:
            cache = filled(Path(folder), kilobytes)
            for workers in wishes.workers:
                waits = measured(arms(cache, workers), 1 if wishes.quick else wishes.rounds or 5)
                alone, after, together = (1000 * median(waits[name]) for name in ("alone", "after", "with"))
                ratios = Spread.of([one / other for one, other in zip(waits["with"], waits["after"], strict=True)])
                rows.append([kilobytes, workers, f"{alone:.1f}", f"{after:.1f}", f"{together:.1f}", ratios])
    print(
        section(
            "Waiting for the rows of a cache",
            command(),
            f"Milliseconds that a step waits for {BATCH} images of 32 pixels: alone, with rows that are read after "
            "them by the process that trains, and with rows that are read with them. The last column is the ratio of "
            "these two, median (quartiles) over epochs. A step sleeps for 100 ms.",
            ["kB a row", "workers", "images alone", "rows after", "rows with", "with / after"],
            rows,
        )
    )


def filled(folder: Path, kilobytes: int) -> TeacherCache:
    cache = TeacherCache(folder, [Stored("layer", (kilobytes * 256,), torch.float32)], BATCH * BATCHES)
    cache.prepare(0)
    cache.begin(0)
    for first in range(0, cache.count, BATCH):
        cache.keep(torch.arange(first, first + BATCH), [torch.randn(BATCH, kilobytes * 256)])
    cache.flush()
    return cache


def arms(cache: TeacherCache, workers: int) -> dict[str, Wait]:
    data = DataOptions(dataset="sklearn/digits", input_size=SEEN.size, batch_size=BATCH, views=1, workers=workers)
    images = Subset(open_datasets(data).train, range(cache.count))
    reader = RowReader(cache.folder, cache.taps, cache.count, True, {seed_of_view(0, 0): 0})
    without, reading = (loader(images, data, SEEN, training=True, rows=rows) for rows in ({}, {"": reader}))
    return {
        "alone": lambda epoch: waited(without, epoch, lambda *_: []),
        "after": lambda epoch: waited(without, epoch, lambda _, __, indices: cache.rows(indices)),
        "with": lambda epoch: waited(reading, epoch, lambda _, __, ___, rows: rows[""]),
    }


def waited(batches: Batches, epoch: int, rows_of: Callable[..., object]) -> list[float]:
    """The seconds that steps wait, without the first, for which nothing was read ahead."""
    assert isinstance(batches.sampler, Views)
    batches.sampler.begin(epoch)
    iterator, waits = iter(batches), list[float]()
    for _ in range(len(batches)):
        started = time.perf_counter()
        rows = rows_of(*next(iterator))
        waits.append(time.perf_counter() - started)
        assert rows is not None
        time.sleep(STEP)
    return waits[1:]


def measured(arms: Mapping[str, Wait], rounds: int) -> dict[str, list[float]]:
    """The median wait of each round of each arm, after a round that begins the workers."""
    waits: dict[str, list[float]] = {name: [] for name in arms}
    for epoch in range(rounds + 1):
        for name, wait in arms.items():
            seconds = median(wait(epoch))
            waits[name] += [seconds] * bool(epoch)
    return waits


if __name__ == "__main__":
    main()
