"""The commands on two models: `inspect`, `match` and `init`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probe_kd.cli.options import (
    MODEL_HELP,
    ByChoice,
    InputSize,
    Json,
    Kwargs,
    Level,
    LevelChoice,
    NumPairs,
    SideKwargs,
    Student,
    Teacher,
    TeacherInputSize,
)
from probe_kd.cli.output import as_options, check_free, command_line, make_console, print_notes, print_text
from probe_kd.cli.tracing import about, trace_both, trace_named
from probe_kd.errors import RunError

if TYPE_CHECKING:
    from probe_kd.engine.spec import Trace
    from probe_kd.recipe.feature_measuring import FeatureMatch


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

    trace = trace_named(model, input_size, model_kwargs, training=train)
    rows = layer_rows(trace, every=all_modules, glob=glob, depth=depth)
    if as_json:
        print(json.dumps({**about(trace), "layers": [asdict(row) for row in rows]}, indent=1))
        return
    make_console().print(layers_table(trace, rows))


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
    student_trace, teacher_trace = trace_both(
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
        sides = {"student": about(student_trace), "teacher": about(teacher_trace)}
        print(json.dumps({**sides, "pairs": [asdict(row) for row in rows], "remarks": remarks}, indent=1))
    else:
        make_console().print(pairs_table(student, teacher, rows))
        print_notes(remarks, make_console())
    if output is not None:
        write_recipe(student_trace, teacher_trace, pairs, output)
        command = f"probe-kd train {output}{as_options(allow_import=packages([student, teacher]))}"
        print_text(f"wrote {output}; run it with: {command}", sys.stderr if as_json else None)


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
    with make_console(stderr=True).status("measuring the features"):
        return match_models(student, teacher, images, level=level, num_pairs=num_pairs, **given)


def _show_by_features(matched: "FeatureMatch", output: Path | None, *, as_json: bool) -> None:
    from probe_kd.engine.models import packages
    from probe_kd.recipe.feature_measuring import write_matched_recipe
    from probe_kd.tables import figures_as_json, figures_table, measured_pairs_table

    if as_json:
        sides = {"student": about(matched.student), "teacher": about(matched.teacher)}
        print(json.dumps({**sides, **figures_as_json(matched)}, indent=1))
    else:
        console = make_console()
        for table in (figures_table(matched), measured_pairs_table(matched)):
            console.print(table)
        print_notes(matched.remarks, console)
    if output is not None:
        write_matched_recipe(matched, output, command=command_line())
        allowed = as_options(allow_import=packages([matched.student.model, matched.teacher.model]))
        print_text(f"wrote {output}; run it with: probe-kd train {output}{allowed}", sys.stderr if as_json else None)


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
    student_trace, teacher_trace = trace_both(
        student, teacher, input_size, teacher_input_size, student_kwargs, teacher_kwargs
    )
    needs_pairs = chosen_method.pairs or chosen_method.shares
    pairs = match_layers(student_trace, teacher_trace, level=level.value, num_pairs=num_pairs) if needs_pairs else ()
    write_recipe(student_trace, teacher_trace, pairs, output, method=method, data=data, root=root)
    allowed = as_options(allow_import=packages([student, teacher]))
    print_text(f"wrote {output}\n  probe-kd check {output}{allowed}\n  probe-kd train {output}{allowed}")


def _check_recipe_is_new(output: Path | None, overwrite: bool) -> None:
    if output is not None and output.is_dir():
        raise RunError(f"{output} is a folder; name the recipe in it, as in {output / 'distil.yaml'}")
    check_free(output, overwrite)
