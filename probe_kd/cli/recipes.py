"""The commands on a recipe: `check`, `schema`, `train`, `cache` and `tune`."""

import json
import re
import shlex
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probe_kd.cli.options import AllowImport, Json, Quiet, Seed, Sets
from probe_kd.cli.output import (
    as_options,
    command_line,
    errors_as_notes,
    exit_stopped,
    is_first_process,
    make_console,
    print_lines,
    print_notes,
    print_parts,
    print_text,
    write_text,
)
from probe_kd.cli.tracing import allow
from probe_kd.errors import RunError, Stopped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from probe_kd.files.run_folder import Claim
    from probe_kd.recipe.planner import Plan
    from probe_kd.recipe.reading import Source
    from probe_kd.tables import Idle
    from probe_kd.training.audit import Audit
    from probe_kd.training.progress import Progress


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
    from probe_kd.recipe.reading import load
    from probe_kd.tables import idle_rows

    source, allowed = load(recipe, sets=sets or (), tolerant=True), allow(allow_import)
    planned = _planned(source, allowed)
    varied, idle, console = _varied(source, planned, allowed), idle_rows(planned), make_console()
    if not as_json:
        _show_plan(planned, idle, varied, console)
    audited = None
    if gradients or not no_batch:
        from probe_kd.training.audit import audit

        audited = audit(planned)
    if as_json:
        print(json.dumps(_checked(planned, idle, audited), indent=1))
    elif audited is not None:
        _show_audit(planned, audited, console, gradients=gradients)
    if audited is not None and audited.wrong:
        raise RunError("\n".join(f"{recipe}: {text}" for text in audited.wrong))


def _show_plan(planned: "Plan", idle: "list[Idle]", varied: list[str], console: "Console") -> None:
    from probe_kd.tables import (
        cache_lines,
        data_lines,
        evaluation_lines,
        frozen_lines,
        idle_table,
        models_table,
        plan_table,
        teacher_lines,
    )

    console.print(models_table(planned))
    if planned.comparisons:
        console.print(plan_table(planned))
    if idle:
        console.print(idle_table(idle))
    models = cache_lines(planned), teacher_lines(planned), frozen_lines(planned)
    print_lines([*_pair_lines(planned), *chain(*models), *varied], console)
    print_lines([*data_lines(planned), *evaluation_lines(planned)], console, folded=True)
    print_notes(planned.remarks, console)


def _show_audit(planned: "Plan", audited: "Audit", console: "Console", *, gradients: bool) -> None:
    from probe_kd.tables import cache_cost_lines, costs_table, losses_table, reach_table, shares_table

    trains_teacher = any(teacher.options.train is not None for teacher in planned.teachers.values())
    console.print(losses_table(audited.costs, trains_teacher=trains_teacher))
    console.print(costs_table(audited.costs))
    if gradients:
        console.print(reach_table(audited.reach))
    if audited.shares:
        console.print(shares_table(audited.shares, trains_teacher=trains_teacher))
    print_lines(cache_cost_lines(audited.caches), console)
    print_notes(audited.remarks, console)


def _planned(source: "Source", allowed: list[str]) -> "Plan":
    """Plan a recipe. Raises RecipeError with all that is wrong, also in `tune`."""
    from probe_kd.errors import RecipeError
    from probe_kd.recipe.planner import plan

    try:
        return plan(source, allow_import=allowed)
    except RecipeError as refusal:
        if "tune" not in source.node.value:
            raise
        from probe_kd.tuning.space import with_all_problems

        raise with_all_problems(source, refusal, allowed) from None


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


def _pair_lines(planned: "Plan") -> list[str]:
    """List the taps that each pattern stands for, and the pairs that are in no loss."""
    measured = ", ".join(str(pair) for pair in planned.every_pair if not pair.weight)
    return [*map(str, planned.expansions), *([f"measured only: {measured}"] if measured else [])]


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
        write_text(text, output, overwrite=overwrite)


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
    run_recipe(source, folder, again, resume=resume, overwrite=overwrite, allowed=allow(allow_import), quiet=quiet)


def _name_of_run(recipe: Path) -> str:
    """Return the name of a run. A recipe called `...yaml` would otherwise write into the parent folder."""
    if not re.fullmatch(r"\w[\w .+-]{0,99}", recipe.stem):
        raise RunError(f"the folder of a run has the name of its recipe, and {recipe.stem!r} is none; name it by --out")
    return recipe.stem


