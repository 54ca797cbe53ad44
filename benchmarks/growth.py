"""How the cost of a step grows: with the number of pairs, the batch, the resolution and the depth of the models.

python benchmarks/growth.py [--quick] [--device cuda]
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import measure
from step import LOSSES, RESNETS, Case, arms_of

VITS = Case("vit_tiny_patch16_224", "vit_tiny_patch16_224", {}, size=64, depth=24)


def paired(case: Case, pairs: int) -> Case:
    """So many pairs of blocks, spread over the depth."""
    assert case.depth is not None
    blocks = [case.depth * (number + 1) // pairs - 1 for number in range(pairs)]
    return replace(case, pairs={f"blocks.{block}": f"blocks.{block}" for block in blocks})


@dataclass(frozen=True)
class Growth:
    """What grows, in which unit, the cases with their size in that unit, and the losses beside the labels'."""

    what: str
    unit: str
    losses: str
    cases: Sequence[tuple[float, Case]]


SMALL = replace(RESNETS, size=64)
GROWTHS = (
    Growth("hint pairs of ViT-Ti, 24 blocks", "pair", "hint", [(n, paired(VITS, n)) for n in (1, 2, 4, 8, 12, 16, 24)]),
    Growth("images", "image", "all", [(n, replace(SMALL, batch=n)) for n in (4, 8, 16, 24, 32)]),
    Growth(
        "pixels",
        "1000 pixels of an image",
        "all",
        [(side**2 / 1000, replace(SMALL, size=side, batch=8)) for side in (32, 64, 96, 128, 160)],
    ),
    Growth(
        "blocks of both ViT-Ti, 4 pairs",
        "block",
        "hint",
        [(n, paired(replace(VITS, depth=n), 4)) for n in (4, 8, 12, 16, 24)],
    ),
)
QUICK = (Growth("pairs", "pair", "hint", [(n, paired(replace(VITS, depth=3, batch=2), n)) for n in (1, 2, 3)]),)


def line(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(slope, share of the variance that the straight line explains)."""
    return statistics.linear_regression(sizes, costs).slope, statistics.correlation(sizes, costs) ** 2


def row(growth: Growth, rounds: int, device: str) -> tuple[object, ...]:
    """Milliseconds and MiB that one unit more costs, by hand and in a Distiller, and how straight both are."""
    sizes = [size for size, _ in growth.cases]
    arms = ("by hand", "Distiller")
    milliseconds: dict[str, list[float]] = {arm: [] for arm in arms}
    mebibytes: dict[str, list[float]] = {arm: [] for arm in arms}
    for _, case in growth.cases:
        made = {name: arm for name, arm in arms_of(case, LOSSES[growth.losses], device).items() if name in arms}
        samples = measure.interleaved(made, rounds, device=device)
        for arm in arms:
            milliseconds[arm].append(samples.milliseconds(arm))
            mebibytes[arm].append(measure.peak_bytes(made[arm], device) / 2**20)
    cells: list[object] = []
    for costs, digits in ((milliseconds, 2), (mebibytes, 3)):
        slopes = {arm: line(sizes, costs[arm]) for arm in arms}
        cells += [f"{slopes[arm][0]:.{digits}f} ({slopes[arm][1]:.3f})" for arm in arms]
    return growth.what, f"{sizes[0]:g} to {sizes[-1]:g}", growth.unit, *cells


def main() -> None:
    wishes = measure.options(__doc__).parse_args()
    rounds = wishes.rounds or (1 if wishes.quick else 5)
    growths = QUICK if wishes.quick else GROWTHS
    print(
        measure.section(
            "How the cost of a step grows",
            measure.command(),
            "One row is one straight line through steps of several sizes (forward, losses with the labels' among them, "
            f"backward, AdamW), each the median of {rounds} rounds: the milliseconds, and the MiB of tensors at the "
            "peak, that one unit more costs, by hand and in a Distiller; in brackets the share of the variance that "
            "the line explains. The slope by hand is that of the work itself: of a pair its map, its loss and their "
            "gradients, of an image, a pixel or a block that of the models.",
            ("grows", "from, to", "unit", "ms, by hand", "ms, Distiller", "MiB, by hand", "MiB, Distiller"),
            [row(growth, rounds, wishes.device) for growth in growths],
        )
    )


if __name__ == "__main__":
    main()
