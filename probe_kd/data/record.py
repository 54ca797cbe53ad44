"""`data.json`: the classes, counts and contents of a run's images, by which a resumed run refuses other images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probe_kd.data.digests import Contents
from probe_kd.errors import DataError
from probe_kd.files.atomic import whole_bytes
from probe_kd.files.run_folder import Manifest, changed, damaged

RECORD = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """What a run keeps of its data in `data.json`, to read them again by: above all, the order of the classes."""

    classes: tuple[str, ...]
    num_classes: int
    images: dict[str, int]
    skipped: dict[str, tuple[str, ...]]
    contents: dict[str, Contents] = field(default_factory=dict)  # by the key of the split; none in runs of before

    def write(self, file: Path) -> None:
        file.write_bytes(TypeAdapter(DataRecord).dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "DataRecord | None":
        """None for a run from before there were any. Raises DataError for a file that is none, or has changed."""
        try:
            if changed(folder / RECORD):
                raise DataError(damaged(folder / RECORD))
            return TypeAdapter(DataRecord).validate_json(whole_bytes(folder / RECORD))
        except FileNotFoundError:
            manifest = Manifest.read(folder)
            if manifest is not None and RECORD in manifest.files:
                raise DataError(
                    f"{folder / RECORD}, which tells the classes and images of the run, is not there any more; put it "
                    "back from a copy of the run, or begin the run anew by --overwrite"
                ) from None
            return None
        except (OSError, ValidationError) as refusal:
            why = " ".join(str(refusal).split())[:200]
            raise DataError(f"{folder / RECORD} does not tell the classes of a run: {why}") from None

    def refuse_others(self, now: "DataRecord", where: Path) -> None:
        """Raise DataError where the data are no longer those that a run was begun with."""
        if self.classes != now.classes:
            for difference, text in (
                (set(now.classes) - set(self.classes), "now have a class {}, which they then had not"),
                (set(self.classes) - set(now.classes), "have no class {} any more"),
                (set(self.classes), "have their classes in another order, {} among them"),
            ):
                if difference:
                    raise DataError(f"the data of the run in {where} {text.format(repr(min(difference)))}")
        told = [
            f"in {key} {other}"
            for key, before in self.contents.items()
            if key in now.contents and (other := before.difference(now.contents[key]))
        ]
        told += [] if told else _of_skipped(self.skipped, now.skipped)
        if self.images != now.images:
            before, after = ([*it.images.items(), *it.skipped.items()] for it in (self, now))
            told.append(f"it had {_counts(before)}, and now there are {_counts(after)}")
        if told:
            raise DataError(
                f"the data of the run in {where} are not those that it was begun with: {'; '.join(told)}; put them "
                "back, or begin anew with --overwrite"
            )


def _of_skipped(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[str]:
    """Which image can no longer be read, or can be again."""
    told = []
    for key in dict.fromkeys([*before, *now]):
        had, has = set(before.get(key, ())), set(now.get(key, ()))
        told += [f"{min(has - had)!r} of {key} could be read then, and cannot be now"] if has - had else []
        told += [f"{min(had - has)!r} of {key} could not be read then, and can be now"] if had - has else []
    return told


def _counts(items: Iterable[tuple[str, Any]]) -> str:
    told = [
        f"{value} {name} images" if isinstance(value, int) else f"{len(value)} skipped in {name}"
        for name, value in items
    ]
    return ", ".join(told)
