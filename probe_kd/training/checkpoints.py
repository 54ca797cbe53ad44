"""Checkpoints that are whole or absent, whatever happens while one is written.

One is a folder, `checkpoints/000042`. It is written beside its place, brought to the disk, and only then named so. Its
manifest holds the size and the digest of every file in it, so that one that a full disk or a bad sector has cut short
is known before anything of it is loaded, and the one before it is taken.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from probe_kd.errors import RunError
from probe_kd.files.atomic import MANIFEST, digest_of, to_disk, whole_text

FOLDER = "checkpoints"
ASIDE, DAMAGED = ".partial", ".damaged"
# What accelerate and the library write into one; a later accelerate's other files stand in the manifest.
_FILES = re.compile(
    r"(pytorch_model|model|optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.(bin|safetensors)|scaler\.pt"
    r"|(random_states|custom_checkpoint)_\d+\.pkl|(journal|manifest)\.json"
    r"|(average|best|best-average)\.(safetensors|partial)"
)


def begin(run: Path) -> Path:
    """An empty folder for the next checkpoint of the run in `run`, to be filled and given to `commit`."""
    number = max((_number(found) for found in _all(run)), default=0) + 1
    aside = run / FOLDER / f"{number:06d}{ASIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, keep: int) -> Path:
    """Give a filled folder its name, and delete all but the newest `keep`."""
    files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
    manifest = {str(file.relative_to(aside)): [file.stat().st_size, digest_of(file)] for file in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, aside / MANIFEST, aside):
        to_disk(path)
    place = aside.with_suffix("")
    aside.rename(place)
    to_disk(place.parent)
    for old in _whole(place.parent.parent)[keep:]:
        shutil.rmtree(old)
    return place


def newest(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none.

    A damaged one is set aside under another name, and said aloud. Raises RunError where all are damaged.
    """
    found = _whole(run)
    for path in found:
        wrong = _damage(path)
        if not wrong:
            return path
        warn(f"checkpoint {path} is damaged ({wrong}); going back to the one before it")
        path.rename(path.with_suffix(DAMAGED))
    if found:
        raise RunError(f"every checkpoint in {run / FOLDER} is damaged; --overwrite begins anew")
    return None


def remove(run: Path) -> None:
    """Delete all checkpoints of a run that has ended."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def foreign(run: Path) -> Path | None:
    """The first in the folder of checkpoints that no run wrote."""
    for entry in sorted((run / FOLDER).iterdir()):
        if entry.is_symlink() or not entry.is_dir() or not re.fullmatch(rf"\d{{6,}}({ASIDE}|{DAMAGED})?", entry.name):
            return entry
        known = _names(entry)
        for file in sorted(entry.rglob("*")):
            name = str(file.relative_to(entry))
            within = file.is_dir() and any(other.startswith(f"{name}/") for other in known)
            if file.is_symlink() or not (within or name in known or (file.is_file() and _FILES.fullmatch(name))):
                return file
    return None


def _names(checkpoint: Path) -> set[str]:
    """Those of the files that a checkpoint's manifest has."""
    try:
        found = json.loads(whole_text(checkpoint / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return set()
    return set(found) if isinstance(found, dict) else set()


def _all(run: Path) -> Iterator[Path]:
    """Whole, partial and damaged ones."""
    return (path for path in (run / FOLDER).glob("*") if path.stem.isdigit())


def _whole(run: Path) -> list[Path]:
    """Those that were finished, the newest first."""
    return sorted((path for path in _all(run) if not path.suffix), key=_number, reverse=True)


def any_whole(run: Path) -> bool:
    return bool(_whole(run))


def _number(path: Path) -> int:
    return int(path.stem)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words; nothing where it is as it was written."""
    try:
        manifest = json.loads(whole_text(path / MANIFEST))
        for name, (size, digest) in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if digest_of(file) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as refusal:
        return f"its manifest cannot be read: {refusal}"
    return ""
