"""Train every method with every pair of models under one budget, and write each run to docs/study/control.csv.

    python study/study.py                 # go on where it was stopped; `make study`
    python study/study.py --list          # what is left, and how many hours of two cores it takes

A cell is a pair of models and a method. Its learning rate, and then its weight, are chosen on held-out training images
by the mean of two seeds; with both, three other seeds are trained, and only these see the test images, once. Every run
is a row of the table as soon as it ends, and a run that has a row is not run again: to go on, the table and the
teachers are enough. Commit it as it grows. Teachers are trained from their recipes where they are not there; the study
refuses to mix rows of two teachers (teachers.csv). To measure a cell again, name another folder: `--tables FOLDER`.
"""

import argparse
import copy
import gzip
import hashlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from run_table import Row, Rows, Runs, beside, choose, divided, read, workers
from torch import Tensor

from probe_kd import load_student
from probe_kd.data.datasets import Datasets
from probe_kd.data.loading import loader
from probe_kd.engine.weights import read_weights
from probe_kd.errors import RunError
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.training.progress import Progress
from probe_kd.training.records import write_metrics
from probe_kd.training.run import train

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "study"
TABLES = ROOT / "docs" / "study"
PAIRS = {
    "vit-resnet": "resnet",
    "mixer-convnext": "convnext",
    "resnet-vit": "vit",
    "swin-vit": "vit",
    "mobilenet-convnext": "convnext",
    "resnet-resnet": "resnet",
}
RATES = (2e-4, 7e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
FIRST = (6e-3,)  # tried first; then what is beside the best, until both its neighbours are tried
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT_FACTOR = 1.0
CHOICE_SEEDS, TEST_SEEDS = (0, 1), (2, 3, 4)
TOGETHER = "the two best together"  # the best loss of outputs and the best loss of layers, each with its chosen weight
KINDS = ("outputs", "layers")
DEEPEST = {"level": "stage", "num_pairs": 1}
ALLOWED = ["timm"]  # the mixer is one of timm's classes and none of its names
USUAL_RUNS = 14  # of a cell
IMAGES: dict[str, Datasets] = {}  # of this process, by the options of the data


@dataclass(frozen=True)
class Budget:
    """The same for every method. `fraction` is of the training images that are not held out."""

    fraction: float = 0.05
    epochs: int = 6
    batch_size: int = 64
    warmup: float = 0.5


@dataclass(frozen=True)
class Settings:
    out: Path
    budget: Budget = field(default_factory=Budget)
    choice_seeds: tuple[int, ...] = CHOICE_SEEDS
    test_seeds: tuple[int, ...] = TEST_SEEDS
    rates: tuple[float, ...] = RATES
    sets: tuple[str, ...] = ()  # of the data, where it is other data


@dataclass(frozen=True)
class Cell:
    """What is compared: a method with a pair of models. `parts` are the methods that `TOGETHER` puts together."""

    pair: str
    method: str
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def about(self) -> str:
        return " + ".join(f"{method} x {factor:g}" for method, factor in self.parts)


@dataclass(frozen=True)
class Trial:
    """One run of a cell."""

    cell: Cell
    rate: float
    factor: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """By which its row is found."""
        values = (f"{self.rate:g}", f"{self.factor:g}", str(self.seed))
        return (self.cell.pair, self.cell.method, self.cell.about, *values)


KEY = ("pair", "method", "parts", "lr", "factor", "seed")


def place_of(row: Row) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    order = {name: place for place, name in enumerate((*PAIRS, *all_methods()))}
    numbers = (float(row[name]) for name in ("lr", "factor", "seed"))
    return order[row["pair"]], order[row["method"]], row["parts"], row["part"], *numbers


@cache
def known() -> dict[str, Any]:
    """study/methods.yaml."""
    methods: dict[str, Any] = YAML(typ="safe").load(Path(__file__).with_name("methods.yaml"))
    return methods


def all_methods() -> list[str]:
    """In the order in which they are run."""
    return [*known()["methods"], TOGETHER]


def cells(pairs: Sequence[str] = tuple(PAIRS), methods: Sequence[str] = ()) -> list[Cell]:
    """Each method with all pairs before the next."""
    chosen = [method for method in all_methods() if not methods or method in methods]
    return [Cell(pair, method) for method in chosen for pair in pairs if pair not in without(method)]


def without(method: str) -> list[str]:
    """The pairs of models that the method cannot be run with."""
    pairs: list[str] = known()["methods"].get(method, {}).get("not_with", [])
    return pairs


def losses_of(cell: Cell, factor: float) -> tuple[dict[str, Any], float]:
    """The losses of a cell, with the weight that varies times `factor`; and what its weight decay is multiplied by."""
    losses: dict[str, Any] = {}
    decay = 1.0
    for method, own_factor in cell.parts or ((cell.method, 1.0),):
        about = known()["methods"][method]
        stage = copy.deepcopy({"losses": about["losses"], "optimizer": {"weight_decay": 1.0}})
        for path in about["vary"]:
            *above, last = path.split(".")
            section: Any = stage
            for key in above:
                section = section[key]
            section[last] *= own_factor * factor
        losses = {**stage["losses"], **losses}  # of the labels, the weight beside the loss of outputs
        decay *= stage["optimizer"]["weight_decay"]
    layers = {**known()["layers"][cell.pair], "deepest": DEEPEST}
    for loss in losses.values():
        if isinstance(loss.get("pairs"), str):
            loss["pairs"] = layers[loss["pairs"]]
    return losses, decay


def sets_of(trial: Trial, settings: Settings) -> list[str]:
    """What is changed in the pair's recipe, as the command line's --set would."""
    budget = settings.budget
    losses, decay = losses_of(trial.cell, trial.factor)
    stage = {
        "name": "train",
        "epochs": budget.epochs,
        "losses": losses,
        "optimizer": {"opt": "adamw", "lr": trial.rate, "weight_decay": 0.05 * decay},
        "scheduler": {"sched": "cosine", "warmup_epochs": budget.warmup},
        "clip_grad": 1.0,
    }
    changes: dict[str, Any] = {
        "stages": [stage],
        "data.fraction": budget.fraction,
        "data.batch_size": budget.batch_size,
        "val_interval": budget.epochs,
        "teacher.train": None,
        "teacher.checkpoint": str(weights_of(PAIRS[trial.cell.pair], settings.out)),
        "teacher.cache": str(settings.out.resolve() / "cache"),  # runs with the same seed see the same views
    }
    return [*settings.sets, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]


def teacher_folder(name: str, out: Path, seed: int = 0) -> Path:
    return out / "teachers" / (f"{name}-seed{seed}" if seed else name)


def weights_of(teacher: str, out: Path) -> Path:
    return teacher_folder(teacher, out) / "student.safetensors"


def plan_of(recipe: Path, seed: int, sets: Sequence[str]) -> Plan:
    """The plan of a recipe. Those with the same data have the same images in memory, with what became of them."""
    source = load(recipe, seed, sets)
    data = source.recipe.data.model_dump_json()
    whole = plan(source, allow_import=ALLOWED, datasets=IMAGES.get(data))
    IMAGES[data] = whole.datasets
    return whole


def planned(recipe: Path, seed: int, sets: Sequence[str]) -> Plan:
    """The plan of a run that measures itself on held-out images, and leaves the test images alone."""
    whole = plan_of(recipe, seed, sets)
    assert whole.datasets.held_out is not None
    return replace(whole, datasets=replace(whole.datasets, test=whole.datasets.held_out))


def run(recipe: Path, seed: int, sets: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train, or go on, or find it done. Returns its summary by role, with accuracies on the held-out images."""
    summary = folder / "summary.json"
    if not summary.exists():
        train(planned(recipe, seed, sets), folder, Progress(Console(quiet=True)), resume=folder.exists())
    results: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))["results"]
    return {result["role"]: result for result in results}


def test(recipe: Path, seed: int, sets: Sequence[str], student: Path, teacher: Path | None) -> dict[str, float]:
    """Accuracy of these weights on the test images, and the agreement with the teacher's."""
    whole = plan_of(recipe, seed, sets)
    answers, target = _answers(whole, student)
    measures = {"student": float((answers == target).float().mean())}
    if teacher is not None:
        expected, _ = _answers(whole, teacher)
        measures["agreement"] = float((answers == expected).float().mean())
        measures["teacher"] = float((expected == target).float().mean())
    return measures


@torch.no_grad()
def _answers(whole: Plan, weights: Path) -> tuple[Tensor, Tensor]:
    """What the model of these weights answers; kept beside a teacher, which many runs ask for."""
    of_teacher = weights.parent.parent.name == "teachers"
    stored = weights.with_suffix(f".{len(whole.datasets.test)}.pt")  # type: ignore[arg-type]
    if of_teacher and stored.exists():
        answers, target = torch.load(stored)
        return answers, target
    model = load_student(weights, allow_import=ALLOWED).eval()
    batches = list(loader(whole.datasets.test, whole.recipe.data, whole.student_input, training=False))
    answers = torch.cat([model(images).argmax(1) for images, _ in batches])
    target = torch.cat([target for _, target in batches])
    if of_teacher:
        torch.save((answers, target), stored)
    return answers, target


def run_teacher(name: str, settings: Settings, seed: int = 0) -> Row:
    """Train a teacher from its recipe, or find it there. Returns its row of teachers.csv."""
    torch.set_num_threads(1)
    recipe, folder = RECIPES / f"teacher-{name}.yaml", teacher_folder(name, settings.out, seed)
    run(recipe, seed, settings.sets, folder)
    weights = folder / "student.safetensors"
    digest = hashlib.sha256()
    for key, tensor in sorted(read_weights(weights).items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    accuracy = test(recipe, seed, settings.sets, weights, None)["student"]
    return {"teacher": name, "seed": str(seed), "test": f"{100 * accuracy:.2f}", "digest": digest.hexdigest()[:16]}


def check_teachers(rows: Rows, table: Path) -> None:
    """Write the teachers of this study to a table that may have others. Stops where one has other weights there."""
    with_weights = {row["teacher"]: row for row in read(table)}
    for row in rows:
        other = with_weights.get(row["teacher"], row)
        if other != row:
            raise SystemExit(
                f"the rows of {table.parent} are of another teacher `{row['teacher']}`: {other['test']} % of the test "
                f"images ({other['digest']}), and the one trained here has {row['test']} % ({row['digest']}). Students "
                "of both are not compared: name another folder by --tables, or bring the teacher of the rows."
            )
    write_metrics(beside(rows, table, "teacher"), table)


def run_trial(trial: Trial, settings: Settings) -> Row:
    """Train, measure, and forget the run's folder. One whose loss does not stay finite has an accuracy of 0."""
    torch.set_num_threads(1)
    begun = time.process_time()
    recipe, sets = RECIPES / f"{trial.cell.pair}.yaml", sets_of(trial, settings)
    tests = trial.seed in settings.test_seeds
    measures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=settings.out) as name:
        folder = Path(name) / "run"
        try:
            held_out = float(run(recipe, trial.seed, sets, folder)["student"]["accuracy"])
            if tests:
                teacher = weights_of(PAIRS[trial.cell.pair], settings.out)
                measures = test(recipe, trial.seed, sets, folder / "student.safetensors", teacher)
        except RunError as error:
            if " became " not in str(error):  # a loss, or a weight, became no number
                raise
            held_out, measures = 0.0, {"student": 0.0, "agreement": 0.0} if tests else {}
    return {
        "part": "test" if tests else "choice",
        "held_out": f"{100 * held_out:.2f}",
        "test": f"{100 * measures['student']:.2f}" if measures else "",
        "agreement": f"{100 * measures['agreement']:.2f}" if measures else "",
        "core_seconds": f"{time.process_time() - begun:.1f}",
    }


def chosen(cell: Cell, runs: Runs, settings: Settings) -> tuple[float, float]:
    """The learning rate of the cell, and the factor of its weight, by the mean of the seeds of the choice."""

    def held_out(rate: float, factor: float) -> float:
        return runs.mean([Trial(cell, rate, factor, seed) for seed in settings.choice_seeds], "held_out")

    factors = known()["methods"].get(cell.method, {}).get("factors", FACTORS)
    rate, _ = choose(lambda rate: held_out(rate, DEFAULT_FACTOR), settings.rates, FIRST)
    factor, _ = choose(lambda factor: held_out(rate, factor), factors, (DEFAULT_FACTOR,))
    return rate, factor


def together(pair: str, runs: Runs, settings: Settings) -> Cell:
    """The cell of the pair's best loss of outputs and best loss of layers, on the held-out images of the choice."""
    parts = []
    for kind in KINDS:
        scores: dict[tuple[str, float], float] = {}
        for method, about in known()["methods"].items():
            if about.get("kind") == kind and pair not in without(method):
                rate, factor = chosen(Cell(pair, method), runs, settings)
                trials = [Trial(Cell(pair, method), rate, factor, seed) for seed in settings.choice_seeds]
                scores[method, factor] = runs.mean(trials, "held_out")
        parts.append(max(scores, key=scores.__getitem__))
    return Cell(pair, TOGETHER, tuple(parts))


def tests(cell: Cell, runs: Runs, settings: Settings) -> Rows:
    """The rows of a cell on the test images."""
    whole = together(cell.pair, runs, settings) if cell.method == TOGETHER else cell
    rate, factor = chosen(whole, runs, settings)
    return [runs.row_of(Trial(whole, rate, factor, seed)) for seed in settings.test_seeds]


def progress(asked: Sequence[Cell], runs: Runs, settings: Settings) -> tuple[list[Cell], list[Cell], float | None]:
    """As `divided` returns it."""
    return divided(
        asked, lambda cell: tests(cell, runs, settings), runs, lambda cell: (cell.pair, cell.method), USUAL_RUNS
    )


def study(cells: Sequence[Cell], settings: Settings, tables: Path, jobs: int, console: Console) -> None:
    """All cells, several at a time, each method with all pairs before the next; what is put together comes last."""
    for folder in (settings.out, tables):
        folder.mkdir(parents=True, exist_ok=True)
    with workers(jobs) as pool, ThreadPoolExecutor(jobs) as threads:
        names = sorted({PAIRS[cell.pair] for cell in cells})
        check_teachers(list(pool.map(run_teacher, names, [settings] * len(names))), tables / "teachers.csv")
        runs = Runs(tables / "control.csv", KEY, place_of, partial(run_trial, settings=settings), pool)
        for cell, rows in zip(cells, threads.map(lambda cell: tests(cell, runs, settings), cells), strict=True):
            mean = statistics.fmean(float(row["test"]) for row in rows)
            console.print(f"{cell.pair}, {cell.method}: {mean:.2f}", highlight=False, soft_wrap=True)


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
    parser.add_argument("--list", action="store_true", help="only say what is left")
    parser.add_argument("--pair", action="append", choices=PAIRS, help="only this pair of models; may be repeated")
    parser.add_argument("--method", action="append", choices=all_methods(), help="only this method", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the folder of images and teachers")
    parser.add_argument("--tables", type=Path, default=TABLES, help="the folder of the tables")
    options = parser.parse_args()
    console = Console()
    asked = cells(options.pair or tuple(PAIRS), options.method or ())
    settings, runs = Settings(options.out), Runs(options.tables / "control.csv", KEY, place_of)
    done, left, hours = progress(asked, runs, settings)
    cost = "the first rows tell how long they take" if hours is None else f"{hours:.1f} hours of two cores"
    console.print(f"{len(done)} of {len(asked)} cells are finished; the others: {cost}", highlight=False)
    if options.list:
        for cell in left:
            console.print(f"  {cell.pair}, {cell.method}", highlight=False)
        return
    bring_images(options.out / "data")
    study(left, settings, options.tables, options.jobs, console)


if __name__ == "__main__":
    main()
