"""Tables and sentences of choosing by data (choices.csv) and of training without labels (label_free.csv and others)."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from control_report import ALONE, Accuracies, name_of, over
from pretrained import ARMS, CHANGES, DISTILLED, FREE, FROM_PROBED, FROM_TUNED, LABELS, STUDENT_ALONE
from rows import Key, Row, by_seed, change, decided, differences, groups, spread, table
from scipy.stats import spearmanr

DEFAULT = "default"
CHOICES = (DEFAULT, "by features", "tune, 3 runs", "tune, 10 runs")


def choices(rows: Sequence[Row], grid: Accuracies, pairs: Sequence[str]) -> Iterator[str]:
    """The default recipe beside what was chosen, and beside the best cell that a study found with the same budget."""
    measured = {key: {row["seed"]: row["test"] for row in runs} for key, runs in groups(rows, "pair", "choice").items()}
    means = {key: fmean(accuracies.values()) for key, accuracies in grid.items()}
    lines = []
    for pair in pairs:
        cells = [measured.get((pair, choice), {}) for choice in CHOICES]
        of_pair = {method: mean for (other, method), mean in means.items() if other == pair}
        best = max(of_pair, key=of_pair.__getitem__, default="")
        alone = f"{of_pair[ALONE]:.1f}" if ALONE in of_pair else ""
        text = f"{of_pair[best]:.1f}: {best}" if len(of_pair) > 1 else ""
        lines.append((name_of(pair), alone, *(spread(list(cell.values()), 1) if cell else "" for cell in cells), text))
    yield table("student <- teacher", "alone", *CHOICES, "best of the studies", rows=lines) + "\n"
    for choice in CHOICES[1:]:
        changes = {
            pair: differences(measured[pair, choice], measured[pair, DEFAULT])
            for pair in pairs
            if (pair, choice) in measured and (pair, DEFAULT) in measured
        }
        if changes:
            yield f"- `{choice}` over the default: {_counted(changes.values())}."
        of_pairs = {pair: [own for (other, _), own in means.items() if other == pair] for pair in changes}
        over = [fmean(measured[pair, choice].values()) - max(own) for pair, own in of_pairs.items() if len(own) > 1]
        if over:
            listed = ", ".join(f"{value:+.1f}" for value in over)
            yield f"  Over the best cell of the studies: {fmean(over):+.1f} points in the mean ({listed})."
    yield ""


def _counted(changes: Iterable[Sequence[float]]) -> str:
    listed = list(changes)
    signs = [decided(values) for values in listed]
    means = ", ".join(f"{fmean(values):+.1f}" for values in listed)
    return f"better in {signs.count(1)}, undecided in {signs.count(0)} and worse in {signs.count(-1)} pairs ({means})"


def label_free(rows: Sequence[Row]) -> Iterator[str]:
    """k-NN of the student by its teachers, and whether two teachers beat one."""
    students = {
        name: {row["seed"]: 100 * row["student"] for row in runs} for (name,), runs in groups(rows, "teachers").items()
    }
    untrained = {row["seed"]: 100 * row["untrained"] for row in rows}
    lines = [[*by_seed("none (the untrained student)", untrained), "", ""]]
    for name, accuracies in students.items():
        own = {str(row["teacher"]) for row in rows if row["teachers"] == name}
        alone = "" if "+" in name else ", ".join(f"{100 * float(accuracy):.2f}" for accuracy in sorted(own))
        explained = [row["explained_variance"] for row in rows if row["teachers"] == name]
        lines.append([*by_seed(name, accuracies), alone, spread(explained)])
    seeds = [f"seed {seed:.0f}" for seed in sorted(untrained)]
    yield table("teachers", *seeds, "mean", "the teacher itself", "explained variance", rows=lines) + "\n"
    single = sorted((name for name in students if "+" not in name), key=lambda name: -fmean(students[name].values()))
    for both in (name for name in students if "+" in name):
        for one in single:
            yield f"- `{both}` over `{one}`: {change(differences(students[both], students[one]))} points."
    yield ""


def few_labels(rows: Sequence[Row]) -> Iterator[str]:
    """Fine-tuned on few labels: what was distilled without labels beside the same student from scratch."""
    runs = groups(rows, "start", "lr")
    starts: dict[str, dict[float, float]] = {}
    for (start, _), own in sorted(runs.items(), key=lambda item: len(item[1])):
        starts[start] = {row["seed"]: 100 * row["test_accuracy"] for row in own}  # the rate with all seeds comes last
    yield (
        table("start", "seed 0", "seed 1", "seed 2", "mean", rows=[by_seed(*item) for item in starts.items()]) + "\n"
    )
    for start in starts:
        if start != "scratch":
            yield f"- `{start}` over `scratch`: {change(differences(starts[start], starts['scratch']))} points.\n"


def pretrained(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracy by the number of labels, what a student gained, and whether the probed teacher is the better one."""
    measured = finished_arms(rows, "test")
    if not measured:
        yield f"**Not measured yet**: none of {len(LABELS) * len(ARMS)} cells is finished.\n"
        return
    lines = [[arm, *(_spread_of(measured.get((part, arm))) for part in LABELS)] for arm in ARMS]
    yield table("test accuracy, percent", *LABELS, rows=lines) + "\n"
    gained = {arm: [over(measured, part, arm, STUDENT_ALONE) for part in LABELS] for arm in DISTILLED}
    lines = [[arm, *map(_change_of, values)] for arm, values in gained.items() if any(values)]
    if lines:
        yield table("points over the student alone", *LABELS, rows=lines) + "\n"
    for part in LABELS:
        if values := over(measured, part, FROM_PROBED, FROM_TUNED):
            verdict = ("Undecided", "Yes", "No")[decided(values)]
            yield f"- {part}: is the probed teacher the better one for a student? {verdict}: {change(values)}.\n"


