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
    """Rename a complete file to its final name. A reader finds either the old file or the new one, and all of it."""
    to_disk(aside)
    aside.replace(place)
    to_disk(place.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk and survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def whole_bytes(path: Path) -> bytes:
    """Read a file of a run's folder, which may come from somebody else.

    Raises OSError if it is no regular file, or larger than MOST_BYTES.
    """
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(EFBIG, f"it is larger than {MOST_BYTES // 1_000_000} MB", str(path))
    return data


def whole_text(path: Path) -> str:
    """Read a file as `whole_bytes` does, and decode it. Raises OSError, or ValueError if it is not UTF-8 text."""
    return whole_bytes(path).decode("utf-8").replace("\r\n", "\n")


def read_text(path: Path) -> str:
    """Read a text file. Raises OSError, or ValueError if it is no regular file, no text, or larger than MOST_TEXT."""
    if not S_ISREG(path.stat().st_mode):  # nobody waits for a FIFO, or for the end of /dev/zero
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"it is larger than {MOST_TEXT // 1000} kB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        line = data.count(b"\n", 0, refusal.start) + 1
        raise ValueError(f"its line {line} is not UTF-8 text") from None


def reason(error: Exception) -> str:
    """Return why a file could not be read or written, without the name of the file."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def check_regular(path: Path) -> None:
    """Raise OSError for anything but a regular file: reading `/dev/zero` or a FIFO may never end."""
    if not S_ISREG(path.stat().st_mode):
        raise OSError(EINVAL, "it is no regular file", str(path))


def irregular(folder: Path) -> list[str]:
    """What in a folder is neither a file nor a folder, a FIFO say, by name. Raises OSError."""
    return sorted(file.name for file in folder.iterdir() if not (file.is_file() or file.is_dir()))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of the contents of a file. Raises OSError if it cannot be read."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
