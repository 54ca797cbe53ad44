"""Targets normalised by statistics that are fitted once: against numpy in float64, and kept wherever they are saved."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probe_kd import Distiller, InputSpec, Objective
from probe_kd.engine.weights import load_weights, save_weights
from probe_kd.errors import AdapterError
from probe_kd.methods.normalisation import FittedNorm
from probe_kd.methods.rotations import balancing_rotation, hadamard

KINDS = ["fitted", "phi_s"]


def distribution(width: int, count: int, rank: int | None = None) -> Tensor:
    """Vectors whose channels have unlike means, deviations and correlations."""
    generator = torch.Generator().manual_seed(width)
    latent = torch.randn(count, rank or width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return latent @ (mixing * torch.logspace(-1, 0.5, width)) + torch.linspace(-5, 9, width)


def fitted(kind: Any, vectors: Tensor) -> FittedNorm:
    norm = FittedNorm(kind, vectors.shape[1], "x").double()
    moments = norm.empty_moments()
    for part in vectors.split(37):
        moments.add(part)
    norm.fit(moments)
    return norm


@pytest.mark.parametrize("order", [1, 2, 4, 12, 16, 20, 28, 36, 112, 192, 384, 576, 1280])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("width", [1, 3, 24, 47, 52, 92, 128, 257])
def test_every_width_has_a_rotation_to_equal_variances(width: int) -> None:
    """Also those without a Hadamard matrix, and variances of which most are zero."""
    for variances in (np.geomspace(1e-6, 1e3, width), np.eye(width)[0], np.ones(width)):
        rotation = balancing_rotation(variances)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-12)
        np.testing.assert_allclose(np.diag((rotation * variances) @ rotation.T), variances.mean(), rtol=1e-9)


@pytest.mark.parametrize("width", [16, 21, 24])
def test_phi_s_is_a_rotation_and_one_factor_after_which_all_channels_have_variance_1(width: int) -> None:
    vectors = distribution(width, 400)
    norm = fitted("phi_s", vectors)
    numbers: NDArray[np.float64] = vectors.numpy()
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(numbers.T, bias=True))
    alpha = np.sqrt(eigenvalues.mean())
    normalised = norm(vectors).numpy()
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.var(0), 1, rtol=1e-5)
    # invertible, and distances keep their proportions
    matrix = norm.scale.numpy()
    np.testing.assert_allclose(alpha**2 * matrix.T @ matrix, np.eye(width), atol=1e-5)
    np.testing.assert_allclose(alpha**2 * normalised @ matrix + norm.mean.numpy(), numbers, atol=2e-4)
    if width % 4 == 0:  # the equation: every eigenvector has the same share of every channel
        shares = np.abs(alpha * matrix @ eigenvectors)
        np.testing.assert_allclose(shares, 1 / np.sqrt(width), rtol=1e-4)


def test_each_channel_is_standardised_and_one_without_variance_stays_small() -> None:
    vectors = torch.cat([distribution(6, 300), torch.full((300, 1), 7.0, dtype=torch.float64)], 1)
    normalised = fitted("fitted", vectors)(vectors)
    expected = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    torch.testing.assert_close(normalised[:, :6], expected[:, :6], rtol=1e-5, atol=1e-5)
    assert normalised[:, 6].abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_vectors_count_every_position(kind: Any) -> None:
    vectors = distribution(8, 3 * 4 * 5)
    maps = vectors.reshape(3, 4, 5, 8).permute(0, 3, 1, 2)
    of_vectors, of_maps = fitted(kind, vectors), fitted(kind, maps)
    assert int(of_maps.count) == 60
    torch.testing.assert_close(of_maps.scale, of_vectors.scale)
    torch.testing.assert_close(of_maps(maps).permute(0, 2, 3, 1).reshape(60, 8), of_vectors(vectors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_does_not_vary_or_is_not_finite_is_refused(kind: Any) -> None:
    for value, words in ((3.0, "does not vary"), (torch.nan, "is not finite")):
        with pytest.raises(AdapterError, match=words):
            fitted(kind, torch.full((50, 4), value, dtype=torch.float64))


class Body(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images)
        return features.mean((2, 3))


IMAGES = torch.randn(12, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def distiller(kind: Any, teacher: nn.Module | None = None, **options: Any) -> Distiller:
    torch.manual_seed(0)
    objective = Objective("hint", pairs={"layer": "layer"}, normalize=kind, **options)
    return Distiller(Body(5), teacher or Body(8), objective, student_input=InputSpec((3, 28, 28)))


@pytest.mark.parametrize("options", [{}, {"tokens": "pool"}, {"policy": "fixed"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_needs_statistics_which_fit_targets_sets_and_every_copy_keeps(
    kind: Any, options: Any, tmp_path: Path
) -> None:
    fresh = distiller(kind, **options)
    with pytest.raises(AdapterError, match=r"has no statistics yet; call `distiller.fit_targets\(batches\)`"):
        fresh(IMAGES)
    fresh.fit_targets([IMAGES[:7], (IMAGES[7:], torch.zeros(5))])
    expected = fresh(IMAGES)["loss"]
    with torch.no_grad():  # the target by hand
        feature = fresh.frozen_teacher.layer(IMAGES).double()  # type: ignore[union-attr, operator]
    feature = feature.mean((2, 3)) if options.get("tokens") else feature
    norm = next(module for module in fresh.adapters.modules() if isinstance(module, FittedNorm))
    np.testing.assert_allclose(norm.mean, feature.movedim(1, -1).reshape(-1, 8).mean(0), rtol=1e-5, atol=1e-6)
    variances = norm(feature).movedim(1, -1).reshape(-1, 8).var(0, correction=0)
    np.testing.assert_allclose(variances, 1, rtol=1e-4)

    save_weights(fresh.adapters, tmp_path / "adapters.safetensors", {})
    loaded, restored = distiller(kind, **options), distiller(kind, **options)
    load_weights(loaded.adapters, tmp_path / "adapters.safetensors")
    restored.load_state_dict(fresh.state_dict())
    for copied in (loaded, restored, copy.deepcopy(restored)):
        assert torch.equal(copied(IMAGES)["loss"], expected)
    if not options:
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(restored, backend="aot_eager")(IMAGES)["loss"], expected)


@pytest.mark.parametrize("tokens", ["drop", "pool"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cache_stores_does_not_depend_on_statistics(kind: Any, tokens: Any) -> None:
    first, second = distiller(kind, tokens=tokens), distiller(kind, tokens=tokens)
    first.fit_targets([IMAGES])
    second.fit_targets([IMAGES[:3] * 2])
    stored = first.teacher_targets(IMAGES)
    assert first.targets == distiller("none", tokens=tokens).targets
    for one, other in zip(stored, second.teacher_targets(IMAGES), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(second(IMAGES, None, stored)["loss"], second(IMAGES)["loss"])
    assert not torch.equal(second(IMAGES)["loss"], first(IMAGES)["loss"])


def test_statistics_add_up_over_processes() -> None:
    """Every process has its own images, and one has none."""
    whole = distiller("phi_s")
    whole.fit_targets([IMAGES])
    parts = [IMAGES[:5], IMAGES[5:], IMAGES[:0]]
    sums: list[list[Tensor]] = [[], [], []]
    for part, own in zip(parts, sums, strict=True):
        with pytest.raises(AdapterError, match="no images"):
            distiller("phi_s").fit_targets(
                part.split(2) if len(part) else [], add_up=lambda tensor, own=own: own.append(tensor) or tensor * 0
            )
    totals = iter([sum(tensors) for tensors in zip(*sums, strict=True)])
    together = distiller("phi_s")
    together.fit_targets([], add_up=lambda tensor: next(totals))
    for name, value in whole.adapters.state_dict().items():
        torch.testing.assert_close(together.adapters.state_dict()[name], value)


def test_the_statistics_of_a_teacher_that_trains_too_are_refused() -> None:
    objectives = [
        Objective("hint", pairs={"layer": "layer"}, normalize="phi_s"),
        Objective("cross_entropy", of="teacher"),
    ]
    with pytest.raises(AdapterError, match="a teacher that trains with the student change; take `normalize: layer`"):
        Distiller(Body(5), Body(8), objectives, student_input=InputSpec((3, 28, 28)), block="output")
