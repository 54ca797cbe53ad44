"""Cosine of two features against numpy; the explained variance and CKA are in tests/results/test_evaluation.py."""

import numpy as np
import pytest
import torch

from probe_kd.methods.similarity import added, cosine_sums, mean_cosine


@pytest.mark.parametrize("shape", [(7,), (7, 3, 2), (7, 5)])
@pytest.mark.parametrize("sizes", [(13,), (5, 8), (4, 4, 4, 1)])
def test_the_cosine_is_numpys_over_channels_and_its_mean_over_positions_and_images(
    shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(13, *shape)) + 0.3, rng.normal(size=(13, *shape)) + 0.3
    student[3] = 0.0
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    expected = np.where(norms > 0, (student * teacher).sum(1) / np.where(norms > 0, norms, 1), 0.0).mean()

    def measured(scale: float) -> float:
        sums: dict[str, torch.Tensor] = {}
        for ours, theirs in zip(
            torch.from_numpy(scale * student).split(sizes), torch.from_numpy(teacher).split(sizes), strict=True
        ):
            sums = added(sums, cosine_sums(ours, theirs))
        return mean_cosine(sums)

    assert measured(1.0) == pytest.approx(expected, rel=1e-12)
    assert measured(1e-30) == pytest.approx(expected, rel=1e-12)
    assert measured(-7.0) == pytest.approx(-expected, rel=1e-12)


def test_half_precision_is_summed_in_float64() -> None:
    features = torch.full((4096, 8, 3), 3e4, dtype=torch.float16)
    assert mean_cosine(cosine_sums(features, features)) == pytest.approx(1.0, abs=1e-12)
