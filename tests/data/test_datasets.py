"""Which images and labels a recipe gets: one numbering of the classes, splits that do not overlap, and no silence."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WHOLE
from PIL import Image
from pydantic import ValidationError

from probe_kd.data.cache_keys import fingerprint
from probe_kd.data.datasets import class_names, open_datasets
from probe_kd.data.names import check_name
from probe_kd.data.options import DataOptions
from probe_kd.data.overlap import overlap
from probe_kd.data.record import DataRecord
from probe_kd.data.split import Split
from probe_kd.data.timm_datasets import HubImages
from probe_kd.errors import DataError, RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load, parse


def pictures(root: Path, **classes: int) -> None:
    """So many images of each class; `_` in a name is a folder deeper."""
    for name, count in classes.items():
        folder = root / name.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (9, 8), (number, len(name), 7)).save(folder / f"{number}.png")


def options(root: Path, **more: Any) -> DataOptions:
    return DataOptions(**{"root": str(root), "input_size": (3, 8, 8), **more})


def labels(dataset: Any) -> list[int]:
    return [dataset[index][1] for index in range(len(dataset))]


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_one_numbering_of_the_classes_serves_every_split(dataset: str, tmp_path: Path) -> None:
    pictures(tmp_path, train_a=2, train_b=2, train_c10=2, train_c9=2, validation_b=1, validation_c9=2, test_c10=1)
    found = open_datasets(options(tmp_path, dataset=dataset, test_split="test"))
    numbers = {name: index for index, name in enumerate(found.classes)}
    assert numbers.keys() == {"a", "b", "c9", "c10"}
    assert labels(found.val) == sorted([numbers["b"], numbers["c9"], numbers["c9"]])
    assert labels(found.test) == [numbers["c10"]]
    assert class_names(found) == list(found.classes)
    assert any(note.startswith("val_split 'validation' has no images of 2 of the 4 classes") for note in found.notes)


def test_a_class_that_only_another_split_has_is_refused_by_name(tmp_path: Path) -> None:
    pictures(tmp_path, train_cat=2, train_dog=2, validation_cat=1, validation_dogs=1)
    with pytest.raises(
        DataError, match=r"val_split 'validation' has the class 'dogs', .*did you mean 'dog'"
    ) as refusal:
        open_datasets(options(tmp_path))
    assert refusal.value.key == "val_split"


def test_a_class_that_is_a_link_to_another_is_told_where_it_is_missed(tmp_path: Path) -> None:
    pictures(tmp_path, train_cat=2, train_dog=2, validation_cat=1, validation_lynx=1)
    lynx = tmp_path / "train" / "lynx"
    lynx.symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(
        DataError, match=f"the class 'lynx', which .*; {lynx} is a link to .*cat, whose images are read al"
    ):
        open_datasets(options(tmp_path))
    pictures(tmp_path, alone_cat=2)
    (tmp_path / "alone" / "lynx").symlink_to(tmp_path / "alone" / "cat")
    with pytest.raises(DataError, match=r"of one class only.*lynx is a link to .*, and was not followed"):
        open_datasets(options(tmp_path, train_split="alone", val_split=None, holdout=0.5))


def test_a_link_to_itself_is_no_folder_of_a_split(tmp_path: Path) -> None:
    pictures(tmp_path, train_cat=2, train_dog=2)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"there is no folder 'validation' .* there are 'train'; "):
        open_datasets(options(tmp_path))


def test_the_classes_of_a_run_serve_data_that_have_lost_one(tmp_path: Path) -> None:
    pictures(tmp_path, train_a=2, train_b=2, train_c=2, validation_b=1, validation_c=1)
    before = open_datasets(options(tmp_path))
    before.record.write(tmp_path / "data.json")
    record = DataRecord.read(tmp_path)
    assert record == before.record
    (tmp_path / "train" / "a").rename(tmp_path / "gone")
    assert labels(open_datasets(options(tmp_path)).test) == [0, 1]
    assert labels(open_datasets(options(tmp_path), record).test) == [1, 2]
    pictures(tmp_path, train_new=1)
    with pytest.raises(DataError, match="has the class 'new', which the run has not"):
        open_datasets(options(tmp_path), record)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_new": 2}, "now have a class 'new'"),
        ({"train_a": 3}, "it had 4 train images, 2 test images, and now there are 5 train images"),
        ({}, ""),
    ],
)
def test_data_that_are_no_longer_those_of_a_run_are_refused(change: dict[str, int], says: str, tmp_path: Path) -> None:
    pictures(tmp_path, train_a=2, train_b=2, validation_a=1, validation_b=1)
    record = open_datasets(options(tmp_path)).record
    pictures(tmp_path, **change)
    now = open_datasets(options(tmp_path)).record
    if not says:
        record.refuse_others(now, tmp_path)
        return
    with pytest.raises(DataError, match=says):
        record.refuse_others(now, tmp_path)


class Reader:
    """What timm's reader of Hugging Face's datasets has, over a list."""

    image_key, label_key = "image", "label"

    def __init__(self, column: list[Any], names: tuple[str, ...] = ()) -> None:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(file, "png")
        self.column, self.bytes, self.class_to_idx = column, file.getvalue(), {it: n for n, it in enumerate(names)}
        self.dataset: Any = self
        self.column_names = ["image", "label"]
        self.features: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, key: Any) -> Any:
        content = {"image": {"bytes": self.bytes, "path": None}}
        return self.column if key == "label" else content | {"label": self.column[key]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Reader]:
    """Splits of a dataset of the hub, by their names."""
    splits: dict[str, Reader] = {}

    def create(_: DataOptions, split: str) -> Any:
        return type("Dataset", (), {"reader": splits[split]})

    monkeypatch.setattr("probe_kd.data.timm_datasets._create_dataset", create)
    return splits


def _swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.mark.parametrize("named", [13, 11])  # of 12 images; of more than 11 no names are kept
@pytest.mark.parametrize(
    ("change", "says", "of_many"),
    [
        (
            lambda it: (it / "a/2.bmp").unlink(),
            "'a/2.bmp' is not there any more",
            "class 'a' has 5 images and had 6",
        ),
        (lambda it: shutil.copy(it / "b/0.bmp", it / "b/x.bmp"), "'b/x.bmp' is new", "class 'b' has 7 images"),
        (
            lambda it: (it / "a/2.bmp").rename(it / "b/moved.bmp"),
            "'a/2.bmp' is not there any more, 'b/moved.bmp' is new",
            "class 'a' has 5 images",
        ),
        (
            lambda it: (it / "a/3.bmp").write_bytes(b"other"),
            r"'a/3.bmp' has 5 bytes and had \d+",
            "class 'a' has other images, as many as before",
        ),
        (lambda it: _swap(it / "a", it / "b"), "'a/0.bmp' .* has other contents", "'a/0.bmp' .* has other contents"),
        (
            lambda it: (it / "a/0.bmp").write_bytes((it / "b/0.bmp").read_bytes()),  # of the same size
            "'a/0.bmp' has other contents",
            "'a/0.bmp' has other contents",
        ),
    ],
    ids=["gone", "new", "moved", "changed", "swapped", "same size"],
)
def test_other_images_of_a_split_are_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: int, change: Any, says: str, of_many: str
) -> None:
    monkeypatch.setattr("probe_kd.data.digests.NAMED", named)
    pictures(tmp_path, validation_a=1, validation_b=1)
    for number, name in enumerate("ab"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "train" / name / "0.bmp")
        for index in range(1, 6):
            os.link(tmp_path / "train" / name / "0.bmp", tmp_path / "train" / name / f"{index}.bmp")
    before = open_datasets(options(tmp_path)).record
    before.write(tmp_path / "data.json")
    kept = DataRecord.read(tmp_path)
    assert kept == before
    shutil.copytree(tmp_path / "train", tmp_path / "copied" / "train")  # made in another order, at other times
    (tmp_path / "validation").rename(tmp_path / "copied" / "validation")
    copied = tmp_path / "copied"
    kept.refuse_others(open_datasets(options(copied)).record, copied)
    change(copied / "train")
    with pytest.raises(DataError, match=f"in train_split {says if named == 13 else of_many}.*; put them back, or beg"):
        kept.refuse_others(open_datasets(options(copied)).record, copied)


def test_the_images_of_other_kinds_of_data_are_known_too(hub: dict[str, Reader], tmp_path: Path) -> None:
    """Tables of a hub by labels and bytes, torchvision's files by name, and arrays by labels and pixels."""
    wanted = DataOptions(dataset="hfds/x", input_size=(3, 8, 8))
    hub |= {"train": Reader([0, 1, 2], ("a", "b", "c")), "validation": Reader([1, 0], ("a", "b"))}
    before = open_datasets(wanted).record
    before.refuse_others(open_datasets(wanted).record, tmp_path)
    hub["train"] = Reader([1, 0, 2], ("a", "b", "c"))
    with pytest.raises(DataError, match="in train_split class 'a' has other images, as many as before"):
        before.refuse_others(open_datasets(wanted).record, tmp_path)
    hub["train"] = Reader([0, 1, 2], ("a", "b", "c"))
    hub["train"].bytes += b"another revision"
    with pytest.raises(DataError, match=r"in train_split 'image 0' \(and 2 more\) has other contents"):
        before.refuse_others(open_datasets(wanted).record, tmp_path)
    digits = DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))
    record = open_datasets(digits).record
    grey = open_datasets(digits.model_copy(update={"input_size": (1, 8, 8)})).record
    assert "has other contents" in record.contents["val_split"].difference(grey.contents["val_split"])
    assert not record.contents["train_split"].difference(open_datasets(digits).record.contents["train_split"])


