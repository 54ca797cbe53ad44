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
    """What a run stores about its data in `data.json`: above all the order of the classes, to read the data again."""

    classes: tuple[str, ...]
    num_classes: int
    images: dict[str, int]
    skipped: dict[str, tuple[str, ...]]
    contents: dict[str, Contents] = field(
        default_factory=dict
    )  # by the key of the split; empty in runs of earlier versions

    def write(self, file: Path) -> None:
        file.write_bytes(TypeAdapter(DataRecord).dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "DataRecord | None":
        """The record of the run in `folder`; None if an earlier version, which wrote none, made the run.

        Raises DataError if the file is missing, cannot be read, or has changed.
        """
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

    def refuse_others(self, current: "DataRecord", where: Path) -> None:
        """Raise DataError if `current` differs from this record, with which the run in `where` began."""
        if self.classes != current.classes:
            for difference, text in (
                (set(current.classes) - set(self.classes), "now have a class {}, which they then had not"),
                (set(self.classes) - set(current.classes), "have no class {} any more"),
                (set(self.classes), "have their classes in another order, {} among them"),
            ):
                if difference:
                    raise DataError(f"the data of the run in {where} {text.format(repr(min(difference)))}")
        differences = [
            f"in {key} {change}"
            for key, before in self.contents.items()
            if key in current.contents and (change := before.difference(current.contents[key]))
        ]
        differences += [] if differences else _skipped_differences(self.skipped, current.skipped)
        if self.images != current.images:
            before, after = ([*record.images.items(), *record.skipped.items()] for record in (self, current))
            differences.append(f"it had {_counts(before)}, and now there are {_counts(after)}")
        if differences:
            raise DataError(
                f"the data of the run in {where} are not those that it was begun with: {'; '.join(differences)}; "
                "put them back, or begin anew with --overwrite"
            )


def _skipped_differences(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[str]:
    """For each split, one image that can no longer be read, and one that can be read again."""
    differences = []
    for key in dict.fromkeys([*before, *now]):
        earlier, current = set(before.get(key, ())), set(now.get(key, ()))
        newly_skipped, no_longer_skipped = current - earlier, earlier - current
        if newly_skipped:
            differences.append(f"{min(newly_skipped)!r} of {key} could be read then, and cannot be now")
        if no_longer_skipped:
            differences.append(f"{min(no_longer_skipped)!r} of {key} could not be read then, and can be now")
    return differences


def _counts(items: Iterable[tuple[str, Any]]) -> str:
    parts = [
        f"{value} {name} images" if isinstance(value, int) else f"{len(value)} skipped in {name}"
        for name, value in items
    ]
    return ", ".join(parts)
