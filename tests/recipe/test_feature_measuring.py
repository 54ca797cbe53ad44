"""`probe-kd match --by features`: from images and weights to figures, warnings and a recipe that `check` accepts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import Command
from PIL import Image
from safetensors.torch import save_file

from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load

STUDENT = ["--student", "resnet10t", "--student-kwargs", "channels=[8,16,24,32]", "--input-size", "32"]
TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
VIT = "vit_tiny_patch16_224"
TEACHER_OPTIONS = [
    "--teacher",
    VIT,
    *(part for item in TEACHER.items() for part in ("--teacher-kwargs", "{}={}".format(*item))),
]
MATCH = ["match", *STUDENT, *TEACHER_OPTIONS, "--by", "features"]
WEIGHTS = ["--teacher-checkpoint", "teacher.safetensors"]


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., None]:
    """Write images of noise into folders, and a teacher's weights: its second block has an outlier channel."""

    def write(*folders: str) -> None:
        noise = np.random.default_rng(0)
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            for index in range(24):
                pixels = noise.integers(0, 255, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")
        torch.manual_seed(0)
        weights = timm.create_model(VIT, **TEACHER).state_dict()
        weights["blocks.1.mlp.fc2.bias"][5] += 100.0
        save_file(weights, tmp_path / "teacher.safetensors")

    return write


@pytest.mark.parametrize(("folders", "count"), [(["photos/nested"], 22), (["photos/cat", "photos/dog"], 43)])
def test_it_writes_a_recipe_for_the_users_images_that_check_accepts(
    command: Command, images: Callable[..., None], folders: list[str], count: int, tmp_path: Path
) -> None:
    images(*folders)
    done = command(*MATCH, *WEIGHTS, "--images", "photos", "-o", "made/r.yaml")
    assert done.returncode == 0, done.stderr
    assert f"Features of {count} training images" in done.stdout  # a tenth is held out
    assert "note: teacher layer 'blocks.1': 1 of 48 channels hold" in done.stdout
    recipe = load(tmp_path / "made" / "r.yaml").recipe
    assert recipe.data.labels == ("class" if len(folders) > 1 else "none")
    assert recipe.teacher is not None
    assert recipe.teacher.checkpoint == "teacher.safetensors"
    checked = command("check", "made/r.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "layer4 <- blocks.3" in checked.stdout
    # The outlier goes on through the residual stream.
    planned = plan(load(tmp_path / "made" / "r.yaml"))
    (hint,) = (objective for objective in planned.objectives[0] if objective.resolved.reads_layers)
    norms = {str(pair.teacher): pair.adapter.get("normalize", hint.normalize) for pair in planned.every_pair}
    assert norms == {"blocks.0": "layer", "blocks.1": "fitted", "blocks.2": "fitted", "blocks.3": "fitted"}
    again = command(*MATCH, *WEIGHTS, "--images", "photos", "-o", "made/r.yaml")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_json_has_all_figures_and_the_same_for_a_seed(
    command: Command, images: Callable[..., None], tmp_path: Path
) -> None:
    images("photos")
    asked = [*MATCH, *WEIGHTS, "--images", "photos", "--num-images", "16", "--num-pairs", "2", "--json"]
    texts = [command(*asked, "--seed", seed).stdout for seed in ("3", "3", "4")]
    assert texts[0] == texts[1] != texts[2]
    figures = json.loads(texts[0])
    assert figures["images"] == 16
    shape = [len(figures["layers"]["student"]), len(figures["layers"]["teacher"])]
    assert (
        [len(figures["cka"]), len(figures["cka"][0])]
        == [len(figures["explained"]), len(figures["explained"][0])]
        == shape
    )
    assert [pair["student"] for pair in figures["pairs"]][-1] == "layer4"
    assert len(figures["pairs"]) == 2
    first = next(layer for layer in figures["layers"]["teacher"] if layer["tap"] == "blocks.1")
    assert (first["outliers"], first["finite"]) == (1, True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--by", "features"], "give a folder or the name of a data set, as in --images photos"),
        (["--images", "photos"], "--images is of `--by features`"),
        (["--num-images", "64"], "--num-images is of `--by features`"),
        (["--by", "features", "--images", "photos"], "timm has no weights for nf_resnet26"),
        (["--by", "features", "--images", "fotos", *WEIGHTS], "there is no folder 'fotos'"),
        (["--by", "features", "--images", "photos", "--device", "gpu7", *WEIGHTS], "device 'gpu7' cannot be used"),
        (["--by", "features", "--images", "photos", "--num-pairs", "9", *WEIGHTS], "num_pairs 9"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(
    command: Command, images: Callable[..., None], options: list[str], error: str
) -> None:
    images("photos")
    teacher = TEACHER_OPTIONS if "weights" not in error else ["--teacher", "nf_resnet26"]
    done = command("match", *STUDENT, *teacher, *options)
    assert done.returncode == 2
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
