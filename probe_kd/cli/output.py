"""What the commands print and write."""

import os
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from probe_kd.errors import RunError, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def make_console(*, stderr: bool = False) -> "Console":
    from probe_kd.console import PlainConsole

    console = PlainConsole(stderr=stderr)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return PlainConsole(width=160, stderr=stderr)  # a pipe has no width; 80 would fold every name


def print_text(text: str, file: TextIO | None = None) -> None:
    print(visible(text), file=file)


def print_error(message: str, start: str = "error: ") -> None:
    print_text(f"{start}{message}", sys.stderr)


def print_lines(lines: "Iterable[str]", console: "Console", *, folded: bool = False) -> None:
    """Print text as it is. If `folded`, break it at the width of the console, which else the terminal does."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=not folded)


def print_notes(remarks: "Iterable[str]", console: "Console") -> None:
    for remark in remarks:
        console.print(f"note: {remark}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def print_parts(console: "Console", parts: "Iterable[Table | Text | str]") -> None:
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=not hasattr(part, "columns"))


@contextmanager
def errors_as_notes(consequence: str) -> "Iterator[None]":
    """Print errors inside the block as notes: the run is already saved, and must not seem to have failed."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as refusal:  # models, images and disks can fail in any way
        print_error(f"{consequence}: {' '.join(str(refusal).split())[:300] or type(refusal).__name__}", "note: ")


def exit_stopped(stop: BaseException, again: str) -> NoReturn:
    """Say how to go on, and end with the status of a process that a signal ended."""
    if is_first_process():
        print_error(f"{str(stop) or 'stopped'}; go on with: {again}", "")
    sys.exit(128 + (signal.SIGTERM if "SIGTERM" in str(stop) else signal.SIGINT))


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch started."""
    ranks = (os.environ[name] for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ)
    return next(ranks, "0") == "0"


def command_line() -> str:
    """Return the command that this process was started by, without --resume and --overwrite."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return shlex.join(["probe-kd", *words])


def as_options(**options: Any) -> str:
    """Format options for the command line. None is left out, and a list repeats its option."""
    items = [(key, item) for key, value in options.items() for item in (value if isinstance(value, list) else [value])]
    return "".join(f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in items if value is not None)


def check_free(output: Path | None, overwrite: bool) -> None:
    if output is not None and output.exists() and not overwrite:
        raise RunError(f"{output} exists; --overwrite replaces it")


def write_text(text: str, path: Path, *, overwrite: bool) -> None:
    check_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as refusal:
        raise RunError(f"cannot write {path}: {refusal.strerror}") from None
