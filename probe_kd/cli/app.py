"""The `probe-kd` command: its subcommands, and how errors end it."""

import inspect as introspection
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from probe_kd.cli.distillation import distill
from probe_kd.cli.models import init, inspect, match
from probe_kd.cli.output import is_first_process, print_error, print_text
from probe_kd.cli.recipes import check, fill_cache, schema, train, tune
from probe_kd.cli.results import compare, evaluate, export
from probe_kd.errors import ProbeKDError
from probe_kd.version import __version__

app = typer.Typer(
    help="Knowledge distillation between any two vision models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def main() -> None:
    """Run the `probe-kd` command. Errors that the user can fix print one message and exit with status 2."""
    try:
        app()
    except ProbeKDError as refusal:
        if is_first_process() or not refusal.in_all_processes:
            if logging.getLogger().isEnabledFor(logging.INFO):  # --verbose
                print_text(traceback.format_exc(), sys.stderr)
            print_error(str(refusal))
        sys.exit(2)
    except BrokenPipeError:  # `probe-kd inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as refusal:  # where stdout goes to a full disk, say
        if logging.getLogger().isEnabledFor(logging.INFO):
            print_text(traceback.format_exc(), sys.stderr)
        place = f"{refusal.filename}: " if refusal.filename else ""
        print_error(f"{place}{refusal.strerror or refusal}; `probe-kd -v ...` shows where")
        sys.exit(2)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "match": match,
    "init": init,
    "check": check,
    "schema": schema,
    "train": train,
    "cache": fill_cache,
    "tune": tune,
    "distill": distill,
    "eval": evaluate,
    "compare": compare,
    "export": export,
}
for name, command in COMMANDS.items():
    described = introspection.getdoc(command) or ""
    app.command(name, help=described.replace("[", r"\["))(command)  # rich would take `[tune]` for markup
