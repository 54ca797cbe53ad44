"""Checkpoints that are whole or absent, whatever happens while one is written.

A checkpoint is a folder such as `checkpoints/000042`. It is written under another name, flushed to the disk, and only
then renamed. Its manifest holds the size and the digest of every file in it. So a checkpoint that is damaged, by a full
disk or a bad sector, is recognised before it is loaded, and the previous one is used.
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
# The files that accelerate and probe-kd write into a checkpoint. Those of a later accelerate are in the manifest.
_FILES = re.compile(
    r"(pytorch_model|model|optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.(bin|safetensors)|scaler\.pt"
    r"|(random_states|custom_checkpoint)_\d+\.pkl|(journal|manifest)\.json"
    r"|(average|best|best-average)\.(safetensors|partial)"
)


def begin(run: Path) -> Path:
    """Make an empty folder for the next checkpoint of a run. The caller fills it and passes it to `commit`."""
    number = max((_number(checkpoint) for checkpoint in _all(run)), default=0) + 1
    partial = run / FOLDER / f"{number:06d}{ASIDE}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, keep: int) -> Path:
    """Rename a filled folder to its final name, and delete all checkpoints but the newest `keep`."""
    files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
    manifest = {str(file.relative_to(partial)): [file.stat().st_size, digest_of(file)] for file in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        to_disk(path)
    checkpoint = partial.with_suffix("")
    partial.rename(checkpoint)
    to_disk(checkpoint.parent)
    for outdated in _whole(checkpoint.parent.parent)[keep:]:
        shutil.rmtree(outdated)
    return checkpoint


def newest(run: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is not damaged, or None if there are no checkpoints.

    A damaged checkpoint is renamed, and reported by `warn`. Raises RunError if all are damaged.
    """
    checkpoints = _whole(run)
    for path in checkpoints:
        damage = _damage(path)
        if not damage:
            return path
        warn(f"checkpoint {path} is damaged ({damage}); going back to the one before it")
        path.rename(path.with_suffix(DAMAGED))
    if checkpoints:
        raise RunError(f"every checkpoint in {run / FOLDER} is damaged; --overwrite begins anew")
    return None


def remove(run: Path) -> None:
    """Delete all checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def foreign(run: Path) -> Path | None:
    """The first file or folder among the checkpoints that no run wrote."""
    for entry in sorted((run / FOLDER).iterdir()):
        if entry.is_symlink() or not entry.is_dir() or not re.fullmatch(rf"\d{{6,}}({ASIDE}|{DAMAGED})?", entry.name):
            return entry
        written_names = _names(entry)
        for file in sorted(entry.rglob("*")):
            name = str(file.relative_to(entry))
            is_parent = file.is_dir() and any(written_name.startswith(f"{name}/") for written_name in written_names)
            if file.is_symlink() or not (
                is_parent or name in written_names or (file.is_file() and _FILES.fullmatch(name))
            ):
                return file
    return None


def _names(checkpoint: Path) -> set[str]:
    """The names of the files in a checkpoint's manifest."""
    try:
        manifest = json.loads(whole_text(checkpoint / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return set()
    return set(manifest) if isinstance(manifest, dict) else set()


def _all(run: Path) -> Iterator[Path]:
    """All checkpoints: whole, partial and damaged."""
    return (path for path in (run / FOLDER).glob("*") if path.stem.isdigit())


def _whole(run: Path) -> list[Path]:
    """All finished checkpoints, the newest first."""
    return sorted((path for path in _all(run) if not path.suffix), key=_number, reverse=True)


def any_whole(run: Path) -> bool:
    return bool(_whole(run))


def _number(path: Path) -> int:
    return int(path.stem)


def _damage(path: Path) -> str:
    """Describe how a checkpoint is damaged; empty if it is not."""
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
