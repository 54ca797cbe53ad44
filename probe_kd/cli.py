"""The command line: parse, call, print. What takes seconds to import is imported by the command that needs it."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer

from probe_kd.errors import ProbeKDError, RunError, Stopped, visible
from probe_kd.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from probe_kd.engine.spec import Trace
    from probe_kd.files.run_folder import Claim
    from probe_kd.recipe.feature_measuring import FeatureMatch
    from probe_kd.recipe.planner import Plan
    from probe_kd.recipe.reading import Source
    from probe_kd.tables import Idle
    from probe_kd.training.audit import Audit
    from probe_kd.training.progress import Progress

app = typer.Typer(
    help="Knowledge distillation between any two vision models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = (
    "A timm name, `hf-hub:...`, `local-dir:...`, `transformers:...`, `open_clip:...`, or `package.module:function` for "
    "your own nn.Module."
)
Kwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwargs", metavar="KEY=VALUE", help="An argument for the model, as in `depth=6`; may be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
InputSize = Annotated[
    str | None,
    typer.Option(help="Size of the images: `224`, `224x192` (height x width) or `3x224x192`. Default: the model's."),
]


AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import",
        metavar="PACKAGE",
        help="Allow the recipe to import models from this package or module, and run its code; may be repeated.",
    ),
]


Seed = Annotated[int | None, typer.Option(min=0, help="The random seed, in place of the recipe's.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the results, and on stderr what changes their meaning.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, as in `stages.0.epochs=5`; the value is YAML; may be repeated.",
    ),
]


class LevelChoice(StrEnum):
    stage = "stage"
    block = "block"


class ByChoice(StrEnum):
    trace = "trace"
    features = "features"


Student = Annotated[str, typer.Option(help=MODEL_HELP)]
Teacher = Annotated[str, typer.Option(help="The teacher, named as the student is.")]
Level = Annotated[LevelChoice, typer.Option(help="Pair the ends of stages, or also the blocks between them.")]
NumPairs = Annotated[
    int | None, typer.Option(min=1, help="Number of pairs, evenly spaced; the deepest is always kept. Default: all.")
]
TeacherInputSize = Annotated[str | None, typer.Option(help="Size of the teacher's images, if it differs.")]
SideKwargs = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An argument for that model, as in `depth=6`; may be repeated."),
]


class SplitChoice(StrEnum):
    test = "test"
    val = "val"
    train = "train"
    held_out = "held_out"


def main() -> None:
    """Run the `probe-kd` command. Errors that the user can fix print one message and exit with status 2."""
    try:
        app()
    except ProbeKDError as refusal:
        if _is_first_process() or not refusal.in_all_processes:
            if logging.getLogger().isEnabledFor(logging.INFO):  # --verbose
                _print(traceback.format_exc(), sys.stderr)
            _print_error(str(refusal))
        sys.exit(2)
    except BrokenPipeError:  # `probe-kd inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as refusal:  # where stdout goes to a full disk, say
        if logging.getLogger().isEnabledFor(logging.INFO):
            _print(traceback.format_exc(), sys.stderr)
        place = f"{refusal.filename}: " if refusal.filename else ""
        _print_error(f"{place}{refusal.strerror or refusal}; `probe-kd -v ...` shows where")
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Also show the logs of timm and accelerate, and the traceback of an error."
        ),
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if version:
        print(f"probe-kd {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    all_modules: Annotated[
        bool, typer.Option("--all", help="List every module, also those that yield no tensor.")
    ] = False,
    glob: Annotated[str | None, typer.Option(help="List only modules whose names match, as in `blocks.*.mlp`.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=0, help="List only modules down to this nesting depth; 1 is the top level.")
    ] = None,
    input_size: InputSize = None,
    train: Annotated[bool, typer.Option("--train", help="Trace in training mode.")] = False,
    model_kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """List the layers of a model that can be matched: layout, shape, stride, parameters, MACs.

    Without --all, --glob and --depth, it lists the stage ends (marked), the blocks and the output. No weights are
    downloaded, and nothing is computed.
    """
    from probe_kd.tables import layer_rows, layers_table

    trace = _trace(model, input_size, model_kwargs, training=train)
    rows = layer_rows(trace, every=all_modules, glob=glob, depth=depth)
    if as_json:
        print(json.dumps({**_about(trace), "layers": [asdict(row) for row in rows]}, indent=1))
        return
    _console().print(layers_table(trace, rows))


@app.command()
def match(
    student: Student,
    teacher: Teacher,
    level: Level = LevelChoice.stage,
    num_pairs: NumPairs = None,
    input_size: InputSize = None,
    teacher_input_size: TeacherInputSize = None,
    student_kwargs: SideKwargs = None,
    teacher_kwargs: SideKwargs = None,
    by: Annotated[
        ByChoice,
        typer.Option(
            help="Pair by stride and depth (`trace`), or by `features` of the teacher's weights and --images."
        ),
    ] = ByChoice.trace,
    images: Annotated[
        str | None,
        typer.Option(help="For --by features: a folder of images, or the name of a data set, as `torch/cifar100`."),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=8, help="For --by features: how many of them are read. Default: 512.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None,
        typer.Option(help="For --by features: the file with the teacher's weights. Default: those of its name."),
    ] = None,
    student_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="For --by features: the file with the student's weights; `pretrained` for those of its name. Default: "
            "random weights."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="For --by features: `cpu`, `cuda:1`, ... Default: an accelerator, if there is one."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="For --by features: of the images and of random weights. Default: 0.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a complete recipe to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe file.")] = False,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="Also pair the stages of the decoders, as of a U-Net.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pair the layers of a student with the layers of a teacher, and show the reason for each pair.

    With --by features, both models run once on a few hundred images. It also shows what each layer holds, how targets
    should be normalised, and which layers teach nothing; -o then writes a recipe that learns the features.
    """
    from probe_kd.engine.matching import doubts
    from probe_kd.engine.matching import find_pairs as match_layers
    from probe_kd.engine.models import packages
    from probe_kd.recipe.scaffold import write_recipe
    from probe_kd.tables import pair_rows, pairs_table

    _check_recipe_is_new(output, overwrite)
    student_trace, teacher_trace = _trace_both(
        student, teacher, input_size, teacher_input_size, student_kwargs, teacher_kwargs
    )
    measuring: dict[str, Any] = {
        "images": images,
        "num_images": num_images,
        "teacher_checkpoint": teacher_checkpoint,
        "student_checkpoint": student_checkpoint,
        "device": device,
        "seed": seed,
    }
    if by is ByChoice.features:
        matched = _match_by_features(student_trace, teacher_trace, level.value, num_pairs, **measuring)
        _show_by_features(matched, output, as_json=as_json)
        return
    _refuse_without_features(measuring)
    pairs = match_layers(student_trace, teacher_trace, level=level.value, num_pairs=num_pairs, decoder=decoder)
    rows = pair_rows(pairs, student_trace, teacher_trace)
    remarks = doubts(pairs, student_trace, teacher_trace, complete=num_pairs is None)
    if as_json:
        sides = {"student": _about(student_trace), "teacher": _about(teacher_trace)}
        print(json.dumps({**sides, "pairs": [asdict(row) for row in rows], "remarks": remarks}, indent=1))
    else:
        _console().print(pairs_table(student, teacher, rows))
        _print_notes(remarks, _console())
    if output is not None:
        write_recipe(student_trace, teacher_trace, pairs, output)
        command = f"probe-kd train {output}{_options(allow_import=packages([student, teacher]))}"
        _print(f"wrote {output}; run it with: {command}", sys.stderr if as_json else None)


