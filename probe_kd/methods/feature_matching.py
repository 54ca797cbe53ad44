"""Pairs of layers, and how their targets are normalised, from figures of the features (`measure_features`)."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, product
from math import log2
from statistics import fmean

from probe_kd.engine.anatomy.strides import SAME_STRIDE, stride_of
from probe_kd.engine.spec import Pair, Side, Tap
from probe_kd.errors import MatchError
from probe_kd.methods.feature_figures import FeatureFigures, LayerFigures
from probe_kd.methods.normalisation import Normalize

DEFAULT_PAIRS = 4  # as many as most models have stages
DISTANCE = 0.05  # of a pair's layers from each other, against the share of the teacher that the pairs stand for
LEAST_UNEXPLAINED = 0.01  # of a layer, so that one that is explained counts for something
RANK_ONE = 2.0  # an effective rank below this is one direction and rounding, or little else
MOSTLY = 0.5  # of the energy, in a few channels: then they rule a squared error, and a norm over the channels
FEW_IMAGES = 100  # below this, a held-out half says little: a map that is fitted on 4 images explains less than nothing
NEARLY_ALL = 0.9  # of the energy, the same for all images


def match_features(figures: FeatureFigures, *, num_pairs: int | None = None) -> tuple[Pair, ...]:
    """Pair layers of a student with layers of a teacher by figures of their features, which `measure_features` took.

    Layers that teach nothing, or cannot learn, are left out (`remarks` says why), and those of stride 1 and 2 if enough
    others remain. The deepest of the others are always paired, no layer is used twice, and the pairs follow the order
    of both models. Among all such choices of `num_pairs` pairs (by default 4, or as many as there can be), the score is
    greatest:

        sum over teacher layers of share * CKA(layer, nearest paired layer of the teacher)
            - mean over pairs of the difference of places / 20

    The share of a layer is that of what a linear map from the student does not explain of it yet. So the paired layers
    stand for all of the teacher, and for what is still to be learned. The second term places the student's layers: by
    stride and depth as in `match`, since the features of an untrained student do not tell its layers apart.
    `features_score` is this score of any pairs.

    Each pair has its figures as `reason`, and the `normalize` that its target needs. Raises MatchError if a model has
    no layer that can be paired, or if there are fewer pairs than requested.
    """
    usable = _usable(figures.student, "student"), _usable(figures.teacher, "teacher")
    most = min(map(len, usable))
    count = min(DEFAULT_PAIRS, most) if num_pairs is None else num_pairs
    if not 1 <= count <= most:
        raise MatchError(
            f"num_pairs {count}: {len(usable[0])} layers of the student and {len(usable[1])} of the teacher make up to "
            f"{most}"
        )
    rows, columns = _above_stem(figures.student, usable[0], count), _above_stem(figures.teacher, usable[1], count)
    shares, similar = _shares(figures, rows, columns), _similarities(figures, columns)
    distances = _distances(figures, rows, columns)
    costs = [[DISTANCE * distance / count for distance in row] for row in distances]
    chosen = assign(costs, lambda before, column: _covered(shares, similar, before, column), count)
    return tuple(_pair(figures, rows[row], columns[column]) for row, column in chosen)


def features_score(figures: FeatureFigures, pairs: Sequence[Pair]) -> float:
    """The score by which `match_features` chooses, of any pairs of candidates, over all layers that can be paired.

    Raises MatchError for a layer that is no candidate.
    """
    rows, columns = _usable(figures.student, "student"), _usable(figures.teacher, "teacher")
    indices = [figures.indices(pair.student, pair.teacher) for pair in pairs]
    everything = range(len(figures.student)), range(len(figures.teacher))
    distances = _distances(figures, *everything)
    similar = _similarities(figures, everything[1])
    covered = [
        share * max(similar[column][paired] for _, paired in indices)
        for column, share in zip(columns, _shares(figures, rows, columns), strict=True)
    ]
    return sum(covered) - DISTANCE * fmean(distances[row][column] for row, column in indices)


def _similarities(figures: FeatureFigures, columns: Sequence[int]) -> list[list[float]]:
    """CKA of every two of these layers of the teacher, 0 where it is not defined."""
    return [[figures.within_teacher[one][other] or 0.0 for other in columns] for one in columns]


def _above_stem(layers: Sequence[LayerFigures], indices: list[int], count: int) -> list[int]:
    """Leave out layers of stride 1 and 2, which hold little more than edges, if enough others remain."""
    deep = [index for index in indices if stride_of(layers[index].spec) > 2 * SAME_STRIDE]
    return deep if len(deep) >= max(count, 2) else indices


def _shares(figures: FeatureFigures, rows: Sequence[int], columns: Sequence[int]) -> list[float]:
    """Of each teacher layer, its share of what the student's layers do not explain."""
    explained = [max(figures.pairs[row][column].explained or 0.0 for row in rows) for column in columns]
    unexplained = [1 - min(max(value, 0.0), 1 - LEAST_UNEXPLAINED) for value in explained]
    return [value / sum(unexplained) for value in unexplained]


def _covered(shares: Sequence[float], similar: Sequence[Sequence[float]], before: int, column: int) -> float:
    """The share of the teacher that a paired layer stands for, with the layers after the one paired `before` it."""
    total = shares[column]
    for layer in range(before + 1, column):
        nearest = similar[layer][column] if before < 0 else max(similar[layer][before], similar[layer][column])
        total += shares[layer] * nearest
    return total


