"""Data sets in CSV files, of one class or of several labels an image."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.loading import loader, mixer
from probe_kd.data.options import DataOptions
from probe_kd.data.record import DataRecord
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images 0.png to 9.png, one whose name needs quotes, and one outside of the folder of the lists."""
    for place in [*(tmp_path / f"lists/images/{number}.png" for number in range(10)), tmp_path / "lists/a, b.png"]:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(place.name), *place.name.encode()[:2])).save(place)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return tmp_path / "lists"


def rows(*labels: str, start: int = 0) -> str:
    return "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(labels, start))


def opened(folder: Path, text: str, val: str = rows("b", "a", start=8), record: Any = None, **more: Any) -> Datasets:
    (folder / "train.csv").write_text(text, encoding="utf-8")
    (folder / "val.csv").write_text(val, encoding="utf-8")
    given: dict[str, Any] = {"dataset": f"csv/{folder}", "val_split": "val.csv", "input_size": (3, 8, 8), **more}
    return open_datasets(DataOptions(**given), record)


def targets(data: Any) -> list[Any]:
    return [
        data[index][1] if isinstance(data[index][1], int) else data[index][1].tolist() for index in range(len(data))
    ]


@pytest.mark.parametrize(
    "text",
    [
        rows("a", "b", "b"),
        "images,label\n" + rows("a", "b", "b"),  # which is a folder too
        "\ufeff" + rows("a", "b", "b").replace("\n", "\r\n"),
        "\n" + rows(' "a" ', '"b"', "b,,").replace(' "a" ', "a ") + "\n",
        "image,class\n" + rows("a", "b", "b") + rows("a"),  # a repeated row
        "{here}/images/0.png,a\n" + rows("b", "b", start=1),
        "../lists/images/0.png,a\n" + rows("b", "b", start=1),
    ],
)
def test_one_list_in_every_form_that_people_write_it_in(text: str, images: Path) -> None:
    data = opened(images, text.replace("{here}", str(images)))
    assert data.classes == ("a", "b")
    assert targets(data.train) == [0, 1, 1]
    assert targets(data.test) == [1, 0]
    assert any("repeat an image" in note for note in data.notes) == (text.count("images/0") == 2)


def test_labels_that_two_systems_write_are_one_class(images: Path) -> None:
    data = opened(images, rows("caf\u00e9", "cafe\u0301", "tea"), rows("cafe\u0301", start=8))
    assert data.classes == ("caf\u00e9", "tea")
    assert targets(data.train) == [0, 0, 1]