def _refuse_without_features(options: dict[str, Any]) -> None:
    """Raise RunError for an option that only `--by features` reads."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RunError(f"--{given[0].replace('_', '-')} is of `--by features`; add that, or leave it out")


def _match_by_features(
    student: "Trace",
    teacher: "Trace",
    level: Literal["stage", "block"],
    num_pairs: int | None,
    *,
    images: str | None,
    **options: Any,
) -> "FeatureMatch":
    from probe_kd.recipe.feature_measuring import match_models

    if images is None:
        raise RunError("`--by features` reads images: give a folder or the name of a data set, as in --images photos")
    given = {key: value for key, value in options.items() if value is not None}
    with _console(stderr=True).status("measuring the features"):
        return match_models(student, teacher, images, level=level, num_pairs=num_pairs, **given)


def _show_by_features(matched: "FeatureMatch", output: Path | None, *, as_json: bool) -> None:
    from probe_kd.engine.models import packages
    from probe_kd.recipe.feature_measuring import write_matched_recipe
    from probe_kd.tables import figures_as_json, figures_table, measured_pairs_table

    if as_json:
        sides = {"student": _about(matched.student), "teacher": _about(matched.teacher)}
        print(json.dumps({**sides, **figures_as_json(matched)}, indent=1))
    else:
        console = _console()
        for table in (figures_table(matched), measured_pairs_table(matched)):
            console.print(table)
        _print_notes(matched.remarks, console)
    if output is not None:
        write_matched_recipe(matched, output, command=_command_line())
        allowed = _options(allow_import=packages([matched.student.model, matched.teacher.model]))
        _print(f"wrote {output}; run it with: probe-kd train {output}{allowed}", sys.stderr if as_json else None)


@app.command()
def init(
    student: Student,
    teacher: Teacher,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")],
    method: Annotated[
        str, typer.Option(help="The method: `fitnets_joint`, `soft_targets`, `fsp`, `rocket`, ...")
    ] = "fitnets_joint",
    data: Annotated[
        str, typer.Option(help="The images: `torch/cifar100`, `hfds/...`, or a folder with one folder per class.")
    ] = "sklearn/digits",
    root: Annotated[str | None, typer.Option(help="Folder that holds the data, or to download it to.")] = None,
    level: Level = LevelChoice.stage,
    num_pairs: NumPairs = None,
    input_size: InputSize = None,
    teacher_input_size: TeacherInputSize = None,
    student_kwargs: SideKwargs = None,
    teacher_kwargs: SideKwargs = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe file.")] = False,
) -> None:
    """Write a complete, commented recipe for two models, a method and a set of images. Nothing is downloaded."""
    from probe_kd.engine.matching import find_pairs as match_layers
    from probe_kd.engine.models import packages
    from probe_kd.recipe.scaffold import chosen, write_recipe

    chosen_method = chosen(method)
    _check_recipe_is_new(output, overwrite)
    student_trace, teacher_trace = _trace_both(
        student, teacher, input_size, teacher_input_size, student_kwargs, teacher_kwargs
    )
    needs_pairs = chosen_method.pairs or chosen_method.shares
    pairs = match_layers(student_trace, teacher_trace, level=level.value, num_pairs=num_pairs) if needs_pairs else ()
    write_recipe(student_trace, teacher_trace, pairs, output, method=method, data=data, root=root)
    allowed = _options(allow_import=packages([student, teacher]))
    _print(f"wrote {output}\n  probe-kd check {output}{allowed}\n  probe-kd train {output}{allowed}")


def _about(trace: "Trace") -> dict[str, Any]:
    """Return the traced model and how it was traced, for JSON."""
    return {
        "model": trace.model,
        "model_kwargs": dict(trace.model_kwargs),
        "input_size": trace.input_size,
        "parameters": trace.parameters,
        "macs": trace.macs,
    }


def _check_recipe_is_new(output: Path | None, overwrite: bool) -> None:
    if output is not None and output.is_dir():
        raise RunError(f"{output} is a folder; name the recipe in it, as in {output / 'distil.yaml'}")
    _check_free(output, overwrite)


def _trace_both(
    student: str,
    teacher: str,
    size: str | None,
    teacher_size: str | None,
    student_kwargs: list[str] | None,
    teacher_kwargs: list[str] | None,
) -> "tuple[Trace, Trace]":
    """Trace a student, and a teacher as `_trace_teacher` does."""
    student_trace = _trace(student, size, student_kwargs, training=True)
    return student_trace, _trace_teacher(teacher, student_trace, size, teacher_size, teacher_kwargs)


def _trace_teacher(
    teacher: str, student: "Trace", size: str | None, teacher_size: str | None, teacher_kwargs: list[str] | None
) -> "Trace":
    """Trace a teacher at the student's size; if no size was given and it refuses, at its own."""
    requested_size = teacher_size or size or "x".join(map(str, student.input_size))
    return _trace(teacher, requested_size, teacher_kwargs, or_own_size=teacher_size is None and size is None)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also show which parameters each loss reaches.")
    ] = False,
    no_batch: Annotated[
        bool, typer.Option("--no-batch", help="Do not run a real batch: no weights, no compute.")
    ] = False,
    sets: Sets = None,
    allow_import: AllowImport = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe will do, and check that it can run. Nothing is trained; status 2 on any problem.

    Models, pairs and adapters are checked without weights or compute. Then every stage runs one real batch with the
    models as they are before training, and shows each loss, and the time and memory of a step. Of a teacher's cache a
    few rows are written, read beside the teacher, and deleted. Missing images are downloaded if the recipe says
    `download: true`.
    """
    from probe_kd.recipe.planner import plan
    from probe_kd.recipe.reading import load
    from probe_kd.tables import (
        cache_cost_lines,
        cache_lines,
        costs_table,
        data_lines,
        evaluation_lines,
        frozen_lines,
        idle_rows,
        idle_table,
        losses_table,
        models_table,
        plan_table,
        shares_table,
        teacher_lines,
    )
    from probe_kd.tables import reach_table as reach

    source, allowed = load(recipe, sets=sets or (), tolerant=True), _allowed(allow_import)
    planned = plan(source, allow_import=allowed)
    varied = _varied(source, planned, allowed)
    console, idle = _console(), idle_rows(planned)
    trains_teacher = any(teacher.options.train is not None for teacher in planned.teachers.values())
    if not as_json:
        console.print(models_table(planned))
        if planned.comparisons:
            console.print(plan_table(planned))
        if idle:
            console.print(idle_table(idle))
        for line in [
            *_pair_lines(planned),
            *cache_lines(planned),
            *teacher_lines(planned),
            *frozen_lines(planned),
            *varied,
        ]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for line in (*data_lines(planned), *evaluation_lines(planned)):
            console.print(line, highlight=False, markup=False)
        _print_notes(planned.remarks, console)
    audited = None
    if gradients or not no_batch:
        from probe_kd.training.audit import audit

        audited = audit(planned)
    if as_json:
        print(json.dumps(_checked(planned, idle, audited), indent=1))
    elif audited is not None:
        for table in (
            losses_table(audited.costs, trains_teacher=trains_teacher),
            costs_table(audited.costs),
            *([reach(audited.reach)] if gradients else []),
            *([shares_table(audited.shares, trains_teacher=trains_teacher)] if audited.shares else []),
        ):
            console.print(table)
        for line in cache_cost_lines(audited.caches):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        _print_notes(audited.remarks, console)
    if audited is not None and audited.wrong:
        raise RunError("\n".join(f"{recipe}: {text}" for text in audited.wrong))


def _varied(source: "Source", planned: "Plan", allowed: list[str]) -> list[str]:
    """List what `probe-kd tune` varies, if the recipe says so. Raises RecipeError for values that cannot run."""
    if source.recipe.tune is None:
        return []
    from probe_kd.tuning.space import Planner, lines_of, space_of

    return ["`probe-kd tune` varies:", *lines_of(space_of(Planner(source, planned, tuple(allowed))))]


def _checked(planned: "Plan", idle: "list[Idle]", audited: "Audit | None") -> dict[str, Any]:
    """Return what `check --json` prints."""
    compared = [
        {"stage": item.stage, "loss": item.objective.name, "layers": str(item.comparison), "adapter": item.adapter}
        for item in planned.comparisons
    ]
    return {
        "data": {"measured_on": planned.datasets.measured_on, "notes": list(planned.notes)},
        "weights": list(planned.new_classifiers),
        "frozen": [list(frozen.layers) for frozen in planned.frozen],
        "pairs": [{"student": str(pair.student), "teacher": str(pair.teacher)} for pair in planned.pairs],
        "compared": compared,
        "remarks": [*planned.remarks, *(audited.remarks if audited else ())],
        "not_run": [asdict(row) for row in idle],
        "steps": [asdict(row) | {"memory": row.memory} for row in audited.costs] if audited else [],
        "gradients": [asdict(row) for row in audited.reach] if audited else [],
        "shares": [asdict(row) for row in audited.shares] if audited else [],
        "caches": [asdict(row) | {"is_slower": row.is_slower} for row in audited.caches] if audited else [],
    }


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schema to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
) -> None:
    """Write the JSON Schema of recipes. Editors use it to complete and check recipes.

    Refer to it in a recipe by `# yaml-language-server: $schema=recipe.schema.json`, with the path of the file.
    """
    from probe_kd.recipe.schema import schema as written

    text = json.dumps(written(), indent=1)
    if output is None:
        print(text)
    else:
        _write(text, output, overwrite=overwrite)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    out: Annotated[Path | None, typer.Option(help="The folder of results. Default: runs/NAME-OF-THE-RECIPE.")] = None,
    seed: Seed = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, or start if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of a former run.")] = False,
    allow_import: AllowImport = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: train and evaluate the models, and write the student as safetensors that timm can load."""
    from probe_kd.recipe.reading import load

    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite deletes it; give one of the two")
    folder = out or Path("runs") / _name_of_run(recipe)
    source = load(recipe, seed=seed, sets=sets or (), tolerant=True)
    again = _resume_command(recipe, out, seed, sets, allow_import)
    _train(source, folder, again, resume=resume, overwrite=overwrite, allowed=_allowed(allow_import), quiet=quiet)