def test_the_images_of_inaturalist_have_one_order_and_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{index:05}_k_p_c_o_f_g_{index}" for index in range(2)]
    for split in ("2021_train", "2021_valid"):
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (2, 2), (number, index, len(split[5:]))).save(tmp_path / split / name / f"{index}.png")
    wanted = options(
        tmp_path, dataset="torch/inat", train_split="full/2021_train", val_split="full/2021_valid", num_classes=2
    )
    found, listdir = open_datasets(wanted), os.listdir
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
        again = open_datasets(wanted)
    assert labels(again.train) == labels(found.train) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert again.record == found.record
    (tmp_path / "2021_train" / names[1] / "0.png").unlink()
    with pytest.raises(DataError, match=f"in train_split '.*{names[1]}/0.png' is not there any more"):
        found.record.refuse_others(open_datasets(wanted).record, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"classes": [1]}', "\0"])
def test_a_damaged_record_is_told(text: str, tmp_path: Path) -> None:
    assert DataRecord.read(tmp_path) is None
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data.json does not tell the classes of a run"):
        DataRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({}, "val_split", r"no folder 'validation' .* there are 'holiday', 'train'; .*`val_split: none` with `holdout"),
        ({"val_split": "hoilday"}, "val_split", r"did you mean 'holiday'\?"),
        ({"train_split": "trian", "val_split": "holiday"}, "train_split", r"did you mean 'train'\?"),
        ({"val_split": "holiday", "test_split": "tset"}, "test_split", "no folder 'tset'"),
        ({"val_split": None}, "val_split", "no images to measure on: name them as `val_split`, or .*holdout: 0.1"),
        ({"val_split": "train"}, "val_split", "val_split 'train' has images of train_split 'train'"),
        ({"val_split": "training"}, "val_split", "has images of train_split"),
        ({"val_split": "./train/../train"}, "val_split", "has images of train_split"),
        (
            {"train_split": ".", "val_split": "train", "dataset": "torch/folder"},
            "val_split",
            "has images of train_split",
        ),
        ({"val_split": "holiday", "test_split": "holiday"}, "test_split", "has images of val_split"),
        ({"train_split": "train[:50%]", "val_split": "holiday"}, "train_split", r"no folder 'train\[:50%\]'"),
    ],
    ids=str,
)
def test_a_split_that_is_not_there_or_is_another_is_refused(
    given: dict[str, Any], key: str, says: str, tmp_path: Path
) -> None:
    pictures(tmp_path, train_a=2, train_b=2, holiday_a=2, holiday_b=2)
    with pytest.raises(DataError, match=says) as refusal:
        open_datasets(options(tmp_path, **given))
    assert refusal.value.key == key


