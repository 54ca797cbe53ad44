"""Losses of adapted features and of maps, against the papers' equations written out in float64, between any layouts."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import agrees, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_adapters import KINDS, feature
from torch import Tensor

from probe_kd import Layout, adapt
from probe_kd.errors import LossError
from probe_kd.methods.adapters import adapt_maps
from probe_kd.methods.losses.features import cwd, ickd, pkd, smooth_l1
from probe_kd.methods.losses.maps import gram_tokens, nst

MAPS = [kind for kind in KINDS if kind[0] is not Layout.NC]


def norm(row: Tensor) -> Tensor:
    return (row @ row).sqrt()


def written_smooth_l1(s: Tensor, t: Tensor, beta: float = 1.0) -> Tensor:
    difference = (s - t).abs()
    return torch.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2).mean()


def written_pkd(s: Tensor, t: Tensor) -> Tensor:
    """1 - r of each channel, over the batch and the positions."""
    rows = [side.transpose(0, 1).flatten(1) for side in (s, t)]
    centred = [[row - row.sum() / len(row) for row in side] for side in rows]
    return sum(1 - a @ b / norm(a) / norm(b) for a, b in zip(*centred, strict=True)) / s.shape[1]


def written_cwd(s: Tensor, t: Tensor, temperature: float = 4.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    rows = [side.flatten(2).flatten(0, 1) / temperature for side in (s, t)]
    for a, b in zip(*rows, strict=True):
        log_p, log_q = (row - row.max() - (row - row.max()).exp().sum().log() for row in (a, b))
        total = total + (log_q.exp() * (log_q - log_p)).sum()
    return temperature**2 * total / len(rows[0])


def written_ickd(s: Tensor, t: Tensor) -> Tensor:
    values = []
    for sides in zip(s.flatten(2), t.flatten(2), strict=True):
        own, other = ([torch.stack([a @ b for b in map_]) for a in map_] for map_ in sides)
        values += [((a / norm(a) - b / norm(b)) ** 2).sum() for a, b in zip(own, other, strict=True)]
    return sum(values) / len(values)


def written_nst(s: Tensor, t: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of the channels, with the kernel (x y)^2."""
    values = []
    for sides in zip(s.flatten(2), t.flatten(2), strict=True):
        own, other = ([channel / norm(channel) for channel in map_] for map_ in sides)

        def kernel(first: list[Tensor], second: list[Tensor]) -> Tensor:
            return sum((a @ b) ** 2 for a in first for b in second) / len(first) / len(second)

        values.append(kernel(own, own) + kernel(other, other) - 2 * kernel(own, other))
    return sum(values) / len(values)


def written_gram_tokens(s: Tensor, t: Tensor) -> Tensor:
    values = []
    for sides in zip(s.flatten(2), t.flatten(2), strict=True):
        own, other = ([position / norm(position) for position in map_.T] for map_ in sides)
        n = len(own)
        values += [(own[i] @ own[j] - other[i] @ other[j]) ** 2 for i in range(n) for j in range(n)]
    return sum(values) / len(values)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "smooth_l1": (smooth_l1, written_smooth_l1, {"beta": 0.3}),
    "pkd": (pkd, written_pkd, {}),
    "cwd": (cwd, written_cwd, {}),
    "cwd, hot": (cwd, written_cwd, {"temperature": 100.0}),
    "ickd": (ickd, written_ickd, {}),
    "nst": (nst, written_nst, {}),
    "gram_tokens": (gram_tokens, written_gram_tokens, {}),
}
OF_MAPS = (nst, gram_tokens)


