"""Train every method with every pair of models, and write what came of it to docs/study/.

    python study/study.py                 # go on where it was stopped; `make study`
    python study/study.py --list          # what there is to do, and how long it will take

For every cell (a pair of models, a method, how many images) the learning rate is chosen on held-out training images
with the first seed; then the other seeds are trained with it. The test images are looked at once a run, at its end:
tests.csv. What the runs measured on held-out images on their way, the ones of other learning rates too, is in
curves.csv. The runs lie in runs/study, each a folder of `probe-kd train`; a run that is finished is not run again, so
keep that folder until all is done. What the tables say of cells that are not run here is kept.
"""

import argparse
import csv
import gzip
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from torch import Tensor

from probe_kd import load_student
from probe_kd.data.loading import loader
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.results.comparison import read_metrics
from probe_kd.training.progress import Progress
from probe_kd.training.records import write_metrics
from probe_kd.training.run import train

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "study"
PAIRS = {"resnet-resnet": "resnet", "vit-resnet": "resnet", "resnet-vit": "vit", "mixer-convnext": "convnext"}
FULL = ("resnet-resnet", "vit-resnet")  # the pairs that are also tried with all images
RATES = (2e-4, 7e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
FIRST = (6e-3,)  # tried first; then what is beside the best, until both its neighbours are tried
ALLOWED = ["timm", "outliers"]  # the mixer is one of timm's classes and none of its names; outliers.py
FEW, ALL = "few", "all"  # images
KNOWN = 15  # seconds in which a cell is only read, and says nothing of how long the others take


@dataclass(frozen=True)
class Cell:
    """What is compared: one method with one pair of models, and how many images."""

    images: str
    pair: str
    method: str


ABOUT = tuple(field.name for field in fields(Cell))  # of a row, its cell


@dataclass(frozen=True)
class Budget:
    """The same for every method. `fraction` is of the training images that are not held out."""

    fraction: float
    epochs: int
    batch_size: int
    warmup: float


@dataclass(frozen=True)
class Settings:
    out: Path
    budgets: Mapping[str, Budget]
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = RATES
    sets: tuple[str, ...] = ()  # of the data, where it is other data


BUDGETS = {FEW: Budget(0.05, 6, 64, 0.5), ALL: Budget(1.0, 2, 128, 0.2)}


@cache
def known() -> dict[str, Any]:
    """study/methods.yaml."""
    found: dict[str, Any] = YAML(typ="safe").load(Path(__file__).with_name("methods.yaml"))
    return found


def cells() -> Iterator[Cell]:
    """In the order in which they are run: what is asked of all comes first."""
    methods = known()["methods"]
    for images, pairs in ((FEW, tuple(PAIRS)), (ALL, FULL)):
        for pair in pairs:
            for method, about in methods.items():
                if pair in about.get("of", PAIRS) and (images == FEW or about.get("full")):
                    yield Cell(images, pair, method)


def sets_of(cell: Cell, rate: float, settings: Settings) -> list[str]:
    """What is changed in the pair's recipe, as the command line's --set would."""
    found, budget = known(), settings.budgets[cell.images]
    about = found["methods"][cell.method]
    stages = [
        {
            **stage,
            "epochs": max(1, round(budget.epochs * stage.get("epochs", 1))),
            "optimizer": {"opt": "adamw", "lr": rate, "weight_decay": 0.05},
            "scheduler": {"sched": "cosine", "warmup_epochs": budget.warmup},
            "clip_grad": 1.0,
        }
        for stage in about["stages"]
    ]
    changes: dict[str, Any] = {
        "stages": stages,
        "data.fraction": budget.fraction,
        "data.batch_size": budget.batch_size,
        "teacher.train": None,
        "val_interval": max(1, budget.epochs // 2),
    }
    if about.get("layers", "all") != "all":
        changes["pairs"] = found["layers"][cell.pair][about["layers"]]
    if "teacher" in about:
        changes["teacher.model"] = about["teacher"]
    if "share" in about:
        changes["share"] = about["share"]
    else:
        changes["teacher.checkpoint"] = str(teacher_of(cell.pair, settings) / "student.safetensors")
        changes["teacher.cache"] = str(settings.out / "cache")
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def teacher_of(pair: str, settings: Settings) -> Path:
    return teacher_folder(PAIRS[pair], settings.out)


def teacher_folder(name: str, out: Path, seed: int = 0) -> Path:
    return out / "teachers" / (f"{name}-seed{seed}" if seed else name)


def planned(recipe: Path, seed: int, sets: Sequence[str]) -> Plan:
    """The plan of a run that measures itself on held-out images, and leaves the test images alone."""
    found = plan(load(recipe, seed, sets), allow_import=ALLOWED)
    assert found.datasets.held_out is not None
    return replace(found, datasets=replace(found.datasets, test=found.datasets.held_out))


def run(recipe: Path, seed: int, sets: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train, or go on, or find it done. Returns its summary by role, with accuracies on the held-out images."""
    summary = folder / "summary.json"
    if not summary.exists():
        train(planned(recipe, seed, sets), folder, Progress(Console(quiet=True)), resume=folder.exists())
    results: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))["results"]
    return {result["role"]: result for result in results}


def test(recipe: Path, seed: int, sets: Sequence[str], folder: Path, teacher: Path | None) -> dict[str, float]:
    """Accuracy of every model of the run on the test images, and the student's agreement with its teacher."""
    kept = folder / "study-test.json"
    if not kept.exists():
        found = plan(load(recipe, seed, sets), allow_import=ALLOWED)
        answers, target = {}, torch.tensor([])
        files = {file.stem: file for file in folder.glob("*.safetensors") if not file.stem.startswith("adapters")}
        for role, file in (files | ({"teacher": teacher} if teacher else {})).items():
            answers[role], target = _answers(found, file)
        measures = {role: float((answer == target).float().mean()) for role, answer in answers.items()}
        if "teacher" in answers:
            measures["agreement"] = float((answers["student"] == answers["teacher"]).float().mean())
        kept.write_text(json.dumps(measures), encoding="utf-8")
    measured: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return measured


@torch.no_grad()
def _answers(found: Plan, weights: Path) -> tuple[Tensor, Tensor]:
    """What the model of these weights answers; kept beside a teacher, which many runs ask for."""
    of_teacher = weights.parent.parent.name == "teachers"
    kept = weights.with_suffix(f".{len(found.datasets.test)}.pt")  # type: ignore[arg-type]
    if of_teacher and kept.exists():
        answers, target = torch.load(kept)
        return answers, target
    model = load_student(weights, allow_import=ALLOWED).eval()
    batches = list(loader(found.datasets.test, found.recipe.data, found.student_input, training=False))
    answers = torch.cat([model(images).argmax(1) for images, _ in batches])
    target = torch.cat([target for _, target in batches])
    if of_teacher:
        torch.save((answers, target), kept)
    return answers, target


def run_teacher(name: str, settings: Settings, seed: int = 0) -> str:
    torch.set_num_threads(1)
    run(RECIPES / f"teacher-{name}.yaml", seed, settings.sets, teacher_folder(name, settings.out, seed))
    return name


def choose(
    accuracy: Callable[[float], float], rates: Sequence[float], first: Sequence[float] = FIRST
) -> tuple[float, list[float]]:
    """The best of these learning rates and all that were tried: none is the best whose neighbours were not tried."""
    places = [place for place, rate in enumerate(rates) if rate in first] or list(range(len(rates)))
    found = {place: accuracy(rates[place]) for place in places}
    while True:
        best = max(found, key=found.__getitem__)
        beside = [place for place in (best - 1, best + 1) if 0 <= place < len(rates) and place not in found]
        if not beside:
            return rates[best], [rates[place] for place in sorted(found)]
        found[beside[0]] = accuracy(rates[beside[0]])


Rows = list[dict[str, Any]]


def run_cell(cell: Cell, settings: Settings) -> tuple[Rows, Rows]:
    """All runs of a cell: the rows of tests.csv, and those of curves.csv."""
    torch.set_num_threads(1)
    recipe, first = RECIPES / f"{cell.pair}.yaml", settings.seeds[0]
    home = settings.out / "runs" / cell.images / cell.pair / "".join(c if c.isalnum() else "-" for c in cell.method)
    sets = {rate: [*settings.sets, *sets_of(cell, rate, settings)] for rate in settings.rates}

    def held_out(rate: float) -> float:
        done = run(recipe, first, sets[rate], home / f"lr{rate:g}-seed{first}")
        return float(done["student"]["accuracy"])

    best, tried = choose(held_out, settings.rates)
    shares = "share" in known()["methods"][cell.method]
    rows, curves = [], [row for rate in tried for row in _curve(cell, home, rate, first)]
    for seed in settings.seeds:
        folder = home / f"lr{best:g}-seed{seed}"
        done = run(recipe, seed, sets[best], folder)
        teacher = None if shares else teacher_of(cell.pair, settings) / "student.safetensors"
        measured = test(recipe, seed, sets[best], folder, teacher)
        rows.append(
            {
                **asdict(cell),
                "lr": best,
                "seed": seed,
                "held_out": round(100 * done["student"]["accuracy"], 2),
                "test": round(100 * measured["student"], 2),
                "agreement": round(100 * measured.get("agreement", 0), 2),
                "teacher": round(100 * measured.get("teacher", 0), 2),
                "teacher_alone": round(100 * measured["teacher-baseline"], 2) if "teacher-baseline" in measured else "",
            }
        )
        curves += _curve(cell, home, best, seed) if seed != first else []
    return rows, curves


def timed_cell(cell: Cell, settings: Settings) -> tuple[tuple[Rows, Rows], float]:
    started = time.perf_counter()
    return run_cell(cell, settings), time.perf_counter() - started


def _curve(cell: Cell, home: Path, rate: float, seed: int) -> Iterator[dict[str, Any]]:
    """The epochs of the student that were measured."""
    for row in read_metrics(home / f"lr{rate:g}-seed{seed}" / "metrics.csv"):
        if row["role"] == "student" and "accuracy" in row:
            where = {"lr": rate, "seed": seed, "stage": row["stage"], "epoch": row["epoch"]}
            yield {
                **asdict(cell),
                **where,
                "loss": f"{row['loss']:.5g}",
                "held_out": round(100 * row["accuracy"], 2),
            }


def write(rows: Rows, path: Path) -> None:
    order = {astuple(cell): place for place, cell in enumerate(cells())}
    every = [row for row in beside(rows, path, *ABOUT) if _keys(row, *ABOUT) in order]
    ranked = sorted(every, key=lambda row: (order[_keys(row, *ABOUT)], float(row["lr"]), int(row["seed"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(ranked, path)


def beside(rows: Rows, path: Path, *keys: str) -> Rows:
    """The rows, and those of the table that is there which are about something else: nothing measured is lost."""
    done = {_keys(row, *keys) for row in rows}
    if not path.exists():
        return rows
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if _keys(row, *keys) not in done] + rows


def _keys(row: Mapping[str, Any], *keys: str) -> tuple[Any, ...]:
    return tuple(row[key] for key in keys)


def study(chosen: Sequence[Cell], settings: Settings, tables: Path, jobs: int, console: Console) -> None:
    """Everything, several runs at a time, saying how long the rest will take."""
    rows: Rows = []
    curves: Rows = []
    taken: list[float] = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        names = sorted({PAIRS[cell.pair] for cell in chosen})
        for name in pool.map(run_teacher, names, [settings] * len(names)):
            console.print(f"teacher {name} is there")
        waiting = {pool.submit(timed_cell, cell, settings): cell for cell in chosen}
        for count, future in enumerate(as_completed(waiting), 1):
            (done, run_by_run), seconds = future.result()
            taken += [seconds] if seconds > KNOWN else []
            rows, curves = rows + done, curves + run_by_run
            write(rows, tables / "tests.csv")
            write(curves, tables / "curves.csv")
            tests = statistics.fmean(row["test"] for row in done)
            left = statistics.fmean(taken or [0]) * (len(chosen) - count) / jobs / 60
            cell = waiting[future]
            console.print(
                f"{count}/{len(chosen)} {cell.images} {cell.pair} {cell.method}: {tests:.2f}; {left:.0f} minutes left",
                highlight=False,
                soft_wrap=True,
            )


def bring_images(folder: Path) -> None:
    """Fashion-MNIST where torchvision looks for it: from Debian's package where that is installed, else downloaded."""
    raw = folder / "FashionMNIST" / "raw"
    if raw.exists():
        return
    listed = subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True, check=False)
    files = [Path(line) for line in listed.stdout.split() if line.endswith("ubyte.gz")]
    if not files:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        return
    raw.mkdir(parents=True)
    for file in files:
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    parser.add_argument("--pair", action="append", choices=PAIRS, help="only this pair of models; may be repeated")
    parser.add_argument("--images", action="append", choices=(FEW, ALL), help="only with so many images")
    parser.add_argument(
        "--method", action="append", choices=known()["methods"], help="only this method", metavar="NAME"
    )
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--tables", type=Path, default=ROOT / "docs" / "study", help="the folder of the tables")
    options = parser.parse_args()
    chosen = [
        cell
        for cell in cells()
        if cell.pair in (options.pair or PAIRS)
        and cell.images in (options.images or (FEW, ALL))
        and cell.method in (options.method or known()["methods"])
    ]
    console = Console()
    console.print(
        f"{len(chosen)} cells of 5 to 7 runs, {options.jobs} at a time; a run takes 20 to 120 s of one core, all of "
        f"them about {len(chosen) * 6 * 70 / options.jobs / 3600:.1f} hours; what is finished in {options.out} is read"
    )
    if options.list:
        for cell in chosen:
            console.print(f"  {cell.images} {cell.pair} {cell.method}", highlight=False)
        return
    bring_images(options.out / "data")
    study(chosen, Settings(options.out, BUDGETS), options.tables, options.jobs, console)


if __name__ == "__main__":
    main()
