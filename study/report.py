"""The tables and plots of the study, from docs/study/*.csv into docs/results.md and README.md, between `study:` marks.

python study/report.py                # `make study` runs it last

What is said about what helps stands between the marks too, so that no sentence outlives its figures.
"""

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import control_report
import other_reports
import recipe_report
from matplotlib.figure import Figure
from rows import DOCS, Key, Row, groups, read, spread, table
from run_table import Runs
from scipy.stats import spearmanr

from study import KEY, PAIRS, TABLES, Settings, all_methods, cells, place_of, progress


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
        _draw_differences(place, own)
        place.set_title(f"{pair.replace('-', ' <- ')}, {'5 %' if images == 'few' else 'all'} of the images", fontsize=9)
        place.set_xlabel("points over the baseline", fontsize=8)
    _save(figure, "gains")


def draw_control(measured: control_report.Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> None:
    """Every method less normalised hints of all pairs, seed by seed, a panel for each pair of models."""
    automatic = control_report.AUTOMATIC
    figure, axes = _panels(len(pairs), 3.6)
    for place, pair in zip(axes, pairs, strict=True):
        compared = {name: control_report.over(measured, pair, name, automatic) for name in methods if name != automatic}
        _draw_differences(place, {name: values for name, values in compared.items() if values})
        place.set_title(control_report.name_of(pair), fontsize=9)
        place.set_xlabel("points over normalised hints of all pairs", fontsize=8)
    _save(figure, "control")


def draw_summary(measured: control_report.Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> None:
    """For the README: a line for each method, a point for each unlike pair of models."""
    gained = control_report.means(measured, pairs, methods)
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(gained)), layout="constrained")
    place = figure.subplots()
    _draw_differences(place, gained)
    place.margins(y=0.08)
    place.set_xlabel("points over the student alone, in five unlike pairs and in their mean", fontsize=8)
    _save(figure, "summary")


def _draw_differences(place: Any, values_of: Mapping[str, Sequence[float]]) -> None:
    """A line for each method: a point for every value, and their mean."""
    for line, values in enumerate(values_of.values()):
        place.plot(values, [line] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
        place.plot(fmean(values), line, "|", color="black", markersize=12)
    place.axvline(0, color="grey", linewidth=1)
    place.set_yticks(range(len(values_of)), values_of, fontsize=7)
    place.invert_yaxis()
    place.grid(alpha=0.3)


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
        raise SystemExit(f"the page has no `<!-- study: {name} -->` with an `<!-- end -->` after it")
    return re.sub(marks, lambda found: f"{found[1]}\n{body}\n{found[2]}", text, flags=re.DOTALL)


def parts() -> dict[str, Iterator[str]]:
    """What stands between each pair of marks."""
    names = ("tests.csv", "curves.csv", "fit.csv", "crossfit.csv", "channels.csv", "choices.csv")
    tests, curves, fit, crossed, spectra, chosen = map(read, names)
    pairs, methods = tuple(PAIRS), all_methods()
    rows, recipes = read("control.csv"), read("recipes.csv")
    control = control_report.accuracies(rows)
    done, left, hours = progress(cells(), Runs(TABLES / "control.csv", KEY, place_of), Settings(TABLES))
    return {
        "quickstart": recipe_report.quickstart(recipes),
        "losses": recipe_report.losses(recipes),
        "once": recipe_report.once(recipes),
        "label-free": other_reports.label_free(read("label_free.csv")),
        "few-labels": other_reports.few_labels(read("few_labels.csv")),
        "pretrained": other_reports.pretrained(read("pretrained.csv")),
        "without-labels": other_reports.without_labels(read("pretrained.csv")),
        "choices": other_reports.choices(chosen, {**other_reports.first_study(tests), **control}, pairs),
        "control-state": iter([control_report.state(rows, len(done), len(left), hours)]),
        "control-answer": control_report.answer(control, pairs, methods),
        "control-ranking": control_report.ranking(control, pairs, methods),
        "control-gains": control_report.gains(control, pairs, methods),
        "control-claims": control_report.claims(control, pairs),
        "helped": other_reports.helped(tests),
        "accuracies": accuracies(tests),
        "boosters": boosters(tests),
        "indicators": indicators(curves),
        "fits": fits(fit),
        "crossfits": crossfits(crossed),
        "channels": channels(spectra),
    }


def filled(text: str, bodies: Mapping[str, Iterator[str]]) -> str:
    for name, lines in bodies.items():
        text = put(text, name, "\n".join(lines) or "Not measured yet.\n")
    return text


def pages() -> dict[Path, dict[str, Iterator[str]]]:
    """The pages that are written from the tables, with what stands between their marks."""
    control = control_report.accuracies(read("control.csv"))
    return {
        DOCS / "results.md": parts(),
        DOCS.parent / "README.md": {"summary": control_report.summary(control, tuple(PAIRS))},
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "probe-kd"  # so that a drawing of the same figures is the same file
    for page, bodies in pages().items():
        page.write_text(filled(page.read_text(encoding="utf-8"), bodies), encoding="utf-8")
    draw_gains(read("tests.csv"))
    draw_fits(read("fit.csv"))
    control = control_report.accuracies(read("control.csv"))
    if control:
        draw_control(control, tuple(PAIRS), all_methods())
        draw_summary(control, tuple(PAIRS), all_methods())


if __name__ == "__main__":
    main()
