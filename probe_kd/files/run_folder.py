"""The folder of a run: which process may write it, which files in it a run wrote, and whether they are as written.

`manifest.json` is the run's mark. It names the files that the run wrote, with the digests of those that are read again,
and the digests of the files outside the folder that the recipe names. `.lock` is locked by the process that writes the
folder; the lock ends with that process, however it ends.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self

from probe_kd.errors import RunError
from probe_kd.files.atomic import MANIFEST, check_regular, digest_of, put, whole_text

LOCK = ".lock"
RECIPE = "recipe.yaml"
GENERATOR = "probe-kd "  # by which a report names its maker
_MOST_BYTES = 10_000_000  # of an evaluation, which has a few kB
EVALUATION = {"run", "split", "images", "scores", "pairs", "notes"}  # the keys of what `eval -o` writes
_OPEN = set[IO[str]]()  # the locks that this process holds
_UNWRITABLE = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOENT", "ENOTDIR", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}  # of a lock's file, and not of locks


def _close_in_child() -> None:
    """A forked process, such as a worker of a loader, shares its parent's locks, and would hold them after its end."""
    for handle in _OPEN:
        handle.close()
    _OPEN.clear()


os.register_at_fork(after_in_child=_close_in_child)


def lock_file(path: Path) -> IO[str] | None:
    """The opened file, locked for this process until `unlock_file`; None where another process has locked it.

    Raises OSError where the file cannot be opened, or where the file system has no locks.
    """
    while True:
        # No link is followed: what it leads to would be written to.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.fdopen(os.open(path, flags, 0o666), "a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        except OSError:
            handle.close()
            raise
        if _is_at(handle, path):  # else it was deleted by the process that held it, between the two lines above
            _OPEN.add(handle)
            return handle
        handle.close()


def unlock_file(handle: IO[str]) -> None:
    _OPEN.discard(handle)
    with suppress(OSError):  # what a full disk did not take of its text; it is closed all the same
        handle.close()


def _is_at(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except OSError:
        return False


@dataclass
class Claim:
    """The right of one process to write one folder, until `release` or the end of its `with`.

    `made` are the folders that this claim created.
    """

    folder: Path
    made: tuple[Path, ...] = ()
    handle: IO[str] | None = None  # None where the file system has no locks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises RunError where the folder was deleted, moved or replaced since it was claimed."""
        exists = self.folder.is_dir() if self.handle is None else _is_at(self.handle, self.folder / LOCK)
        if not exists:
            raise RunError(
                f"{self.folder} was deleted, moved or replaced while the run was writing it; what the run had saved "
                "there is not there any more. Begin anew, with a folder that stays where it is"
            )

    def release(self) -> None:
        """Unlock the folder, and delete the folders that this claim created if they are empty.

        Raises nothing, so that an error that ended the run stays visible. A lock that cannot be deleted ends with the
        process.
        """
        if self.handle is not None:
            if _is_at(self.handle, self.folder / LOCK):
                with suppress(OSError):
                    (self.folder / LOCK).unlink()
            unlock_file(self.handle)
            self.handle = None
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:  # it holds something by now
                return


def claim(folder: Path, warn: Callable[[str], None]) -> Claim:
    """Create the folder if it does not exist, and lock it. Links are followed, also to a folder that is missing.

    Raises RunError if another process writes the folder, or if it cannot be created or written.
    """
    try:
        place = Path(os.path.realpath(folder, strict=False))
        made = tuple(path for path in (place, *place.parents) if not path.exists())
        place.mkdir(parents=True, exist_ok=True)
    except OSError as refusal:
        why = f"it is {kind_of(folder)}" if isinstance(refusal, FileExistsError) else refusal.strerror
        raise RunError(f"cannot write to {folder}: {why}; choose another --out") from None
    claimed = Claim(folder, made)
    if not _is_lock(folder / LOCK):
        claimed.release()
        raise RunError(f"{folder / LOCK} was written by no run, and will not be overwritten; choose another --out")
    try:
        claimed.handle = lock_file(folder / LOCK)
    except OSError as refusal:
        if refusal.errno in _UNWRITABLE or not os.access(folder, os.W_OK | os.X_OK):
            claimed.release()
            raise RunError(f"cannot write to {folder}: {refusal.strerror}; choose another --out") from None
        warn(f"{folder} cannot be locked ({refusal.strerror}): see to it yourself that no other run writes there")
        return claimed
    if claimed.handle is None:
        raise RunError(
            f"{folder} is being written by another run{_owner(folder / LOCK)}; wait for its end, or stop it, or choose "
            "another --out"
        )
    try:
        claimed.handle.truncate(0)
        claimed.handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        claimed.handle.flush()
    except OSError as refusal:  # a full disk
        claimed.release()
        raise RunError(
            f"cannot write to {folder}: {refusal.strerror}; nothing in it was changed. Mend that and try again, or "
            "choose another --out"
        ) from None
    return claimed


def kind_of(path: Path) -> str:
    """Describe in words what a path leads to, for messages about a folder."""
    if path.is_file():
        return "a file"
    if path.is_symlink() and not path.exists():
        return "a link that goes round, or to nothing"
    return "a folder" if path.is_dir() else "a device or a pipe" if path.exists() else "not there"


def why_no_run(folder: Path) -> str:
    """Say why a folder is not the folder of a run. The folder of a run has a recipe.yaml."""
    if not folder.is_dir():
        return "there is none" if not os.path.lexists(folder) else f"it is {kind_of(folder)}"
    if not os.path.lexists(folder / RECIPE):
        return f"it has no {RECIPE}"
    return f"its {RECIPE} is {kind_of(folder / RECIPE)}, and no file"


def runs_beside(folder: Path) -> list[str]:
    """Return the names of the other run folders beside `folder`, for a hint in a message."""
    parent = folder.absolute().parent
    recipes = parent.glob(f"*/{RECIPE}") if parent.is_dir() else ()
    return [recipe.parent.name for recipe in recipes if recipe.is_file() and recipe.parent.name != folder.name]


def _is_lock(lock: Path) -> bool:
    """Whether a lock may be written here: there is no file yet, or the file is a lock, perhaps cut short by a kill."""
    if not os.path.lexists(lock):
        return True
    try:
        return not lock.is_symlink() and whole_text(lock)[:7] in ("", '{"pid":')
    except (OSError, ValueError):
        return False


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(whole_text(lock))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(owner["since"])))
        return f" (process {int(owner['pid'])} on {owner['host']}, since {since})"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just locked the file
        return ""


