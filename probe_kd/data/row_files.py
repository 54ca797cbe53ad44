"""Tensors with a row per image in safetensors files that are mapped into memory and written in place.

Such a file holds two tensors: `sums`, a checksum for each row, 0 where the row is not there, and `rows`. The checksums
lie first, so that both are aligned whatever the size of a row. The file has its full size from the beginning, so it is
a valid safetensors file at any time, and other tools can read it while it is being filled.
"""

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probe_kd.files.atomic import put

SUM = torch.int64  # of checksums, which need 33 bits as signed numbers
PRESENT = "rows_present"  # the key of the metadata with the number of rows that are there
_MOST_HEADER = 1_000_000
_ALIGNMENT = 64
_DIGITS = 12  # of the number of rows that are there, which is written in place


class RowFile(NamedTuple):
    """The tensors of a file, mapped: what is written to them is written to the file, if it was opened for that."""

    sums: Tensor
    rows: Tensor


def create(
    path: Path, count: int, row: Sequence[int], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Make a file for `count` rows with all its space on the disk, unless there is one for the same rows already.

    A file that was cut off, as by a copy that was interrupted, is filled up with zeros, which no checksum fits. Raises
    OSError where the disk has no room: writing to a mapped file on a full disk would kill the process.
    """
    content = SUM.itemsize * count + prod(row) * dtype.itemsize * count
    start = _start(path, count, row, dtype)
    if start is not None and path.stat().st_size <= start + content:
        _reserve(path, start + content)
        return
    header = _header(count, row, dtype, metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    try:
        aside.write_bytes(header)
        _reserve(aside, len(header) + content)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    put(aside, path)


def open_rows(path: Path, count: int, row: Sequence[int], dtype: torch.dtype, *, writes: bool) -> RowFile | None:
    """Map a file; None if there is none for these rows. Unless it `writes`, changes of the tensors stay in memory."""
    start = _start(path, count, row, dtype)
    if start is None:
        return None
    end = start + SUM.itemsize * count
    size = end + prod(row) * dtype.itemsize * count
    if path.stat().st_size != size:
        return None
    content = torch.from_file(str(path), shared=writes, size=size, dtype=torch.uint8)
    return RowFile(content[start:end].view(SUM), content[end:].view(dtype).view(count, *row))


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file; empty if it cannot be read."""
    metadata: dict[str, str] = _read_header(path).get("__metadata__") or {}
    return metadata


def write_present(path: Path, present: int) -> None:
    """Write how many rows are there into the metadata, in place."""
    # In a text that JSON quotes, a backslash would stand before each quote.
    opening = f'"{PRESENT}": "'.encode()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + file.read(length).index(opening) + len(opening))
        file.write(f"{present:0{_DIGITS}d}".encode())


def _header(count: int, row: Sequence[int], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON of the header, padded with spaces, as the format allows."""
    end = SUM.itemsize * count
    fields = {
        "__metadata__": {PRESENT: "0" * _DIGITS, **metadata},
        "sums": {"dtype": _name_of(SUM), "shape": [count], "data_offsets": [0, end]},
        "rows": {
            "dtype": _name_of(dtype),
            "shape": [count, *row],
            "data_offsets": [end, end + prod(row) * dtype.itemsize * count],
        },
    }
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors, as the library writes it."""
    from safetensors.torch import save

    written = save({"rows": torch.empty(0, dtype=dtype)})
    name: str = json.loads(written[8:])["rows"]["dtype"]
    return name


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fields = json.loads(file.read(length)) if length <= _MOST_HEADER else {}
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _start(path: Path, count: int, row: Sequence[int], dtype: torch.dtype) -> int | None:
    """Where the tensors of a file begin; None if it is not a file of these rows."""
    expected = json.loads(_header(count, row, dtype, {})[8:])
    fields = _read_header(path)
    if any(fields.get(name) != expected[name] for name in ("sums", "rows")):
        return None
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _reserve(path: Path, size: int) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)