def without_labels(rows: Sequence[Row]) -> Iterator[str]:
    """k-NN and linear probe of each arm, and whether explained variance orders the runs as k-NN does."""
    knn, linear = finished_arms(rows, "knn"), finished_arms(rows, "linear")
    arms = [arm for arm in CHANGES if (FREE, arm) in knn]
    if not arms:
        yield f"**Not measured yet**: none of {len(CHANGES)} cells is finished.\n"
        return
    base = next(iter(CHANGES))
    lines = []
    for arm in arms:
        values = over(knn, FREE, arm, base) if arm != base else []
        lines.append((arm, _spread_of(knn[FREE, arm]), _spread_of(linear[FREE, arm]), _change_of(values)))
    yield table("changed", "k-NN", "linear probe", "k-NN over the first line", rows=lines) + "\n"
    comparable = {arm for arm, changed in CHANGES.items() if not changed.keys() & {"loss", "pairs"}}
    runs = [row for row in rows if row["part"] == FREE and row["arm"] in comparable and row["use"] == "choice"]
    if len(runs) > 3:
        rank = spearmanr([row["explained"] for row in runs], [row["knn"] for row in runs]).statistic
        lost = max(row["knn"] for row in runs) - max(runs, key=lambda row: row["explained"])["knn"]
        said = f"Over {len(runs)} runs with token matching of all pairs, explained variance and k-NN on held-out images"
        yield f"{said} have a rank correlation of {rank:+.2f}; choosing by the former costs {lost:.2f} points.\n"


def finished_arms(rows: Sequence[Row], column: str) -> dict[Key, dict[float, float]]:
    """By seed, the values of the cells of which three seeds were tested."""
    cells = groups([row for row in rows if row["use"] == "test" and row[column] != ""], "part", "arm")
    return {key: {row["seed"]: row[column] for row in runs} for key, runs in cells.items() if len(runs) == 3}


def _change_of(values: Sequence[float]) -> str:
    return change(values) if values else ""


def _spread_of(values: dict[float, float] | None) -> str:
    return spread(list(values.values())) if values else ""


def first_study(tests: Sequence[Row]) -> Accuracies:
    """The test accuracy of the first study's cells with few images, by seed."""
    few = groups([row for row in tests if row["images"] == "few"], "pair", "method")
    return {key: {row["seed"]: row["test"] for row in runs} for key, runs in few.items()}


def helped(tests: Sequence[Row]) -> Iterator[str]:
    """The first study: in how many pairs each method was better than the student alone, with few images."""
    measured = first_study(tests)
    methods = list(dict.fromkeys(method for _, method in measured if method != ALONE))
    for sign, word in ((1, "better"), (0, "undecided"), (-1, "worse")):
        texts = []
        for method in methods:
            changes = [
                differences(measured[pair, method], measured[pair, ALONE]) for pair, own in measured if own == method
            ]
            values = [fmean(own) for own in changes if decided(own) == sign]
            if values:
                texts.append(f"{method} ({', '.join(f'{value:+.1f}' for value in values)})")
        yield f"- **{word.capitalize()}** than the student alone: {'; '.join(texts)}.\n"
