"""Every recipe of recipes/ as it stands: each run a row of docs/study/recipes.csv.

    python study/every_recipe.py            # go on where it was stopped
    python study/every_recipe.py --list     # the commands of what is left

`quickstart` is run with three seeds, and so are the recipes that differ from it in their losses and pairs alone; these
leave out the baseline, which would be that of `quickstart` again. Every other recipe has one seed.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from run_table import Row, Runs, finished, percent, workers

from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
TABLE = ROOT / "docs" / "study" / "recipes.csv"
FIRST = "quickstart"
SEEDS = (0, 1, 2)
KEY = ("recipe", "seed")
COLUMNS = {  # by role, of accuracies
    "teacher baseline": "teacher_alone",
    "teacher": "teacher",
    "baseline": "baseline",
    "student": "student",
}


@dataclass(frozen=True)
class Trial:
    recipe: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.recipe, str(self.seed)

    @property
    def sets(self) -> list[str]:
        return ["baseline=false"] if self.recipe != FIRST and self.recipe in alike() else []

    @property
    def command(self) -> str:
        """What a user types for this run."""
        sets = "".join(f" --set {each}" for each in self.sets)
        return (
            f"OMP_NUM_THREADS=1 probe-kd train recipes/{self.recipe}.yaml --allow-import timm --seed {self.seed}{sets}"
        )


@cache
def alike() -> list[str]:
    """The recipes that differ from the quickstart in their losses and pairs alone, and the quickstart itself."""

    def rest(path: Path) -> dict[str, Any]:
        tree: dict[str, Any] = YAML(typ="safe").load(path)
        tree.pop("pairs", None)
        return {**tree, "stages": [{**stage, "losses": {}} for stage in tree["stages"]]}

    first = rest(RECIPES[FIRST])
    return [name for name, path in RECIPES.items() if rest(path) == first]


def trials() -> list[Trial]:
    """The quickstart, then those that are alike, then the others."""
    same = sorted(alike(), key=lambda name: name != FIRST)
    several = [Trial(name, seed) for name in same for seed in SEEDS]
    return [*several, *(Trial(name, SEEDS[0]) for name in RECIPES if name not in same)]


def run_trial(trial: Trial, sets: tuple[str, ...] = ()) -> Row:
    """Train by the recipe and measure its models on the test images. A test that has to be short has `sets`."""
    torch.set_num_threads(1)
    begun = time.process_time()
    whole = plan(load(RECIPES[trial.recipe], trial.seed, [*trial.sets, *sets]), allow_import=["timm"])
    with tempfile.TemporaryDirectory() as name:
        results = train(whole, Path(name) / "run", Progress(Console(quiet=True))).results
    by_role = {role: vars(result) for role, result in results.items()}
    return {
        "student_model": by_role["student"]["model"].rpartition(":")[2],
        "teacher_model": by_role["teacher"]["model"].rpartition(":")[2] if "teacher" in by_role else "",
        **{column: percent(by_role.get(role, {}).get("accuracy")) for role, column in COLUMNS.items()},
        "agreement": percent(by_role["student"]["agreement"]),
        "baseline_agreement": percent(by_role.get("baseline", {}).get("agreement")),
        "core_seconds": f"{time.process_time() - begun:.1f}",
    }


def place_of(row: Row) -> tuple[int, int]:
    names = [trial.recipe for trial in trials()]
    return names.index(row["recipe"]), int(row["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what is left")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at a time, one thread each")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    table = Runs(options.table, KEY, place_of)
    done = finished(trials(), lambda trial: [table.row_of(trial)])
    todo = [trial for trial in trials() if trial not in done]
    if options.list:
        for trial in todo:
            Console().print(trial.command, highlight=False, soft_wrap=True)
        return
    with workers(options.jobs) as pool, ThreadPoolExecutor(options.jobs) as threads:
        runs = Runs(options.table, KEY, place_of, run_trial, pool)
        for trial, row in zip(todo, threads.map(runs.row_of, todo), strict=True):
            Console().print(f"{trial.recipe}, seed {trial.seed}: {row['student']}", highlight=False)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