@pytest.mark.parametrize(
    ("given", "counts", "says"),
    [
        ({}, (20, 4, None, None), r"both of val_split 'validation' \(4 images\); `test_split` gives others"),
        (
            {"test_split": "test"},
            (20, 2, 4, None),
            "curves are of val_split .*, the final figures of test_split 'test'",
        ),
        ({"val_split": None, "holdout": 0.2}, (16, 4, None, 4), r"held-out images \(4\); there is no test figure"),
        (
            {"val_split": "none", "holdout": 0.2, "test_split": "test"},
            (16, 2, 4, 4),
            "curves are of the held-out images",
        ),
        ({"val_split": None, "test_split": "test"}, (20, 2, None, None), "both of test_split 'test'"),
        ({"holdout": 0.2}, (16, 4, None, 4), "both of val_split"),
        ({"holdout": 0.2, "test_split": "test"}, (16, 2, 4, 4), "curves are of val_split"),
    ],
    ids=str,
)
def test_which_images_are_measured_is_said(
    given: dict[str, Any], counts: tuple[int | None, ...], says: str, tmp_path: Path
) -> None:
    pictures(tmp_path, train_a=10, train_b=10, validation_a=2, validation_b=2, test_a=1, test_b=1)
    found = open_datasets(options(tmp_path, **given))
    parts = (found.train, found.test, found.val, found.held_out)
    assert tuple(None if part is None else len(part) for part in parts) == counts  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found.measured_on)
    assert (found.to_choose_by is None) == ("both of" in found.measured_on and not given.get("holdout"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"train_split": "trian"},
            r"sklearn/digits has no split 'trian'; it has 'train' and 'test'; did you mean 'train",
        ),
        ({"val_split": "tset"}, "sklearn/digits has no split 'tset'"),
        ({"val_split": "train"}, "has images of train_split"),
        ({"test_split": "test"}, "test_split 'test' has images of val_split 'validation'"),
    ],
    ids=str,
)
def test_splits_of_a_dataset_with_two_parts(given: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8), **given))


