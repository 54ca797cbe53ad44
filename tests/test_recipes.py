"""Every recipe in recipes/, run end to end at toy size: for models of one family, and for models that are unlike."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from ruamel.yaml import YAML

from probe_kd.data.loading import DataOptions, open_datasets
from probe_kd.engine.matching import match
from probe_kd.engine.tracing import trace
from probe_kd.methods.sharing import load_student
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from probe_kd.training.audit import audit
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))  # the study has tests of its own
RESNET = {"model": "resnet10t", "model_kwargs": {"channels": [8, 16, 24, 32]}}
VIT = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
}
SWIN = {
    "model": "swin_tiny_patch4_window7_224",
    "model_kwargs": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
}
MIXER = {
    "model": "timm.models.mlp_mixer:MlpMixer",
    "model_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 3},
}
CONVNEXT = {"model": "convnext_atto", "model_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}}
DEEPER = {"model": "resnet10t", "model_kwargs": {"channels": [8, 16, 24, 32], "layers": [1, 1, 2, 2]}}
PAIRS = {
    "resnet-resnet": (RESNET, DEEPER),
    "cnn-vit": (RESNET, VIT),
    "vit-cnn": (VIT, RESNET),
    "swin-resnet": (SWIN, RESNET),
    "mixer-convnext": (MIXER, CONVNEXT),
}


def runs() -> list[Any]:
    """Every recipe with every pair, of which `make test` runs one for each recipe, in turn; `make test-zoo` the others.

    What is shared as the recipe says, by models of one family, is always among the first.
    """
    sampled = []
    for number, recipe in enumerate(RECIPES):
        for index, pair in enumerate(PAIRS):
            first = index == number % len(PAIRS) or (pair == "resnet-resnet" and "\nshare:" in recipe.read_text())
            marks = () if first else pytest.mark.zoo
            sampled.append(pytest.param(recipe, pair, id=f"{recipe.stem}-{pair}", marks=marks))
    return sampled


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits in a folder per class."""
    root = tmp_path_factory.mktemp("pictures")
    datasets = open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8)))
    for split, dataset, count in (("train", datasets.train, 50), ("validation", datasets.test, 20)):
        for index in range(count):
            image, target = dataset[index]
            path = root / split / f"class{target}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return root


def toy(recipe: Path, pictures: Path, student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """The recipe with other models, few images, and one epoch of each stage; its methods are left alone."""
    tree = YAML(typ="safe").load(recipe)
    tree["student"] = {**tree["student"], **student}
    data = {"dataset": "", "root": str(pictures), "batch_size": 16, "input_size": [3, 32, 32], "num_classes": 10}
    tree["data"] |= data
    if "teacher" in tree:
        tree["teacher"] = {**tree["teacher"], **teacher}
        if "train" in tree["teacher"]:
            tree["teacher"]["train"]["epochs"] = 1
    if "pairs" in tree:
        tree["pairs"] = pairs_for(tree, student, teacher)
    if "share" in tree:
        share_for(tree, student, teacher)
    for stage in tree["stages"]:
        stage["epochs"] = 1
        stage.pop("scheduler", None)  # whose warm-up may be longer
        for loss in stage["losses"].values():
            if "pairs" in loss:  # of exits, which learn from the teacher's output
                loss["pairs"] = dict.fromkeys(found(student, teacher), "")
            if student is MIXER and isinstance(loss.get("weight"), dict):
                loss["weight"] = 1.0  # its classifier starts at zero, so no gradient is a share of the task's
        scales = stage.get("optimizer", {}).get("lr_scale")
        if scales:
            stage["optimizer"]["lr_scale"] = dict.fromkeys(list(tree["pairs"]), 0.5)
    return tree


def found(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, str]:
    """The matched pairs of more than one position."""
    ours, theirs = (trace(side["model"], 32, model_kwargs=side["model_kwargs"]) for side in (student, teacher))
    pairs = match(ours, theirs)
    wide = [pair for pair in pairs if (1, 1) not in (ours[pair.student].grid, theirs[pair.teacher].grid)]
    return {str(pair.student): str(pair.teacher) for pair in wide}


def pairs_for(tree: dict[str, Any], student: dict[str, Any], teacher: dict[str, Any]) -> Any:
    return "auto" if tree["pairs"] == "auto" else found(student, teacher)


def share_for(tree: dict[str, Any], student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """What can be shared by models of one family is grafted, or not shared at all, by others."""
    alike = student["model"] == teacher["model"]
    (ours, theirs), *_ = found(student, teacher).items()
    for side in ("data", "teacher"):
        tree[side] |= {"mean": [0.5], "std": [0.5]}
    form = tree["share"]["form"]
    if form == "graft" or (form == "trunk" and not alike):
        tree["share"] = {"form": "graft", "at": {ours: theirs}}
    elif form == "trunk":
        tree["share"] = {"form": "trunk", "at": "layer2"}
    elif not alike:
        tree["share"] = {"form": "none"}


def written(tree: dict[str, Any], path: Path) -> Plan:
    with path.open("w") as file:
        YAML().dump(tree, file)
    return plan(load(path), allow_import=["timm"])


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "soft_targets", "logits", "fitnets", "fsp", "rocket", "rocket_graft"} <= names


@pytest.mark.parametrize(("recipe", "pair"), runs())
def test_a_recipe_runs_end_to_end(recipe: Path, pair: str, pictures: Path, tmp_path: Path) -> None:
    planned = written(toy(recipe, pictures, *PAIRS[pair]), tmp_path / "r.yaml")
    journal = train(planned, tmp_path / "run", Progress(Console(quiet=True)))
    assert journal.results["student"].weights == "student.safetensors"
    losses = [row for row in journal.rows if row["role"] == "student"]
    assert len(losses) == len(planned.recipe.stages)
    for row, stage in zip(losses, planned.recipe.stages, strict=True):
        assert set(stage.losses) <= {name for name, value in row.items() if value is not None}
    student = load_student(tmp_path / "run" / "student.safetensors", allow_import=["timm"])
    assert sum(p.numel() for p in student.parameters()) == planned.trained.parameters


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_its_first_line_says_and_short(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    own = " --allow-import timm" * (recipe.stem == "fsp_joint")
    assert lines[0] == f"# probe-kd train recipes/{recipe.stem}.yaml{own}"
    assert len(lines) <= 35


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_loss_of_a_recipe_moves_something_and_every_parameter_is_moved(recipe: Path) -> None:
    found = audit(plan(load(recipe), allow_import=["timm"]))
    assert (found.wrong, found.remarks) == ((), ())
    planned = load(recipe).recipe
    assert {(row.stage, row.loss) for row in found.reach} == {
        (s.name, loss) for s in planned.stages for loss in s.losses
    }
