"""`probe-kd distill`: from a folder of images and a teacher's weights to an exported backbone, with one command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Command
from PIL import Image
from safetensors.torch import save_file

from probe_kd.recipe.distillation import default_batch_size, default_epochs, teacher_names
from probe_kd.recipe.reading import load

STUDENT = ["--student", "resnet10t", "--student-kwargs", "channels=[8,16,24,32]", "--input-size", "32"]
TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
TEACHER_KWARGS = [part for key, value in TEACHER.items() for part in ("--teacher-kwargs", f"{key}={value}")]
VIT = "vit_tiny_patch16_224"


def _results(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "summary.json").read_text())["results"]
    return found


@pytest.fixture
def images(tmp_path: Path) -> Callable[[str, int], None]:
    """Write so many images of noise into a folder, and the teacher's weights beside it."""

    def write(folder: str, count: int) -> None:
        noise = np.random.default_rng(0)
        (tmp_path / folder).mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 255, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")
        torch.manual_seed(0)
        save_file(timm.create_model(VIT, **TEACHER).state_dict(), tmp_path / "teacher.safetensors")

    return write


def test_one_command_writes_a_recipe_trains_and_exports_a_backbone(
    command: Command, images: Callable[[str, int], None], tmp_path: Path
) -> None:
    images("photos/nested", 40)
    arguments = ["distill", *STUDENT, "--teacher", VIT, *TEACHER_KWARGS, "--images", "photos", "-o", "out"]
    done = command(*arguments, "--checkpoint", "teacher.safetensors", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "stage takes" in done.stdout  # the time, before it is spent
    assert "accuracy" not in done.stdout.lower()
    recipe = load(tmp_path / "out" / "recipe.yaml").recipe
    assert (recipe.data.labels, recipe.stages[0].epochs, recipe.baseline) == ("none", 1, False)
    backbone = timm.create_model(f"local-dir:{tmp_path / 'out' / 'student'}", pretrained=True)
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    (student,) = [row for row in _results(tmp_path / "out" / "run") if row["role"] == "student"]
    assert student["accuracy"] is None
    assert command(*arguments, "--epochs", "1").returncode == 2  # what is there is not replaced unasked
    again = command(*arguments, "--resume")
    assert again.returncode == 0, again.stderr


def test_a_recipe_that_could_not_run_is_no_reason_to_refuse_the_next_try(
    command: Command, images: Callable[[str, int], None], tmp_path: Path
) -> None:
    images("photos", 24)
    arguments = ["distill", *STUDENT, "--teacher", VIT, *TEACHER_KWARGS, "--images", "photos", "-o", "out"]
    for _ in range(2):
        failed = command(*arguments, "--checkpoint", "missing.safetensors")
        assert failed.returncode == 2
        assert "missing.safetensors" in failed.stderr
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "--overwrite" in command(*arguments, "--checkpoint", "missing.safetensors").stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--images", "nowhere", "--checkpoint", "teacher.safetensors"], "nowhere"),
        (["--images", "photos", *["--checkpoint", "teacher.safetensors"] * 2], "2 --checkpoint for 1 --teacher"),
        (["--images", "photos", "--resume"], "out/recipe.yaml"),
        (["--images", "photos", "--labels"], "labels: none"),
    ],
    ids=["no folder", "one checkpoint too many", "nothing to resume", "no class folders"],
)
def test_what_cannot_be_distilled_is_one_error_and_leaves_nothing(
    command: Command, images: Callable[[str, int], None], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    images("photos", 4)
    done = command("distill", *STUDENT, "--teacher", VIT, *TEACHER_KWARGS, *arguments, "-o", "out")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_epochs_and_the_batches_follow_from_the_number_of_images() -> None:
    for count in (2, 15, 16, 100, 5_000, 60_000, 1_281_167, 10**8):
        batch_size = default_batch_size(count)
        epochs = default_epochs(count, batch_size)
        assert 2 <= batch_size <= 128
        assert 1 <= epochs <= 100
        updates = epochs * max(1, count // batch_size)
        assert updates >= 10_000 or epochs == 100
        assert updates < 10_000 + max(1, count // batch_size)  # not an epoch more than is needed


def test_teachers_have_short_names_of_their_own() -> None:
    assert teacher_names(["vit_small_patch16_dinov3.lvd1689m", "hf-hub:timm/ViT-B-16-SigLIP"]) == [
        "vit_small_patch16_dinov3",
        "ViT_B_16_SigLIP",
    ]
    assert teacher_names(["resnet18", "resnet18"]) == ["resnet18_1", "resnet18_2"]


def test_one_layer_of_the_student_learns_from_every_teacher(
    command: Command, images: Callable[[str, int], None], tmp_path: Path
) -> None:
    images("photos", 24)
    teachers = ["--teacher", VIT, "--checkpoint", "teacher.safetensors"] * 2
    arguments = ["distill", *STUDENT, *teachers, *TEACHER_KWARGS, "--images", "photos", "-o", "out", "--epochs", "0"]
    assert command(*arguments).returncode == 2  # no epochs are no distillation
    missing = command(*arguments[:-1], "1", "--set", "data.root=nowhere")  # the recipe is written, and cannot run
    assert "nowhere" in missing.stderr
    recipe = load(tmp_path / "out" / "recipe.yaml").recipe
    assert recipe.teachers is not None
    assert [(name, teacher.checkpoint) for name, teacher in recipe.teachers.items()] == [
        (f"{VIT}_1", "teacher.safetensors"),
        (f"{VIT}_2", "teacher.safetensors"),
    ]
    assert recipe.pairs == {
        "": [f"{VIT}_1:", f"{VIT}_2:"],
        "layer4": [f"{VIT}_1:blocks.1", f"{VIT}_2:blocks.1"],
    }