def test_a_misspelt_split_of_torchvisions_datasets_is_not_the_test_split(tmp_path: Path) -> None:
    for key in ("train_split", "val_split"):
        with pytest.raises(DataError, match="torch/cifar10 has no split 'trian'"):
            open_datasets(options(tmp_path, dataset="torch/cifar10", **{key: "trian"}))


@pytest.mark.parametrize(
    ("classes", "given", "says"),
    [
        ({"train_a": 1, "validation_a": 1}, {}, "has 1 image; nothing can be learned"),
        ({"train_a": 4, "validation_a": 1}, {}, r"images of one class only \('a'\)"),
        ({"train": 4, "validation": 4}, {}, "in no class folders"),
        ({"train_a": 2, "train_b": 2, "train_c": 0, "validation_a": 1}, {}, "train_split 'train' has no images of 'c'"),
        ({"train_a": 2, "train_b": 2, "validation_a": 0}, {}, "no images in .*validation"),
        (
            {"train_a": 2, "train_b": 2, "train_c": 2, "validation_a": 1},
            {"num_classes": 2},
            "2 labels are none of the 2",
        ),
        ({"train_a": 2, "train_b": 2, "validation_a": 1}, {"num_classes": 1}, "none of the 1 classes"),
        ({"train_a": 9, "train_b": 1, "validation_a": 1}, {"fraction": 0.1}, "has 1 image|one class"),
    ],
    ids=str,
)
def test_labels_that_no_classifier_can_learn_are_refused_at_check(
    classes: dict[str, int], given: dict[str, Any], says: str, tmp_path: Path
) -> None:
    pictures(tmp_path, **classes)
    more = "".join(f"\n  {key}: {value}" for key, value in given.items())
    text = WHOLE.replace("dataset: sklearn/digits", f"root: {tmp_path}{more}")
    with pytest.raises(RecipeError, match=says) as refusal:
        plan(parse(text))
    assert len(refusal.value.problems) == 1


