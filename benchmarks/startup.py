"""How long a command takes as a whole process, and how much memory, beside the import that it cannot do without.

python benchmarks/startup.py
"""

import os
import subprocess
import sys
from pathlib import Path

from measure import Samples, Spread, command, options, section

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


def main() -> None:
    wishes = options(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peaks: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(1 if wishes.quick else wishes.rounds or RUNS):  # interleaved, so that a busy moment falls on all
        for name, arguments in COMMANDS.items():
            taken, peak = measured(arguments)
            seconds[name].append(taken)
            peaks[name].append(peak)
    seen = Samples(seconds)
    timm = Spread.of(peaks["import timm"]).median
    rows = [
        [
            f"`{name}`",
            f"{Spread.of(seconds[name]).median:.2f}",
            ""
            if name == "import timm"
            else f"{(seen.milliseconds(name) - seen.milliseconds('import timm')) / 1000:+.2f}",
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
