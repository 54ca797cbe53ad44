"""How long a command takes as a whole process, beside the import that it cannot do without.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

import measure

COMMANDS = {
    "probe-kd --help": ["-m", "probe_kd.cli", "--help"],
    "import timm": ["-c", "import timm"],
    "probe-kd inspect convnext_tiny": ["-m", "probe_kd.cli", "inspect", "convnext_tiny"],
    "probe-kd match vit_tiny <- resnet50": [
        *("-m", "probe_kd.cli", "match"),
        *("--student", "vit_tiny_patch16_224", "--teacher", "resnet50"),
    ],
}
RUNS = 5


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    wishes = measure.options(__doc__).parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(wishes.rounds or (1 if wishes.quick else RUNS)):  # interleaved, so that a busy moment falls on all
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    rows = [
        (f"`{name}`", f"{statistics.median(taken):.2f}", f"{min(taken):.2f} to {max(taken):.2f}")
        for name, taken in times.items()
    ]
    print(
        measure.section(
            "Starting a command",
            measure.command(),
            "One row is one command as a whole process, in seconds; most cannot do without `import timm`.",
            ("command", "median", "least to most"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
