"""Tar shards: the images that timm's reader of webdataset finds, once an epoch, at any place, in any process."""

import io
import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import webdataset
from conftest import TINY
from PIL import Image
from running import After, close, epoch_of, run, run_by_two, same
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data import create_dataset

from probe_kd.data import loading as data
from probe_kd.data.cache_keys import fingerprint
from probe_kd.data.loading import DataOptions, Views, _shards_of, loader, open_datasets, readable
from probe_kd.data.shards import _Info, _lengths, open_shards
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError, Stopped
from probe_kd.training import checkpoints

LENGTHS = {"train": (50, 1, 70, 39), "validation": (30, 25)}  # uneven, as shards are


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels * (255 / 16)).astype("uint8")).resize((32, 32)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as webdataset writes them, with what else stands there: text and JSON."""
    folder = tmp_path_factory.mktemp("shards")
    pixels, targets = load_digits(return_X_y=True)
    splits: dict[str, Any] = {}
    at = 0
    for split, lengths in LENGTHS.items():
        names = [f"digits-{split}-{shard}.tar" for shard in range(len(lengths))]
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        for name, length in zip(names, lengths, strict=True):
            with webdataset.TarWriter(str(folder / name)) as tar:
                tar.write({"__key__": "about", "txt": "no image"})
                for index in range(at, at + length):
                    parts = {
                        "PNG" if index % 3 else "png": png(pixels[index].reshape(8, 8)),
                        "cls": int(targets[index]),
                    }
                    tar.write({"__key__": f"part.s/{index:05}", "json": {"of": index}, **parts})
            at += length
    (folder / "_info.json").write_text(json.dumps({"name": "digits", "splits": splits}))
    return folder


def options(folder: Path, **more: Any) -> DataOptions:
    wanted: dict[str, Any] = {"dataset": "wds/digits", "root": str(folder), "num_classes": 10, "batch_size": 16}
    return DataOptions(**{**wanted, "input_size": (3, 32, 32), **more})


def test_the_docs_show_shards_that_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
    shown = page.partition("```json\n")[2].partition("```")[0]
    found = _lengths(_Info.model_validate_json(shown).splits)
    assert list(found.values()) == [1024, 413, 360]


@pytest.fixture
def bare(written: Path, tmp_path: Path) -> Path:
    """The same without `_info.json`."""
    for file in written.glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_images_and_classes_are_those_of_timms_reader(written: Path, bare: Path) -> None:
    theirs = list(create_dataset("wds/digits", root=str(written), split="train", is_training=False))
    assert len(theirs) == sum(LENGTHS["train"])
    for folder, split, expected in (
        (written, "train", theirs),
        (written, "digits-train-{2,0}.tar|120", [*theirs[51:121], *theirs[:50]]),
        (bare, "digits-train-{0..3}.tar", theirs),
    ):
        ours = open_shards(str(folder), split)
        assert len(ours) == len(expected)
        for (image, target), (picture, label) in zip(ours, expected, strict=True):
            assert (image.mode, image.tobytes(), target) == (picture.mode, picture.tobytes(), label)


def test_an_epoch_is_every_image_once_whatever_the_workers(written: Path) -> None:
    def epoch(age: int, seed: int = 0, **more: Any) -> list[torch.Tensor]:
        opened = open_datasets(options(written, **more))
        found = epoch_of(opened.train, age, seed, **more)
        whole = opened.train.dataset if more.get("holdout") else opened.train
        assert whole._read.all()  # also where workers have read them: what one knows, all know
        return found

    first = epoch(3, batch_size=20)
    assert sorted(first[2].tolist()) == list(range(160))
    for more in ({"workers": 2}, {"batch_size": 32}):
        assert all(torch.equal(*pair) for pair in zip(first, epoch(3, **{"batch_size": 20, **more}), strict=True))
    for age, seed in ((4, 0), (3, 1)):
        assert not torch.equal(first[2], epoch(age, seed, batch_size=20)[2])
    assert len(set(epoch(3, batch_size=20, holdout=0.25)[2].tolist())) == 120


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_an_epoch_goes_shard_after_shard_and_mixes_images_within_windows(
    written: Path, monkeypatch: pytest.MonkeyPatch, holdout: float
) -> None:
    monkeypatch.setattr(data, "WINDOW", 8)
    dataset: Any = open_datasets(options(written, holdout=holdout)).train
    places = np.array(getattr(dataset, "indices", range(160)))
    views = Views(len(dataset), 0, shards=_shards_of(dataset))
    rows = set()
    for age in range(4):
        views.begin(age)
        numbers = places[[index for index, _ in views]]
        assert sorted(numbers) == sorted(places)
        shards = np.searchsorted(np.cumsum(LENGTHS["train"]), numbers, side="right")
        windows = np.split(shards, range(8, len(shards), 8))
        assert sum(len(set(window)) > 1 for window in windows) <= 3  # of the windows, those where one file ends
        assert (np.diff(numbers) < 0).sum() > len(numbers) / 4
        rows.add(tuple(np.argsort([np.flatnonzero(shards == shard).mean() for shard in (0, 2, 3)])))
    assert len(rows) > 1


@pytest.fixture(scope="module")
def recipe(written: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A frozen teacher from a file, and small batches, so that there are points inside an epoch."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), file)
    text = TINY.replace("train: {epochs: 1}", f"checkpoint: {file}").replace("baseline: true\n", "")
    text = text.replace("sklearn/digits", f"wds/digits\n  root: {written}\n  num_classes: 10")
    text = text.replace("batch_size: 64", "batch_size: 8\n  holdout: 0.1\n  views: 2\n  reprob: 0.5")
    return text.partition("  - name: task")[0].replace("epochs: 1", "epochs: 2")


@pytest.fixture(scope="module")
def whole(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(recipe, folder)
    return folder


def test_a_stopped_run_goes_on_to_the_same_bits_and_neither_cache_nor_workers_change_it(
    recipe: str, whole: Path, tmp_path: Path
) -> None:
    cached = recipe.replace("model: resnet10t", f"model: resnet10t\n  cache: {tmp_path / 'cache'}")
    text = cached.replace("views: 2", "views: 2\n  workers: 1")
    with pytest.raises(Stopped):
        run(text, tmp_path / "parts", After(lambda: os.kill(os.getpid(), signal.SIGTERM), updates=6))
    newest = sorted((tmp_path / "parts" / checkpoints.FOLDER).iterdir())[-1]
    assert json.loads((newest / "journal.json").read_text())["step"] == 2
    run(text, tmp_path / "parts", resume=True)
    same(whole, tmp_path / "parts")


def test_two_processes_train_and_measure_what_one_does(recipe: str, whole: Path, tmp_path: Path) -> None:
    assert run_by_two(recipe.replace("batch_size: 8", "batch_size: 4"), tmp_path / "two") == ["done", "done"]
    close(whole, tmp_path / "two", 1e-3)


def test_a_cache_notices_another_shard_and_not_another_place(written: Path, bare: Path) -> None:
    name = "digits-train-1.tar"
    before = fingerprint(open_shards(str(written), name)).images
    (bare / name).unlink()
    shutil.copy(written / name, bare)
    os.utime(bare / name, (1, 1))
    assert fingerprint(open_shards(str(bare), name)).images == before
    with (bare / name).open("ab") as file:
        file.write(bytes(512))
    assert fingerprint(open_shards(str(bare), name)).images != before


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"root": "nowhere"}, "there is no folder 'nowhere' to read shards from"),
        ({"root": "https://example.org/shards"}, "an address is not enough"),
        ({"num_classes": None}, "set `num_classes`"),
        ({"train_split": "trian"}, r"no split 'trian' in .* has 'train', 'validation'; did you mean 'train'\?"),
        (
            {"train_split": "digits-train-{0..9}.tar"},
            r"of 10 shards .* not there: '.*digits-train-4.tar', .* and 3 more",
        ),
    ],
    ids=str,
)
def test_shards_that_are_not_there(written: Path, wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_datasets(options(written, **wishes))


def described(folder: Path, **more: Any) -> None:
    split = {"filenames": ["digits-train-0.tar"], "shard_lengths": [50], **more}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"filenames": "digits"}, "does not describe shards as timm has it: splits.train.filenames"),
        ({"alt_label": "of"}, "labels in JSON"),
        ({"shard_lengths": [49]}, "holds 50 images with a class, and `shard_lengths` of its _info.json says 49"),
        ({"filenames": ["notes.tar"]}, "notes.tar, which should be a tar file without compression"),
        ({"filenames": ["broken.tar"], "shard_lengths": [1]}, r"image 0 \(from 0\) of shard .*broken.tar cannot be"),
        ({"filenames": []}, "no images"),
        ({"num_classes": 9}, "has an image of class 9, which is none of the 9 classes"),
        ({"shard_lengths": [10**15]}, "splits.train.shard_lengths.0: Input should be less"),
    ],
    ids=str,
)
def test_shards_that_are_wrong(bare: Path, info: dict[str, Any], says: str) -> None:
    described(bare, **info)
    with tarfile.open(bare / "notes.tar", "w:gz") as tar:
        tar.add(__file__)
    with webdataset.TarWriter(str(bare / "broken.tar")) as writer:
        writer.write({"__key__": "0", "png": png(np.zeros((8, 8)))[:20], "cls": 0})
    wanted = options(bare)

    def read() -> None:
        images = open_shards(str(bare), "train", num_classes=info.get("num_classes", 10))
        list(readable(loader(images, wanted, InputSpec((3, 32, 32)), training=False), "test"))

    with pytest.raises(DataError, match=says):
        read()


@pytest.mark.parametrize("described_too", [False, True])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda it, at, _: it[: at[0]] + b"\x01" * 512 + it[at[0] + 512 :], "should be a header is none, at byte {0}"),
        (lambda it, at, _: it[: at[0]] + b"\0" * 512 + it[at[0] + 512 :], "should be a header is none, at byte {0}"),
        (lambda it, at, _: it[: at[0]], "it is cut off at byte {0}, before the two blocks of zeros"),
        (lambda it, at, _: it[: at[0] + 99], "it is cut off at byte .*, before the two blocks"),
        (lambda it, at, _: it[: at[0] + 611], "it is cut off at byte"),
        (lambda it, at, _: it[: at[1]], "it is cut off at byte {1}"),
        (lambda it, _, end: it[: end + 512], "it is cut off at byte .*, before the two blocks"),
        (lambda it, *_: it + it, "behind what looks like its end is more, at byte {size}"),
        (lambda it, *_: it + b"\0" * 3_000_000 + b"x", "behind what looks like its end is more"),
    ],
    ids=["header", "zeros", "cut", "in a header", "in headers", "in an image", "one block", "twice", "far behind"],
)
def test_a_damaged_shard_is_told_as_such(
    written: Path, tmp_path: Path, damage: Any, says: str, described_too: bool
) -> None:
    """With the byte, and not as a shard of fewer images, or as a wrong number in `_info.json`."""
    file = written / "digits-train-0.tar"
    with tarfile.open(file) as tar:
        member = tar.getmember("part.s/00020.PNG")
        at, end, content = (member.offset, member.offset_data + 50), tar.offset, file.read_bytes()
    (tmp_path / file.name).write_bytes(damage(content, at, end))
    if described_too:
        described(tmp_path)
    says = says.format(*at, size=len(content))
    with pytest.raises(
        DataError, match=rf"shard .*digits-train-0.tar is damaged, .*; fetch or write it anew: .*{says}"
    ):
        open_shards(str(tmp_path), "train" if described_too else file.name).read_labels()


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"png": b"x"}, r"sample 'odd' of shard .*odd.tar has an image and no class \(.cls\) \(1 such samples\); mend"),
        ({"cls": b"1"}, "has no image "),
        ({"jpeg": b"x", "cls": b"1"}, "has no image: .jpeg is not read, only jpg, png, webp are"),
        ({"png": b"x", "cls": b"cat"}, "has no class number in its .cls file: b'cat'"),
        ({"txt": b"about"}, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [None, 3, 4])
def test_a_sample_that_is_no_image_with_a_class_is_told_or_left_out(
    tmp_path: Path, sample: dict[str, bytes], says: str, length: int | None
) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, parts in {"0": {}, "1": {}, "odd": sample, "2": {}}.items():
            for suffix, content in (parts or {"png": png(np.zeros((8, 8))), "cls": name.encode()}).items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    split = "odd.tar"
    if length:
        split = "train"
        described(tmp_path, filenames=["odd.tar"], shard_lengths=[length])
    wanted = options(tmp_path, train_split=split, val_split="none", holdout=0.4)
    skipping = wanted.model_copy(update={"on_error": "skip"})
    if not says:
        if length != 4:
            assert len(open_shards(str(tmp_path), split)) == 3
        return
    with pytest.raises(DataError, match=says):
        open_datasets(wanted)
    found = open_datasets(skipping)
    assert found.skipped == {"train_split": ("odd.tar: odd",)}
    assert "1 images of train_split cannot be read or have no class and are left out: 'odd.tar: odd'" in found.notes
    assert (len(found.train), len(found.held_out)) == (2, 1)  # type: ignore[arg-type]
    found.record.refuse_others(open_datasets(skipping, found.record).record, tmp_path)


def test_a_run_knows_its_shards(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copied")
    wanted = options(tmp_path / "copied")
    before = open_datasets(options(written)).record
    before.refuse_others(open_datasets(wanted).record, tmp_path)
    file = tmp_path / "copied" / "digits-train-2.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        place = tar.getmember("part.s/00051.cls").offset_data
    content[place] ^= 1  # another class, in the same bytes
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"in train_split shard 'digits-train-2.tar' has other images"):
        before.refuse_others(open_datasets(wanted).record, tmp_path)
    info = json.loads((written / "_info.json").read_text())
    for name in ("filenames", "shard_lengths"):
        info["splits"]["validation"][name].reverse()
    shutil.copy(written / file.name, file)
    (tmp_path / "copied" / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="in val_split the shards come in another order"):
        before.refuse_others(open_datasets(wanted).record, tmp_path)


def test_what_a_worker_cannot_read_is_told_without_its_traceback(written: Path) -> None:
    wanted = options(written, workers=1)
    images = open_shards(str(written), "validation", num_classes=9)
    batches = loader(images, wanted, InputSpec((3, 32, 32)), training=False)
    with pytest.raises(DataError, match=r"^cannot read a batch of test images: shard \S+ has an image of class 9, .*"):
        list(readable(batches, "test"))


def test_braces_need_webdataset_and_names_do_not(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert len(open_shards(str(written), "train")) == sum(LENGTHS["train"])
    with pytest.raises(DataError, match=r"braces need webdataset \(pip install 'probe-kd\[wds\]'\)"):
        open_shards(str(written), "digits-train-{0..3}.tar")
