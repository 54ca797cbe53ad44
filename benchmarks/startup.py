"""How long a command takes as a whole process, and how much memory, beside the import that it cannot do without.

python benchmarks/startup.py
"""

import os
import subprocess
import sys
from pathlib import Path

from measure import Samples, Spread, command, interleaved, options, section

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
COMMANDS = {
    "import timm": ["-c", "import timm"],
    "probe-kd --help": ["-m", "probe_kd.cli", "--help"],
    "probe-kd inspect convnext_tiny": ["-m", "probe_kd.cli", "inspect", "convnext_tiny"],
    "probe-kd match vit_tiny <- resnet50": [
        *("-m", "probe_kd.cli", "match"),
        *("--student", "vit_tiny_patch16_224", "--teacher", "resnet50"),
    ],
    "probe-kd check quickstart.yaml": ["-m", "probe_kd.cli", "check", str(RECIPE)],
}
RUNS = 5
EMPTY_APP = """\
import typer
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
@app.command()
def first(): pass
@app.command()
def second(): pass
app()
"""
HELP = {"an empty typer app": ["-c", EMPTY_APP, "--help"], "`probe-kd --help`": COMMANDS["probe-kd --help"]}
HELP_RUNS = 60  # a fifth of a second each, of which the difference is a tenth


# A process of its own runs each command: the peak of a child begins with that of the process it was forked from, and
# this one has torch in it.
PROGRAM = """\
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measured(arguments: list[str]) -> tuple[float, int]:
    """(seconds, peak of resident bytes) of one process."""
    line = [sys.executable, "-c", PROGRAM, sys.executable, *arguments]
    seconds, peak = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def help_beside_an_empty_app(rounds: int) -> str:
    """What the commands, their options and the modules of this package add to typer's own start."""
    arms = {
        name: lambda line=line: subprocess.run([sys.executable, *line], check=True, stdout=subprocess.DEVNULL)
        for name, line in HELP.items()
    }
    samples = interleaved(arms, rounds)
    empty, probe_kd = HELP
    fastest = {name: min(samples.seconds[name]) for name in HELP}
    rows = [
        [empty, f"{samples.milliseconds(empty):.0f}", f"{1000 * fastest[empty]:.0f}", "", ""],
        [
            probe_kd,
            f"{samples.milliseconds(probe_kd):.0f}",
            f"{1000 * fastest[probe_kd]:.0f}",
            samples.ratio(probe_kd, empty),
            f"{fastest[probe_kd] / fastest[empty]:.3f}",
        ],
    ]
    header = ["", "ms, median", "ms, minimum", "ratio by round (quartiles)", "ratio of minima"]
    return section("Help beside an empty typer app", command(), f"{rounds} rounds, arms in turn.", header, rows)


def main() -> None:
    arguments = options(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once, not at every start
    print(help_beside_an_empty_app(1 if arguments.quick else arguments.rounds or HELP_RUNS))
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peaks: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(1 if arguments.quick else arguments.rounds or RUNS):  # in turn, so that a busy moment falls on all
        for name, line in COMMANDS.items():
            taken, peak = measured(line)
            seconds[name].append(taken)
            peaks[name].append(peak)
    samples = Samples(seconds)
    timm = Spread.of(peaks["import timm"]).median
    rows = [
        [
            f"`{name}`",
            f"{Spread.of(seconds[name]).median:.2f}",
            ""
            if name == "import timm"
            else f"{(samples.milliseconds(name) - samples.milliseconds('import timm')) / 1000:+.2f}",
            f"{Spread.of(peaks[name]).median / 2**20:.0f}",
            "" if name == "import timm" else f"{(Spread.of(peaks[name]).median - timm) / 2**20:+.0f}",
        ]
        for name in COMMANDS
    ]
    print(
        section(
            "Commands as whole processes",
            command(),
            f"Medians of {len(seconds['import timm'])} runs, and the difference to `import timm` alone.",
            ["", "s", "s beyond timm", "MiB at the peak", "MiB beyond timm"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
