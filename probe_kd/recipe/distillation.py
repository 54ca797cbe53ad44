"""Write the recipe of `probe-kd distill`: a student learns the features of one or several teachers from images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ruamel.yaml import YAML

from probe_kd.data.datasets import open_datasets
from probe_kd.data.options import DataOptions
from probe_kd.engine.spec import Pair, Trace
from probe_kd.recipe.scaffold import FEATURES, FITTED, data_lines, model_lines, quoted, word, write_lines

UPDATES = 10_000  # of the student's weights, by default
MOST_EPOCHS = 100
WARM_UP = 0.05  # of the epochs


@dataclass(frozen=True)
class TeacherChoice:
    """A teacher, the pairs that the student learns from it, and its `checkpoint`; None for the weights of its name."""

    trace: Trace
    pairs: Sequence[Pair]
    checkpoint: str | None = None


def count_images(images: str, student: Trace, *, labels: bool) -> int:
    """Return the number of training images of a folder or data set. Raises DataError."""
    text = "\n".join(data_lines(images, None, student.input_size, labels=labels))
    datasets = open_datasets(DataOptions.model_validate(YAML(typ="safe").load(text)["data"]))
    return len(datasets.train)  # type: ignore[arg-type]


def default_batch_size(images: int) -> int:
    """Return the largest power of two, at most 128, with which an epoch has 8 batches; at least 2."""
    return max(2, min(128, 2 ** ((images // 8).bit_length() - 1))) if images >= 16 else 2


def default_epochs(images: int, batch_size: int) -> int:
    """Return the number of epochs with 10,000 updates, at most 100."""
    return max(1, min(MOST_EPOCHS, ceil(UPDATES / max(1, images // batch_size))))


def teacher_names(models: Sequence[str]) -> list[str]:
    """Return a short name for each teacher: that of its architecture, with a number if two are equal."""
    short = [re.sub(r"\W+", "_", model.rpartition("/")[2].rpartition(":")[2].partition(".")[0]) for model in models]
    return [name if short.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(short, 1)]


def write_distillation(
    student: Trace,
    teachers: Sequence[TeacherChoice],
    images: str,
    path: Path,
    *,
    epochs: int,
    batch_size: int,
    labels: bool = False,
    knn: str | None = None,
    seed: int = 0,
    student_checkpoint: str | None = None,
    command: str = "",
) -> None:
    """Write the recipe. The student starts from random weights unless it has a checkpoint, a file or `pretrained`.

    Raises RecipeError.
    """
    several = teacher_names([teacher.trace.model for teacher in teachers]) if len(teachers) > 1 else [""]
    named = dict(zip(several, teachers, strict=True))
    parts = [
        f"# Written by: {command}" if command else "# Features of a teacher, learned from images",
        "student:",
        model_lines(student),
        *_weights_of_student(student_checkpoint),
        *_teacher_lines(student, named),
        *data_lines(images, None, student.input_size, labels=labels, batch_size=batch_size),
        *_pair_lines(named),
        "stages:",
        "  - name: distil",
        f"    epochs: {epochs}",
        "    losses:",
        *(["      task: {loss: cross_entropy}"] * labels),
        f"      {FEATURES}",
        "    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.05}",
        f"    scheduler: {{sched: cosine, warmup_epochs: {WARM_UP * epochs:.3g}}}",
        *([f"evaluate: {{knn: {{root: {word(knn)}}}}}"] if knn else []),
        f"seed: {seed}",
    ]
    write_lines(parts, path)


def _weights_of_student(checkpoint: str | None) -> list[str]:
    if checkpoint is None:
        return []
    return ["  pretrained: true" if checkpoint == "pretrained" else f"  checkpoint: {word(checkpoint)}"]


def _teacher_lines(student: Trace, teachers: Mapping[str, TeacherChoice]) -> list[str]:
    """The section of one teacher, which has an empty name, or of several."""
    if "" in teachers:
        return ["teacher:", *_of_teacher(student, teachers[""], "  ")]
    lines = ["teachers:"]
    for name, teacher in teachers.items():
        lines += [f"  {name}:", *_of_teacher(student, teacher, "    ")]
    return lines


def _of_teacher(student: Trace, teacher: TeacherChoice, indent: str) -> list[str]:
    trace = teacher.trace
    weights = f"checkpoint: {word(teacher.checkpoint)}" if teacher.checkpoint else "pretrained: true"
    size = [f"input_size: {list(trace.input_size)}"] if trace.input_size != student.input_size else []
    return [indent + line.strip() for line in [*model_lines(trace).splitlines(), weights, *size]]


def _pair_lines(teachers: Mapping[str, TeacherChoice]) -> list[str]:
    """One line for each layer of the student, with the layers of all teachers that it learns from."""
    lines = ["pairs:                          # student layer: teacher layer"]
    layers: dict[str, list[tuple[str, str]]] = {}
    for name, teacher in teachers.items():
        for pair in teacher.pairs:
            target = _target(replace(pair, teacher=replace(pair.teacher, model=name)))
            layers.setdefault(quoted(pair.student), []).append((target, pair.reason))
    for student, targets in layers.items():
        if len(targets) == 1:
            lines.append(f"  {student}: {targets[0][0]}  # {targets[0][1]}")
        else:
            lines.append(f"  {student}: [{', '.join(text for text, _ in targets)}]")
    return lines


def _target(pair: Pair) -> str:
    """The teacher's layer of a pair, with its `normalize` where this is not what the loss has."""
    normalize = pair.adapter.get("normalize", FITTED)
    layer = quoted(pair.teacher)
    return layer if normalize == FITTED else f"{{teacher: {layer}, normalize: {normalize}}}"