def test_paths_may_be_quoted_and_lead_out_of_the_folder(images: Path) -> None:
    data = opened(images, '"a, b.png",a\n../outside.png,b\n')
    assert data.train[0][0].getpixel((0, 0)) == (8, ord("a"), ord(","))
    assert data.train[1][0].getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        (rows("a", "b", "c") + "images/99.png,a\n", {}, r"1 of 4 images .* line 4: '.*99.png'; paths are relative"),
        (rows("a", "b").replace(",", ";"), {}, "separated by semicolons: separate them by commas"),
        (rows("a", "", "b"), {}, r"line 2 of .*train.csv has no label, and an image has one class; `labels: none`"),
        (rows("a", "b,c"), {}, r"line 2 of .* has 2 labels, .*`labels: multilabel`"),
        (rows("a", "b") + rows("b"), {}, r"two classes, 'a' and in line 3 'b'"),
        (rows("a", "c"), {}, r"val_split 'val.csv' has the class 'b', which train_split 'train' has not"),
        (rows("a", "a"), {"val_split": None, "holdout": 0.5}, "one class only"),
        (rows("a", "b") + ",a\n", {}, "line 3 of .* has labels and no path"),
        ("path,label\n", {}, "there are no images in .*train.csv"),
        (rows("a", "b") + '"images/3.png,a\n', {}, "is no CSV: line 3"),
        (rows(*"ababababa"), {}, "has images of train_split"),
        (
            rows("a", "b"),
            {"val_split": "validaton"},
            "there is no file 'validaton.csv' .*did you mean|name one of them",
        ),
        (
            rows("a", "b"),
            {"root": "/nowhere", "dataset": "csv/x.csv", "val_split": None, "holdout": 0.5},
            "cannot read",
        ),
        (rows("", ""), {"labels": "multilabel"}, "no image of .* has a label"),
        (rows("0,1,0", "1,1,0"), {"labels": "multilabel"}, "name the labels that each image has"),
        (rows("0,1", "1,0"), {"labels": "multilabel"}, "name the labels that each image has"),  # in two columns
        (rows("a", "b") + "images,a\n", {}, "1 of 3 images .* are not files, the first in line 3"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_list_is_told_with_its_line(
    text: str, more: dict[str, Any], says: str, images: Path
) -> None:
    with pytest.raises(DataError, match=says):
        opened(images, text, **more)


def test_a_list_that_is_no_text_is_told(images: Path) -> None:
    (images / "latin.csv").write_bytes("images/0.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv is no UTF-8 text"):
        opened(images, rows("a", "b"), train_split="latin.csv")
    (images / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv is no CSV: it is no regular file"):
        opened(images, rows("a", "b"), train_split="folder.csv")


def test_images_of_a_list_that_are_not_there_can_be_left_out(images: Path) -> None:
    data = opened(images, rows("a", "b", "b") + "images/99.png,a\n", on_error="skip")
    assert data.skipped == {"train_split": ("images/99.png",)}
    assert targets(data.train) == [0, 1, 1]


def test_one_list_is_divided_and_needs_no_other(images: Path) -> None:
    (images / "all.csv").write_text(rows(*"abababab"))
    for given in ({"dataset": f"csv/{images}/all.csv"}, {"root": f"{images}/all.csv"}):
        data = open_datasets(DataOptions(**given, val_split="none", holdout=0.25, input_size=(3, 8, 8)))
        assert (len(data.train), len(data.test)) == (6, 2)  # type: ignore[arg-type]
        without = open_datasets(DataOptions(**given, labels="none", input_size=(3, 8, 8)))
        assert without.num_classes == 0
        assert (len(without.train), len(without.test)) == (7, 1)  # type: ignore[arg-type]


SETS = rows("cat,dog", "dog", "", "owl10,cat", "owl9")


def test_several_labels_are_a_vector_of_all_classes(images: Path) -> None:
    data = opened(images, SETS + rows("dog"), rows("owl9,dog", "", start=8), labels="multilabel")
    assert data.classes == ("cat", "dog", "owl9", "owl10")
    assert targets(data.train) == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]
    assert targets(data.test) == [[0, 1, 1, 0], [0, 0, 0, 0]]
    options = DataOptions(input_size=(3, 8, 8), labels="multilabel", batch_size=4, mixup=1.0, dataset=f"csv/{images}")
    pixels, target, index = next(iter(loader(data.train, options, InputSpec((3, 8, 8)), training=True)))
    assert target.dtype == torch.float32
    assert target.tolist() == [targets(data.train)[row] for row in index.tolist()]
    mix = mixer(options, data.num_classes)
    assert mix is not None
    _, mixed = mix(pixels, target)
    shares = mixed[target != target.flip(0)]
    assert torch.equal(mixed[target == target.flip(0)], target[target == target.flip(0)])
    assert len({round(float(share), 5) for share in torch.minimum(shares, 1 - shares)}) <= 1


def test_the_classes_of_a_run_number_other_lists(images: Path) -> None:
    before = opened(images, SETS, rows("owl9", start=8), labels="multilabel").record
    before.write(images / "data.json")
    record = DataRecord.read(images)
    assert record == before
    data = opened(images, rows("owl10", "dog", "dog"), rows("owl9", start=8), record=record, labels="multilabel")
    assert targets(data.train)[0] == [0, 0, 0, 1]
    with pytest.raises(DataError, match=r"class 'cat' is not there any more|it had 5 train images"):
        before.refuse_others(data.record, images)
    moved = opened(images, SETS.replace("dog\n", "cat\n"), rows("owl9", start=8), labels="multilabel").record
    with pytest.raises(DataError, match="class"):
        before.refuse_others(moved, images)


def test_several_labels_need_a_source_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`labels: multilabel` is read from a CSV file"):
        open_datasets(DataOptions(dataset="sklearn/digits", labels="multilabel", input_size=(3, 8, 8)))


@pytest.mark.parametrize("dataset", ["csv/{here}/all.csv", "csv/lists/all.csv", ""])
def test_a_list_that_has_moved_is_found_by_its_new_folder(
    dataset: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    (images / "all.csv").write_text(rows(*"abababab"))
    moved = images.rename(images.with_name("moved"))
    root = moved if dataset else moved / "all.csv"
    given = {"dataset": dataset.format(here=images), "root": str(root), "val_split": "none", "holdout": 0.25}
    assert len(open_datasets(DataOptions(**given, input_size=(3, 8, 8))).train) == 6  # type: ignore[arg-type]


def test_a_first_row_that_is_no_image_is_a_header_and_an_unusual_one_is_said(images: Path) -> None:
    plain = opened(images, "\n,\nPath,Label\n" + rows("a", "b"))
    assert (len(plain.train), plain.notes) == (2, opened(images, rows("a", "b")).notes)
    odd = opened(images, "img001,a\n" + rows("a", "b"))
    assert len(odd.train) == 2
    assert any("line 1" in note and "'img001'" in note for note in odd.notes)
