"""Models of other libraries than timm, with the stage ends that their authors name: foreign_stages.csv.

Every row was written by hand from the source that its last column quotes, and not from what `match` gives. `built` is
the expression that builds the model with random weights, or a name that `trace` knows. `stages` are taps;
`blocks.{0..11}` are twelve of them.
"""

import csv
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probe_kd import Trace, trace
from probe_kd.engine.models import build_model

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class ForeignModel:
    """One row of foreign_stages.csv."""

    library: str
    name: str
    built: str
    input_size: tuple[int, ...]
    stages: tuple[str, ...]
    source: str

    @property
    def label(self) -> str:
        return f"{self.library}: {self.name}"


def foreign_models(*, installed: bool = True) -> list[ForeignModel]:
    """The rows of the table, or those of them whose library is installed."""
    path = Path(__file__).with_name("foreign_stages.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [_read(row) for row in csv.DictReader(file)]
    return [model for model in rows if find_spec(model.library) or not installed]


def trace_foreign(model: ForeignModel, *, training: bool = False) -> Trace:
    """Trace on the meta device, or if the model cannot be built or run there, with random weights."""
    try:
        return trace(build(model, device="meta"), model.input_size, training=training)
    except Exception:  # models fail on the meta device in every way
        return trace(build(model), model.input_size, training=training)


def build(model: ForeignModel, device: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device) if device else nullcontext():
        if "(" not in model.built:
            return build_model(model.built, {})
        built: nn.Module = eval(model.built, {"__builtins__": {}}, _Libraries())  # our own table
    return built


class _Libraries(Mapping[str, Any]):
    """The names in an expression: a library, imported when it is first used."""

    def __getitem__(self, name: str) -> Any:
        return importlib.import_module("segmentation_models_pytorch" if name == "smp" else name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _read(row: Mapping[str, str]) -> ForeignModel:
    stages = tuple(stage for text in row["stages"].split() for stage in _expand(text))
    size = tuple(int(side) for side in row["input"].split("x"))
    return ForeignModel(row["library"], row["model"], row["built"], size, stages, row["source"])


def _expand(text: str) -> list[str]:
    """`blocks.{0..2}` as `blocks.0`, `blocks.1`, `blocks.2`."""
    span = _RANGE.search(text)
    if span is None:
        return [text]
    numbers = range(int(span[1]), int(span[2]) + 1)
    return [text[: span.start()] + str(number) + text[span.end() :] for number in numbers]
