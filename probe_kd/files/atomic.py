"""Files that are written whole or not at all, and read only where they are regular files of a bounded size."""

import hashlib
import os
from errno import EFBIG, EINVAL
from pathlib import Path
from stat import S_ISREG

MANIFEST = "manifest.json"  # of a folder: its files and their digests
MOST_BYTES = 64_000_000  # of a file that is read as a whole: tables and JSON of a run
MOST_TEXT = 250_000  # bytes of a file that a person writes: recipes have 2 kB


def put(aside: Path, place: Path) -> None:
    """Give a file that was written aside its name. Whoever reads it finds the old one or the new, and all of it."""
    to_disk(aside)
    aside.replace(place)
    to_disk(place.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def whole_bytes(path: Path) -> bytes:
    """What is in a file of a run's folder, which may be a stranger's. Raises OSError for no file, or a huge one."""
    check_regular(path)
    with path.open("rb") as file:
        found = file.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise OSError(EFBIG, f"it is larger than {MOST_BYTES // 1_000_000} MB", str(path))
    return found


def whole_text(path: Path) -> str:
    """The same as text. Raises OSError, or ValueError for what is none."""
    return whole_bytes(path).decode("utf-8").replace("\r\n", "\n")


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, or ValueError for what is no file, no text, or larger than MOST_TEXT."""
    if not S_ISREG(path.stat().st_mode):  # nobody waits for a FIFO, or for the end of /dev/zero
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        found = file.read(MOST_TEXT + 1)
    if len(found) > MOST_TEXT:
        raise ValueError(f"it is larger than {MOST_TEXT // 1000} kB")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        line = found.count(b"\n", 0, refusal.start) + 1
        raise ValueError(f"its line {line} is not UTF-8 text") from None


def reason(error: Exception) -> str:
    """Why a file was not read or written, without its name."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def check_regular(path: Path) -> None:
    """Nobody waits for the end of `/dev/zero`, or for somebody to write into a FIFO. Raises OSError."""
    if not S_ISREG(path.stat().st_mode):
        raise OSError(EINVAL, "it is no regular file", str(path))


def digest_of(path: Path) -> str:
    """SHA-256 of all that is in a file. Raises OSError."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
