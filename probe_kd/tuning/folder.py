"""The folder of a study: what it was begun with, and whether a study may begin, go on, or overwrite in it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probe_kd.data.datasets import Datasets
from probe_kd.data.record import RECORD, DataRecord
from probe_kd.errors import RunError
from probe_kd.files.atomic import put, whole_text
from probe_kd.files.run_folder import digests_of, kind_of
from probe_kd.recipe.reading import Source
from probe_kd.recipe.writing import inputs_of
from probe_kd.tuning.outcome import TUNED
from probe_kd.tuning.space import AS_WRITTEN, Parameter
from probe_kd.tuning.trials import BEST, JOURNAL, TRIALS, is_alive

MARK, FEATURES = "tune.json", "features"
TEACHER, OTHER_TEACHER, CACHE, FULL = "teacher", "teacher-of-full-runs", "cache", "full"
SUMMARY, REPORT = "summary.json", "report.html"
_OWN = {MARK, JOURNAL, TRIALS, BEST, TEACHER, OTHER_TEACHER, CACHE, FULL, SUMMARY, REPORT, RECORD, TUNED, ".link"}


def settings_of(source: Source, parameters: Sequence[Parameter], *, epochs: int) -> dict[str, Any]:
    """What all trials of a study have in common, as its folder records it."""
    recipe = {key: value for key, value in source.node.plain.items() if key != "tune"}
    return {
        "written_by": "probe-kd tune",
        "recipe": recipe | {"seed": source.recipe.seed},
        "tune": {parameter.path: str(parameter) for parameter in parameters},
        "epochs": epochs,
        "inputs": digests_of(inputs_of(source.recipe)),
        **_measured(source, parameters),
    }


def _measured(source: Source, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """The pairs that were found by features, beside what the recipe said of them: they are measured once."""
    options = _of_features(source)
    if options is None:
        return {}
    (pairs,) = (dict(parameter.choices) for parameter in parameters if parameter.path == "pairs")
    pairs.pop(AS_WRITTEN)
    return {FEATURES: {"options": options, "pairs": pairs}}


def _of_features(source: Source) -> dict[str, Any] | None:
    options = (source.recipe.tune or {}).get("pairs")
    return options.model_dump(mode="json") if options is not None and options.source == "features" else None


def measured_before(source: Source, folder: Path) -> dict[str, Any] | None:
    """The pairs that a study in this folder has found by features; None if it has not, or the recipe says otherwise."""
    options = _of_features(source)
    if options is None or not (folder / MARK).is_file():
        return None
    before = _settings_in(folder).get(FEATURES)
    return before["pairs"] if isinstance(before, dict) and before.get("options") == options else None


def _settings_in(folder: Path) -> dict[str, Any]:
    """What a study was begun with. Raises RunError for a damaged file."""
    try:
        before = json.loads(whole_text(folder / MARK))
    except (OSError, ValueError, RecursionError):
        raise _damaged(folder) from None
    if not isinstance(before, dict):
        raise _damaged(folder)
    return before


def _damaged(folder: Path) -> RunError:
    return RunError(f"{folder / MARK} is damaged, which says what the study was begun with; --overwrite begins anew")


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise RunError if a study may not begin or go on in this folder. Nothing is written."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is {kind_of(folder)}; choose another --out")
    contents = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not contents:
        return
    foreign = [name for name in contents if not _is_own(name)]
    if MARK not in contents or foreign:
        what = foreign[0] if foreign else contents[0]
        raise RunError(
            f"{folder} holds more than a study writes ({what}), and will be neither resumed nor overwritten; choose "
            "another --out"
        )
    if not (resume or overwrite):
        raise RunError(
            f"{folder} is not empty; go on with it by --resume, replace it by --overwrite, or choose another --out"
        )
    busy = [path.name for path in (folder / TRIALS).glob("*") if overwrite and is_alive(path)]
    if busy:
        raise RunError(f"trial {int(busy[0])} of {folder} is running in another process; stop it before --overwrite")


def _is_own(name: str) -> bool:
    return name.removesuffix(".partial") in _OWN or name.startswith(JOURNAL)  # Optuna's lock is called after it


def open_folder(folder: Path, settings: Mapping[str, Any], images: Datasets, *, overwrite: bool) -> bool:
    """Make the folder of a study, or check that it was begun with the same. Returns whether there was one.

    Raises RunError where it was begun with another recipe, with other images, or with files that have changed.
    """
    if overwrite and folder.is_dir():
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if (folder / MARK).is_file():
        _check_same(folder, settings)
        record = DataRecord.read(folder)
        if record is not None:
            record.refuse_others(images.record, folder)
        return True
    try:
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        images.record.write(folder / RECORD)
        aside = folder / f"{MARK}.partial"
        aside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        put(aside, folder / MARK)
    except OSError as refusal:
        raise RunError(f"cannot write to {folder}: {refusal.strerror}; choose another --out") from None
    return False


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    before = _settings_in(folder)
    if not {"recipe", "tune", "epochs", "inputs"} <= before.keys() or not isinstance(before["inputs"], dict):
        raise _damaged(folder)
    for file, digest in before["inputs"].items():
        if settings["inputs"].get(file, digest) != digest:
            raise RunError(f"{file} is not the file that {folder} was begun with; put it back, or choose another --out")
    now = json.loads(json.dumps(settings))
    for key in ("recipe", "tune", "epochs"):
        difference = _difference(before[key], now[key], key)
        if difference:
            raise RunError(
                f"the study in {folder} was begun with {difference}, so that their trials cannot be compared. Give the "
                "same recipe and options again, or another folder by --out; --overwrite deletes that study and begins "
                "anew"
            )


def _difference(before: Any, now: Any, key: str) -> str:
    """The first value in which two settings differ, in words; empty if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        inner = (_difference(before.get(name), now.get(name), f"{key}.{name}") for name in keys)
        return next(filter(None, inner), "")
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = (_difference(*both, f"{key}.{index}") for index, both in enumerate(zip(before, now, strict=True)))
        return next(filter(None, inner), "")
    path = key.removeprefix("recipe.")
    return "" if before == now else f"`{path}: {json.dumps(before)}` where there now is `{json.dumps(now)}`"


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder, as they are on the disk."""
    sizes = (_size(Path(place) / name) for place, _, names in os.walk(folder) for name in names)
    return sum(sizes)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:  # deleted meanwhile
        return 0
