"""Does it help to choose by data? The default recipe, `match --by features` and `tune`, beside the study's best cells.

    python study/choices.py [--pairs resnet-vit ...]

For each pair of models of the study: a recipe with the defaults (labels, soft targets, hints of automatic pairs, the
learning rate of the study's base recipe); the same with the pairs and `normalize` of `match_features`; and with the
values that `probe-kd tune` chose by the price of three and of ten runs (6 and 20 trials of half the epochs). All have
the budget of the study's cells with few images, and are measured on the test images with three seeds. Rows are
written to docs/study/choices.csv as they come, and what is there is not run again.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from run_table import beside
from torch.utils.data import Subset

import study
from probe_kd import match_features, measure_features
from probe_kd.data.loading import loader
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import load_weights
from probe_kd.methods.feature_matching import remarks
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.training.records import write_metrics

TABLE = study.ROOT / "docs" / "study" / "choices.csv"
SEEDS = (0, 1, 2)
IMAGES = 512  # that `match_features` looks at
BUDGET = study.Budget()
TRIALS = {"tune, 3 runs": 6, "tune, 10 runs": 20}
LOSSES = {
    "task": {"loss": "cross_entropy"},
    "soft": {"loss": "soft_targets", "temperature": 4.0},
    "hint": {"loss": "hint", "normalize": "layer"},
}


def start_of(pair: str, home: Path, settings: study.Settings) -> Path:
    """Write the recipe that all begin with."""
    stage = {
        "name": "train",
        "epochs": BUDGET.epochs,
        "losses": LOSSES,
        "optimizer": {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.05},
        "scheduler": {"sched": "cosine", "warmup_epochs": BUDGET.warmup},
        "clip_grad": 1.0,
    }
    teacher = study.weights_of(study.PAIRS[pair], settings.out).resolve()
    recipe = {
        "extends": str(study.RECIPES / f"{pair}.yaml"),
        "data": {"fraction": BUDGET.fraction, "batch_size": BUDGET.batch_size},
        "teacher": {"train": None, "checkpoint": str(teacher), "cache": str(settings.out.resolve() / "cache")},
        "val_interval": BUDGET.epochs // 2,
        "stages": [stage],
    }
    return written(recipe, home / "default.yaml")


def written(recipe: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(dict(recipe), file)
    return path


def by_features(start: Path, home: Path) -> Path:
    """The recipe with the pairs that the features of some training images propose."""
    planned = plan(load(start), allow_import=study.ALLOWED)
    teacher_trace, options = planned.teachers[""].trace, planned.teachers[""].options
    torch.manual_seed(0)
    student, teacher = (build_model(trace.model, trace.model_kwargs) for trace in (planned.student, teacher_trace))
    load_weights(teacher, options.checkpoint)
    chosen = torch.randperm(len(planned.datasets.train))[:IMAGES].tolist()  # type: ignore[arg-type]
    data = planned.recipe.data.model_copy(update={"memory": False})
    images = loader(Subset(planned.datasets.train, chosen), data, planned.student_input, training=False)
    inputs = {"student_input": planned.student_input, "teacher_input": planned.teacher_input}
    traces = {"student_trace": planned.student, "teacher_trace": teacher_trace}
    figures = measure_features(student, teacher, images, **inputs, **traces)
    for remark in remarks(figures):
        print(remark, flush=True)
    pairs = {}
    for pair in match_features(figures, num_pairs=len(planned.pairs)):
        print(pair, pair.reason, flush=True)
        pairs[str(pair.student)] = {"teacher": str(pair.teacher), **pair.adapter}
    return written({"extends": start.name, "pairs": pairs}, home / "features.yaml")


def by_tuning(trials: int) -> Callable[[Path, Path], Path]:
    def tuned(start: Path, home: Path) -> Path:
        """The recipe of a study of so many trials, which goes on with that of fewer."""
        out, copy = home / "tuned", home / f"tuned-{trials}.yaml"
        if not copy.exists():
            goes_on = ["--resume"] if out.exists() else []
            budget = ["--trials", str(trials), "--epochs", str(BUDGET.epochs // 2), "--seeds", "0", "--seed", "0"]
            allowed = [f"--allow-import={name}" for name in study.ALLOWED]
            command = [sys.executable, "-m", "probe_kd.cli", "tune", str(start), "-o", str(out), *budget, *goes_on]
            subprocess.run([*command, *allowed, "--quiet"], check=True)
            copy.write_text((out / "tuned.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        return copy

    return tuned


ARMS: Mapping[str, Callable[[Path, Path], Path]] = {
    "default": lambda start, home: start,
    "by features": by_features,
    **{name: by_tuning(trials) for name, trials in TRIALS.items()},
}


def row(pair: str, arm: str, seed: int, recipe: Path, home: Path) -> dict[str, Any]:
    folder = home / arm.replace(", ", "-").replace(" ", "-") / f"seed{seed}"
    done = study.run(recipe, seed, (), folder)
    accuracy = study.test(recipe, seed, (), folder / "student.safetensors", None)["student"]
    held_out = round(100 * done["student"]["accuracy"], 2)
    return {"pair": pair, "choice": arm, "seed": str(seed), "held_out": held_out, "test": round(100 * accuracy, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs="*", choices=list(study.PAIRS), default=list(study.PAIRS))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    wishes = parser.parse_args()
    torch.set_num_threads(1)
    settings = study.Settings(wishes.out)
    for pair in wishes.pairs:
        study.run_teacher(study.PAIRS[pair], settings)
        home = wishes.out / "choices" / pair
        start = start_of(pair, home, settings)
        for arm, choose in ARMS.items():
            recipe = choose(start, home)
            for seed in SEEDS:
                rows = beside([row(pair, arm, seed, recipe, home)], TABLE, "pair", "choice", "seed")
                write_metrics(sorted(rows, key=lambda each: [str(value) for value in each.values()][:3]), TABLE)
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
