"""Losses of the relations in a batch, against the papers' equations written out over pairs and triplets in float64."""

import contextlib
from collections.abc import Callable
from math import exp, factorial
from typing import Any

import pytest
import torch
from equations import agrees, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses import relations
from probe_kd.methods.losses.relations import cc, pkt, rkd, sp


def huber(first: Tensor, second: Tensor) -> Tensor:
    difference = (first - second).abs()
    return difference**2 / 2 if difference < 1 else difference - 0.5


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return first @ second / (first @ first).sqrt() / (second @ second).sqrt()


def written_rkd(s: Tensor, t: Tensor, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Park et al. 2019: over pairs (i, j) and triplets with the vertex j; those of equal images count zero."""
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    far = [{(i, j): ((z[i] - z[j]) ** 2).sum().sqrt() for i, j in pairs} for z in (s, t)]
    means = [sum(side.values()) / len(pairs) for side in far]
    of_pairs = sum(huber(far[0][pair] / means[0], far[1][pair] / means[1]) for pair in pairs) / n**2
    triplets = [(i, j, k) for i, j in pairs for k in range(n) if k not in (i, j)]
    of_triplets = sum(huber(*(cosine(z[i] - z[j], z[k] - z[j]) for z in (s, t))) for i, j, k in triplets) / n**3
    return distance * of_pairs + angle * of_triplets


def written_sp(s: Tensor, t: Tensor) -> Tensor:
    matrices = [torch.stack([torch.stack([a @ b for b in z]) for a in z]) for z in (s, t)]
    rows = [torch.stack([row / (row @ row).sqrt() for row in matrix]) for matrix in matrices]
    return ((rows[0] - rows[1]) ** 2).sum() / len(s) ** 2


def written_pkt(s: Tensor, t: Tensor, form: str = "paper") -> Tensor:
    n, total = len(s), torch.zeros((), dtype=torch.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i or form == "code"]
        q, p = ([(cosine(z[i], z[j]) + 1) / 2 for j in others] for z in (s, t))
        total = total + sum(b / sum(p) * ((b / sum(p)).log() - (a / sum(q)).log()) for a, b in zip(q, p, strict=True))
    return total / n


def written_cc(s: Tensor, t: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        powers = range(order + 1)
        return exp(-2 * gamma) * sum((2 * gamma) ** p / factorial(p) * cosine(a, b) ** p for p in powers)

    n = len(s)
    return sum((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in range(n) for j in range(n)) / n**2


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "rkd": (rkd, written_rkd, {}),
    "rkd of distances": (rkd, written_rkd, {"distance": 25.0, "angle": 0.0}),
    "rkd of angles": (rkd, written_rkd, {"distance": 0.0, "angle": 50.0}),
    "sp": (sp, written_sp, {}),
    "pkt": (pkt, written_pkt, {}),
    "pkt as in the code": (pkt, written_pkt, {"form": "code"}),
    "cc": (cc, written_cc, {}),
    "cc of order 5": (cc, written_cc, {"gamma": 1.3, "order": 5}),
}
FUNCTIONS = [rkd, sp, pkt, cc]


@pytest.fixture(params=[None, 1, 30], ids=["whole", "row by row", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute a matrix whole, or in parts of at most so many numbers."""
    if request.param:
        original = relations.in_parts
        monkeypatch.setattr(
            relations, "in_parts", lambda *sides, largest, **given: original(*sides, largest=request.param, **given)
        )


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_equations(name: str) -> None:
    function, written, options = LOSSES[name]
    for seed, (n, c1, c2, scale) in enumerate([(2, 3, 5, 1.0), (4, 2, 7, 30.0), (6, 9, 4, 0.01), (5, 6, 6, 1e4)]):
        sides = draw(n, c1, seed=seed, scale=scale), draw(n, c2, seed=seed + 50)
        in_float32 = {"rel": 1e-4 if function is pkt else 2e-6, "abs": 1e-12}
        agrees(function, written, sides, options, scale=scale, in_float32=in_float32)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 6), widths=st.tuples(st.integers(2, 6), st.integers(2, 6)), seed=st.integers(0, 99))