def _train(
    source: "Source",
    folder: Path,
    again: str,
    *,
    resume: bool,
    overwrite: bool,
    allowed: list[str],
    quiet: bool,
    timed: bool = False,
) -> None:
    """Plan a recipe, run it, and show its results. `again` is the command that goes on with a run that is stopped.

    If `timed`, show before the training what a step costs, and how long all of them will take.
    """
    from probe_kd.recipe.planner import plan
    from probe_kd.tables import data_lines, evaluation_lines, frozen_lines, plan_table, print_student, teacher_lines
    from probe_kd.training.progress import Progress

    console = _console()
    quiet = quiet or not _is_first_process()
    progress = Progress(console, quiet=quiet)
    with _claimed(folder, progress, resume=resume, overwrite=overwrite) as claimed:
        with console.status("tracing the models"):
            planned = plan(source, allow_import=allowed)
        from probe_kd.training.run import train as run

        if not quiet:
            if planned.comparisons:
                console.print(plan_table(planned))
            _print_notes(planned.remarks, console)
            for line in (*teacher_lines(planned), *frozen_lines(planned)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            for line in (*data_lines(planned), *evaluation_lines(planned)):
                console.print(line, highlight=False, markup=False)
            if timed:
                _print_costs(planned, console)
        elif _is_first_process():  # notes explain the results, so --quiet keeps them
            for remark in (*planned.remarks, *planned.notes):
                progress.say(f"note: {remark}")
        try:
            run(planned, folder, progress, resume=resume, overwrite=overwrite, claimed=claimed)
        except (KeyboardInterrupt, Stopped) as stop:
            _exit_stopped(stop, again)
        if _is_first_process():
            _report(planned, folder, console)
            if claimed is not None:
                claimed.check()  # do not name a folder of results that is gone
            print_student(planned, folder, console)


@app.command(name="cache")
def fill_cache(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Fill so many views of each image. Default: those that the stages show."),
    ] = None,
    seed: Seed = None,
    sets: Sets = None,
    allow_import: AllowImport = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Fill the cache of a recipe's frozen teachers without training, so that no step of `train` has to run them.

    It shows the size before it begins, can be stopped, and goes on where it was.
    """
    from probe_kd.recipe.planner import plan
    from probe_kd.recipe.reading import load
    from probe_kd.training.filling import fill_caches
    from probe_kd.training.progress import Progress

    planned = plan(load(recipe, seed=seed, sets=sets or (), tolerant=True), allow_import=_allowed(allow_import))
    progress = Progress(_console(), quiet=quiet or not _is_first_process())
    try:
        fill_caches(planned, progress, views=views)
    except (KeyboardInterrupt, Stopped) as stop:
        _exit_stopped(stop, _command_line())


def _exit_stopped(stop: BaseException, again: str) -> NoReturn:
    """Say how to go on, and end with the status of a process that a signal ended."""
    if _is_first_process():
        _print_error(f"{str(stop) or 'stopped'}; go on with: {again}", "")
    sys.exit(128 + (signal.SIGTERM if "SIGTERM" in str(stop) else signal.SIGINT))


def _print_costs(planned: "Plan", console: "Console") -> None:
    from probe_kd.tables import costs_table
    from probe_kd.training.audit import audit

    with console.status("trying one step"):
        audited = audit(planned)
    console.print(costs_table(audited.costs))


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe. Its section `tune` says what may vary.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write. Default: runs/NAME-OF-THE-RECIPE-tune.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials; the first is the recipe as it stands.")] = 20,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of a trial. Default: a quarter of the recipe's.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Begin no trial after so many seconds. Default: no limit.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of processes that run trials.")] = 1,
    seeds: Annotated[
        int,
        typer.Option(
            min=0, help="Seeds with which the best trial is compared with the recipe at its full epochs; 0 for none."
        ),
    ] = 3,
    seed: Seed = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study in the folder, also beside another process.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a former study.")] = False,
    allow_import: AllowImport = None,
    quiet: Quiet = False,
) -> None:
    """Choose values of a recipe by short runs on held-out training images. The test images are not read.

    Writes OUT/tuned.yaml, OUT/summary.json and OUT/report.html. Needs `pip install 'probe-kd[tune]'` (Optuna).
    """
    from probe_kd.recipe.reading import load
    from probe_kd.training.progress import Progress
    from probe_kd.tuning.report import tables, write_report
    from probe_kd.tuning.study import Budget
    from probe_kd.tuning.study import tune as run

    if resume and overwrite:
        raise RunError("--resume goes on with a study and --overwrite deletes it; give one of the two")
    folder, console = out or Path("runs") / f"{_name_of_run(recipe)}-tune", _console()
    source = load(recipe, seed=seed, sets=sets or ())
    budget = Budget(trials=trials, epochs=epochs, timeout=timeout, jobs=jobs, seeds=seeds)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "allow_import": _allowed(allow_import)}
    try:
        outcome = run(source, folder, Progress(console, quiet=quiet), budget=budget, **options)
    except (KeyboardInterrupt, Stopped) as stop:
        _exit_stopped(stop, f"{_command_line()} --resume")
    _print_parts(console, tables(outcome))
    write_report(outcome, folder / "report.html")
    _print(f"wrote {folder / 'tuned.yaml'}, {folder / 'report.html'}")


@app.command()
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
        again = f"{_command_line()} --resume"
        options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "timed": not resume}
        _train(source, out / "run", again, allowed=_allowed(allowed), **options)
    if _is_first_process():
        exported = write(out / "run", out / "student", allow_import=allowed, overwrite=resume or overwrite)
        _print(f"{exported.folder}: {', '.join(exported.files)}")
        _print("\n".join(f"note: {note}" for note in exported.notes))
        _print(f"  timm.create_model({f'local-dir:{exported.folder}'!r}, pretrained=True)")


def _check_folder_is_new(folder: Path, overwrite: bool) -> None:
    """Raise RunError if there is more in a folder than the recipe of an attempt that could not run."""
    if overwrite or not folder.exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {"recipe.yaml"}:
        raise RunError(f"{folder} is not a new or empty folder; --resume goes on with a run, --overwrite replaces it")


def _command_line() -> str:
    """Return the command that this process was started by, without --resume and --overwrite."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return shlex.join(["probe-kd", *words])


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
    student_trace = _trace(student, sizes[0], student_kwargs, training=True)
    choices = []
    for name, file in teachers:
        teacher_trace = _trace_teacher(name, student_trace, *sizes, kwargs[1])
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
        command=_command_line(),
    )


