"""The teacher's cache: the same bits as a live teacher, no teacher where it serves, and never another teacher's."""

import os
import pickle
import resource
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from conftest import NARROW, TINY, apart, begin
from running import After, Quiet, same, stop
from safetensors.torch import load_file, save_file

import probe_kd.data.cache
from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_keys import depends_on, fingerprint, key_of
from probe_kd.data.cache_rows import RowReader, Stored, checksums, lengthen, shorten
from probe_kd.data.loading import DataOptions, open_datasets
from probe_kd.data.row_files import RowFile, metadata_of, open_rows
from probe_kd.errors import RecipeError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.run import train

TAPS = [Stored("layer", (3,), torch.float32)]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A frozen teacher from a file; augmentation in two views; hint and soft targets in different stages."""
    torch.manual_seed(1)
    teacher = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32])
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    text = NARROW.replace("  train: {epochs: 1}", f"  checkpoint: {tmp_path / 'teacher.safetensors'}")
    text = text.replace("hflip: 0.0", "hflip: 0.0\n  views: 2").replace("baseline: true\n", "")
    return text.replace("- name: task\n    epochs: 2", "- name: task\n    epochs: 3")


def cached(text: str, folder: Path, extra: str = "") -> str:
    return text.replace("  model: resnet10t\n", f"  model: resnet10t\n  cache: {folder}\n{extra}")


def mapped(folder: Path, tap: str) -> RowFile:
    """The rows of the first view at a tap, as (359, numbers): what is written to them is written to the file."""
    (path,) = folder.glob(f"*/{tap}/000000.safetensors")
    rows = load_file(path)["rows"]
    file = open_rows(path, 359, rows.shape[1:], rows.dtype, writes=True)
    assert file is not None
    return file._replace(rows=file.rows.flatten(1))


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of which the process that trains has read the rows."""
    sizes = list[int]()
    rows = TeacherCache.rows

    def counted(self: TeacherCache, indices: torch.Tensor) -> Any:
        found = rows(self, indices)
        sizes.extend([len(indices)] * (found is not None and len(indices) > 8))  # fewer are compared with the teacher
        return found

    monkeypatch.setattr(TeacherCache, "rows", counted)
    return sizes


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> int:
    """How many images the teacher ran for, in training steps."""
    from probe_kd.methods.teachers import FrozenTeacher

    seen = [0]
    features = FrozenTeacher.features

    def counted(self: FrozenTeacher, images: torch.Tensor, stored: Any = None) -> Any:
        seen[0] += len(images) if stored is None and len(images) > 8 else 0  # fewer only look at shapes, or check
        return features(self, images, stored)

    torch.set_num_threads(1)
    display = options.pop("display", None) or Quiet()
    if monkeypatch is None:
        train(plan(parse(text)), folder, display, **options)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(FrozenTeacher, "features", counted)
            patch.setattr("probe_kd.training.run.check_student", lambda *_: None)  # its batch is no training step
            train(plan(parse(text)), folder, display, **options)
    return seen[0]


def test_a_run_with_a_cache_is_the_run_without_and_asks_about_every_view_once(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: list[int]
) -> None:
    """What a batch reads of the cache is read with its images, by a worker too, and from images in memory."""
    live = run(recipe, tmp_path / "live", monkeypatch)
    text, said = cached(recipe, tmp_path / "cache"), Quiet()
    first = run(text, tmp_path / "first", monkeypatch, display=said)
    assert not gathered
    worked = text.replace("views: 2", "views: 2\n  workers: 2\n  memory: true")
    again = run(worked, tmp_path / "again", monkeypatch)
    assert not gathered
    assert f"student: hint: {5 * 64} images asked of the teacher, 0 known from its cache" in said.said[0]
    images = 5 * 64  # of an epoch; the last batch is not full
    # The hint sees view 0, and the task views 1, 0, 1, each once from the teacher. Which images an epoch leaves out
    # changes, so that a batch of the last may hold one that was not seen.
    assert live == 4 * images
    assert 3 * images <= first <= 4 * images
    assert again <= images
    same(tmp_path / "live", tmp_path / "first")
    same(tmp_path / "live", tmp_path / "again")
    taps = {path.name for path in (tmp_path / "cache").glob("*/*") if path.is_dir()}
    assert taps == {"layer2", "layer3", "output"}


def test_what_a_killed_run_kept_is_whole_and_the_rest_is_asked_again(recipe: str, tmp_path: Path) -> None:
    text = cached(recipe, tmp_path / "cache") + "recovery_interval: 1\n"
    run(text, tmp_path / "whole")
    for path in (tmp_path / "cache").glob("*/*/*"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "parts", display=After(stop, updates=3))
    (file,) = (tmp_path / "cache").glob("*/layer2/*.safetensors")
    kept = load_file(file)["sums"].count_nonzero()
    assert kept == 64 * 3
    assert metadata_of(file)["rows_present"] == f"{kept:012d}"
    run(text, tmp_path / "parts", resume=True)
    same(tmp_path / "parts", tmp_path / "whole")


