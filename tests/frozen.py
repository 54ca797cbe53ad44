"""What all runs need, imported and kept out of garbage collection: accelerate collects after every phase.

A collection looks at half a million objects of torch and timm, which takes half a second and finds nothing. And files
are not forced to the disk, which takes a tenth of a run: no test cuts the power, and a killed process loses nothing.
The curves of runs with the same columns are drawn once: half of the time of a short report is text in a picture.
"""

import gc
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import timm
import torchmetrics

import probe_kd.training.run
from probe_kd.training import records

__all__ = ["matplotlib", "probe_kd", "timm", "torchmetrics"]

draw_curves = records.draw_curves
_pictures: dict[str, bytes] = {}


def drawn(rows: Any, path: Path, other_columns: Any, **options: Any) -> None:
    """`draw_curves`, whose picture of the first rows with these roles and columns stands for later ones."""
    roles = sorted({(row["role"], *(key for key in row if row[key] is not None)) for row in rows})
    key = repr((roles, sorted(other_columns), options))
    if key not in _pictures:
        draw_curves(rows, path, other_columns, **options)
        _pictures[key] = path.read_bytes()
    path.write_bytes(_pictures[key])


records.draw_curves = drawn

os.fsync = lambda handle: None
gc.collect()
gc.freeze()
