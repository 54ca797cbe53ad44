"""The control of unlike pairs, from docs/study/control.csv: tables, verdicts and sentences."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from rows import Key, Row, change, decided, differences, groups, table

MODELS = {
    "vit": "ViT",
    "resnet": "ResNet",
    "mixer": "mixer",
    "swin": "Swin",
    "mobilenet": "MobileNet",
    "convnext": "ConvNeXt",
}
ALONE, SOFT, AUTOMATIC = "alone", "soft targets, labels in full", "hint, all pairs, normalised"
ALIKE = "resnet-resnet"  # the one pair of one family

Accuracies = Mapping[Key, Mapping[float, float]]  # of a pair and a method, by seed


class Claim(NamedTuple):
    """A published order of two methods."""

    better: str
    worse: str
    source: str


CLAIMS = (
    Claim(ALONE, "hint, one pair", "hints collapse between unlike models: Hao et al. 2023"),
    Claim(ALONE, "hint, all pairs", "hints collapse between unlike models: Hao et al. 2023"),
    Claim("OFA, outputs and exits", SOFT, "Hao et al. 2023"),
    Claim("OFA, outputs and exits", "DIST", "Hao et al. 2023"),
    Claim("OFA, outputs and exits", "OFA, outputs", "Hao et al. 2023"),
    Claim("RSD", "OFA, outputs and exits", "Zhang et al. 2025"),
    Claim("RSD", "hint, one pair", "Zhang et al. 2025"),
    Claim("DIST", SOFT, "Huang et al. 2022"),
    Claim("DKD", SOFT, "Zhao et al. 2022"),
    Claim("ReviewKD", "hint, one pair", "Chen et al. 2021"),
    Claim("PKD", "hint, all pairs", "Cao et al. 2022"),
    Claim("SP", "hint, one pair", "Tung and Mori 2019"),
    Claim("RKD", "hint, one pair", "Park et al. 2019"),
)


def accuracies(rows: Sequence[Row]) -> Accuracies:
    """The test accuracy of every finished cell: of one whose three seeds were tested with what was chosen."""
    tests = groups([row for row in rows if row["part"] == "test"], "pair", "method")
    return {key: {row["seed"]: row["test"] for row in runs} for key, runs in tests.items() if len(runs) == 3}


def name_of(pair: str) -> str:
    student, teacher = pair.split("-")
    return f"{MODELS[student]} <- {MODELS[teacher]}"


def over(measured: Accuracies, pair: str, method: str, other: str) -> list[float]:
    """The differences of two methods seed by seed; none where a cell is not finished."""
    if (pair, method) not in measured or (pair, other) not in measured:
        return []
    return differences(measured[pair, method], measured[pair, other])


def state(rows: Sequence[Row], done: int, left: int, hours: float | None) -> str:
    """How many cells are finished, and what the others cost by the runs so far."""
    seconds = [row["core_seconds"] for row in rows]
    if not left:
        cost = f"Their {len(rows)} runs took {sum(seconds) / 2 / 3600:.1f} hours of two cores"
        return (
            f"**All {done} cells are finished.** {cost}. An empty place in a table is a cell that was not possible.\n"
        )
    text = f"**{done} of {done + left} cells are finished.** An empty place in a table is a cell that is not."
    if hours is None:
        return text + "\n"
    cost = f"A run takes {fmean(seconds):.0f} seconds of one core (the mean of {len(rows)} so far)"
    return f"{text} {cost}, and what is left {hours:.1f} hours of two idle cores.\n"


def gains(measured: Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> Iterator[str]:
    """Points over the student alone; in the first line its accuracy."""
    if not measured:
        return
    lines = []
    for method in methods:
        if method == ALONE:
            means = [fmean(measured[pair, ALONE].values()) if (pair, ALONE) in measured else None for pair in pairs]
            lines.append([method, *("" if mean is None else f"{mean:.1f} %" for mean in means)])
        else:
            changes = (over(measured, pair, method, ALONE) for pair in pairs)
            lines.append([method, *(change(values) if values else "" for values in changes)])
    yield table("method", *map(name_of, pairs), rows=lines) + "\n"


def summary(measured: Accuracies, pairs: Sequence[str]) -> Iterator[str]:
    """For the README: points over the student alone with soft targets, and with normalised hints of all pairs."""
    lines = []
    for pair in pairs:
        gained = [over(measured, pair, method, ALONE) for method in (SOFT, AUTOMATIC)]
        if all(gained):
            alone = f"{fmean(measured[pair, ALONE].values()):.1f} %"
            lines.append((name_of(pair), alone, *(f"{fmean(values):+.1f}" for values in gained)))
    yield table("student <- teacher", "alone", "soft targets", "hints, normalised", rows=lines) + "\n"


def means(measured: Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """By method, the points over the student alone in each unlike pair; methods finished in all, the best first."""
    unlike = [pair for pair in pairs if pair != ALIKE]
    gained = {
        method: [fmean(values) for pair in unlike if (values := over(measured, pair, method, ALONE))]
        for method in methods
        if method != ALONE
    }
    whole = {method: values for method, values in gained.items() if len(values) == len(unlike)}
    return dict(sorted(whole.items(), key=lambda item: -fmean(item[1])))


def ranking(measured: Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> Iterator[str]:
    """The methods by their mean gain over the student alone, of those that are finished in all unlike pairs."""
    gained = means(measured, pairs, methods)
    if gained:
        listed = "; ".join(f"{method} {fmean(values):+.1f}" for method, values in gained.items())
        yield f"Points over the student alone, in the mean of the {len(pairs) - 1} unlike pairs: {listed}.\n"


def answer(measured: Accuracies, pairs: Sequence[str], methods: Sequence[str]) -> Iterator[str]:
    """Which methods are better or worse than automatic matching with normalised hints, pair by pair."""
    unlike = [pair for pair in pairs if pair != ALIKE]
    against: dict[str, list[tuple[str, list[float]]]] = {}
    for method in methods:
        compared = [(pair, over(measured, pair, method, AUTOMATIC)) for pair in unlike]
        if method not in (ALONE, AUTOMATIC) and any(values for _, values in compared):
            against[method] = [(pair, values) for pair, values in compared if values]
    if not against:
        yield "No method has been compared with normalised hints of all pairs yet, so there is no answer.\n"
        return
    lines = []
    for method, compared in sorted(against.items(), key=lambda item: -fmean(fmean(values) for _, values in item[1])):
        places: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for pair, values in compared:
            places[decided(values)].append(f"{name_of(pair)} {change(values)}")
        lines.append([method, *("; ".join(places[sign]) for sign in (1, 0, -1))])
    better = [line[0] for line in lines if line[1] and not line[3]]
    everywhere = [name for name in better if len(against[name]) == len(unlike) and not _undecided(against[name])]
    counted = f"Of {len(against)} methods that were compared with normalised hints of all pairs in unlike pairs,"
    if everywhere:
        yield f"{counted} {_listed(everywhere)} better in all {len(unlike)} of them.\n"
    else:
        some = f"{_listed(better)} better in some and worse in none"
        others = some if better else "none is better in some without being worse in others"
        yield f"{counted} none is better in all {len(unlike)} pairs, and {others}.\n"
    yield table("method", "better", "undecided", "worse", rows=lines) + "\n"


def _undecided(compared: Sequence[tuple[str, Sequence[float]]]) -> bool:
    return any(decided(values) == 0 for _, values in compared)


def _listed(names: Sequence[str]) -> str:
    return f"{'; '.join(names) or 'none'} {'is' if len(names) < 2 else 'are'}"


def claims(measured: Accuracies, pairs: Sequence[str]) -> Iterator[str]:
    """What is published about the order of two methods, and what was measured in the unlike pairs."""
    unlike = [pair for pair in pairs if pair != ALIKE]
    lines = []
    for claim in CLAIMS:
        values = {pair: over(measured, pair, claim.better, claim.worse) for pair in unlike}
        lines.append((claim.better, claim.worse, claim.source, *(_verdict(values[pair]) for pair in unlike)))
    yield table("better", "worse", "said by", *map(name_of, unlike), rows=lines) + "\n"


def _verdict(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{('undecided', 'confirmed', 'refuted')[decided(values)]} {change(values)}"
