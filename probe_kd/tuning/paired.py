"""Whether the tuned recipe beats the recipe as it stands: both are run with the same seeds, at the full budget.

The trials' own scores cannot say so. The best of many is the greatest of many, and some of it is luck. These runs are
measured on images that no trial was scored on, and the difference is taken seed by seed.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from probe_kd.data.datasets import Datasets
from probe_kd.errors import ProbeKDError, RunError, Stopped, short
from probe_kd.files.atomic import MANIFEST
from probe_kd.files.run_folder import Claim, claim
from probe_kd.recipe.keys import TeacherOptions
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import Source, changed
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.training.progress import Progress
from probe_kd.training.run import train
from probe_kd.tuning.budget import scored_on_held_out, with_teachers
from probe_kd.tuning.trials import KEPT

LEVEL = 0.95  # of the interval
FAILED = "failed.json"


@dataclass(frozen=True)
class Paired:
    """The measure of both recipes by seed, and their difference.

    `low` and `high` bound the mean difference by Student's t; None with fewer than two seeds. `failed` says which runs
    failed, and why; the difference is over the seeds of which both runs ended.
    """

    seeds: tuple[int, ...]
    default: tuple[float, ...]
    tuned: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    failed: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(tuned - default for default, tuned in zip(self.default, self.tuned, strict=True))

    @property
    def better(self) -> int:
        """In how many seeds the tuned recipe is better."""
        return sum(difference > 0 for difference in self.differences)

    @property
    def is_better(self) -> bool:
        return self.mean is not None and self.mean > 0


def paired(default: Mapping[int, float], tuned: Mapping[int, float], failed: Sequence[str] = ()) -> Paired:
    """Compare the measures of two recipes by seed, over the seeds that both have."""
    seeds = tuple(seed for seed in default if seed in tuned)
    sides = tuple(default[seed] for seed in seeds), tuple(tuned[seed] for seed in seeds)
    differences = [after - before for before, after in zip(*sides, strict=True)]
    if len(seeds) < 2:
        return Paired(seeds, *sides, fmean(differences) if seeds else None, None, None, tuple(failed))
    mean = fmean(differences)
    reach = float(student_t.ppf((1 + LEVEL) / 2, len(seeds) - 1)) * stdev(differences) / sqrt(len(seeds))
    return Paired(seeds, *sides, mean, mean - reach, mean + reach, tuple(failed))


@dataclass(frozen=True)
class FullRun:
    """A run of the whole budget: its folder, its seed, and what is changed in the recipe."""

    folder: Path
    seed: int
    values: Mapping[KeyPath, Any]


@dataclass(frozen=True)
class FullRuns:
    """What all full runs have in common."""

    source: Source
    teachers: Mapping[str, TeacherOptions]
    measure: str
    allow_import: tuple[str, ...] = ()


def run_full(common: FullRuns, run: FullRun, datasets: Datasets, progress: Progress) -> None:
    """Run the recipe with one seed, or go on where it was stopped, and keep its tables.

    Does nothing for a run that has ended. A run that fails leaves the reason. Raises Stopped after a signal, and
    RunError while another process writes the folder.
    """
    if (run.folder / "summary.json").is_file() or (run.folder / FAILED).is_file():
        _clean(run.folder)
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with claim(run.folder, progress.say) as claimed:
        try:
            _run(common, run, datasets, progress, claimed)
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as refusal:  # as of a trial; the other runs may not fail
            kind = "" if isinstance(refusal, ProbeKDError) else f"{type(refusal).__name__}: "
            (run.folder / FAILED).write_text(json.dumps(f"{kind}{short(refusal)}"), encoding="utf-8")
            progress.say(f"{run.folder.name} failed: {short(refusal)}")
    _clean(run.folder)


def _run(common: FullRuns, run: FullRun, datasets: Datasets, progress: Progress, claimed: Claim) -> None:
    other = changed(common.source, run.values, place=("tune",))
    recipe = with_teachers(scored_on_held_out(other.recipe), common.teachers)
    recipe = recipe.model_copy(update={"seed": run.seed})
    planned = plan(replace(other, recipe=recipe), allow_import=common.allow_import, datasets=datasets)
    train(planned, run.folder, progress, resume=(run.folder / MANIFEST).is_file(), claimed=claimed)


def _clean(folder: Path) -> None:
    """Delete all of a run but its tables: weights, checkpoints, and what marks it as a run that goes on."""
    for path in folder.iterdir():
        if path.name in (*KEPT, FAILED):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def value_of(folder: Path, measure: str) -> float | str:
    """The student's measure in the tables of a full run, or why it failed. Raises RunError if it has not ended."""
    try:
        if (folder / FAILED).is_file():
            return str(json.loads((folder / FAILED).read_text(encoding="utf-8")))
        results = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["results"]
        student = next(result for result in results if result["role"] == "student")
        value = {**student, **student["measures"]}.get(measure)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        raise RunError(f"{folder} has no results; delete it, and go on by --resume") from None
    return f"the run has no {measure}" if value is None else float(value)