def sides_of(function: Callable[..., Tensor], sizes: tuple[int, ...], seed: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, channels, others, height, width = sizes
    if function not in OF_MAPS:
        others = channels
    return (
        draw(batch, channels, height, width, seed=seed, scale=scale),
        draw(batch, others, height, width, seed=seed + 50),
    )


@pytest.mark.parametrize("sizes", [(3, 2, 4, 3, 3), (2, 7, 5, 1, 2), (2, 3, 2, 4, 5), (1, 5, 4, 2, 2), (4, 4, 6, 2, 3)])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_equations(name: str, sizes: tuple[int, ...]) -> None:
    """With more channels than positions, and with fewer, for which some losses have two ways to compute them."""
    function, written, options = LOSSES[name]
    for seed, scale in enumerate([1.0, 30.0, 0.01]):
        sides = sides_of(function, sizes, seed, scale)
        agrees(function, written, sides, options, scale=scale, in_float32={"rel": 2e-5})


@pytest.mark.parametrize("kind", MAPS, ids=str)
def test_unlike_layouts_widths_and_grids_are_compared_after_their_adapter(kind: Any) -> None:
    spec, student, *_ = feature(kind, (3, 4), 6, 1)
    for other_kind in MAPS:
        other, teacher, *_ = feature(other_kind, (6, 8), 10, 2)
        for function, written, options in LOSSES.values():
            adapter = adapt_maps(spec, other) if function in OF_MAPS else adapt(spec, other)
            sides = [side.double() for side in adapter(student, teacher)]
            assert function(*sides, **options).item() == pytest.approx(written(*sides, **options).item(), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(sizes=st.tuples(st.integers(2, 4), *[st.integers(2, 5)] * 4), seed=st.integers(0, 99))
def test_what_does_not_matter(sizes: tuple[int, ...], seed: int) -> None:
    """The order of the images and of the positions or channels; scales and offsets that the equation does not see."""
    for function, _, options in LOSSES.values():
        s, t = sides_of(function, sizes, seed, 1.0)
        expected = function(s, t, **options)
        images, rows = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (len(s), s.shape[2]))
        of_channel, of_position = draw(1, s.shape[1], 1, 1, seed=seed).exp(), draw(len(s), 1, *s.shape[2:], seed=seed)
        same = {"images": (s[images], t[images]), "positions": (s[:, :, rows], t[:, :, rows])}
        if function is pkd:
            same["each channel"] = (of_channel * s + of_channel, t)
        if function is cwd:
            same["offset of each channel"] = (s + of_channel, t)
        if function is nst:
            same["each channel"] = (of_channel * s, t)
            same["channels"] = (s.flip(1), t)
        if function is gram_tokens:
            same["each position"] = (of_position.exp() * s, t)
            same["channels"] = (s.flip(1), t)
        if function not in (smooth_l1, cwd):
            same["scale"] = (1e6 * s, 1e-6 * t)
        for sides in same.values():
            torch.testing.assert_close(function(*sides, **options), expected, rtol=1e-6, atol=1e-9)
        if t.shape == s.shape:
            assert function(s, s, **options).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (3, 7, 1, 2)])
@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1.0, 1e4, 1e18, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_any_numbers_give_numbers(name: str, scale: float, shape: tuple[int, ...]) -> None:
    """Zeros, constants, constant channels, equal images."""
    function, _, options = LOSSES[name]
    drawn, flat = draw(*shape, seed=0).float(), draw(*shape, seed=1).float()
    flat[:, 0], flat[:, 1] = 0.7, 0.0
    contents = [scale * it for it in (torch.zeros(shape), torch.ones(shape) / 3, drawn, flat, drawn[:1].expand(shape))]
    for s in contents:
        for t in contents:
            student = s.clone().requires_grad_()
            if function is ickd and scale > 1e16:  # its products are taken of the numbers as they are
                with contextlib.suppress(LossError):
                    assert function(student, t, **options).isfinite()
                continue
            value = function(student, t, **options)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.isfinite()
            assert gradient.isfinite().all()
            if function not in (smooth_l1, cwd):  # the others have no scale
                assert -1e-6 < value.item() < 4
                assert (gradient.double() * s.double()).norm() < 20


def test_constant_channels_count_as_standardised_zeros() -> None:
    s, t = draw(3, 4, 2, 2, seed=0).float(), draw(3, 4, 2, 2, seed=1).float()
    s[:, 1], t[:, 2], s[:, 3], t[:, 3] = 0.7, 1e3, 5.0, -2.0
    r = torch.corrcoef(torch.stack([s[:, 0].flatten(), t[:, 0].flatten()]))[0, 1]
    assert pkd(s, t).item() == pytest.approx((float(1 - r) + 1 / 2 + 1 / 2 + 0) / 4, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_one_graph(name: str) -> None:
    function, _, options = LOSSES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    s, t = sides_of(function, (2, 3, 3, 2, 2), 0, 1.0)
    values = [each(s.requires_grad_(), t, **options) for each in (compiled, function)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in values))


@pytest.mark.parametrize(
    ("function", "shapes", "options", "says"),
    [
        *[(function, ((2, 4, 3), (2, 5, 3)), {}, "differ in shape") for function in (smooth_l1, pkd, cwd, ickd)],
        (smooth_l1, ((2, 4), (2, 4)), {"beta": 0.0}, "beta 0.0; it has to be positive"),
        (pkd, ((4,), (4,)), {}, r"expected \(batch, channels, ...\)"),
        (pkd, ((1, 4), (1, 4)), {}, "has a single image and position; give larger batches, or pair layers with"),
        (pkd, ((1, 4, 1, 1), (1, 4, 1, 1)), {}, "has a single image and position"),
        (cwd, ((2, 4), (2, 4)), {}, "a vector has no positions .* pair layers with positions, and leave `tokens`"),
        (cwd, ((2, 4, 3), (2, 4, 3)), {"temperature": 0.0}, "temperature 0.0; it has to be positive, and finite"),
        (ickd, ((2, 4), (2, 4)), {}, "a vector has no positions .* pair layers with positions, and leave `tokens`"),
        (nst, ((2, 4, 3, 3), (2, 4, 3, 2)), {}, "nst: expected two maps .* of one batch and grid"),
        (gram_tokens, ((2, 4, 3), (2, 4, 3)), {}, "gram_tokens: expected two maps .* of one batch and grid"),
    ],
)
def test_what_cannot_be_compared_is_refused(function: Any, shapes: Any, options: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        function(*(torch.randn(shape) for shape in shapes), **options)