def test_what_does_not_matter(n: int, widths: tuple[int, int], seed: int) -> None:
    """The order of the images and the scale of either model, where the equation does not see them."""
    s, t = (draw(n, width, seed=seed + side) for side, width in enumerate(widths))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(draw(widths[0], widths[0], seed=seed))[0]
    factors = draw(n, 1, seed=seed).exp()
    for function, _, options in LOSSES.values():
        same = {
            "order": (s[order], t[order]),
            "scale": (1e6 * s, 1e-6 * t),
            "rotation": (s @ basis, t),
            **({"offset": (s + 3, t - 2)} if function is rkd else {}),
            **({"the scale of each image": (factors * s, t)} if function in (pkt, cc) else {}),
        }
        expected = function(s, t, **options)
        for sides in same.values():
            torch.testing.assert_close(function(*sides, **options), expected, rtol=1e-6, atol=1e-9)
        assert function(s, s, **options).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1.0, 1e4, 1e18, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_any_numbers_give_numbers(name: str, scale: float) -> None:
    """Zeros, equal vectors, opposite vectors, two equal images, one of another scale."""
    function, _, options = LOSSES[name]
    drawn = draw(4, 3, seed=0).float()
    twice, far = drawn.clone(), drawn.clone()
    twice[1], far[2] = twice[0], 1e6 * far[2]
    opposite = drawn[:1] * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    contents = [scale * it for it in (torch.zeros(4, 3), drawn, drawn[:1].expand(4, 3), opposite, twice, far)]
    for s in contents:
        for t in contents:
            student = s.clone().requires_grad_()
            if (
                function is sp and max(s.abs().max(), t.abs().max()) > 1e16
            ):  # its products are taken of the numbers as they are
                with contextlib.suppress(LossError):
                    assert function(student, t, **options).isfinite()
                continue
            value = function(student, t, **options)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.isfinite()
            assert gradient.isfinite().all()
            change = gradient.double().norm(dim=1) * s.double().norm(dim=1)
            assert change.max() < 2e4  # by so much a loss without a scale changes with a vector


def test_two_similar_vectors_far_from_the_origin_keep_their_digits() -> None:
    """A difference of products in float32 would have none: (1e3)^2 against 0.1^2 is 1e8."""
    s, t = 1e3 + 0.1 * draw(5, 8, seed=0).float(), draw(5, 6, seed=1).float()
    assert rkd(s, t).item() == pytest.approx(written_rkd(s.double(), t.double()).item(), rel=1e-5)


def test_parts_hold_no_more_than_the_vectors() -> None:
    sizes = list[int]()

    def part(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return torch.ones(())

    assert relations.in_parts(part, (torch.zeros(7),), (), numbers=10, largest=25).item() == 4
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_cannot_be_compared_is_refused(function: Callable[..., Tensor]) -> None:
    name = function.__name__
    with pytest.raises(LossError, match=rf"{name} compares the images of a batch .* a single image; give larger"):
        function(torch.randn(1, 3), torch.randn(1, 4))
    for shapes in (((2, 3, 4), (2, 3)), ((2, 3), (3, 3)), ((2, 0), (2, 3)), ((3,), (3,))):
        with pytest.raises(LossError, match=rf"{name}: expected one vector an image of both models"):
            function(*(torch.randn(shape) for shape in shapes))
    with pytest.raises(LossError, match=r"is torch.int64; expected real numbers"):
        function(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("function", "options", "says"),
    [
        (rkd, {"distance": 0.0, "angle": 0.0}, "expected factors from 0 on, and one above it"),
        (rkd, {"angle": -1.0}, "expected factors from 0 on, and one above it"),
        (pkt, {"form": "author"}, "form 'author'; expected 'paper' or 'code'"),
        (cc, {"gamma": 0.0}, "expected a gamma above 0 and an order from 1 on"),
        (cc, {"order": 0}, "expected a gamma above 0 and an order from 1 on"),
    ],
)
def test_values_that_mean_nothing_are_refused(function: Callable[..., Tensor], options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        function(torch.randn(3, 4), torch.randn(3, 5), **options)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_compiled_loss_is_one_graph_in_parts_too(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = relations.in_parts
    monkeypatch.setattr(relations, "in_parts", lambda *sides, largest, **given: original(*sides, largest=30, **given))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    s, t = draw(4, 3, seed=0).requires_grad_(), draw(4, 5, seed=1)
    values = [each(s, t) for each in (compiled, function)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in values))