def test_rows_that_are_damaged_are_asked_again_and_told(recipe: str, tmp_path: Path) -> None:
    """Words in another order, a lost half, and whole checksums that are not those of their rows; a worker sees them."""
    text, said = cached(recipe, tmp_path / "cache"), Quiet()
    run(text, tmp_path / "run")
    sums, rows = mapped(tmp_path / "cache", "layer3")
    filled = sums.nonzero().flatten()[-40:]  # not the first, which are compared with the teacher before
    rows[filled] = rows[filled].flip(1)
    sums[100:200][sums[100:200] != 0] += 1
    written = rows.clone()
    run(text.replace("views: 2", "views: 2\n  workers: 1"), tmp_path / "again", display=said)
    same(tmp_path / "run", tmp_path / "again")
    (told,) = [line for line in said.said if "were damaged" in line]
    assert int(told.split()[0]) >= 40
    assert not torch.equal(mapped(tmp_path / "cache", "layer3").rows, written), "they are written anew"


def test_a_cache_that_holds_something_else_is_noticed(recipe: str, tmp_path: Path) -> None:
    """Whole rows, but of another teacher: something that no checksum tells."""
    text = cached(recipe, tmp_path / "cache")
    run(text, tmp_path / "run")
    sums, rows = mapped(tmp_path / "cache", "layer3")
    rows *= 1.1
    sums.copy_(torch.where(sums != 0, checksums(rows), 0))
    with pytest.raises(RunError, match=r"holds at `layer3` what is 10.0% away from what the teacher gives"):
        run(text, tmp_path / "again")


def test_the_key_changes_with_all_that_it_depends_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    options = DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))
    images = open_datasets(options).train
    about = {"seed": 0, "views": {"aa": None}}
    key = key_of(depends_on(model, fingerprint(images).images, about))
    assert key_of(depends_on(model, fingerprint(images).images, dict(about))) == key
    others = [key_of(depends_on(model, fingerprint(images).images, {**about, "seed": 1}))]
    held_out = open_datasets(options.model_copy(update={"holdout": 0.1}))
    others.append(key_of(depends_on(model, fingerprint(held_out.train).images, about)))
    with torch.no_grad():
        model.bn1.running_var[3] += 1e-6
    others.append(key_of(depends_on(model, fingerprint(images).images, about)))
    assert len({key, *others}) == 4


def test_a_folder_of_images_is_known_by_its_files(tmp_path: Path) -> None:
    digits = open_datasets(DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8))).train
    for split, first in (("train", 0), ("validation", 200)):
        for index in range(first, first + 200):
            path = tmp_path / split / str(digits[index][1])
            path.mkdir(parents=True, exist_ok=True)
            digits[index][0].save(path / f"{index}.png")
    options = DataOptions(root=str(tmp_path), input_size=(3, 8, 8), num_classes=10)
    before = fingerprint(open_datasets(options).train).images
    assert fingerprint(open_datasets(options).train).images == before
    some = sorted((tmp_path / "train").glob("*/*.png"))[101]  # one that is not among those whose pixels are read
    digits[0][0].resize((9, 9)).save(some)
    assert fingerprint(open_datasets(options).train).images != before


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_logits_keep_the_probabilities_of_the_k_and_all_of_one(k: int) -> None:
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)) * 3
    found = lengthen(shorten(logits, k), 10).double().softmax(1)
    truth = logits.double().softmax(1)
    top = truth.topk(k).indices
    torch.testing.assert_close(found.gather(1, top), truth.gather(1, top), rtol=1e-5, atol=1e-7)
    rest = found.scatter(1, top, 0)
    left = (1 - truth.gather(1, top).sum(1, keepdim=True)) / max(10 - k, 1)
    torch.testing.assert_close(rest[rest > 0].view(7, -1), left.expand(7, 10 - k), rtol=1e-4, atol=1e-7)


def test_a_run_on_top_k_logits_replays_to_the_bit_and_keeps_little(recipe: str, tmp_path: Path) -> None:
    text = cached(recipe, tmp_path / "cache", "  cache_top_k: 3\n")
    run(text, tmp_path / "first")
    run(text, tmp_path / "again")
    same(tmp_path / "first", tmp_path / "again")
    (file, *_) = (tmp_path / "cache").glob("*/output top 3/*.safetensors")
    assert load_file(file)["rows"].shape == (359, 7)
    assert metadata_of(file)["top_k"] == "3"


