"""Tables and sentences of choosing by data (choices.csv) and of training without labels (label_free.csv and others)."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from control_report import name_of
from rows import Row, change, decided, differences, groups, spread, table
from scipy.stats import spearmanr

DEFAULT = "default"
CHOICES = (DEFAULT, "by features", "tune, 3 runs", "tune, 10 runs")


def choices(rows: Sequence[Row], tests: Sequence[Row], pairs: Sequence[str]) -> Iterator[str]:
    """The default recipe beside what was chosen, and beside the best cell of the first study."""
    measured = {key: {row["seed"]: row["test"] for row in runs} for key, runs in groups(rows, "pair", "choice").items()}
    grid = groups([row for row in tests if row["images"] == "few"], "pair", "method")
    means = {key: fmean(row["test"] for row in runs) for key, runs in grid.items()}
    of_study = {pair for pair, _ in means}
    lines = []
    for pair in pairs:
        cells = [measured.get((pair, choice), {}) for choice in CHOICES]
        of_pair = {method: mean for (other, method), mean in means.items() if other == pair}
        best = max(of_pair, key=of_pair.__getitem__, default="")
        alone = f"{of_pair['alone']:.1f}" if of_pair else ""
        text = f"{of_pair[best]:.1f}: {best}" if best else ""
        lines.append((name_of(pair), alone, *(spread(list(cell.values()), 1) if cell else "" for cell in cells), text))
    yield table("student <- teacher", "alone", *CHOICES, "best of the first study", rows=lines) + "\n"
    for choice in CHOICES[1:]:
        changes = {
            pair: differences(measured[pair, choice], measured[pair, DEFAULT])
            for pair in pairs
            if (pair, choice) in measured and (pair, DEFAULT) in measured
        }
        if changes:
            yield f"- `{choice}` over the default: {_counted(changes.values())}."
        best = {
            pair: max(own for (other, _), own in means.items() if other == pair) for pair in changes if pair in of_study
        }
        if best:
            lost = [best[pair] - fmean(measured[pair, choice].values()) for pair in best]
            regret = ", ".join(f"{value:.1f}" for value in lost)
            yield f"  Below the best cell of the first study by {fmean(lost):.1f} points in the mean ({regret})."
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
    lines = [[*_by_seed("none (the untrained student)", untrained), "", ""]]
    for name, accuracies in students.items():
        own = {str(row["teacher"]) for row in rows if row["teachers"] == name}
        alone = "" if "+" in name else ", ".join(f"{100 * float(accuracy):.2f}" for accuracy in sorted(own))
        explained = [row["explained_variance"] for row in rows if row["teachers"] == name]
        lines.append([*_by_seed(name, accuracies), alone, spread(explained)])
    seeds = [f"seed {seed:.0f}" for seed in sorted(untrained)]
    yield table("teachers", *seeds, "mean", "the teacher itself", "explained variance", rows=lines) + "\n"
    single = sorted((name for name in students if "+" not in name), key=lambda name: -fmean(students[name].values()))
    for both in (name for name in students if "+" in name):
        for one in single:
            yield f"- `{both}` over `{one}`: {change(differences(students[both], students[one]))} points."
    yield ""


def _by_seed(name: str, accuracies: dict[float, float]) -> list[str]:
    values = [accuracies[seed] for seed in sorted(accuracies)]
    return [name, *(f"{value:.2f}" for value in values), spread(values)]


def few_labels(rows: Sequence[Row]) -> Iterator[str]:
    """Fine-tuned on few labels: what was distilled without labels beside the same student from scratch."""
    runs = groups(rows, "start", "lr")
    starts: dict[str, dict[float, float]] = {}
    for (start, _), own in sorted(runs.items(), key=lambda item: len(item[1])):
        starts[start] = {row["seed"]: 100 * row["test_accuracy"] for row in own}  # the rate with all seeds comes last
    yield (
        table("start", "seed 0", "seed 1", "seed 2", "mean", rows=[_by_seed(*item) for item in starts.items()]) + "\n"
    )
    for start in starts:
        if start != "scratch":
            yield f"- `{start}` over `scratch`: {change(differences(starts[start], starts['scratch']))} points.\n"


def sweep(rows: Sequence[Row]) -> Iterator[str]:
    """The runs of study/pretrained.py, and whether explained variance orders them as k-NN does."""
    lines = []
    for (part, arm), runs in groups(rows, "part", "arm").items():
        measures = [[100 * row[name] for row in runs if row[name] != ""] for name in ("knn", "linear")]
        explained = [row["explained"] for row in runs if row["explained"] != ""]
        accuracy = [100 * row["test"] for row in runs if row["test"] != ""]
        texts = [spread(values) if values else "" for values in (*measures, accuracy)]
        lines.append((part, arm, len(runs), *texts, spread(explained, 3) if explained else ""))
    if not lines:
        yield "Nothing of this has been measured yet.\n"
        return
    yield (
        table("part", "arm", "seeds", "k-NN", "linear probe", "test accuracy", "explained variance", rows=lines) + "\n"
    )
    yield from order_of_explained(rows)


def order_of_explained(rows: Sequence[Row]) -> Iterator[str]:
    """Whether held-out explained variance orders the runs that compare the same layers of one teacher as k-NN does."""
    for (layers,), runs in groups([row for row in rows if row["explained"] != ""], "compared").items():
        if len(runs) > 3:
            rank = spearmanr([row["explained"] for row in runs], [row["knn"] for row in runs]).statistic
            best = max(runs, key=lambda row: row["explained"])["knn"]
            lost = 100 * (max(row["knn"] for row in runs) - best)
            said = f"{layers}: the rank correlation of explained variance and k-NN is {rank:+.2f} over {len(runs)} runs"
            yield f"- {said}; choosing by it costs {lost:.2f} points.\n"


def helped(tests: Sequence[Row]) -> Iterator[str]:
    """The first study: in how many pairs each method was better than the student alone, with few images."""
    few = [row for row in tests if row["images"] == "few"]
    measured = {key: {row["seed"]: row["test"] for row in runs} for key, runs in groups(few, "pair", "method").items()}
    methods = list(dict.fromkeys(row["method"] for row in few if row["method"] != "alone"))
    for sign, word in ((1, "better"), (0, "undecided"), (-1, "worse")):
        texts = []
        for method in methods:
            changes = [
                differences(measured[pair, method], measured[pair, "alone"]) for pair, own in measured if own == method
            ]
            values = [fmean(own) for own in changes if decided(own) == sign]
            if values:
                texts.append(f"{method} ({', '.join(f'{value:+.1f}' for value in values)})")
        yield f"- **{word.capitalize()}** than the student alone: {'; '.join(texts)}.\n"
