"""The folder of a run: whether a run may begin, resume, or overwrite in it."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from probe_kd.data.record import RECORD, DataRecord
from probe_kd.errors import ProbeKDError, RunError
from probe_kd.files.atomic import MANIFEST, digest_of, whole_text
from probe_kd.files.run_folder import (
    LOCK,
    RECIPE,
    Manifest,
    changed,
    check_inputs,
    clear,
    damaged,
    digests_of,
    is_measured,
    kind_of,
    recording,
)
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.reading import load, parse
from probe_kd.recipe.sections.mistakes import teacher_place
from probe_kd.recipe.writing import dump, inputs_of, rewritten
from probe_kd.training import checkpoints
from probe_kd.training.processes import TRACKERS
from probe_kd.training.progress import Progress
from probe_kd.training.state import JOURNAL, TrainState

_WEIGHTS = r"(student|teacher|baseline|teacher-[^\W\d][\w-]*|student-alone)(-ema)?|adapters-\d+"
_TABLE_OR_PARTIAL = (
    r"(manifest|data|summary|layers)\.json|recipe\.yaml|(metrics|summary)\.csv|curves\.png|report\.html"
    rf"|({_WEIGHTS}|metrics|summary)\.partial|(manifest\.json|layers\.json|report\.html)\.partial"
)


def open_run(
    plan: Plan, folder: Path, progress: Progress, *, resume: bool, overwrite: bool
) -> tuple[TrainState, Path | None]:
    """Prepare a claimed folder for a run, or find the state and the checkpoint from which to resume.

    Files that no run wrote are never touched, and those of another run only with `overwrite`.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    _check_inputs_outside(plan, folder, resume=resume)
    resolved = dump(plan.resolved)
    if resume and (folder / RECIPE).is_file():
        checkpoint = _reopen(folder, resolved, plan, progress)
        if checkpoint is not None:
            data_record = DataRecord.read(folder)
            if data_record is not None:
                data_record.refuse_others(plan.datasets.record, folder)
            state = TrainState.read(checkpoint / JOURNAL)
            batch = f", batch {state.step}" if state.step else ""
            progress.say(f"going on with {folder}: {state.role or 'the next model'}, epochs done {state.epoch}{batch}")
            return state, checkpoint
    if resume:
        weights = [name for name in _contents(folder) if name.endswith(".safetensors")]
        if weights:
            raise RunError(
                f"there is no checkpoint in {folder} to resume, but {weights[0]} is there; --overwrite deletes it and "
                "begins anew"
            )
        progress.say(f"there is no checkpoint in {folder} to resume; beginning anew")
    inputs = digests_of(inputs_of(plan.recipe))
    try:
        clear(folder, _contents(folder))
        Manifest({RECIPE: hashlib.sha256(resolved.encode()).hexdigest()}, inputs).write(folder)
        (folder / RECIPE).write_text(resolved, encoding="utf-8")
        with recording(folder, RECORD) as file:
            plan.datasets.record.write(file)
    except OSError as refusal:
        raise RunError(f"cannot write to {folder}: {refusal.strerror}") from None
    return TrainState(), None


def _reopen(folder: Path, resolved: str, plan: Plan, progress: Progress) -> Path | None:
    recipe_file, manifest = folder / RECIPE, Manifest.read(folder)
    original_recipe = _with_root_of(whole_text(recipe_file), resolved)
    if original_recipe != resolved:
        data_record = DataRecord.read(folder) if _same_data(original_recipe, plan.resolved) else None
        if data_record is not None:  # a class more makes another model
            data_record.refuse_others(plan.datasets.record, folder)
        raise RunError(
            f"the recipe is not the one that {folder} was begun with ({recipe_file}); it then had "
            f"{_first_difference(original_recipe, resolved)}. Give the same recipe and options "
            "again, or another folder by --out; --overwrite deletes that run and begins anew"
        )
    if manifest is not None:
        advice = "Put the former file back, or choose another --out; --overwrite deletes that run and begins anew"
        check_inputs(folder, manifest.inputs, advice)
    if (folder / "summary.json").exists():
        raise RunError(f"nothing to resume in {folder}: the run is finished")
    if manifest is None:
        weights = [file.name for file in folder.glob("*.safetensors")]
        if weights or any(folder.glob(f"{checkpoints.FOLDER}/*")):
            progress.say(
                f"{folder} has no {MANIFEST}, which says what the run wrote and what it reads: that these are as they "
                "were cannot be known. Going on with what is there"
            )
        files = {name: digest_of(folder / name) for name in (RECIPE, *weights)}
        Manifest(files, digests_of(inputs_of(plan.recipe))).write(folder)
    return checkpoints.newest(folder, progress.say)


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise RunError if a run may not begin or resume in this folder. Nothing is written."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is {kind_of(folder)}; choose another --out")
    contents = _contents(folder)
    if not contents or (
        contents == [MANIFEST] and Manifest.read(folder)
    ):  # the folder of a run that was killed as it began
        return
    foreign = foreign_files(folder, contents)
    if foreign:
        raise RunError(foreign)
    if not (resume or overwrite):
        raise RunError(
            f"{folder} is not empty; go on with it by --resume, replace it by --overwrite, or choose another --out"
        )