def _distances(figures: FeatureFigures, rows: Sequence[int], columns: Sequence[int]) -> list[list[float]]:
    """How far a student's and a teacher's layer are from each other: by depth, and by stride if both models have some.

    A depth is the share of the candidates up to a layer. Half a difference of depth, and a third for each factor of 2
    between the strides.
    """
    sides = figures.student, figures.teacher
    depths = [[(index + 1) / len(layers) for index in range(len(layers))] for layers in sides]
    octaves = [[log2(stride_of(layer.spec)) for layer in layers] for layers in sides]
    strided = all(max(side) - min(side) > log2(SAME_STRIDE) for side in octaves)

    def distance(row: int, column: int) -> float:
        depth = abs(depths[0][row] - depths[1][column])
        return depth / 2 + abs(octaves[0][row] - octaves[1][column]) / 3 if strided else depth

    return [[distance(row, column) for column in columns] for row in rows]


def most_pairs(figures: FeatureFigures) -> int:
    """How many pairs there can be: each layer is in one, and layers that teach nothing are in none."""
    return min(len(_usable(figures.student, "student")), len(_usable(figures.teacher, "teacher")))


def _usable(layers: Sequence[LayerFigures], side: Side) -> list[int]:
    indices = [index for index, layer in enumerate(layers) if not defect(layer, side)]
    if not indices:
        why = "; ".join(f"'{layer.tap}' {defect(layer, side)}" for layer in layers[:3])
        raise MatchError(f"the {side} has no layer whose features can be paired: {why}")
    return indices


def defect(layer: LayerFigures, side: Side) -> str:
    """Why a layer of the teacher teaches nothing, or one of the student cannot learn; empty if nothing is wrong.

    What a layer of the student holds before training is no defect: residual branches that begin at zero leave the last
    stage of some models the same for every image.
    """
    statistics = layer.statistics
    if layer.is_input:
        return "yields the images themselves, so that nothing before it learns"
    if not statistics.finite:
        return "holds NaN or infinity"
    if side == "student":
        return ""
    if not statistics.energy:
        return "is zero for every image"
    if statistics.scaled_rank is None:
        return "is the same for every image"
    if statistics.scaled_rank < RANK_ONE:
        return f"varies in one direction only (effective rank {statistics.scaled_rank:.1f})"
    return ""


def caution(layer: LayerFigures) -> str:
    """What a raw squared error of a layer would be ruled by; empty if nothing."""
    statistics = layer.statistics
    share = statistics.outlier_share or 0.0
    if share >= MOSTLY:
        return f"{statistics.outliers} of {layer.spec.channels} channels hold {share:.0%} of the energy"
    if (statistics.constant or 0) >= NEARLY_ALL:
        return f"{statistics.constant:.0%} of the energy is the same for every image"
    return ""


def normalization(layer: LayerFigures) -> Normalize:
    """`fitted` for a target that a few channels or a constant rule: each channel then has one weight. Else `layer`."""
    return "fitted" if caution(layer) else "layer"


def remarks(figures: FeatureFigures) -> list[str]:
    """Sentences on too few images, on the layers that are left out, and on targets that have to be normalised."""
    few = (
        f"figures of {figures.images} images mean little: maps are fitted on one half of them and measured on the "
        "other; take 512"
    )
    sentences = [few] if figures.images < FEW_IMAGES else []
    for side, layers in figures.by_side.items():
        for why, alike in groupby(layers, partial(defect, side=side)):
            if why:
                sentences.append(_left_out(side, [layer.tap for layer in alike], why))
    return sentences + [
        f"teacher layer '{layer.tap}': {caution(layer)}; as a target it needs `normalize: fitted`"
        for layer in figures.teacher
        if not defect(layer, "teacher") and caution(layer)
    ]


def _left_out(side: Side, taps: Sequence[Tap], why: str) -> str:
    if len(taps) == 1:
        return f"{side} layer '{taps[0]}' {why}; it is not paired"
    return f"{side} layers '{taps[0]}' to '{taps[-1]}', {len(taps)} in a row: each {why}; none is paired"


def _pair(figures: FeatureFigures, row: int, column: int) -> Pair:
    student, teacher, pair = figures.student[row], figures.teacher[column], figures.pairs[row][column]
    statistics = teacher.statistics
    parts = [
        *([f"CKA {pair.cka:.2f}"] if pair.cka is not None else []),
        *([f"{_share(pair.explained)} explained by a linear map"] if pair.explained is not None else []),
        f"effective rank {statistics.effective_rank:.0f} of {teacher.spec.channels}",
        caution(teacher) or f"{statistics.constant:.0%} constant",
    ]
    adapter = {"normalize": normalization(teacher)}
    return Pair(student.tap, teacher.tap, reason="; ".join(parts), adapter=adapter)


def _share(explained: float) -> str:
    """A share in percent. A map that gives less than the mean on images that it was not fitted on explains nothing."""
    return f"{explained:.0%}" if explained >= 0.005 else "nothing"


def assign(costs: Sequence[Sequence[float]], gain: Callable[[int, int], float], count: int) -> list[tuple[int, int]]:
    """The `count` pairs of a row and a column with the greatest sum of gains without costs, in order in both.

    The last row and column are one of the pairs. `gain(before, column)` is that of a column after the one `before` it,
    -1 for the first. Dynamic programming over the last pair so far.
    """
    rows, columns = range(len(costs)), range(len(costs[0]))
    gains = [[gain(before, column) for column in columns] for before in range(-1, len(columns))]
    best = {
        (row, column): (gains[0][column] - costs[row][column], [(row, column)]) for row in rows for column in columns
    }
    for _ in range(count - 1):
        longer = {}
        for row, column in product(rows, columns):
            ways = [
                (total + gains[before + 1][column] - costs[row][column], [*path, (row, column)])
                for (last, before), (total, path) in best.items()
                if last < row and before < column
            ]
            if ways:
                longer[row, column] = max(ways, key=lambda way: way[0])
        best = longer
    return best[rows[-1], columns[-1]][1]
