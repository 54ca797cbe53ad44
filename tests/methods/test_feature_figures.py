"""The figures of layers and pairs, against numpy and scikit-learn on all features at once, and what is degenerate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from probe_kd.engine.spec import InputSpec, Pair
from probe_kd.errors import DataError, MatchError
from probe_kd.methods import feature_figures
from probe_kd.methods.feature_figures import FeatureFigures, measure_features
from probe_kd.methods.feature_matching import assign, defect, features_score, match_features, remarks
from probe_kd.methods.layer_figures import (
    PENALTY,
    cka,
    hsic_sums,
    input_sums,
    joint_sums,
    layer_statistics,
    layer_sums,
    linearly_explained,
    target_sums,
)
from probe_kd.methods.similarity import Sums, added

Change = Callable[[Tensor, Tensor], Tensor]  # of a stage's output and input
Array = Float[np.ndarray, "images positions channels"]


def summed(sums_of: Callable[..., Sums], *features: Array, sizes: tuple[int, ...]) -> Sums:
    """The sums over batches of these sizes."""
    total: Sums = {}
    for parts in zip(*(torch.from_numpy(feature).split(sizes) for feature in features), strict=True):
        total = added(total, sums_of(*parts))
    return total


def drawn(*shape: int, seed: int = 0, offset: float = 3.0) -> Array:
    """Features with a mean, correlated channels and channels of unequal size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=shape) @ rng.normal(size=(shape[-1], shape[-1]))
    return np.asarray(mixed * rng.lognormal(size=shape[-1]) + offset)


def hsic_of_tuples(left: Array, right: Array) -> float:
    """The U-statistic of HSIC from its definition: the mean over all ordered tuples of four different images."""
    k, m = (values.reshape(len(values), -1) @ values.reshape(len(values), -1).T for values in (left, right))
    tuples = list(permutations(range(len(left)), 4))
    return float(np.mean([k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in tuples]))


def test_cka_is_the_mean_over_batches_of_the_unbiased_estimator_by_its_definition() -> None:
    features = [drawn(12, 3, 5), drawn(12, 1, 40, seed=1), drawn(12, 3, 5)[:, :, :2] ** 2]
    sizes = (5, 7)
    parts = [np.split(feature, [5]) for feature in features]

    def hsic(one: int, other: int) -> float:
        return sum(size * hsic_of_tuples(parts[one][part], parts[other][part]) for part, size in enumerate(sizes))

    expected = [[hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)) for b in range(3)] for a in range(3)]
    total: Sums = {}
    for batch in zip(*(torch.from_numpy(feature).split(sizes) for feature in features), strict=True):
        total = added(total, hsic_sums(batch))
    np.testing.assert_allclose(cka(total).numpy(), expected, rtol=1e-9)


def test_cka_of_unrelated_features_is_zero_however_few_the_images() -> None:
    """The usual estimator gives 0.97 here: 16 images of 500 channels."""
    values = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sums = summed(lambda a, b: hsic_sums([a, b]), *(rng.normal(size=(64, 1, 500)) for _ in "ab"), sizes=(16,) * 4)
        values.append(float(cka(sums)[0, 1]))
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(20) + 1e-3


def singular_values_of_scaled(features: Array) -> Float[np.ndarray, " n"]:
    """As shares of their sum, with every channel at variance 1, or with less where it has little."""
    centred = features - features.mean(0)
    deviations = centred.std((0, 1))
    divided = centred / deviations.clip(min=1e-2 * np.sqrt((deviations**2).mean()))
    singular = np.linalg.svd(divided.reshape(-1, features.shape[-1]), compute_uv=False)
    return np.asarray(singular[singular > 1e-12] / singular.sum())


