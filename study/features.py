"""Does the score of `probe-kd match --by features` order what the study measured? Writes docs/study/features.csv.

    python study/features.py              # after study.py, whose teachers it reads from runs/study

For each pair of models, the score of the pairs of layers that the study compared, with the gains in accuracy of hints
at these pairs (docs/study/tests.csv), and the means of CKA and of what a linear map explains, which the score does not
maximise. No student is trained.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from probe_kd import FeatureFigures, Pair, match, match_features
from probe_kd.methods.feature_matching import features_score
from probe_kd.recipe.feature_measuring import ImageSource, measure_models
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import load
from study import ALLOWED, PAIRS, RECIPES, ROOT, known, weights_of

METHODS = {"one": "hint, one pair", "crossed": "hint, pairs crossed", "all": "hint, all pairs"}


def gains(pair: str) -> dict[str, float]:
    """Points over the baseline of hints at each choice of layers, mean over seeds."""
    with (ROOT / "docs" / "study" / "tests.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["pair"] == pair and row["images"] == "few"]
    means = {
        method: fmean(float(row["test"]) for row in rows if row["method"] == method)
        for method in {"alone", *METHODS.values()}
    }
    return {layers: means[method] - means["alone"] for layers, method in METHODS.items()}


def measured(pair: str, out: Path) -> tuple[Plan, FeatureFigures]:
    weights = str(weights_of(PAIRS[pair], out))
    sets = [f"data.root={out / 'data'}", "teacher.train=null", f"teacher.checkpoint={weights}"]
    planned = plan(load(RECIPES / f"{pair}.yaml", sets=sets), allow_import=ALLOWED)
    assert planned.teacher is not None
    figures = measure_models(
        planned.student,
        planned.teacher,
        ImageSource("", planned.recipe.data, planned.datasets),
        teacher_checkpoint=weights,
        inputs=(planned.student_input, planned.teachers[""].input),
    )
    return planned, figures


def rows_of(pair: str, out: Path) -> Iterator[list[str | float]]:
    planned, figures = measured(pair, out)
    assert planned.teacher is not None
    layers = {name: [Pair(*item) for item in known()["layers"][pair][name].items()] for name in ("one", "crossed")}
    layers["all"] = list(match(planned.student, planned.teacher))
    layers["by features"] = list(match_features(figures, num_pairs=len(layers["all"])))
    for name, pairs in layers.items():
        of_pairs = [figures.of(item.student, item.teacher) for item in pairs]
        gain = gains(pair).get(name)
        yield [
            pair,
            name,
            "" if gain is None else round(gain, 2),
            round(features_score(figures, pairs), 4),
            round(fmean(item.cka or 0.0 for item in of_pairs), 3),
            round(fmean(item.explained or 0.0 for item in of_pairs), 3),
            "; ".join(map(str, pairs)),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="folder of the study's runs")
    out = parser.parse_args().out
    with (ROOT / "docs" / "study" / "features.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pair", "layers", "gain", "score", "cka", "explained", "pairs"])
        for pair in (pair for pair in PAIRS if "crossed" in known()["layers"][pair]):  # what tests.csv has
            writer.writerows(rows_of(pair, out))


if __name__ == "__main__":
    main()
