"""The commands on finished runs: `eval`, `compare` and `export`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from probe_kd.cli.options import AllowImport, Json, SplitChoice
from probe_kd.cli.output import (
    check_free,
    is_first_process,
    make_console,
    print_notes,
    print_parts,
    print_text,
    write_text,
)
from probe_kd.cli.tracing import allow
from probe_kd.errors import RunError


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
    check_free(output, overwrite)
    from probe_kd.results.evaluation import evaluate as measure
    from probe_kd.tables import scores_table, similarity_table

    console = make_console()
    with console.status("evaluating"):
        evaluation = measure(
            run,
            weights=weights,
            ema=ema,
            split=split.value,
            batch_size=batch_size,
            device=device,
            root=root,
            allow_import=allow(allow_import),
        )
    if not is_first_process():
        return
    # JSON has no NaN, and an NLL may be NaN: it is written as null.
    values = json.loads(json.dumps(asdict(evaluation)), parse_constant=lambda _: None)
    text = json.dumps(values, indent=1)
    if output is not None:
        write_text(text, output, overwrite=overwrite)
    if as_json:
        print(text)
        return
    console.print(scores_table(evaluation))
    if evaluation.pairs:
        console.print(similarity_table(evaluation))
    print_notes(evaluation.notes, console)


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
    check_free(output, overwrite)
    from probe_kd.results.comparison import compare as compare_runs
    from probe_kd.results.html import as_json as comparison_as_json
    from probe_kd.results.html import tables, write_page

    console = make_console()
    with console.status("reading the runs"):
        comparison = compare_runs(runs, layers=layers, allow_import=allow(allow_import))
    if as_json:
        print(comparison_as_json(comparison))
    else:
        print_parts(console, tables(comparison))
    if output is not None:
        write_page(comparison, output)
        print_text(f"wrote {output}", sys.stderr if as_json else None)


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
    exported = write(run, output, role=role, root=root, allow_import=allow(allow_import), **options)
    address = push(Path(exported.folder), push_to_hub, private=not public) if push_to_hub else None
    if as_json:
        print(json.dumps(asdict(exported) | ({"hub": address} if address else {}), indent=1))
        return
    print_text(f"{exported.weights} ({exported.model}) -> {exported.folder}: {', '.join(exported.files)}")
    for library, difference in (("timm", exported.difference), ("onnxruntime", exported.onnx_difference)):
        if difference is not None:
            print_text(
                f"{library} answers as the run did: "
                f"{exported.outputs} up to {exported.largest_logit:.3g} differ by at most {difference:.2g}"
            )
    print_text("\n".join([f"compared on {exported.images}", *(f"note: {note}" for note in exported.notes)]))
    if exported.difference is not None:
        print_text(f"  timm.create_model({f'local-dir:{exported.folder}'!r}, pretrained=True)")
    if address:
        print_text(f"uploaded to {address}")