def test_images_that_cannot_be_read_are_left_out_once_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    pictures(tmp_path, train_a=70, train_b=70, validation_a=3, validation_b=3)
    for name in ("train/a/5.png", "train/b/69.png", "validation/a/0.png"):
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "train" / "b" / "zz.png")
    found = open_datasets(options(tmp_path, on_error="skip", holdout=0.1))
    assert found.skipped == {"train_split": ("a/5.png", "b/69.png", "b/zz.png"), "val_split": ("a/0.png",)}
    assert any("3 images of train_split cannot be read and are left out: 'a/5.png'" in note for note in found.notes)
    assert (len(found.train), len(found.held_out), len(found.test)) == (124, 14, 5)  # type: ignore[arg-type]
    assert sum(map(len, (labels(part) for part in (found.train, found.held_out, found.test)))) == 143
    again = open_datasets(options(tmp_path, on_error="skip", holdout=0.1), found.record)
    assert fingerprint(again.train).images == fingerprint(found.train).images
    with pytest.raises(DataError, match="cannot be read"):
        labels(open_datasets(options(tmp_path)).train)


def test_a_class_of_which_no_image_can_be_read_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, train_a=2, train_b=2, train_c=1, validation_a=1)
    (tmp_path / "train" / "c" / "0.png").write_text("none")
    with pytest.raises(DataError, match="train_split 'train' has no images of 'c'"):
        open_datasets(options(tmp_path, on_error="skip"))


@pytest.mark.parametrize("text", [False, True])
def test_a_hub_dataset_has_one_numbering_too(text: bool, hub: dict[str, Reader]) -> None:
    if text:  # labels are names themselves
        hub |= {"train": Reader(["cat", "dog", "ant"]), "validation": Reader(["dog", "cat"])}
    else:
        hub |= {"train": Reader([1, 2, 0], ("ant", "cat", "dog")), "validation": Reader([1, 0], ("cat", "dog"))}
    found = open_datasets(DataOptions(dataset="hfds/x", input_size=(3, 8, 8)))
    assert (labels(found.train), labels(found.test)) == ([1, 2, 0], [2, 1])
    assert found.classes == ("ant", "cat", "dog")
    assert np.unique(np.asarray(found.test[0][0])).tolist() == [117]  # 30,000 of 65,535, scaled and not cut


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (
            Reader([0, 1, 3], ("a", "b", "c")),
            r"1 labels are none of the 3 classes \(0 to 2\); the first is 3, of image 2",
        ),
        (Reader([0, -1, 1], ("a", "b")), "the first is -1"),
        (Reader([0, None, 1], ("a", "b")), "are no class numbers .* has: NoneType, int"),
        (Reader([[0], [1]], ("a", "b")), "are no class numbers .* has: list"),
        (Reader([0, 1, 1], ("a", "b", "c")), "has no images of 'c'; where that is meant, say so: `num_classes: 3`"),
        (Reader([0, 1]), "set `num_classes`"),
    ],
)
def test_labels_of_a_hub_dataset_are_checked(train: Reader, says: str, hub: dict[str, Reader]) -> None:
    hub |= {"train": train, "validation": Reader([0, 1], ("a", "b"))}
    with pytest.raises(DataError, match=says):
        open_datasets(DataOptions(dataset="hfds/x", input_size=(3, 8, 8)))