def is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote this folder was killed. Only one caller gets True, and then holds the lock."""
    path = folder / LOCK
    for _ in range(20):  # its sockets may have closed a moment before its lock
        try:
            if not path.is_file():
                return False
            if lock_file(path) is not None:
                return True
        except OSError:
            return False
        time.sleep(0.1)
    return False


@dataclass
class Manifest:
    """The files that a run wrote and the files that it reads, with their digests.

    The digest of a file that is being written is empty.
    """

    files: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    written_by: str = "probe-kd"

    def write(self, folder: Path) -> None:
        aside = folder / f"{MANIFEST}.partial"
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        put(aside, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Read the manifest of a folder. Returns None if there is none, or if it is not the manifest of a run."""
        try:
            values = json.loads(whole_text(folder / MANIFEST))
            manifest = cls(values["files"], values["inputs"], values["written_by"])
            entries = [*manifest.files.items(), *manifest.inputs.items()]
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        valid = manifest.written_by == "probe-kd" and all(isinstance(text, str) for pair in entries for text in pair)
        return manifest if valid else None


@contextmanager
def recording(folder: Path, name: str) -> Iterator[Path]:
    """Yield the path at which to write a file of the run, and enter its digest into the manifest afterwards.

    The name is entered before the file is written, so that a killed run leaves no file that its manifest does not name.
    """
    manifest = Manifest.read(folder) or Manifest()
    manifest.files[name] = ""
    manifest.write(folder)
    yield folder / name
    manifest.files[name] = digest_of(folder / name)
    manifest.write(folder)


def record(folder: Path, names: Iterable[str]) -> None:
    """Enter the digests of these files, which are final, into the manifest."""
    manifest = Manifest.read(folder) or Manifest()
    manifest.files |= {name: digest_of(folder / name) for name in names if (folder / name).is_file()}
    manifest.write(folder)


def changed(path: Path) -> bool:
    """Whether a file differs from what the run that owns its folder wrote. False if no manifest has its digest."""
    manifest = Manifest.read(path.parent)
    digest = manifest.files.get(path.name) if manifest is not None else None
    return bool(digest) and digest_of(path) != digest


def damaged(path: Path) -> str:
    """Return the message for a file that has changed."""
    return (
        f"{path} is damaged, or was replaced: it is not what the run wrote there. Put the file back from a copy; or "
        "delete it, and begin the run anew by --overwrite"
    )


def digests_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the digests of files outside the folder of a run.

    A path that is no file is left out: the code that opens it reports the error.
    """
    return {str(path): digest_of(Path(path)) for path in paths if Path(path).is_file()}


def check_inputs(folder: Path, names: Iterable[str | Path], advice: str) -> None:
    """Raise RunError if a file outside the folder of a run has changed or is gone since the run began.

    The manifest of an older version may name fewer files, or none. A file that it does not name is not checked.
    """
    manifest = Manifest.read(folder)
    recorded = manifest.inputs if manifest is not None else {}
    checked = [str(name) for name in names if str(name) in recorded]
    current = digests_of(checked)
    first_changed = next((name for name in checked if current.get(name) != recorded[name]), "")
    if first_changed:
        why = "its contents have changed since" if first_changed in current else "it is gone"
        raise RunError(f"{first_changed} is not the file that {folder} was begun with: {why}. {advice}")


def check_own(folder: Path, names: Iterable[str]) -> None:
    """Raise RunError if a file of a run is gone, or differs from what the run wrote.

    A run of an older version has no manifest, or one with fewer files. A file that it does not name is not checked.
    """
    manifest = Manifest.read(folder)
    advice = "put the former file back from a copy, or leave this run out"
    if manifest is None and os.path.lexists(folder / MANIFEST):
        raise RunError(f"{folder / MANIFEST} is damaged, which says what the run wrote; {advice}")
    for path in (folder / name for name in names if manifest is not None and manifest.files.get(name)):
        if not path.is_file():
            raise RunError(f"{path} is gone, which the run wrote; {advice}")
        if changed(path):
            raise RunError(
                f"{path} is damaged, or was changed since the run wrote it, so figures would not be of that run; "
                f"{advice}"
            )


def clear(folder: Path, names: Iterable[str]) -> None:
    """Delete these files and folders, recipe and manifest last, so that after a kill it is still a run's folder."""
    for name in sorted(names, key=lambda name: (name == MANIFEST, name == RECIPE, name)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_measured(file: Path) -> bool:
    """Whether a file was written by `eval -o` or `compare -o`, judged by its contents and not by its name."""
    try:
        check_regular(file)
        if file.suffix.lower() in (".html", ".htm"):
            with file.open(encoding="utf-8") as page:
                return f'<meta name="generator" content="{GENERATOR}' in page.read(2000)
        values = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size < _MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() | {"notes"} == EVALUATION  # those of before have no notes