@contextmanager
def _claimed(folder: Path, progress: "Progress", *, resume: bool, overwrite: bool) -> "Iterator[Claim | None]":
    """Check and lock the folder of results before any slow work. Only the first process of a run does this."""
    from probe_kd.files.run_folder import claim
    from probe_kd.training.folder import check_folder

    if not _is_first_process():
        yield None
        return
    with claim(folder, progress.say) as claimed:
        check_folder(folder, resume=resume, overwrite=overwrite)
        yield claimed


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder that `probe-kd train` wrote.")],
    weights: Annotated[
        Path | None, typer.Option(help="Evaluate these weights of the student in place of the run's.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the moving average of the student.")] = False,
    split: Annotated[
        SplitChoice, typer.Option(help="The images to evaluate on; they are never augmented.")
    ] = SplitChoice.test,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch. Default: the recipe's.")] = None,
    device: Annotated[
        str | None, typer.Option(help="The device: `cpu`, `cuda:1`, ... Default: accelerate's choice.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data, if it has moved.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the results as JSON to this file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    allow_import: AllowImport = None,
    as_json: Json = False,
) -> None:
    """Measure the models of a run: accuracy, calibration, and the similarity of student and teacher, layer by layer."""
    _check_free(output, overwrite)
    from probe_kd.results.evaluation import evaluate as measure
    from probe_kd.tables import scores_table, similarity_table

    console = _console()
    with console.status("evaluating"):
        evaluation = measure(
            run,
            weights=weights,
            ema=ema,
            split=split.value,
            batch_size=batch_size,
            device=device,
            root=root,
            allow_import=_allowed(allow_import),
        )
    if not _is_first_process():
        return
    # JSON has no NaN, and an NLL may be NaN: it is written as null.
    values = json.loads(json.dumps(asdict(evaluation)), parse_constant=lambda _: None)
    text = json.dumps(values, indent=1)
    if output is not None:
        _write(text, output, overwrite=overwrite)
    if as_json:
        print(text)
        return
    console.print(scores_table(evaluation))
    if evaluation.pairs:
        console.print(similarity_table(evaluation))
    _print_notes(evaluation.notes, console)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `probe-kd train` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a report to this HTML file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Also compare the layers of runs that did not do so at their end; this builds the models."
        ),
    ] = False,
    allow_import: AllowImport = None,
    as_json: Json = False,
) -> None:
    """Compare runs: accuracy over seeds, agreement, size, time, and the differences between their recipes.

    Runs whose recipes are equal except for `seed` form one group. No model is built, except with --layers.
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{output}: a report is HTML; call it so, as in {output.with_suffix('.html')}, or take --json")
    _check_free(output, overwrite)
    from probe_kd.results.comparison import compare as compare_runs
    from probe_kd.results.html import as_json as comparison_as_json
    from probe_kd.results.html import tables, write_page

    console = _console()
    with console.status("reading the runs"):
        comparison = compare_runs(runs, layers=layers, allow_import=_allowed(allow_import))
    if as_json:
        print(comparison_as_json(comparison))
    else:
        _print_parts(console, tables(comparison))
    if output is not None:
        write_page(comparison, output)
        _print(f"wrote {output}", sys.stderr if as_json else None)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write, which must be new or empty.")
    ] = None,
    role: Annotated[
        str,
        typer.Option(
            "--role",
            "--subject",
            metavar="ROLE",
            help="The model of the run to export: student, baseline, teacher, teacher-baseline, or teacher-NAME of "
            "several.",
        ),
    ] = "student",
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average of its weights.")] = False,
    reparameterize: Annotated[
        bool, typer.Option("--reparameterize", help="Merge the branches and norms that only training needs.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx, checked by onnxruntime.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a former export.")] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data, if it has moved. The exported model is checked on test images."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Also upload the folder to this repository of the Hugging Face hub. A new one is private.",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository of the hub is public.")] = False,
    allow_import: AllowImport = None,
    as_json: Json = False,
) -> None:
    """Write a model of a run as a folder that plain timm loads. Before, it loads the folder and compares the outputs.

    The folder holds config.json, model.safetensors and README.md. timm loads it by `local-dir:`. With --push-to-hub it
    is uploaded too, and its name is that of the repository if -o gives none.
    """
    from probe_kd.results.export import export as write
    from probe_kd.results.hub import check_hub, push

    if output is None and push_to_hub is None:
        raise RunError("give the folder to write: -o FOLDER")
    if public and push_to_hub is None:
        raise RunError("--public is of a repository of the hub; give --push-to-hub ORG/NAME too")
    if push_to_hub is not None:
        check_hub(push_to_hub, overwrite=overwrite)
        output = output or Path(push_to_hub.rpartition("/")[2])
    assert output is not None
    options = {"ema": ema, "reparameterize": reparameterize, "onnx": onnx, "overwrite": overwrite}
    exported = write(run, output, role=role, root=root, allow_import=_allowed(allow_import), **options)
    address = push(Path(exported.folder), push_to_hub, private=not public) if push_to_hub else None
    if as_json:
        print(json.dumps(asdict(exported) | ({"hub": address} if address else {}), indent=1))
        return
    _print(f"{exported.weights} ({exported.model}) -> {exported.folder}: {', '.join(exported.files)}")
    for library, difference in (("timm", exported.difference), ("onnxruntime", exported.onnx_difference)):
        if difference is not None:
            _print(
                f"{library} answers as the run did: "
                f"{exported.outputs} up to {exported.largest_logit:.3g} differ by at most {difference:.2g}"
            )
    _print("\n".join([f"compared on {exported.images}", *(f"note: {note}" for note in exported.notes)]))
    if exported.difference is not None:
        _print(f"  timm.create_model({f'local-dir:{exported.folder}'!r}, pretrained=True)")
    if address:
        _print(f"uploaded to {address}")


def _check_free(output: Path | None, overwrite: bool) -> None:
    if output is not None and output.exists() and not overwrite:
        raise RunError(f"{output} exists; --overwrite replaces it")


def _write(text: str, path: Path, *, overwrite: bool) -> None:
    _check_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as refusal:
        raise RunError(f"cannot write {path}: {refusal.strerror}") from None


def _pair_lines(planned: "Plan") -> list[str]:
    """List the taps that each pattern stands for, and the pairs that are in no loss."""
    measured = ", ".join(str(pair) for pair in planned.every_pair if not pair.weight)
    return [*map(str, planned.expansions), *([f"measured only: {measured}"] if measured else [])]


def _print_notes(remarks: "Iterable[str]", console: "Console") -> None:
    for remark in remarks:
        console.print(f"note: {remark}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _resume_command(
    recipe: Path, out: Path | None, seed: int | None, sets: list[str] | None, allow_import: list[str] | None
) -> str:
    options: dict[str, Any] = {"out": out, "seed": seed, "set": sets, "allow_import": allow_import}
    return f"probe-kd train {shlex.quote(str(recipe))}{_options(**options)} --resume"


def _report(planned: "Plan", folder: Path, console: "Console") -> None:
    """Show the results of a run that has just ended, and write them to report.html."""
    from probe_kd.results.comparison import compare as compare_runs
    from probe_kd.results.comparison import measure_layers
    from probe_kd.results.html import tables, write_page

    if planned.teachers:
        with (
            _errors_as_notes("the layers are not compared"),
            console.status("comparing the layers of student and teacher"),
        ):
            measure_layers(planned, folder)
    with _errors_as_notes("not all of the results can be shown"):
        comparison = compare_runs([folder])
        _print_parts(console, tables(comparison))
        write_page(comparison, folder / "report.html")


@contextmanager
def _errors_as_notes(consequence: str) -> "Iterator[None]":
    """Print errors inside the block as notes: the run is already saved, and must not seem to have failed."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as refusal:  # models, images and disks can fail in any way
        _print_error(f"{consequence}: {' '.join(str(refusal).split())[:300] or type(refusal).__name__}", "note: ")