def _resume_command(
    recipe: Path, out: Path | None, seed: int | None, sets: list[str] | None, allow_import: list[str] | None
) -> str:
    options: dict[str, Any] = {"out": out, "seed": seed, "set": sets, "allow_import": allow_import}
    return f"probe-kd train {shlex.quote(str(recipe))}{as_options(**options)} --resume"


def run_recipe(
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

    console = make_console()
    quiet = quiet or not is_first_process()
    progress = Progress(console, quiet=quiet)
    with _claimed(folder, progress, resume=resume, overwrite=overwrite) as claimed:
        with console.status("tracing the models"):
            planned = plan(source, allow_import=allowed)
        from probe_kd.training.run import train as run

        if not quiet:
            if planned.comparisons:
                console.print(plan_table(planned))
            print_notes(planned.remarks, console)
            print_lines([*teacher_lines(planned), *frozen_lines(planned)], console)
            print_lines([*data_lines(planned), *evaluation_lines(planned)], console, folded=True)
            if timed:
                _print_costs(planned, console)
        elif is_first_process():  # notes explain the results, so --quiet keeps them
            for remark in (*planned.remarks, *planned.notes):
                progress.say(f"note: {remark}")
        try:
            run(planned, folder, progress, resume=resume, overwrite=overwrite, claimed=claimed)
        except (KeyboardInterrupt, Stopped) as stop:
            exit_stopped(stop, again)
        if is_first_process():
            _report(planned, folder, console)
            if claimed is not None:
                claimed.check()  # do not name a folder of results that is gone
            print_student(planned, folder, console)


@contextmanager
def _claimed(folder: Path, progress: "Progress", *, resume: bool, overwrite: bool) -> "Iterator[Claim | None]":
    """Check and lock the folder of results before any slow work. Only the first process of a run does this."""
    from probe_kd.files.run_folder import claim
    from probe_kd.training.folder import check_folder

    if not is_first_process():
        yield None
        return
    with claim(folder, progress.say) as claimed:
        check_folder(folder, resume=resume, overwrite=overwrite)
        yield claimed


def _print_costs(planned: "Plan", console: "Console") -> None:
    from probe_kd.tables import costs_table
    from probe_kd.training.audit import audit

    with console.status("trying one step"):
        audited = audit(planned)
    console.print(costs_table(audited.costs))


def _report(planned: "Plan", folder: Path, console: "Console") -> None:
    """Show the results of a run that has just ended, and write them to report.html."""
    from probe_kd.results.comparison import compare as compare_runs
    from probe_kd.results.comparison import measure_layers
    from probe_kd.results.html import tables, write_page

    if planned.teachers:
        with (
            errors_as_notes("the layers are not compared"),
            console.status("comparing the layers of student and teacher"),
        ):
            measure_layers(planned, folder)
    with errors_as_notes("not all of the results can be shown"):
        comparison = compare_runs([folder])
        print_parts(console, tables(comparison))
        write_page(comparison, folder / "report.html")


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

    planned = plan(load(recipe, seed=seed, sets=sets or (), tolerant=True), allow_import=allow(allow_import))
    progress = Progress(make_console(), quiet=quiet or not is_first_process())
    try:
        fill_caches(planned, progress, views=views)
    except (KeyboardInterrupt, Stopped) as stop:
        exit_stopped(stop, command_line())


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
    folder, console = out or Path("runs") / f"{_name_of_run(recipe)}-tune", make_console()
    source = load(recipe, seed=seed, sets=sets or (), tolerant=True)
    budget = Budget(trials=trials, epochs=epochs, timeout=timeout, jobs=jobs, seeds=seeds)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "allow_import": allow(allow_import)}
    try:
        outcome = run(source, folder, Progress(console, quiet=quiet), budget=budget, **options)
    except (KeyboardInterrupt, Stopped) as stop:
        exit_stopped(stop, f"{command_line()} --resume")
    print_parts(console, tables(outcome))
    write_report(outcome, folder / "report.html")
    print_text(f"wrote {folder / 'tuned.yaml'}, {folder / 'report.html'}")
