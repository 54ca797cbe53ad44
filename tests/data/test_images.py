"""Image files: what a viewer shows, an error with a name, and never a wait or a neighbour."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from probe_kd.data.datasets import open_datasets
from probe_kd.data.images import FolderImages, open_image, scan_folder
from probe_kd.data.options import DataOptions
from probe_kd.errors import DataError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # no two rows or columns alike
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def written(folder: Path, image: Image.Image, kind: str = "png", **more: Any) -> Path:
    image.save(folder / f"0.{kind}", **more)
    return folder / f"0.{kind}"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("image", "kind", "shown"),
    [
        (Image.fromarray(COLOUR), "png", COLOUR),
        (Image.fromarray(GREY), "png", GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png", GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "tif", GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257).convert("I"), "pgm", GREY),
        (Image.fromarray(np.uint8([[0, 255]] * 4)).convert("1"), "png", np.uint8([[0, 255]] * 4)),
        (Image.fromarray(COLOUR).convert("CMYK"), "tif", COLOUR),
        (Image.fromarray(COLOUR // 86 * 86).quantize(), "png", COLOUR // 86 * 86),
        (Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])), "png", COLOUR),
        (Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)])), "png", np.full_like(COLOUR, 255)),
        (Image.fromarray(np.dstack([GREY, np.zeros_like(GREY)])), "png", np.full_like(GREY, 255)),
        (Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])), "png", GREY),
    ],
    ids=lambda value: getattr(value, "mode", value) if not isinstance(value, np.ndarray) else "",
)
def test_an_image_is_what_a_viewer_shows(
    image: Image.Image, kind: str, shown: np.ndarray[Any, Any], mode: str, tmp_path: Path
) -> None:
    expected = np.asarray(Image.fromarray(shown).convert(mode), dtype=int)
    found = open_image(written(tmp_path, image, kind), mode)
    assert found.mode == mode
    assert np.abs(np.asarray(found, dtype=int) - expected).max() <= 1


def test_transparent_colours_of_a_palette_are_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.uint8([[0, 1], [1, 0]]), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    found = np.asarray(open_image(written(tmp_path, palette, transparency=1), "RGB"))
    assert found[0].tolist() == [[200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_as_its_camera_was_held(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(COLOUR)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # lies so, and is to be turned by 90 degrees the other way
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    lying = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(written(tmp_path, lying, exif=exif), "RGB")
    assert np.array_equal(np.asarray(found), COLOUR)


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def whole(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


BROKEN: dict[str, Callable[[Path], Any]] = {
    "truncated png": lambda path: path.write_bytes(whole("png")[:60]),
    "png cut late": lambda path: path.write_bytes(whole("png")[:-1000]),
    "truncated jpeg": lambda path: path.write_bytes(whole("jpeg")[:400]),
    "truncated webp": lambda path: path.write_bytes(whole("webp")[:400]),
    "truncated gif": lambda path: path.write_bytes(whole("gif")[:900]),
    "truncated bmp": lambda path: path.write_bytes(whole("bmp")[:400]),
    "truncated tiff": lambda path: path.write_bytes(whole("tiff")[:400]),
    "header alone": lambda path: path.write_bytes(whole("png")[:8]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image, but <a name> of one"),
    "postscript": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    "zeros": lambda path: path.write_bytes(b"\0" * 5000),
    "bomb": lambda path: path.write_bytes(bomb()),
    "floats": lambda path: Image.fromarray(np.zeros((4, 4), np.float32)).save(path, "tiff"),
    "32 bits": lambda path: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path, "tiff"),
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere.png"),
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_is_an_error_with_its_name_and_nothing_waits(kind: str, tmp_path: Path) -> None:
    written(tmp_path, Image.fromarray(GREY))
    path = tmp_path / "1.png"
    BROKEN[kind](path)
    images = FolderImages([(str(tmp_path / "0.png"), 0), (str(path), 1)], "RGB", str(tmp_path))
    assert images[0][1] == 0
    with pytest.raises(DataError, match=r"1\.png cannot be read: \w+"):
        images[1]


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(root / name)


def test_files_and_classes_have_timms_order_and_torchvisions(tmp_path: Path) -> None:
    folders(tmp_path, *(f"{name}/{number}.png" for name in ("c10", "c2", "C1", "b") for number in (10, 9, 1)))
    theirs = create_dataset("", root=str(tmp_path)).reader
    found = scan_folder(tmp_path)
    order = {name: index for index, name in enumerate(found.files)}
    assert order == theirs.class_to_idx
    assert found.samples(order, by_path=True) == theirs.samples
    torchvisions, found = ImageFolder(str(tmp_path)), scan_folder(tmp_path, outermost=True)
    order = {name: index for index, name in enumerate(found.files)}
    assert order == torchvisions.class_to_idx
    assert found.samples(order, by_path=False) == torchvisions.samples
    assert not found.notes


def test_links_that_go_round_are_not_followed_and_others_are(tmp_path: Path) -> None:
    root = tmp_path / "data" / "train"
    folders(root, "a/0.png", "b/0.png")
    folders(tmp_path / "elsewhere", "0.png", "1.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    for number, target in enumerate((root, root / "a", root / "b", tmp_path / "data", Path("/"))):
        for name in "ab":
            (root / name / f"round{number}").symlink_to(target)
    found = scan_folder(root)
    assert {name: len(files) for name, files in found.files.items()} == {"a": 1, "b": 1, "c": 2}
    assert sum("goes round" in note for note in found.notes) == 8
    doubled = [note for note in found.notes if "whose images are read already" in note]
    assert [str(root / name) in note for name, note in zip("ba", doubled, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["0.png", "1.png"], "in no class folders, .* make one folder for each class"),
        (["a/0.png", "1.png"], r"1 images lie beside the class folders in .* and have no class \(.*1.png"),
        (
            ["a/2020/0.png", "b/2020/0.png"],
            r"two folders would be one class '2020': .*a.2020 and .*b.2020; .*outermost",
        ),
        (["a/0.png", "a/more/0.png", "b/0.png"], r"images in .*a and in .*a.more inside it: which is the class\?"),
    ],
)
def test_images_without_a_plain_class_are_refused(files: list[str], says: str, tmp_path: Path) -> None:
    folders(tmp_path, *files)
    with pytest.raises(DataError, match=says):
        scan_folder(tmp_path)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    folders(tmp_path, "a/0.png", "a/.hidden/1.png", "deep/b/0.png")
    (tmp_path / "a" / "2.heic").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    found = scan_folder(tmp_path)
    assert list(found.files) == ["a", "b"]
    assert found.empty == ["empty"]
    assert any("1 .heic" in note for note in found.notes)
    assert any("'b' of 'deep/b'" in note for note in found.notes)


def test_grey_of_more_than_eight_bits_has_its_files_own_white(tmp_path: Path) -> None:
    """TIFF's tag 262 says that white is zero, PNG's tRNS what is transparent; nobody knows the range of 32 bits."""
    deep = Image.fromarray(np.uint16([[0, 65535]]))
    assert np.asarray(open_image(written(tmp_path, deep, "tif", tiffinfo={262: 0}), "L")).tolist() == [[255, 0]]
    assert np.asarray(open_image(written(tmp_path, deep, "png", transparency=0), "L")).tolist() == [[255, 255]]
    with pytest.raises(DataError, match="more than 16 bits"):
        open_image(written(tmp_path, Image.fromarray(np.int32([[0, 100]])), "tif"), "L")


def test_a_class_has_one_name_however_unicode_writes_it(tmp_path: Path) -> None:
    for name in ("cafe\u0301", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, Image.fromarray(GREY))
    assert set(scan_folder(tmp_path).files) == {"caf\u00e9", "b"}
    (tmp_path / "caf\u00e9").mkdir()
    written(tmp_path / "caf\u00e9", Image.fromarray(GREY))
    with pytest.raises(DataError, match=r"only in how Unicode writes their name, 'caf\\xe9' and 'cafe\\u0301'|'cafe"):
        scan_folder(tmp_path)


def test_a_class_folder_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/a\xff")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="is no UTF-8"):
        scan_folder(tmp_path)


def test_a_draft_is_pillows_and_of_jpegs_alone(tmp_path: Path) -> None:
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 804, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(tmp_path, photograph, "jpg", exif=exif)
    assert open_image(path, "RGB", 301).size == (600, 804)  # as a viewer shows it
    expected = Image.open(path)
    expected.draft("RGB", (300, 300))
    found = open_image(path, "RGB", 300)
    assert found.size == (300, 402)
    assert np.array_equal(np.asarray(found), np.asarray(expected.transpose(Image.Transpose.ROTATE_270)))
    assert open_image(written(tmp_path, photograph, "png"), "RGB", 100).size == (804, 600)


def test_every_source_of_files_takes_a_draft(tmp_path: Path) -> None:
    photograph = Image.fromarray(np.zeros((400, 400, 3), np.uint8))
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            written(tmp_path / split / name, photograph, "jpg", quality=90 if split == "train" else 80)
        (tmp_path / f"{split}.csv").write_text(f"path,label\n{split}/a/0.jpg,a\n{split}/b/0.jpg,b\n")
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("a", "b"):
                tar.add(tmp_path / split / name / "0.jpg", f"{name}.jpg")
                (tmp_path / "0.cls").write_text("01"["ab".index(name)])
                tar.add(tmp_path / "0.cls", f"{name}.cls")
    splits = {"train_split": "train.tar", "val_split": "validation.tar"}
    tables = {"train_split": "train.csv", "val_split": "validation.csv"}
    here = {"root": str(tmp_path)}
    for changes in (
        here,
        {"dataset": f"csv/{tmp_path}", **tables},
        {"dataset": "wds/x", "num_classes": 2, **here, **splits},
    ):
        opened = open_datasets(DataOptions(input_size=(3, 64, 64), draft=100, **changes))
        assert opened.train[0][0].size == (100, 100), changes


def test_a_draft_is_no_smaller_than_what_a_model_sees() -> None:
    with pytest.raises(ValueError, match=r"`draft: 100` would decode .* than the 224 pixels .* take 448 or more"):
        DataOptions(input_size=(3, 224, 224), draft=100)
