"""Tables and sentences of the recipes as they stand (recipes.csv)."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from every_recipe import FIRST, SEEDS, alike
from rows import Row, by_seed, change, decided, differences, groups, spread, table


def quickstart(rows: Sequence[Row]) -> Iterator[str]:
    """Seed by seed, and what the distilled student gained."""
    runs = [row for row in rows if row["recipe"] == FIRST]
    if not runs:
        return
    columns = ("teacher", "baseline", "student", "baseline_agreement", "agreement")
    lines: list[Sequence[object]] = [
        [f"{row['seed']:.0f}", *(f"{row[column]:.2f}" for column in columns)] for row in runs
    ]
    lines.append(["mean", *(spread([row[column] for row in runs]) for column in columns)])
    head = ("teacher", "baseline", "student distilled", "agreement of the baseline", "agreement distilled")
    yield table("seed", *head, rows=lines) + "\n"
    gained = [row["student"] - row["baseline"] for row in runs]
    extent = f"{min(gained):+.1f} to {max(gained):+.1f}"
    yield f"The distilled student over the baseline: {change(gained)} points, {extent}.\n"


def losses(rows: Sequence[Row]) -> Iterator[str]:
    """The recipes that differ from the quickstart in their losses alone, once all seeds are there; and its baseline."""
    by_recipe = {
        name: {row["seed"]: row["student"] for row in runs}
        for (name,), runs in groups(rows, "recipe").items()
        if name in alike() and len(runs) == len(SEEDS)
    }
    if FIRST not in by_recipe:
        return
    alone = {row["seed"]: row["baseline"] for row in rows if row["recipe"] == FIRST}
    gained = {name: differences(values, alone) for name, values in by_recipe.items()}
    order = sorted(by_recipe, key=lambda name: -fmean(by_recipe[name].values()))
    lines = [[*by_seed("baseline", alone), ""]]
    lines += [[*by_seed(name, by_recipe[name]), change(gained[name])] for name in order]
    yield table("recipe", *(f"seed {seed}" for seed in SEEDS), "mean", "over the baseline", rows=lines) + "\n"
    words = ("undecided", "better", "worse")
    for sign in (1, 0, -1):
        names = [name for name in order if decided(gained[name]) == sign]
        if names:
            yield f"- {words[sign].capitalize()}: {', '.join(names)}."
    yield ""


def once(rows: Sequence[Row]) -> Iterator[str]:
    """The recipes that are run with one seed."""
    columns = ("teacher_alone", "teacher", "baseline", "student", "agreement")
    lines = []
    for (name,), runs in groups(rows, "recipe").items():
        row = runs[0]
        if name not in alike():
            models = " <- ".join(filter(None, (row["student_model"], row["teacher_model"])))
            lines.append((name, models, *("" if row[column] == "" else f"{row[column]:.2f}" for column in columns)))
    if lines:
        head = ("teacher baseline", "teacher", "baseline", "student", "agreement")
        yield table("recipe", "student <- teacher", *head, rows=lines) + "\n"