@pytest.mark.parametrize("form", ["numbers", "names", "words"])
def test_a_hub_dataset_of_several_labels_has_one_numbering_of_its_own(form: str, hub: dict[str, Reader]) -> None:
    def column(*sets: str) -> Reader:
        reader = Reader(
            [[*letters] if form == "words" else ["abc".index(letter) for letter in letters] for letters in sets]
        )
        names = ["a", "b", "c"] if form == "names" else None
        item = SimpleNamespace(names=names)
        reader.features = {"label": SimpleNamespace(feature=SimpleNamespace(feature=item))}
        return reader

    hub["train"], hub["validation"] = column("ab", "", "ca", "b"), column("b", "ac")
    given = {"dataset": "hfds/any/thing", "labels": "multilabel", "num_classes": 3 if form == "numbers" else None}
    data = open_datasets(options(Path(), **given))
    assert data.classes == (() if form == "numbers" else ("a", "b", "c"))
    assert [data.train[index][1].tolist() for index in range(4)] == [[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]
    before = data.record
    hub["train"] = column("ab", "", "ca", "a")
    with pytest.raises(DataError, match=r"class .* has .* images and had"):
        before.refuse_others(open_datasets(options(Path(), **given)).record, Path())
    hub["train"] = Reader([0, 1])
    with pytest.raises(DataError, match="are no lists, as `labels: multilabel` needs them"):
        open_datasets(options(Path(), **given))
    hub["train"] = Reader([[0], [1]])
    with pytest.raises(DataError, match="`labels: multilabel` takes lists"):
        open_datasets(options(Path(), dataset="hfds/any/thing"))


def test_a_hub_dataset_needs_no_labels_where_none_are_read(hub: dict[str, Reader]) -> None:
    for split in ("train", "validation"):
        hub[split] = Reader([None, "x", 3.5])
        hub[split].column_names = ["image"]
    data = open_datasets(options(Path(), dataset="hfds/any/thing", labels="none"))
    assert (data.num_classes, labels(data.train)) == (0, [0, 0, 0])
    with pytest.raises(DataError, match="`labels: none` needs none"):
        open_datasets(options(Path(), dataset="hfds/any/thing"))


def test_an_image_that_a_hub_dataset_has_not_is_told_by_number() -> None:
    reader = Reader([0, 1], ("a", "b"))
    reader.bytes = b""
    with pytest.raises(DataError, match=r"image 1 of hfds/x \(train\) cannot be read"):
        HubImages(reader, "RGB", "hfds/x (train)")[1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar100", "did you mean 'torch/cifar100'"),
        ("torch/cifar101", "did you mean 'torch/cifar10"),
        ("sklearn/digit", "there is 'sklearn/digits'"),
        ("hfd/food101", "begin with `torch/`, `hfds/`"),
        ("pictures", "is given as `root`"),
    ],
)
def test_a_dataset_that_there_is_not_is_refused_by_its_name(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        check_name(name)
    pictures(tmp_path, train_a=2, train_b=2, validation_a=1)
    with pytest.raises(DataError, match=says):
        open_datasets(options(tmp_path, dataset=name))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scale": (1.0, 0.08)}, r"\[1, 0.08\]: expected \[least, most\]; did you mean \[0.08, 1\]\?"),
        ({"ratio": (1.5, 0.5)}, r"did you mean \[0.5, 1.5\]"),
        ({"scale": (0.0, 1.0)}, "both above 0"),
        ({"ratio": (-1.0, 1.0)}, "both above 0"),
        ({"input_size": (3, 0, 8)}, "greater than or equal to 1"),
        ({"input_size": (3, 8, -8)}, "greater than or equal to 1"),
        ({"input_size": (3, 10**9, 8)}, "less than or equal to 16384"),
        ({"input_size": (2, 8, 8)}, r"2 channels: images have 1 \(grey\) or 3 \(colour\)"),
    ],
    ids=str,
)
def test_values_that_no_image_can_have(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DataOptions(**{"input_size": (3, 8, 8), **given})


def test_the_training_images_are_divided_as_ever() -> None:
    found = open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8), holdout=0.1, fraction=0.5))
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(0)).tolist()
    assert found.held_out.indices == order[:144]  # type: ignore[union-attr]
    assert found.train.indices == order[144:790]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("train", "val", "shared"),
    [
        ([("train", 0, 80)], [("train", 80, 100)], False),
        ([("train", 0, 80)], [("train", 79, 100)], True),
        ([("train", 0, 100)], [("test", 0, 100)], False),
        ([("train", 0, 10), ("test", 5, 9)], [("train", 10, 20), ("test", 0, 6)], True),
    ],
)
def test_parts_of_a_hub_dataset_that_overlap_are_found(train: Any, val: Any, shared: bool) -> None:
    one, two = (
        Split("val_split", str(rows), [], (), frozenset({str(rows)}), rows=tuple(rows))  # type: ignore[arg-type]
        for rows in (train, val)
    )
    assert overlap(one, two) is overlap(two, one) is shared


