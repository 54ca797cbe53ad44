"""An epoch of `probe-kd train` beside one of timm's training script, on a CPU, as whole processes.

python benchmarks/timm_script.py --timm-script train.py [--quick] [--rounds 4]

timm's script is not part of its package: give a checkout's `train.py`. It takes no weights for a teacher but those of
the hub, so both teachers have random ones: a step costs the same. Both have one thread and one worker, which the script
needs. What counts is the time of all processors, children included, of a long run less that of a short one. A round
takes four minutes.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
from gpu import call_of_script, text_of_recipe
from input import photographs

CASE, QUICK = ("resnet18", "resnet34"), ("resnet10t", "resnet10t")
OURS, SCRIPT, CHANNELS_LAST = "probe-kd train", "timm's script", "timm's script, channels last"
PROBE_KD = [sys.executable, "-c", "from probe_kd.cli import main; main()"]
SHORT = 1  # epochs


def seconds_of(call: Sequence[str]) -> float:
    """What a process and its children took of all processors. Stops with its words if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if run.returncode:
        raise SystemExit(f"{call[3:]} failed:\n{(run.stdout + run.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def call_of_recipe(case: tuple[str, str], folder: Path, size: int, batch: int, epochs: int) -> list[str]:
    recipe, text = folder / f"recipe-{epochs}.yaml", text_of_recipe(case, folder, size, batch, epochs)
    recipe.write_text(text.replace("batch_size:", "workers: 1, batch_size:"), encoding="utf-8")
    return [*PROBE_KD, "train", str(recipe), "--out", str(folder / "run"), "--overwrite", "--quiet"]


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--timm-script", help="train.py of a checkout of timm; without it, only probe-kd is measured")
    parser.add_argument("--images", type=int, default=384)
    wishes = parser.parse_args()
    case, size, batch, images = (QUICK, 32, 4, 8) if wishes.quick else (CASE, 64, 32, wishes.images)
    rounds, long = (1, 2) if wishes.quick else (wishes.rounds or 4, 5)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photographs(folder, images)

        def calls(epochs: int) -> dict[str, list[str]]:
            made = {OURS: call_of_recipe(case, folder, size, batch, epochs)}
            if wishes.timm_script:
                script = (wishes.timm_script, "cpu", case, folder, size, batch, epochs, "-j", "1")
                made |= {SCRIPT: call_of_script(*script), CHANNELS_LAST: call_of_script(*script, "--channels-last")}
            return made

        short, longer = calls(SHORT), calls(long)
        epochs: dict[str, list[float]] = {name: [] for name in short}
        runs: dict[str, list[float]] = {name: [] for name in short}
        for number in range(rounds):
            for name in list(short) if number % 2 == 0 else reversed(list(short)):
                runs[name].append(seconds_of(longer[name]))
                epochs[name].append((runs[name][-1] - seconds_of(short[name])) / (long - SHORT))
            print({name: f"{values[-1]:.2f}" for name, values in epochs.items()}, file=sys.stderr, flush=True)
    rows = []
    of_epochs, of_runs = measure.Samples(epochs), measure.Samples(runs)
    for name in epochs:
        ratios = (of_epochs.ratio(OURS, to=name), of_runs.ratio(OURS, to=name)) if name != OURS else ("", "")
        seconds = (samples.milliseconds(name) / 1000 for samples in (of_epochs, of_runs))
        rows.append((name, *(f"{value:.2f}" for value in seconds), *ratios))
    print(
        measure.section(
            "An epoch on a CPU, beside timm's training script",
            measure.command(),
            f"{case[0]} from {case[1]}, {images} JPEGs of 500x375, {size} pixels, {batch} a batch, labels and soft "
            f"targets, everything else by default, one thread and one worker. Seconds of all processors: of an epoch "
            f"(a run of {long} epochs less one of {SHORT}), and of the whole run of {long}; and probe-kd's time as a "
            f"multiple, over {rounds} alternating rounds, median (quartiles).",
            ("process", "epoch, s", "run, s", "probe-kd, epoch", "probe-kd, run"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