def _contents(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK) if folder.is_dir() else []


def foreign_files(folder: Path, contents: Sequence[str]) -> str:
    """Describe what in a folder no run wrote; empty if a run wrote everything."""
    manifest = Manifest.read(folder)
    consequence = "and will be neither resumed nor overwritten; choose another --out"
    if manifest is None and MANIFEST in contents:
        return f"{folder / MANIFEST} is damaged, or not of a run: what else is there cannot be known, {consequence}"
    if manifest is None and RECIPE in contents and not _is_old_run(folder):
        return f"{folder / RECIPE} was written by no run, {consequence}"
    if manifest is None and RECIPE not in contents:
        return f"{folder} is not the folder of a run (it has no recipe.yaml), {consequence}"
    foreign = [name for name in contents if not _is_of_run(folder / name, manifest)]
    checkpoint_folder = folder / checkpoints.FOLDER
    if foreign == [checkpoints.FOLDER] and checkpoint_folder.is_dir() and not checkpoint_folder.is_symlink():
        foreign = [str((checkpoints.foreign(folder) or checkpoint_folder).relative_to(folder))]
    if foreign:
        return f"{folder} holds more than a run writes ({', '.join(foreign[:3])}), {consequence}"
    changed_name = next((name for name in contents if name != MANIFEST and changed(folder / name)), "")
    if changed_name == RECIPE:
        return f"{folder / RECIPE} was changed since a run wrote it, {consequence}, or put it back"
    return damaged(folder / changed_name) if changed_name else ""


def _is_of_run(file: Path, manifest: Manifest | None) -> bool:
    """Whether a run wrote a file or folder, or `eval -o` or `compare -o` did.

    Weights belong to the run if the manifest names them. Tables and folders are recognised by their names.
    """
    if file.is_symlink():
        return False
    if file.is_dir():
        if file.name == checkpoints.FOLDER:
            return checkpoints.foreign(file.parent) is None
        return file.name == TRACKERS and _has_trackers(file.parent)
    if file.name in ("report.html", "layers.json"):
        return is_measured(file) if file.suffix == ".html" else _is_json(file)
    if file.suffix == ".safetensors":
        weights_match = re.fullmatch(_WEIGHTS, file.stem)
        return bool(weights_match) and (manifest is None or file.name in manifest.files)
    return bool(re.fullmatch(_TABLE_OR_PARTIAL, file.name)) or is_measured(file)


def _has_trackers(folder: Path) -> bool:
    """Whether the recipe of a run has trackers, which write the folder of trackers."""
    try:
        return bool(load(folder / RECIPE).recipe.trackers)
    except (OSError, ValueError, ProbeKDError):
        return False


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(whole_text(file)), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _is_old_run(folder: Path) -> bool:
    """Whether a run of a version without manifests wrote the recipe, and not a person.

    A run writes out every default, in the form of ruamel.yaml, and metrics or a checkpoint are next to it.
    """
    has_results = (folder / "metrics.csv").is_file() or any(folder.glob(f"{checkpoints.FOLDER}/*/{MANIFEST}"))
    try:
        text = whole_text(folder / RECIPE)
        source = load(folder / RECIPE)
    except (OSError, ValueError, ProbeKDError):
        return False
    is_complete = source.recipe.model_fields_set >= {"student", "data", "pairs", "stages", "baseline", "seed"}
    return has_results and is_complete and rewritten(text) == text


def _check_inputs_outside(plan: Plan, folder: Path, *, resume: bool) -> None:
    """Raise RunError if a run in this folder would delete what the recipe reads."""
    real_folder = Path(os.path.realpath(folder))
    for name, teacher in plan.recipe.teachers_by_name.items():
        if teacher.cache and Path(os.path.realpath(teacher.cache)).is_relative_to(real_folder):
            raise RunError(
                f"the teacher's cache {teacher.cache} lies in the folder of results, {folder}, which a run must have "
                f"for itself; give another folder as `{'.'.join(map(str, teacher_place(name)))}.cache`"
            )
    for name in inputs_of(plan.recipe):
        if not resume and Path(os.path.realpath(name)).is_relative_to(real_folder):
            raise RunError(
                f"the recipe reads {name}, which lies in the folder of results, {folder}, and would be overwritten; "
                "choose another --out"
            )


def _first_difference(before: str, now: str) -> str:
    """Describe the first lines in which two recipes differ."""
    for old, new in zip_longest(before.splitlines(), now.splitlines(), fillvalue="nothing"):
        if old != new:
            return f"`{old.strip()}` where there now is `{new.strip()}`"
    return "the same lines, with other ends"


def _same_data(original_recipe: str, recipe: Recipe) -> bool:
    try:
        return parse(original_recipe).recipe.data == recipe.data
    except ProbeKDError:  # of another version
        return False


def _with_root_of(original_recipe: str, resolved: str) -> str:
    """The recipe of a run with the data's present `root`. That the data are the same is checked by `data.json`."""
    try:
        before, now = parse(original_recipe).recipe, parse(resolved).recipe
    except ProbeKDError:  # of another version
        return original_recipe
    if before.data.root == now.data.root or not (before.data.root and now.data.root):
        return original_recipe
    return dump(before.model_copy(update={"data": before.data.model_copy(update={"root": now.data.root})}))
