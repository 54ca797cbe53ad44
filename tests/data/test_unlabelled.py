"""`labels: none`: images without labels, from every source."""

import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.loading import loader, mixer
from probe_kd.data.options import DataOptions
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError, RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse


def pictures(folder: Path, count: int, kind: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (9, 8), (number * 9, sum(folder.name.encode()) % 256, len(folder.name))).save(
            folder / f"{number}.{kind}"
        )


def opened(root: Path | None = None, **more: Any) -> Datasets:
    root_of = {} if root is None else {"root": str(root)}
    return open_datasets(DataOptions(**{**root_of, "input_size": (3, 8, 8), "labels": "none", **more}))


def flat(root: Path) -> dict[str, Any]:
    pictures(root, 20)
    (root / "notes.txt").write_text("no image")
    return {}


def nested(root: Path) -> dict[str, Any]:
    pictures(root / "a" / "b", 10)
    pictures(root / "a", 5)  # beside a folder of images, which is no class
    pictures(root, 5)
    return {"val_split": "none", "holdout": 0.1}


def classes(root: Path) -> dict[str, Any]:
    for name, count in (("train/cat", 9), ("train/dog", 9), ("validation/owl", 2)):  # a class that training has not
        pictures(root / name, count)
    return {}


def torchs(root: Path) -> dict[str, Any]:
    classes(root)
    return {"dataset": "torch/image_folder"}


def shards(root: Path) -> dict[str, Any]:
    for name, count in (("train.tar", 18), ("test.tar", 2)):
        with tarfile.open(root / name, "w") as tar:
            for number in range(count):
                content = BytesIO()
                Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "png")
                files = {"png": content.getvalue()} | ({"cls": b"no number"} if number % 2 else {})
                for suffix, data in files.items():
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return {"dataset": "wds/any", "train_split": "train.tar", "val_split": "test.tar"}


@pytest.mark.parametrize("source", [flat, nested, classes, torchs, shards])
def test_every_image_of_every_source_is_read_and_its_label_is_not(
    source: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    more = source(tmp_path)
    data = opened(tmp_path, **more)
    assert data.labels == "none"
    assert (len(data.train), len(data.test)) == (18, 2)  # type: ignore[arg-type]
    assert data.num_classes == 0
    assert not data.classes
    assert all(data.train[index][1] == 0 for index in range(18))
    record = data.record
    record.refuse_others(opened(tmp_path, **more).record, tmp_path)
    first = next(
        path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".png", ".tar") and "test" not in path.name
    )
    if first.suffix == ".png":
        os.truncate(first, first.stat().st_size - 5)
        with pytest.raises(DataError, match=f"{first.name}' has .* bytes and had"):
            record.refuse_others(opened(tmp_path, **more).record, tmp_path)


def test_digits_without_labels_are_those_with_labels() -> None:
    without = opened(dataset="sklearn/digits")
    labelled = opened(dataset="sklearn/digits", labels="class")
    assert {without.train[index][1] for index in range(len(without.train))} == {0}  # type: ignore[arg-type]
    assert without.train[5][0].tobytes() == labelled.train[5][0].tobytes()


def test_a_folder_without_splits_is_read_whole_and_says_what_it_measures(tmp_path: Path) -> None:
    flat(tmp_path)
    notes = opened(tmp_path).notes
    assert any("no folder 'train'" in note and "all images" in note for note in notes)
    assert any("no `holdout`: 10%" in note for note in notes)
    with pytest.raises(DataError, match=r"no images to measure on.*holdout"):
        opened(tmp_path, val_split="none")
    with pytest.raises(DataError, match="no folder 'valid1'"):
        opened(tmp_path, val_split="valid1")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"there are no images in .*bare; read are files that end in \.png"):
        opened(tmp_path / "bare")
    pictures(tmp_path / "one", 1)
    with pytest.raises(DataError, match="has 1 image; nothing can be learned"):
        opened(tmp_path / "one")


def test_images_that_cannot_be_read_are_told_or_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, 20)
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "4.png").write_bytes(b"")
    data = opened(tmp_path, on_error="skip", holdout=0.5)
    assert data.skipped == {"train_split": ("3.png", "4.png")}
    assert len(data.train) == 9  # type: ignore[arg-type]
    strict = opened(tmp_path, holdout=0.5)
    images = [*zip([strict.train] * 10 + [strict.test] * 10, [*range(10)] * 2, strict=True)]
    with pytest.raises(DataError, match=r"[34]\.png cannot be read"):
        [part[index] for part, index in images]


def test_test_images_that_are_training_images_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 8)
    pictures(tmp_path / "train" / "more", 8)
    pictures(tmp_path / "validation", 8)
    for number in range(8):
        content = (tmp_path / "train" / f"{number}.png").read_bytes()
        (tmp_path / "validation" / f"{number}.png").write_bytes(content)
    with pytest.raises(DataError, match="is a copy of the training images"):
        opened(tmp_path)


def test_without_labels_only_images_are_mixed() -> None:
    options = DataOptions(input_size=(3, 8, 8), labels="none", mixup=1.0, batch_size=4, dataset="sklearn/digits")
    mix = mixer(options, 0)
    assert mix is not None
    images, target, _ = next(iter(loader(open_datasets(options).train, options, InputSpec((3, 8, 8)), training=True)))
    mixed, _ = mix(images.clone(), target)
    difference = images - images.flip(0)
    share = ((mixed - images.flip(0)) * difference).sum() / difference.square().sum()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))


RECIPE = """
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]}}
teacher: {model: resnet18, model_kwargs: {channels: [8, 8, 8, 16]}%s}
data: {dataset: sklearn/digits, labels: none, input_size: [3, 16, 16], batch_size: 256}
pairs: {layer2: layer2}
stages: [{epochs: 1, losses: {%s}}]
%s"""


@pytest.mark.parametrize(
    ("teacher", "loss", "more", "says"),
    [
        (
            "",
            "task: {loss: cross_entropy}",
            "",
            r"loss `task` \(cross_entropy\) reads labels, and `data: .labels: none",
        ),
        ("", "hint: {loss: hint}", "baseline: true", "the baseline learns from labels alone"),
        (", train: {epochs: 1}", "hint: {loss: hint}", "", "a teacher is trained on labels"),
    ],
)
def test_what_needs_labels_is_refused_by_name(teacher: str, loss: str, more: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        plan(parse(RECIPE % (teacher, loss, more)))


def test_a_flat_folder_of_classes_is_told_of_training_without_labels(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 4)
    pictures(tmp_path / "all" / "images", 4)
    for given in ({}, {"train_split": "train"}, {"train_split": "all", "val_split": "none", "holdout": 0.5}):
        with pytest.raises(DataError, match="labels: none"):
            opened(tmp_path, labels="class", **given)
    with pytest.raises(DataError, match=r"images in .*train' itself: train without labels"):
        opened(tmp_path / "train", labels="class")