def test_bf16_features_are_kept_as_they_are(tmp_path: Path) -> None:
    feature = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = TeacherCache(tmp_path, [Stored("a/b", (3, 2), torch.bfloat16)], 6)
    indices = torch.tensor([4, 0, 5, 2])
    cache.prepare(0)
    cache.begin(0)
    assert cache.find(indices) is None
    cache.keep(indices, [feature])
    assert cache.find(indices) is None, "what has not reached the disk does not count"
    cache.flush()
    assert cache.find(torch.tensor([4, 1])) is None
    found = cache.find(indices.flip(0))
    assert found is not None
    assert torch.equal(found[0], feature.flip(0))
    assert cache.damaged == 0


def _killed(folder: Path, feature: torch.Tensor) -> None:
    """Keeps four images and flushes, and four more, which are on their way when it is killed."""
    cache = TeacherCache(folder, TAPS, 10)
    cache.prepare(0)
    cache.begin(0)
    cache.keep(torch.arange(4), [feature])
    cache.flush()
    cache.keep(torch.arange(4, 8), [feature])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_kept_is_written_behind_and_no_process_reads_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feature = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    begin(_killed, tmp_path, feature).join()
    cache, reader = TeacherCache(tmp_path, TAPS, 10), RowReader(tmp_path, TAPS, 10, True, {77: 0})
    assert cache.missing(0).tolist() == [4, 5, 6, 7, 8, 9]
    (rows,) = reader([3, 0], 77) or [None]
    assert rows is not None
    assert torch.equal(rows, feature[[3, 0]])

    gate, written = threading.Event(), probe_kd.data.cache._written
    monkeypatch.setattr("probe_kd.data.cache._written", lambda *given: gate.wait(60) and written(*given))
    indices = torch.tensor([8, 3, 5, 9])
    kept = cache.keep(indices, [-feature])
    kept[0].zero_()  # as a step might
    behind: RowReader = pickle.loads(pickle.dumps(reader))
    for read in (reader, behind):
        assert read([8, 5, 9], 77) is None
        assert read([3], 78) is None, "another view"
    gate.set()
    assert cache.missing(0).tolist() == [4, 6, 7], "it is flushed before it is asked"
    for read in (reader, behind):
        (rows,) = read([8, 3, 5, 9], 77) or [None]
        assert rows is not None
        assert torch.equal(rows, torch.stack([-feature[0], feature[3], -feature[2], -feature[3]])), "3 was there"
    assert metadata_of(cache.path(TAPS[0], 0))["rows_present"] == f"{7:012d}"

    monkeypatch.setattr("probe_kd.data.cache._written", mock.Mock(side_effect=MemoryError("no room")))
    cache.keep(torch.tensor([4]), [feature[:1]])
    with pytest.raises(RunError, match=f"cannot write the teacher's cache in {tmp_path}: no room"):
        cache.flush()
    cache.begin(0)
    cache._files[0].rows[0] += 1
    for image in (0, 4):
        assert reader([image], 77) is None
        assert cache.rows(torch.tensor([image])) is None
    assert cache.damaged == 1


def test_of_two_runs_with_one_cache_the_first_writes(tmp_path: Path) -> None:
    taps = [Stored("", (2,), torch.float32)]
    one, two = TeacherCache(tmp_path, taps, 4), TeacherCache(tmp_path, taps, 4)
    assert one.lock()
    assert not two.lock()
    two.writes = False
    two.begin(0)  # before the first has made room
    assert two.find(torch.tensor([0])) is None
    one.prepare(0)
    one.begin(0)
    one.keep(torch.tensor([0]), [torch.ones(1, 2)])
    one.flush()
    reader = TeacherCache(tmp_path, taps, 4, writes=False)
    reader.begin(0)
    assert reader.find(torch.tensor([0])) is not None
    reader.keep(torch.tensor([1]), [torch.ones(1, 2)])
    reader.flush()
    assert reader.find(torch.tensor([1])) is None
    one.close()
    assert two.lock()


def _with_little_room(folder: Path, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        TeacherCache(folder, [Stored("layer3", (1000,), torch.float32)], 100).prepare(0)
    except RunError as refusal:
        queue.put(str(refusal))


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path: Path) -> None:
    queue = apart.Queue()
    process = begin(_with_little_room, tmp_path, queue)
    assert "needs 0.0004 GB for `layer3` of one view" in queue.get(timeout=60)
    process.join()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hflip: 0.0", "hflip: 0.0\n  mixup: 0.5"), "`cache`: mixup and cutmix make a new image of every two"),
        (("  cache: C\n", ""), "`cache_top_k`: it says what a cache keeps"),
        (("{loss: soft_targets, temperature: 2.0", "{loss: logits"), r"loss `soft` \(logits\) needs all logits"),
    ],
)
def test_what_no_cache_can_serve_is_refused_in_the_plan(change: tuple[str, str], message: str) -> None:
    text = TINY.replace("  model: resnet10t\n", "  model: resnet10t\n  cache: C\n  cache_top_k: 3\n")
    with pytest.raises(RecipeError, match=message):
        plan(parse(text.replace(*change)))
