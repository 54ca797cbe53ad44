"""How the benchmarks measure: arms in turn in one process, ratios round by round, peaks of memory, and their tables.

Not a script of its own: the others import it.
"""

import argparse
import datetime
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Arm = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Samples:
    """The seconds of every arm, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def milliseconds(self, arm: str) -> float:
        return 1000 * statistics.median(self.seconds[arm])

    def ratio(self, arm: str, to: str) -> Spread:
        """How long the arm takes beside `to`: over the ratios of each round, so that a busy moment falls on both."""
        return Spread.of([ours / theirs for ours, theirs in self._by_round(arm, to)])

    def surplus(self, arm: str, to: str) -> Spread:
        """How many milliseconds the arm takes beyond `to`, over the differences of each round."""
        return Spread.of([1000 * (ours - theirs) for ours, theirs in self._by_round(arm, to)])

    def _by_round(self, arm: str, to: str) -> Iterator[tuple[float, float]]:
        return zip(self.seconds[arm], self.seconds[to], strict=True)


def interleaved(
    arms: Mapping[str, Arm],
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Every arm once a round, each round in another order, so that none always follows the same other.

    `clock` gives seconds. `time.process_time` does not count what other processes take of a busy CPU.
    """
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        # Backwards every other time round: a rotation alone would keep every arm's predecessor.
        for name in order if number // len(names) % 2 == 0 else order[::-1]:
            seconds[name].append(_timed(arms[name], device, clock))
    return Samples(seconds)


def _timed(arm: Arm, device: str, clock: Callable[[], float]) -> float:
    _wait(device)
    started = clock()
    arm()
    _wait(device)
    return clock() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(arm: Arm, device: str = "cpu") -> int:
    """How far the tensors of torch rise above where they stood when the arm began. The arm should have run before.

    On the CPU every allocation and release is read from torch's profiler, so that the figure is exact and the same each
    time, which the size of a process is not.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        arm()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    moves = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    now = peak = 0
    for _, size in moves:
        now += size
        peak = max(peak, now)
    return peak


def time_cells(samples: Samples, arm: str, to: str) -> tuple[object, ...]:
    """Two cells of a row: the milliseconds of `to`, and the time of the arm as a multiple of it."""
    return f"{samples.milliseconds(to):.0f}", samples.ratio(arm, to=to)


def memory_cells(arms: Mapping[str, Arm], arm: str, to: str, device: str) -> tuple[object, ...]:
    """Two cells of a row: MiB of tensors at the peak of `to`, and the peak of the arm as a multiple of it."""
    base, peak = (peak_bytes(arms[name], device) for name in (to, arm))
    return f"{base / 2**20:.0f}", f"{peak / base:.3f}"


def section(title: str, command: str, meaning: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """One question as markdown: what was asked, by which command, what a row means, and the answer."""
    lines = [f"## {title}", "", f"`{command}`", "", meaning, ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def command() -> str:
    """How this script was called, to stand over its table."""
    return " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def machine() -> str:
    """Where and when something was measured, in one paragraph."""
    version = importlib.metadata.version
    peers = []
    for name in ("torch", "timm", "torchdistill", "lightning", "accelerate"):
        try:
            peers.append(f"{name} {version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    place = f"{os.cpu_count()} cores"
    if torch.cuda.is_available():
        place += f", {torch.cuda.get_device_name()}"
    moment = datetime.datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0")
    return f"{moment}; {place}; {torch.get_num_threads()} thread(s) a process; {', '.join(peers)}; commit {_commit()}."


def _commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        name = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=7", "--match="]
        return subprocess.run(name, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def options(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test that the arms agree")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (bf16 autocast, larger sizes)")
    parser.add_argument("--rounds", type=int, default=None, help="how often every arm runs")
    return parser
