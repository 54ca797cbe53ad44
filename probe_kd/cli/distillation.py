"""The command `distill`: from a folder of images to an exported student."""

from pathlib import Path
from typing import Annotated, Any

import typer

from probe_kd.cli.options import InputSize, Quiet, Sets, SideKwargs, Student, TeacherInputSize
from probe_kd.cli.output import command_line, is_first_process, print_text
from probe_kd.cli.recipes import run_recipe
from probe_kd.cli.tracing import allow, trace_named, trace_teacher
from probe_kd.errors import RunError


def distill(
    student: Student,
    teacher: Annotated[list[str], typer.Option(help="A teacher, named as the student is; repeat it for several.")],
    images: Annotated[
        str,
        typer.Option(help="A folder of images, flat or nested; or the name of a data set, such as `torch/cifar100`."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    labels: Annotated[
        bool, typer.Option("--labels", help="The images lie in class folders; also learn the classes.")
    ] = False,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="The file with a teacher's weights, for each --teacher in turn; `pretrained` for those of its name, "
            "which is the default."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as make 10,000 updates, at most 100.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Default: 128, or less where an epoch would have fewer than 8 batches.")
    ] = None,
    knn: Annotated[
        str | None,
        typer.Option(
            help="A folder with labelled images in class folders, on which the features are measured by k-NN."
        ),
    ] = None,
    input_size: InputSize = None,
    teacher_input_size: TeacherInputSize = None,
    student_kwargs: SideKwargs = None,
    teacher_kwargs: SideKwargs = None,
    seed: Annotated[int, typer.Option(min=0, help="The random seed.")] = 0,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint of the run in --out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of a former run.")] = False,
    quiet: Quiet = False,
) -> None:
    """Distil the features of a teacher into a student, on images that need no labels, and export the student.

    Writes OUT/recipe.yaml, which `probe-kd train` runs too; shows the plan and the time that it will take; trains in
    OUT/run; and writes OUT/student, which timm loads by `timm.create_model("local-dir:OUT/student", pretrained=True)`.
    """
    from probe_kd.engine.models import packages
    from probe_kd.recipe.reading import load
    from probe_kd.results.export import export as write

    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite deletes it; give one of the two")
    recipe, allowed = out / "recipe.yaml", packages([student, *teacher])
    if not resume:
        _check_folder_is_new(out, overwrite)
        _write_distillation(
            recipe,
            student=student,
            teachers=_with_checkpoints(teacher, checkpoint),
            images=images,
            labels=labels,
            epochs=epochs,
            batch_size=batch_size,
            knn=knn,
            sizes=(input_size, teacher_input_size),
            kwargs=(student_kwargs, teacher_kwargs),
            seed=seed,
        )
    if not (resume and (out / "run" / "summary.json").is_file()):  # a finished run is only exported
        source = load(recipe, sets=sets or (), tolerant=True)
        again = f"{command_line()} --resume"
        options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "timed": not resume}
        run_recipe(source, out / "run", again, allowed=allow(allowed), **options)
    if is_first_process():
        exported = write(out / "run", out / "student", allow_import=allowed, overwrite=resume or overwrite)
        print_text(f"{exported.folder}: {', '.join(exported.files)}")
        print_text("\n".join(f"note: {note}" for note in exported.notes))
        print_text(f"  timm.create_model({f'local-dir:{exported.folder}'!r}, pretrained=True)")


def _check_folder_is_new(folder: Path, overwrite: bool) -> None:
    """Raise RunError if there is more in a folder than the recipe of an attempt that could not run."""
    if overwrite or not folder.exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {"recipe.yaml"}:
        raise RunError(f"{folder} is not a new or empty folder; --resume goes on with a run, --overwrite replaces it")


def _with_checkpoints(teachers: list[str], checkpoints: list[str] | None) -> list[tuple[str, str | None]]:
    """Return each teacher with its file of weights, None for those of its name. Raises RunError."""
    files = checkpoints or ["pretrained"] * len(teachers)
    if len(files) != len(teachers):
        raise RunError(
            f"{len(files)} --checkpoint for {len(teachers)} --teacher; give one for each, in the same order, and "
            "`pretrained` for a teacher with the weights of its name"
        )
    return [(name, None if file == "pretrained" else file) for name, file in zip(teachers, files, strict=True)]


def _write_distillation(
    recipe: Path,
    *,
    student: str,
    teachers: list[tuple[str, str | None]],
    images: str,
    labels: bool,
    epochs: int | None,
    batch_size: int | None,
    knn: str | None,
    sizes: tuple[str | None, str | None],
    kwargs: tuple[list[str] | None, list[str] | None],
    seed: int,
) -> None:
    from probe_kd.engine.matching import find_pairs as match_layers
    from probe_kd.engine.models import built_by_timm
    from probe_kd.recipe.distillation import (
        TeacherChoice,
        count_images,
        default_batch_size,
        default_epochs,
        write_distillation,
    )
    from probe_kd.recipe.scaffold import features_pairs

    student_kwargs = kwargs[0] or []
    if not labels and built_by_timm(student) and not any(text.startswith("num_classes=") for text in student_kwargs):
        student_kwargs = [*student_kwargs, "num_classes=0"]
    student_trace = trace_named(student, sizes[0], student_kwargs, training=True)
    choices = []
    for name, file in teachers:
        teacher_trace = trace_teacher(name, student_trace, *sizes, kwargs[1])
        pairs = features_pairs(student_trace, teacher_trace, match_layers(student_trace, teacher_trace))
        choices.append(TeacherChoice(teacher_trace, pairs, file))
    count = count_images(images, student_trace, labels=labels)
    batch_size = batch_size or default_batch_size(count)
    write_distillation(
        student_trace,
        choices,
        images,
        recipe,
        epochs=epochs or default_epochs(count, batch_size),
        batch_size=batch_size,
        labels=labels,
        knn=knn,
        seed=seed,
        command=command_line(),
    )