def test_a_class_of_which_no_image_is_held_out_is_told(tmp_path: Path) -> None:
    """The division is by lot; of three classes and two images held out, one has none."""
    pictures(tmp_path, train_a=8, train_b=8, train_c=8)
    found = open_datasets(options(tmp_path, val_split=None, holdout=0.08))
    assert any("the held-out images have no images of" in note for note in found.notes)
    assert "the held-out images (2)" in found.measured_on


@pytest.mark.parametrize("whole", [True, False])
def test_images_of_training_behind_links_are_no_others(tmp_path: Path, whole: bool) -> None:
    pictures(tmp_path, train_a=3, train_b=3)
    for name in "ab":
        place = tmp_path / "validation" / name
        place.parent.mkdir(exist_ok=True)
        if whole:
            place.symlink_to(tmp_path / "train" / name)
        else:
            place.mkdir()
            (place / "0.png").symlink_to(tmp_path / "train" / name / "0.png")
    with pytest.raises(DataError, match="has images of train_split"):
        open_datasets(options(tmp_path))


def _link_renamed(image: Path, other: Path) -> None:
    os.link(image, other.with_name(f"renamed {other.name}"))


@pytest.mark.parametrize("how", [shutil.copy, os.link, _link_renamed])
@pytest.mark.parametrize("key", ["val_split", "test_split"])
def test_a_split_that_is_a_copy_of_the_training_images_is_refused(tmp_path: Path, how: Any, key: str) -> None:
    """Copies and hard links, also where the classes of the split lie deeper, and more images than are compared."""
    pictures(tmp_path, train_a=60, train_b=60, validation_a=1, validation_b=1)
    for name in "ab":
        (tmp_path / "copy" / "deep" / name).mkdir(parents=True)
        for image in (tmp_path / "train" / name).iterdir():
            how(image, tmp_path / "copy" / "deep" / name / image.name)
    with pytest.raises(
        DataError, match=rf"{key} 'copy' is a copy of the training images: 100 of 100 .*0\.png.*`holdout: 0.1`"
    ) as refusal:
        open_datasets(options(tmp_path, **{key: "copy"}))
    assert refusal.value.key == key


def test_some_copies_of_training_images_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, train_a=9, train_b=9, validation_a=9, validation_b=9)
    assert not any("the same bytes" in note for note in open_datasets(options(tmp_path)).notes)
    for name, count in (("a", 3), ("b", 1)):
        for number in range(count):
            shutil.copy(tmp_path / "train" / name / f"{number}.png", tmp_path / "validation" / name)
    other = tmp_path / "validation" / "b" / "8.png"
    other.write_bytes((tmp_path / "train" / "a" / "7.png").read_bytes())  # of another name
    (note,) = (note for note in open_datasets(options(tmp_path)).notes if "the same bytes" in note)
    assert note.startswith("4 of 18 sampled images of val_split 'validation' are also training images")
    assert note.endswith(": 'a/0.png', 'a/1.png', 'a/2.png' and 1 more")
    (tmp_path / "r.yaml").write_text(WHOLE.replace("dataset: sklearn/digits", f"root: {tmp_path}"))
    assert note in plan(load(tmp_path / "r.yaml")).datasets.notes
