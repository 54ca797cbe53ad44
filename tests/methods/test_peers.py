"""The losses against torchdistill's, where both have one definition; and the two that differ, by how much.

torchdistill is a test extra (`pip install '.[peers]'`), which `make test` installs.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe_kd.methods.losses.labels import cross_entropy
from probe_kd.methods.losses.maps import attention
from probe_kd.methods.losses.matrices import flow_matrix, fsp
from probe_kd.methods.losses.outputs import dist, soft_targets

mid_level = pytest.importorskip("torchdistill.losses.mid_level")
LOGITS = {"student_module_path": "x", "student_module_io": "output", "teacher_module_path": "x"} | {
    "teacher_module_io": "output"
}
Sizes = st.tuples(st.integers(2, 6), st.integers(3, 9), st.integers(0, 99))


def draw(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(student: Tensor, teacher: Tensor) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    return {"x": {"output": student}}, {"x": {"output": teacher}}


@settings(deadline=None, max_examples=30)
@given(sizes=Sizes, temperature=st.sampled_from([1.0, 2.0, 4.0, 10.0]))
def test_soft_targets_plain_and_standardized(sizes: tuple[int, int, int], temperature: float) -> None:
    batch, classes, seed = sizes
    student, teacher = draw(batch, classes, seed=seed), draw(batch, classes, seed=seed + 1)
    labels = torch.arange(batch) % classes
    for name, standardize in (("KDLoss", False), ("LogitStdKDLoss", True)):
        peer = getattr(mid_level, name)(**LOGITS, temperature=temperature, alpha=0.3, beta=0.7)
        ours = 0.3 * cross_entropy(student, labels) + 0.7 * soft_targets(
            student, teacher, temperature=temperature, standardize=standardize
        )
        torch.testing.assert_close(ours, peer(*both(student, teacher), labels))
        # Where its alpha is unset or 0, torchdistill leaves T^2 out.
        peer = getattr(mid_level, name)(**LOGITS, temperature=temperature, alpha=0.0)
        ours = soft_targets(student, teacher, temperature=temperature, standardize=standardize)
        torch.testing.assert_close(ours, temperature**2 * peer(*both(student, teacher), labels))


@settings(deadline=None, max_examples=30)
@given(sizes=Sizes, temperature=st.sampled_from([1.0, 2.0]))
def test_dist(sizes: tuple[int, int, int], temperature: float) -> None:
    batch, classes, seed = sizes
    student, teacher = draw(batch, classes, seed=seed), draw(batch, classes, seed=seed + 1)
    peer = mid_level.DISTLoss(**LOGITS, beta=2.0, gamma=0.5, tau=temperature)
    ours = dist(student, teacher, temperature=temperature, inter=2.0, intra=0.5)
    torch.testing.assert_close(ours, peer(*both(student, teacher)))


@settings(deadline=None, max_examples=20)
@given(sizes=Sizes, form=st.sampled_from(["paper", "code"]))
def test_attention(sizes: tuple[int, int, int], form: str) -> None:
    batch, channels, seed = sizes
    student, teacher = draw(batch, channels, 4, 5, seed=seed), draw(batch, channels + 2, 4, 5, seed=seed + 1)
    where = {"path": "x", "io": "output"}
    peer = mid_level.ATLoss({"pair": {"student": where, "teacher": where}}, mode=form)
    ours = attention(student, teacher, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, peer(*both(student, teacher)))


@settings(deadline=None, max_examples=20)
@given(sizes=Sizes, downsamples=st.booleans())
def test_the_matrix_of_fsp_is_the_same_and_its_norm_is_not(sizes: tuple[int, int, int], downsamples: bool) -> None:
    batch, channels, seed = sizes
    sides = [
        (draw(batch, channels, 6, 4, seed=seed + side), draw(batch, 3, *((3, 2) if downsamples else (6, 4)), seed=side))
        for side in (1, 2)
    ]
    matrices = [flow_matrix(*flow) for flow in sides]
    for flow, matrix in zip(sides, matrices, strict=True):
        torch.testing.assert_close(matrix, mid_level.FSPLoss.compute_fsp_matrix(*flow))
    # The paper squares the Frobenius norm; torchdistill adds up the norms of the columns, unsquared.
    difference = matrices[0] - matrices[1]
    by_hand = sum(math.fsum(map(float, (image**2).flatten())) for image in difference) / batch
    assert fsp(*matrices).item() == pytest.approx(by_hand)
    ends = {
        f"{side}_{end}": {"path": end, "io": "output"} for side in ("student", "teacher") for end in ("first", "second")
    }
    seen = [{"first": {"output": first}, "second": {"output": second}} for first, second in sides]
    columns = mid_level.FSPLoss({"pair": ends})(*seen)
    assert columns.item() == pytest.approx(difference.square().sum(1).sqrt().sum().item() / batch)