def _print_parts(console: "Console", parts: "Iterable[Table | Text | str]") -> None:
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=not hasattr(part, "columns"))


def _options(**options: Any) -> str:
    """Format options for the command line. None is left out, and a list repeats its option."""
    items = [(key, item) for key, value in options.items() for item in (value if isinstance(value, list) else [value])]
    return "".join(f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in items if value is not None)


def _is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch started."""
    ranks = (os.environ[name] for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ)
    return next(ranks, "0") == "0"


def _name_of_run(recipe: Path) -> str:
    """Return the name of a run. A recipe called `...yaml` would otherwise write into the parent folder."""
    if not re.fullmatch(r"\w[\w .+-]{0,99}", recipe.stem):
        raise RunError(f"the folder of a run has the name of its recipe, and {recipe.stem!r} is none; name it by --out")
    return recipe.stem


def _allowed(packages: list[str] | None) -> list[str]:
    """Return the packages that may be imported, and make them importable from the current folder.

    Without such packages, nothing is imported from there: a stray `yaml.py` must not replace the library.
    """
    if packages:
        sys.path.insert(0, os.getcwd())
    return packages or []


def _trace(
    model: str, size: str | None, kwargs: list[str] | None, *, training: bool = False, or_own_size: bool = False
) -> "Trace":
    from probe_kd.engine.models import packages
    from probe_kd.engine.tracing import trace
    from probe_kd.errors import TraceError

    _allowed(packages([model]))  # a user who types a name has allowed it
    arguments = dict(_key_value(text) for text in kwargs or ())
    try:
        return trace(model, _sides(size), training=training, model_kwargs=arguments)
    except TraceError:
        if not or_own_size:
            raise
        return trace(model, training=training, model_kwargs=arguments)


def _sides(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if not 1 <= len(parts) <= 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RunError(f"input size {text!r}; expected `224`, `224x192` (height x width) or `3x224x192`")
    return [int(part) for part in parts]


def _key_value(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE, and read the value as YAML, as `--set` does."""
    from probe_kd.recipe.yaml_tree import read_value

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RunError(f"model argument {text!r}; expected KEY=VALUE, as in `depth=6`")
    return key, read_value(value, f"--model-kwargs {key}")


def _console(*, stderr: bool = False) -> "Console":
    from probe_kd.console import PlainConsole

    console = PlainConsole(stderr=stderr)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return PlainConsole(width=160, stderr=stderr)  # a pipe has no width; 80 would fold every name


def _print_error(message: str, start: str = "error: ") -> None:
    _print(f"{start}{message}", sys.stderr)


def _print(text: str, file: TextIO | None = None) -> None:
    print(visible(text), file=file)


if __name__ == "__main__":
    main()
