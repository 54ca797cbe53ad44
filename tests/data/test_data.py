"""Data: the same batches as timm's own loader, and files that are not there."""

import gzip
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import epoch_of
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Subset

from probe_kd.data.loading import DataOptions, Views, _combined_seed, loader, open_datasets, readable
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Digits as PNG files in a folder per class, as ImageFolder wants them."""
    datasets = open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8)))
    for split, dataset in (("train", datasets.train), ("validation", datasets.test)):
        for index in range(40):  # all ten classes in both
            image, target = dataset[index]
            path = tmp_path / split / f"class{target}"
            path.mkdir(parents=True, exist_ok=True)
            image.resize((20 + index, 30)).save(path / f"{index}.png")
    return tmp_path


def as_timm_makes_them(
    folder: Path, size: tuple[int, int, int], wanted: InputSpec, training: bool, **drawn: Any
) -> DataLoader[Any]:
    dataset = create_dataset("", root=str(folder), split="train" if training else "validation", is_training=training)
    return create_loader(
        dataset,
        input_size=size,
        batch_size=5,
        is_training=training,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        mean=wanted.mean,
        std=wanted.std,
        interpolation="bicubic",
        **({"re_prob": 0.3, "auto_augment": "rand-m3", "color_jitter": 0.4} | drawn),
    )


SIZES = pytest.mark.parametrize("size", [(3, 16, 16), (3, 16, 24)])
AUGMENTED = {"reprob": 0.3, "aa": "rand-m3", "num_classes": 10}


@SIZES
def test_test_batches_are_those_of_timms_loader(folder: Path, size: tuple[int, int, int]) -> None:
    options = DataOptions(root=str(folder), input_size=size, batch_size=5, **AUGMENTED)
    wanted = InputSpec(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    batches = list(loader(open_datasets(options).test, options, wanted, training=False))
    theirs = list(as_timm_makes_them(folder, size, wanted, training=False))
    assert len(batches) == len(theirs) > 2
    for (images, target), (expected, labels) in zip(batches, theirs, strict=True):
        assert torch.equal(target, labels)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@SIZES
@pytest.mark.parametrize("erased", [0.3, 0.0])  # without, a batch is made into tensors at once: the bits are the same
def test_training_images_are_augmented_by_timms_transform_from_the_seed_of_their_view(
    folder: Path, size: tuple[int, int, int], erased: float
) -> None:
    options = DataOptions(root=str(folder), input_size=size, batch_size=5, **AUGMENTED | {"reprob": erased})
    wanted = InputSpec(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    ours = loader(open_datasets(options).train, options, wanted, training=True, seed=3)
    ours.sampler.begin(2)
    theirs = as_timm_makes_them(folder, size, wanted, training=True, re_prob=erased)
    seeds = dict(iter(ours.sampler))
    seen = []
    for images, target, indices in ours:
        for image, label, index in zip(images, target, indices.tolist(), strict=True):
            seed = _combined_seed(seeds[index], index)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            expected, wanted_label = theirs.dataset[index]
            assert label == wanted_label
            assert torch.equal(image, expected)
        seen += indices.tolist()
    assert len(seen) == len(set(seen)) == len(theirs) * 5  # what does not fill a batch is left out, as timm does
    assert seen != sorted(seen)


def test_a_jitter_of_nothing_is_left_out_and_changes_nothing(folder: Path) -> None:
    options = DataOptions(root=str(folder), input_size=(3, 16, 16), num_classes=10, color_jitter=0.0, hflip=0.5)
    wanted = InputSpec((3, 16, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    ours = loader(open_datasets(options).train, options, wanted, training=True)
    theirs = as_timm_makes_them(folder, (3, 16, 16), wanted, True, re_prob=0.0, auto_augment=None, color_jitter=0.0)
    for index, seed in list(iter(ours.sampler))[:4]:
        mixed = _combined_seed(seed, index)
        random.seed(mixed)
        torch.manual_seed(mixed)
        assert torch.equal(ours.take([(index, seed)])[0][0], theirs.dataset[index][0])


def test_what_is_seen_follows_from_seed_and_age_alone() -> None:
    dataset = Subset(open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))).train, range(64))
    first = epoch_of(dataset, 4)
    for other in (epoch_of(dataset, 4, workers=2), epoch_of(dataset, 4, batch_size=32)):
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    epoch_of(dataset, 4)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])
    for age, seed in ((5, 0), (4, 1)):
        images, _, indices = epoch_of(dataset, age, seed)
        assert not torch.equal(indices, first[2])
        pairs = zip(images[indices.argsort()], first[0][first[2].argsort()], strict=True)
        assert not any(torch.equal(*pair) for pair in pairs)


def test_views_come_round_and_the_order_does_not() -> None:
    dataset = Subset(open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))).train, range(64))
    epochs = [epoch_of(dataset, age, views=2) for age in range(4)]
    by_index = [images[indices.argsort()] for images, _, indices in epochs]
    assert torch.equal(by_index[0], by_index[2])
    assert torch.equal(by_index[1], by_index[3])
    assert not torch.equal(by_index[0], by_index[1])
    assert not torch.equal(epochs[0][2], epochs[2][2])


def test_digits_are_split_once_for_all_without_overlap() -> None:
    options = DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))
    one, two = open_datasets(options), open_datasets(options)
    pixels = [[split[i][0].tobytes() for i in range(len(split))] for split in (one.train, one.test)]
    assert (len(pixels[0]), len(pixels[1]), one.num_classes) == (1437, 360, 10)
    assert not set(pixels[0]) & set(pixels[1])
    assert [two.test[i][1] for i in range(360)] == [one.test[i][1] for i in range(360)]


def test_fashion_mnist_is_read_from_its_files_in_grey_or_colour(tmp_path: Path) -> None:
    """The IDX files of torchvision's `FashionMNIST/raw`, as Debian's package has them too."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 6)):
        pixels = np.random.default_rng(0).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, header, values in (
            ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), pixels),
            ("labels-idx1", struct.pack(">II", 2049, count), labels),
        ):
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
            with gzip.open(raw / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
    for channels in (1, 3):
        size = (channels, 28, 28)
        options = DataOptions(dataset="torch/fashion_mnist", root=str(tmp_path), input_size=size, batch_size=4)
        datasets = open_datasets(options)
        assert (len(datasets.train), len(datasets.test), datasets.num_classes) == (12, 6, 10)  # type: ignore[arg-type]
        images, target = next(iter(loader(datasets.test, options, InputSpec(size), training=False)))
        assert images.shape == (4, channels, 28, 28)
        assert target.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "sklearn/iris"}, "there is 'sklearn/digits'"),
        ({"dataset": "sklearn/digits", "num_classes": 9}, "has 10 classes"),
        ({"dataset": "torch/cifar100", "root": "nowhere"}, "download: true"),
        ({"dataset": "tfds/cifar10", "root": "nowhere"}, r"is a stream, .* tar shards in a folder \(`wds/`\)"),
        ({"dataset": "", "root": "nowhere"}, "no folder 'nowhere'"),
    ],
    ids=str,
)
def test_data_that_is_not_there(options: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_datasets(DataOptions(input_size=(3, 8, 8), **options))  # type: ignore[arg-type]


def test_images_that_cannot_be_read_are_told_with_their_part_of_the_data(folder: Path) -> None:
    options = DataOptions(root=str(folder), input_size=(3, 8, 8), batch_size=5, num_classes=10)
    datasets = open_datasets(options)
    for path in (folder / "validation").glob("*/*.png"):
        path.unlink()
    unreadable = (
        r"cannot read a batch of test images: .*validation.class0.24.png cannot be read: No such file.*on_error: s"
    )
    with pytest.raises(DataError, match=unreadable):
        list(readable(loader(datasets.test, options, InputSpec((3, 8, 8)), training=False), "test"))


POLICIES = [
    *("rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m0", "rand-m10-n6-mstd9", "rand-m9-mstdinf-inc1-p1", "rand-t0-m7"),
    *("original", "originalr", "v0", "v0r", "3a", "original-mstd0.5", "v0r-mstd9"),
    *("augmix-m5-w4-d2", "augmix-m10-mstd9", "augmix-m3-b1"),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_draw_of_any_policy_of_timm_ends_a_run(policy: str, channels: int) -> None:
    """Posterize draws 0 bits with `rand-m9-mstd0.5-inc1`, which Pillow 13 refuses."""
    images = open_datasets(DataOptions(dataset="sklearn/digits", input_size=(channels, 8, 8))).train
    options = DataOptions(dataset="sklearn/digits", input_size=(channels, 16, 16), aa=policy, batch_size=64)
    batches: Any = loader(Subset(images, range(64)), options, InputSpec((channels, 16, 16)), training=True)
    for age in range(4):
        batches.sampler.begin(age)
        for pixels, *_ in batches:
            assert pixels.shape == (64, channels, 16, 16)


def test_the_operations_of_timm_are_as_they_were_for_others() -> None:
    from timm.data import auto_augment

    loader([], DataOptions(input_size=(3, 8, 8), aa="v0r"), InputSpec((3, 8, 8)), training=True)  # type: ignore[arg-type]
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize
    assert auto_augment.AugmentOp("Posterize").aug_fn is auto_augment.posterize


def test_balanced_draws_come_from_every_class_equally_often_and_from_seed_and_age_alone() -> None:
    classes = np.array([2] * 5 + [0] * 90 + [4] * 905)
    views = Views(1000, 3, balanced=classes)
    drawn = []
    for age in range(40):
        views.begin(age)
        drawn.append([index for index, _ in views])
    counts = np.bincount(classes[np.array(drawn)].flatten())
    # 40,000 draws, of which a class has a third: five standard deviations are 471
    assert np.abs(counts[[0, 2, 4]] - 40_000 / 3).max() < 471
    assert counts.sum() == 40_000
    assert set(np.concatenate(drawn)) == set(range(1000))
    again = Views(1000, 3, balanced=classes)
    again.begin(7)
    assert [index for index, _ in again] == drawn[7]
    assert drawn[7] != drawn[8]
    per_image = np.bincount(np.array(drawn).flatten(), minlength=1000)[:5]
    assert np.abs(per_image - 40_000 / 15).max() < 260  # of the five images of the rarest class
