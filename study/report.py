"""The tables and plots of the study, from docs/study/*.csv into docs/results.md, between its `study:` marks.

python study/report.py                # `make study` runs it last

What the figures mean is written around the marks by hand, and has to be read again where they have changed.
"""

import argparse
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

DOCS = Path(__file__).parents[1] / "docs"
Row = dict[str, Any]
Key = tuple[str, ...]


def read(name: str) -> list[Row]:
    """The rows of a table, with numbers where there are any; none where it is not there yet."""
    path = DOCS / "study" / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def groups(rows: Iterable[Row], *keys: str) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`85.21 ± 0.40`: the mean and the standard deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def table(*head: str, rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gains(rows: Sequence[Row]) -> dict[Key, list[float]]:
    """By cell, the test accuracy less that of the baseline of the same seed."""
    alone = {(row["images"], row["pair"], row["seed"]): row["test"] for row in rows if row["method"] == "alone"}
    found: dict[Key, list[float]] = {}
    for row in rows:
        base = alone.get((row["images"], row["pair"], row["seed"]))
        if base is not None:
            found.setdefault((row["images"], row["pair"], row["method"]), []).append(row["test"] - base)
    return found


def accuracies(rows: Sequence[Row]) -> Iterator[str]:
    gained = gains(rows)
    for (images, pair), cell in groups(rows, "images", "pair").items():
        frozen = [row["teacher"] for row in cell if row["teacher_alone"] == "" and row["teacher"]]
        student, teacher = pair.split("-")
        said = "5 % of the images" if images == "few" else "all images"
        yield f"**{student} <- {teacher}, {said}**; the teacher has {fmean(frozen):.2f}.\n"
        lines = []
        for (method,), runs in groups(cell, "method").items():
            gain = gained.get((images, pair, method), [])
            change = f"{fmean(gain):+.2f} ({min(gain):+.2f} to {max(gain):+.2f})" if gain and method != "alone" else ""
            agreement = [row["agreement"] for row in runs]
            lines.append(
                (method, f"{runs[0]['lr']:g}", spread([row["test"] for row in runs]), change, spread(agreement))
            )
        yield table("method", "lr", "accuracy", "over the baseline, by seed", "agreement", rows=lines) + "\n"


def boosters(rows: Sequence[Row]) -> Iterator[str]:
    """What training together costs the teacher."""
    lines = []
    for (images, method), runs in groups(
        [row for row in rows if row["teacher_alone"] != ""], "images", "method"
    ).items():
        change = [row["teacher"] - row["teacher_alone"] for row in runs]
        alone, together = ([row[key] for row in runs] for key in ("teacher_alone", "teacher"))
        by_seed = ", ".join(f"{value:+.2f}" for value in change)
        lines.append((images, method, spread(alone), spread(together), by_seed))
    if lines:
        yield (
            table("images", "method", "teacher baseline", "teacher with the student", "change, by seed", rows=lines)
            + "\n"
        )


def indicators(curves: Sequence[Row]) -> Iterator[str]:
    """Whether a smaller loss goes with a better student: over the runs of a cell."""
    lines = []
    for (images, pair, method), cell in groups(curves, "images", "pair", "method").items():
        runs = groups([row for row in cell if row["stage"] == "train"], "lr", "seed").values()
        last = [run[-1] for run in runs]
        if len(last) < 4:
            continue
        between = spearmanr([row["loss"] for row in last], [row["held_out"] for row in last]).statistic
        best = min(last, key=lambda row: row["loss"])["held_out"]
        lost = max(row["held_out"] for row in last) - best
        along = [run for run in runs if len(run) > 1]
        agree = sum((run[-1]["loss"] < run[0]["loss"]) == (run[-1]["held_out"] > run[0]["held_out"]) for run in along)
        said = f"{agree} of {len(along)}" if along else ""
        lines.append((images, pair, method, len(last), f"{between:+.2f}", f"{lost:.2f}", said))
    if lines:
        head = (
            "images",
            "pair",
            "method",
            "runs",
            "rank correlation",
            "points lost by choosing the least loss",
            "runs whose loss and accuracy moved together",
        )
        yield table(*head, rows=lines) + "\n"


def fits(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for (pair, arm), cell in groups(rows, "pair", "arm").items():
        runs = list(groups(cell, "seed").values())
        ends = [run[-1] for run in runs]
        steps = " / ".join(f"{fmean(_steps(run, share) for run in runs):.0f}" for share in (0.5, 0.9))
        shares = [spread([end[key] for end in ends], 3) for key in ("explained", "uncentred")]
        lines.append((pair, arm, f"{ends[0]['lr']:g}", *shares, steps))
    if lines:
        head = ("pair", "loss", "lr", "variance explained", "the same, not centred", "steps to 50 / 90 % of it")
        yield table(*head, rows=lines) + "\n"


def _steps(run: Sequence[Row], share: float) -> float:
    """The steps after which so much of its own gain is there, between the looks by a straight line."""
    first, last = run[0]["explained"], run[-1]["explained"]
    aim = first + share * (last - first)
    for before, after in itertools.pairwise(run):
        if after["explained"] >= aim > before["explained"]:
            part = (aim - before["explained"]) / (after["explained"] - before["explained"])
            return float(before["step"] + part * (after["step"] - before["step"]))
    return float(run[-1]["step"])


def crossfits(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for (pair, backbone), cell in groups(rows, "pair", "backbone").items():
        by_target = {target: [row["explained"] for row in runs] for (target,), runs in groups(cell, "target").items()}
        lines.append((pair, backbone, *(spread(values, 3) for values in by_target.values())))
    if lines:
        yield table("pair", "the frozen student has learned", "hints explained", "FSP explained", rows=lines) + "\n"


def channels(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for row in rows:
        shares = (f"{row[key]:.1%}" for key in ("largest", "largest 5 %"))
        lines.append((row["teacher"], row["layer"], f"{row['channels']:.0f}", *shares, f"{row['effective']:.1f}"))
    if lines:
        head = ("teacher", "layer", "channels", "variance in the largest", "in the largest 5 %", "effective channels")
        yield table(*head, rows=lines) + "\n"


def draw_gains(rows: Sequence[Row]) -> None:
    gained = {key: value for key, value in gains(rows).items() if key[2] != "alone"}
    panels = list(dict.fromkeys(key[:2] for key in gained))
    figure, axes = _panels(len(panels), 3.2)
    for place, (images, pair) in zip(axes, panels, strict=True):
        own = {key[2]: value for key, value in gained.items() if key[:2] == (images, pair)}
        for line, values in enumerate(own.values()):
            place.plot(values, [line] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
            place.plot(fmean(values), line, "|", color="black", markersize=12)
        place.axvline(0, color="grey", linewidth=1)
        place.set_yticks(range(len(own)), own, fontsize=7)
        place.invert_yaxis()
        place.set_title(f"{pair.replace('-', ' <- ')}, {'5 %' if images == 'few' else 'all'} of the images", fontsize=9)
        place.set_xlabel("points over the baseline", fontsize=8)
        place.grid(alpha=0.3)
    _save(figure, "gains")


def draw_fits(rows: Sequence[Row]) -> None:
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = _panels(len(pairs), 3.4)
    for place, pair in zip(axes, pairs, strict=True):
        for (arm,), cell in groups([row for row in rows if row["pair"] == pair], "arm").items():
            steps = groups(cell, "step")
            points = [(step + 1, max(-0.2, fmean(row["explained"] for row in at))) for (step,), at in steps.items()]
            place.plot(*zip(*points, strict=True), label=arm, marker=".")
        place.set(xscale="log", title=pair.replace("-", " <- "), xlabel="step + 1", ylabel="variance explained")
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    _save(figure, "fit")


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    """So many axes, two in a row, each so many inches high."""
    rows = -(-count // 2)
    figure = Figure(figsize=(11, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flatten())
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def _save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / "study" / f"{name}.svg", metadata={"Date": None})


def put(text: str, name: str, body: str) -> str:
    """The page with what stands between the marks of this name replaced."""
    marks = rf"(<!-- study: {name} -->\n).*?(<!-- end -->)"
    if not re.search(marks, text, re.DOTALL):
        raise SystemExit(f"docs/results.md has no `<!-- study: {name} -->` with an `<!-- end -->` after it")
    return re.sub(marks, lambda found: f"{found[1]}\n{body}\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "probe-kd"  # so that a drawing of the same figures is the same file
    names = ("tests.csv", "curves.csv", "fit.csv", "crossfit.csv", "channels.csv")
    tests, curves, fit, crossed, spectra = map(read, names)
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    parts = {
        "accuracies": accuracies(tests),
        "boosters": boosters(tests),
        "indicators": indicators(curves),
        "fits": fits(fit),
        "crossfits": crossfits(crossed),
        "channels": channels(spectra),
    }
    for name, lines in parts.items():
        text = put(text, name, "\n".join(lines) or "Not measured yet.\n")
    page.write_text(text, encoding="utf-8")
    if tests:
        draw_gains(tests)
    if fit:
        draw_fits(fit)


if __name__ == "__main__":
    main()