@pytest.mark.parametrize("shape", [(40, 4, 6), (30, 1, 50)])
def test_the_statistics_of_a_layer_are_numpys(shape: tuple[int, int, int]) -> None:
    features = drawn(*shape)
    features[:, :, 2] *= 60.0
    channels = torch.arange(shape[-1])
    statistics = layer_statistics(summed(lambda batch: layer_sums(batch, channels), features, sizes=(7, shape[0] - 7)))
    singular = np.linalg.svd((features - features.mean(0)).reshape(-1, shape[-1]), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    energies = (features**2).sum((0, 1))
    large = energies > 100 * np.sort(energies)[(len(energies) - 1) // 2]
    assert statistics.energy == pytest.approx((features**2).mean(), rel=1e-12)
    assert statistics.constant == pytest.approx(1 - features.var(0, ddof=1).mean() / (features**2).mean(), abs=1e-12)
    assert statistics.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    scaled = singular_values_of_scaled(features)
    assert statistics.scaled_rank == pytest.approx(np.exp(-(scaled * np.log(scaled)).sum()), rel=1e-5)
    assert statistics.leading == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-9)
    assert statistics.outliers == large.sum() >= 1
    assert statistics.outlier_share == pytest.approx(energies[large].sum() / energies.sum(), rel=1e-12)


@pytest.mark.parametrize(("images", "positions", "inputs", "targets"), [(60, 4, 7, 5), (40, 1, 90, 3)])
def test_what_a_linear_map_explains_is_scikit_learns_on_the_other_half(
    images: int, positions: int, inputs: int, targets: int
) -> None:
    x = drawn(images, positions, inputs)
    y = np.tanh(x[..., :2] @ np.random.default_rng(2).normal(size=(2, targets)) / 5) + drawn(
        images, positions, targets, seed=3
    )
    flat = [[half.reshape(-1, half.shape[-1]) for half in (of[0::2], of[1::2])] for of in (x, y)]
    scores = []
    for fitted, measured in ((0, 1), (1, 0)):
        scaler = StandardScaler().fit(flat[0][fitted])
        ridge = Ridge(alpha=PENALTY * len(flat[0][fitted]))
        ridge.fit(scaler.transform(flat[0][fitted]), flat[1][fitted])
        scores.append(r2_score(flat[1][measured], ridge.predict(scaler.transform(flat[0][measured]))))
    halves = []
    for half in (0, 1):
        of_inputs, of_targets = x[half::2], y[half::2]
        sizes = (11, len(of_inputs) - 11)
        halves.append(
            summed(input_sums, of_inputs, sizes=sizes)
            | summed(target_sums, of_targets, sizes=sizes)
            | summed(joint_sums, of_inputs, of_targets, sizes=sizes)
        )
    assert linearly_explained(halves) == pytest.approx(np.mean(scores), abs=1e-9)


class Stage(nn.Sequential):
    """Two convolutions, the first with a stride, and a change of what they yield. The next stage reads it unchanged."""

    def __init__(self, inputs: int, width: int, stride: int, change: Change) -> None:
        first, second = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        super().__init__(first, nn.BatchNorm2d(width), nn.ReLU(), second)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.unchanged = super().forward(x)
        return self.change(self.unchanged, x)


class Stages(nn.Module):
    """A classifier of four stages, of stride 2, 4, 8 and 16, or `strides`; `changes` are by the number of a stage."""

    def __init__(self, widths: Sequence[int], changes: Mapping[int, Change], strides: Sequence[int] = (2,) * 4) -> None:
        super().__init__()
        same: Change = lambda y, x: y  # noqa: E731
        sizes = zip((3, *widths[:-1]), widths, strides, strict=True)
        self.stages = nn.Sequential(
            *(Stage(*size, changes.get(index, same)) for index, size in enumerate(sizes))  # type: ignore[arg-type]
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, height, width)
        for stage in self.stages:
            stage(x)
            x = stage.unchanged  # type: ignore[assignment]
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def constant(y: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(y) + torch.arange(y.shape[-1], device=y.device)


def dead(y: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(y)


def of_rank_one(y: Tensor, x: Tensor) -> Tensor:
    return y[:, :1] * torch.linspace(1, 2, y.shape[1], device=y.device).view(-1, 1, 1)


def with_outlier(y: Tensor, x: Tensor) -> Tensor:
    return torch.cat([y[:, :1] * 300.0, y[:, 1:]], 1)


def with_offset(y: Tensor, x: Tensor) -> Tensor:
    return y + 30.0


def with_nan(y: Tensor, x: Tensor) -> Tensor:
    return torch.where(y > y.mean(), torch.nan, y)


def as_input(y: Tensor, x: Tensor) -> Tensor:
    return 0 * y + x


PLAIN = InputSpec((3, 32, 32), 0.0, 1.0)  # type: ignore[arg-type]


def images(count: int = 64) -> Tensor:
    """Images of one pattern of random strength, and noise."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(3, 32, 32, generator=generator)
    return torch.randn(count, 1, 1, 1, generator=generator) * pattern + torch.randn(
        count, 3, 32, 32, generator=generator
    )


def measured(student: nn.Module, teacher: nn.Module, size: int = 16, **options: Any) -> FeatureFigures:
    return measure_features(student, teacher, images().split(size), student_input=PLAIN, teacher_input=PLAIN, **options)


def stages(changes: Mapping[int, Change] | None = None, widths: Sequence[int] = (8, 8, 12, 16), **more: Any) -> Stages:
    torch.manual_seed(len(widths) + sum(widths))
    return Stages(widths, changes or {}, **more)


def hooked(model: Stages, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The outputs of these modules by torch's own hooks, batch by batch."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: taken[name].append(output))
    with torch.no_grad():
        for batch in images().split(16):
            model(batch)
    return taken


def test_all_figures_are_those_of_the_features_that_the_models_give() -> None:
    """At grids that differ, and with no more positions and channels than are read of all: 4x4 at most."""
    student, teacher = stages(strides=(8, 1, 2, 1)), stages(widths=(6, 10, 12, 14), strides=(8, 2, 2, 1))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    figures = measured(student.eval(), teacher.train())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert (student.training, teacher.training, figures.images) == (False, True, 64)
    sides = [
        hooked(model, [str(layer.tap) for layer in layers])
        for model, layers in ((student.train(), figures.student), (teacher.eval(), figures.teacher))
    ]
    for row, of_student in enumerate(sides[0].values()):
        for column, of_teacher in enumerate(sides[1].values()):
            pair, cka_sums, halves = (
                figures.pairs[row][column],
                dict[str, Tensor](),
                [dict[str, Tensor]() for _ in "ab"],
            )
            for batches in zip(of_student, of_teacher, strict=True):
                cka_sums = added(cka_sums, hsic_sums([batch.flatten(2).mT for batch in batches]))
                grid = [min(sizes) for sizes in zip(*(batch.shape[2:] for batch in batches), strict=True)]
                x, y = (F.adaptive_avg_pool2d(batch, grid).flatten(2).mT for batch in batches)
                for half in (0, 1):
                    parts = x[half::2], y[half::2]
                    sums = input_sums(parts[0]) | target_sums(parts[1]) | joint_sums(*parts)
                    halves[half] = added(halves[half], sums)
            assert pair.cka == pytest.approx(float(cka(cka_sums)[0, 1]), abs=1e-6)
            assert pair.explained == pytest.approx(linearly_explained(halves), abs=1e-6)
    last = torch.cat(sides[1]["stages.3"]).double()
    assert figures.teacher[-1].statistics.energy == pytest.approx(float(last.square().mean()), rel=1e-6)


def test_a_sample_of_positions_and_channels_gives_nearly_the_same_and_the_seed_gives_the_very_same() -> None:
    widths = (8, 8, 16, 520)
    models = stages(widths=widths, strides=(2, 1, 2, 2)), stages(widths=widths, strides=(2, 2, 2, 2))
    first, second, other = (measured(*models, seed=seed) for seed in (0, 0, 1))
    assert first == second != other
    for one, two in zip(first.pairs[0], other.pairs[0], strict=True):
        assert one.cka == pytest.approx(two.cka, abs=0.1)
        assert one.explained == pytest.approx(two.explained, abs=0.1)


CHANGES = {
    "constant": (constant, "is the same for every image"),
    "dead": (dead, "is zero for every image"),
    "rank one": (of_rank_one, "varies in one direction only"),
    "not finite": (with_nan, "holds NaN or infinity"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("index", [1, 3])
def test_a_layer_that_teaches_nothing_is_told_and_not_paired(name: str, index: int) -> None:
    change, why = CHANGES[name]
    figures = measured(stages(), stages({index: change}, widths=(8, 8, 8, 8)))
    (remark,) = [text for text in remarks(figures) if f"'stages.{index}'" in text]
    assert why in remark
    pairs = match_features(figures, num_pairs=2)
    usable = [str(layer.tap) for layer in figures.teacher if not defect(layer, "teacher")]
    assert f"stages.{index}" not in usable
    assert {str(pair.teacher) for pair in pairs} <= set(usable)
    assert (str(pairs[-1].student), str(pairs[-1].teacher)) == ("stages.3", usable[-1])


def test_layers_in_a_row_that_teach_nothing_are_told_at_once() -> None:
    figures = measured(stages(), stages({1: dead, 2: dead}, widths=(8, 8, 8, 8)))
    (remark,) = [text for text in remarks(figures) if "not paired" in text or "none" in text]
    assert remark.startswith("teacher layers 'stages.1' to 'stages.2', 2 in a row: each is zero for every image")


@pytest.mark.parametrize("change", [constant, dead, of_rank_one])
def test_a_layer_of_the_student_that_says_nothing_yet_is_paired(change: Change) -> None:
    """As the last stage of a model whose residual branches begin at zero."""
    figures = measured(stages({3: change}, widths=(8, 8, 8, 8)), stages())
    assert not [text for text in remarks(figures) if text.startswith("student")]
    last = match_features(figures, num_pairs=2)[-1]
    assert (str(last.student), str(last.teacher)) == ("stages.3", "stages.3")


def test_a_map_that_is_worse_than_the_mean_explains_nothing() -> None:
    figures = measured(stages(), stages())
    pairs = tuple(
        tuple(replace(pair, explained=explained) for pair in row)
        for row, explained in zip(figures.pairs, (-749.0, -0.4, 0.004, 0.6), strict=True)
    )
    reasons = [pair.reason for pair in match_features(replace(figures, pairs=pairs), num_pairs=4)]
    assert ["nothing explained" in reason for reason in reasons] == [True, True, True, False]
    assert "60% explained" in reasons[-1]


@pytest.mark.parametrize(("change", "why"), [(with_outlier, "1 of 8 channels hold"), (with_offset, "is the same for")])
def test_a_target_that_a_channel_or_a_constant_rules_is_told_and_normalised(change: Change, why: str) -> None:
    figures = measured(stages(), stages({2: change}, widths=(8, 8, 8, 8)))
    (remark,) = [text for text in remarks(figures) if "'stages.2'" in text]
    assert why in remark
    pairs = {str(pair.teacher): pair for pair in match_features(figures)}
    assert pairs["stages.2"].adapter == {"normalize": "fitted"}
    assert pairs["stages.1"].adapter == {"normalize": "layer"}
    assert why in pairs["stages.2"].reason


def test_figures_of_few_images_are_told_to_mean_little() -> None:
    figures = measured(stages(), stages())
    few, enough = (remarks(replace(figures, images=images)) for images in (99, 100))
    assert few[1:] == enough
    assert "figures of 99 images mean little" in few[0]


@pytest.mark.parametrize("size", [32, 48])
def test_a_layer_of_the_student_that_yields_the_images_as_it_sees_them_is_left_out(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first stage of stride 1 is among the candidates, whatever the matcher says of it."""
    every = [f"stages.{index}" for index in range(4)]
    monkeypatch.setattr(feature_figures, "candidates", lambda traced: [traced[tap] for tap in every])
    student = stages({0: as_input}, widths=(3, 8, 8, 8), strides=(1, 2, 2, 2))
    given = F.interpolate(images(), (size, size))
    figures = measure_features(student, stages(), [given], student_input=PLAIN, teacher_input=PLAIN)
    (remark,) = [text for text in remarks(figures) if text.startswith("student")]
    assert "'stages.0' yields the images themselves" in remark
    assert "stages.0" not in {str(pair.student) for pair in match_features(figures, num_pairs=3)}


def test_without_layers_images_or_pairs_there_is_an_error_that_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="7 images"):
        measure_features(stages(), stages(), [images(7)], student_input=PLAIN, teacher_input=PLAIN)
    figures = measured(stages(), stages())
    with pytest.raises(MatchError, match="num_pairs 5: 4 layers of the student and 4 of the teacher"):
        match_features(figures, num_pairs=5)
    with pytest.raises(MatchError, match=r"teacher has no layer .* 'stages.0' is zero"):
        match_features(measured(stages(), stages(dict.fromkeys(range(4), dead))))
    with pytest.raises(MatchError, match=r"'head' was not measured; the candidates: stages.0, stages.1"):
        figures.of("stages.0", "head")


def test_assign_finds_the_choice_with_the_greatest_sum_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for rows, columns, count in [(3, 4, 2), (5, 4, 3), (4, 4, 4), (2, 6, 1)]:
        costs, gains = rng.normal(size=(rows, columns)).tolist(), rng.normal(size=(columns + 1, columns)).tolist()
        choices = [
            [*zip((*some, rows - 1), (*others, columns - 1), strict=True)]
            for some in combinations(range(rows - 1), count - 1)
            for others in combinations(range(columns - 1), count - 1)
        ]

        def worth(choice: list[tuple[int, int]], costs: Any = costs, gains: Any = gains) -> float:
            befores = [-1, *(column for _, column in choice)]
            return sum(
                gains[before + 1][column] - costs[row][column]
                for before, (row, column) in zip(befores, choice, strict=False)
            )

        best = assign(costs, lambda before, column, gains=gains: gains[before + 1][column], count)
        assert best == max(choices, key=worth)


def test_pairs_stand_for_the_whole_teacher_and_leave_out_what_another_layer_carries_too() -> None:
    """Four stages of this teacher, of which two carry the same: three pairs do not take both."""

    def as_before(y: Tensor, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    teacher = stages({2: as_before}, widths=(8,) * 4, strides=(4, 2, 2, 1))
    figures = measured(stages(strides=(4, 2, 2, 2)), teacher)
    assert figures.within_teacher[1][2] == max(value for row in figures.within_teacher for value in row if value < 1)
    pairs = match_features(figures, num_pairs=3)
    assert [str(pair.teacher) for pair in pairs][0::2] == ["stages.0", "stages.3"]
    assert str(pairs[1].teacher) in ("stages.1", "stages.2")


def test_layers_of_the_first_strides_are_left_out_where_enough_others_remain() -> None:
    figures = measured(stages(), stages())
    assert {str(pair.teacher) for pair in match_features(figures, num_pairs=3)} == {
        f"stages.{index}" for index in (1, 2, 3)
    }
    assert len(match_features(figures)) == 4


def test_the_score_is_that_by_which_pairs_are_chosen() -> None:
    """No other monotone choice with the deepest layers has a greater one."""
    figures = measured(stages(strides=(4, 2, 2, 1)), stages(widths=(8, 10, 12, 14), strides=(4, 2, 1, 2)))
    taps = [[str(layer.tap) for layer in layers] for layers in (figures.student, figures.teacher)]
    for count in (1, 2, 3):
        choices = [
            [Pair(*pair) for pair in zip((*some, taps[0][-1]), (*others, taps[1][-1]), strict=True)]
            for some in combinations(taps[0][:-1], count - 1)
            for others in combinations(taps[1][:-1], count - 1)
        ]
        best = max(features_score(figures, choice) for choice in choices)
        assert features_score(figures, match_features(figures, num_pairs=count)) == pytest.approx(best, abs=1e-12)
