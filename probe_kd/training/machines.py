"""What the machines of a run must have in common: versions, recipe, images, files, and the folders that all write."""

import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, get_cpu_distributed_information

from probe_kd.data.record import DataRecord
from probe_kd.errors import RunError, for_all
from probe_kd.files.run_folder import digests_of
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.writing import dump, inputs_of
from probe_kd.version import __version__

PATIENCE = 30.0  # seconds until a file that another machine wrote has to be there: NFS remembers folders that long


@dataclass(frozen=True)
class _Facts:
    """What one process trains with. `files` are the digests of the files that the recipe names."""

    host: str
    versions: dict[str, str]
    recipe: str
    images: DataRecord
    files: dict[str, str]


def check_machines(plan: Plan, accelerator: Accelerator) -> None:
    """Raise RunError, in all processes, if one has another recipe, other images, files or versions than the first.

    `data.root` may differ. The files are read on every machine, by one process each, if there are several machines.
    """
    if accelerator.num_processes == 1:
        return
    own = _facts(plan, accelerator)
    first: _Facts = broadcast_object_list([own])[0]
    difference = next(_differences(first, own), "")
    place = f"process {accelerator.process_index} on {own.host}"
    _raise_together(f"{place} {difference} than process 0 on {first.host}" if difference else "")


def check_shared(accelerator: Accelerator, file: Path, what: str) -> None:
    """Raise RunError, in all processes, if one of them does not see a file that the first has written.

    `what` says which folder holds it.
    """
    if accelerator.num_processes == 1:
        return
    content = _written(file) if accelerator.is_main_process else None
    host, path, content = broadcast_object_list([(socket.gethostname(), str(file), content)])[0]
    paths = {file, Path(path)}  # its own, and the one that the first process gives to the others
    complaint = ""
    if not _all_see(paths, content):
        complaint = (
            f"process {accelerator.process_index} on {socket.gethostname()} does not see {what} {file.parent}, which "
            f"process 0 on {host} writes; give all machines one folder, under the same absolute path"
        )
    _raise_together(complaint)


def _facts(plan: Plan, accelerator: Accelerator) -> _Facts:
    import timm

    recipe, data = plan.resolved, plan.resolved.data.model_copy(update={"root": None})
    several = accelerator.num_processes > get_cpu_distributed_information().local_world_size
    return _Facts(
        socket.gethostname(),
        {"probe-kd": __version__, "torch": torch.__version__, "timm": timm.__version__, "Python": _python()},
        dump(recipe.model_copy(update={"data": data})),
        plan.datasets.record,
        digests_of(inputs_of(plan.recipe)) if several and accelerator.is_local_main_process else {},
    )


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _differences(first: _Facts, own: _Facts) -> Iterator[str]:
    for name, version in own.versions.items():
        if version != first.versions[name]:
            yield f"has another version of {name} ({version}, not {first.versions[name]})"
    if own.recipe != first.recipe:
        lines = zip_longest(own.recipe.splitlines(), first.recipe.splitlines(), fillvalue="nothing")
        here, there = next((here.strip(), there.strip()) for here, there in lines if here != there)
        yield f"was given another recipe (`{here}`, not `{there}`)"
    if own.images != first.images:
        changes = [
            f"in {split} {change}"
            for split, contents in first.images.contents.items()
            if split in own.images.contents and (change := contents.difference(own.images.contents[split]))
        ]
        yield f"reads other images ({'; '.join(changes) or 'other classes or counts'})"
    other = [name for name in own.files if own.files[name] != first.files.get(name)]
    if other:
        yield f"reads another file as {other[0]}"


def _written(file: Path) -> str | None:
    """The content of a file that other machines are to see: this process may still have it open."""
    try:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    except OSError:
        return None
    return _content(file)


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None


def _all_see(paths: set[Path], content: str | None) -> bool:
    end = time.monotonic() + PATIENCE
    while any(_content(path) != content for path in paths):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _raise_together(complaint: str) -> None:
    complaints = [text for text in gather_object([complaint]) if text]
    if complaints:
        raise for_all(RunError(complaints[0]))
