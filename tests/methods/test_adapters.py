"""Adapters: one map in every layout against one map in every other, with the numbers worked out in numpy."""

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms import v2

from probe_kd import FeatureSpec, InputSpec, Layout, Tap, adapt
from probe_kd.errors import AdapterError
from probe_kd.methods.adapters import (
    ClassToken,
    ImageView,
    Mean,
    Resize,
    Standardize,
    ToMap,
    adapt_maps,
    adapt_matrices,
    adapt_outputs,
    semi_orthogonal,
)

BATCH = 3
KINDS = [
    (Layout.NCHW, 0),
    (Layout.NHWC, 0),
    *((Layout.NLC, prefix) for prefix in (0, 1, 2, 5)),
    (Layout.NCL, 0),
    (Layout.NCL, 1),
    (Layout.NC, 0),
]
Kind = tuple[Layout, int]
Grid = tuple[int, int]
RATIOS: list[tuple[Grid, Grid]] = [
    ((4, 6), (4, 6)),
    ((8, 12), (4, 6)),
    ((4, 6), (8, 12)),
    ((7, 5), (3, 4)),
    ((6, 4), (4, 6)),  # each is the smaller in one direction
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def feature(kind: Kind, grid: Grid, channels: int, seed: int, tap: str = "x") -> tuple[FeatureSpec, Tensor, Any, Any]:
    """(spec, tensor in its layout, the map that it holds or its vector, its class token)"""
    layout, prefix = kind
    map_, tokens = draw(BATCH, channels, *grid, seed=seed), draw(BATCH, prefix, channels, seed=seed + 50)
    sequence = torch.cat([tokens, map_.flatten(2).transpose(1, 2)], 1)
    tensor = {
        Layout.NCHW: map_,
        Layout.NHWC: map_.permute(0, 2, 3, 1),
        Layout.NLC: sequence,
        Layout.NCL: sequence.transpose(1, 2),
        Layout.NC: tokens[:, 0] if prefix else map_[:, :, 0, 0],
    }[layout]
    seen = None if layout is Layout.NC else grid
    spec = FeatureSpec(Tap(tap), layout, tuple(tensor.shape), channels, seen, prefix, order=seed)
    return spec, tensor, (map_ if seen else tensor).numpy(), tokens[:, 0].numpy() if prefix else None


def triangle(size: int, target: int) -> NDArray[np.float64]:
    """The antialiased bilinear filter as a matrix: a triangle as wide as the step, around each target's centre."""
    step = size / target
    distance = (np.arange(size) + 0.5)[None] - ((np.arange(target) + 0.5) * step)[:, None]
    weights = np.maximum(0, 1 - np.abs(distance) / step)
    return weights / weights.sum(1, keepdims=True)


def shrink(map_: NDArray[np.float32], target: Grid) -> NDArray[np.float64]:
    _, _, height, width = map_.shape
    if height % target[0] or width % target[1]:
        rows, columns = triangle(height, target[0]), triangle(width, target[1])
        return np.einsum("ih,bchw,jw->bcij", rows, map_, columns)
    blocks = map_.reshape(*map_.shape[:2], target[0], height // target[0], target[1], width // target[1])
    return blocks.mean((3, 5))


def expected(value: Any, token: Any, grid: Grid | None, tokens: str) -> NDArray[Any]:
    """What an adapter makes of one side before any projector; `grid` is None where vectors are compared."""
    if value.ndim == 2:
        return value
    if grid is not None:
        return shrink(value, grid)
    return token if tokens == "cls" and token is not None else value.mean((2, 3))


def words(steps: nn.Sequential) -> list[str]:
    """What a plan has to say of these steps."""
    said: dict[type[nn.Module], Callable[[Any], str]] = {
        ToMap: lambda _: "map",
        Resize: lambda step: "{}x{}".format(*step.target),
        nn.Conv2d: lambda step: (
            f"conv{step.kernel_size[0]}x{step.kernel_size[1]} {step.in_channels}->{step.out_channels}"
        ),
        nn.Linear: lambda step: f"linear {step.in_features}->{step.out_features}",
        Mean: lambda _: "mean",
        ClassToken: lambda _: "class token",
        Standardize: lambda step: f"{step.kind} norm",
    }
    return [said[type(step)](step) for step in steps]


@pytest.mark.parametrize("tokens", ["drop", "cls", "pool"])
@pytest.mark.parametrize("theirs", KINDS, ids=str)
@pytest.mark.parametrize("ours", KINDS, ids=str)
def test_every_layout_against_every_other(ours: Kind, theirs: Kind, tokens: Any) -> None:
    if tokens == "cls" and not ours[1] + theirs[1]:
        with pytest.raises(AdapterError, match="has a class token"):
            adapt(feature(ours, (4, 4), 4, 0)[0], feature(theirs, (4, 4), 4, 0)[0], tokens=tokens)
        return
    as_maps = tokens == "drop" and Layout.NC not in (ours[0], theirs[0])
    for (our_grid, their_grid), width in product(RATIOS, (6, 10)):
        ours_spec, student, value, token = feature(ours, our_grid, 6, seed=1)
        theirs_spec, teacher, their_value, their_token = feature(theirs, their_grid, width, seed=2)
        adapter = adapt(ours_spec, theirs_spec, tokens=tokens)
        common = (min(our_grid[0], their_grid[0]), min(our_grid[1], their_grid[1])) if as_maps else None
        student.requires_grad_()
        projected, target = adapter(student, teacher)

        assert projected.shape == target.shape == (BATCH, width, *(common or ()))
        np.testing.assert_allclose(target, expected(their_value, their_token, common, tokens), rtol=1e-4, atol=1e-5)
        *_, projector = adapter.student_steps
        plain = torch.from_numpy(expected(value, token, common, tokens)).float()
        torch.testing.assert_close(projected, projector(plain), rtol=1e-4, atol=1e-5)

        projected.square().sum().backward()
        assert student.grad is not None
        assert student.grad.abs().sum() > 0
        assert {name: p.grad is not None for name, p in adapter.named_parameters()} == {
            f"student_steps.{len(adapter.student_steps) - 1}.{name}": True for name in ("weight", "bias")
        }
        assert adapter.parameter_count == 6 * width + width
        our_plan, their_plan = words(adapter.student_steps), words(adapter.teacher_steps)
        said = " -> ".join([ours_spec.describe(), *our_plan])
        assert str(adapter) == said + (" | teacher " + " -> ".join([theirs_spec.describe(), *their_plan])) * bool(
            their_plan
        )


def plan(ours: Kind, our_grid: Grid, theirs: Kind, their_grid: Grid, channels: tuple[int, int], **options: Any) -> str:
    sides = zip((ours, theirs), (our_grid, their_grid), channels, strict=True)
    student, teacher = (feature(kind, grid, width, 0)[0] for kind, grid, width in sides)
    return str(adapt(student, teacher, **options))


def test_plans_read_as_a_sentence() -> None:
    vit, cnn, vector, swin = (Layout.NLC, 1), (Layout.NCHW, 0), (Layout.NC, 0), (Layout.NHWC, 0)
    assert plan(vit, (14, 14), cnn, (7, 7), (192, 512)) == ("tokens 14x14+1 192 -> map -> 7x7 -> conv1x1 192->512")
    assert plan(cnn, (7, 7), vit, (16, 16), (512, 384), normalize="layer") == (
        "map 7x7 512 -> conv1x1 512->384 | teacher tokens 16x16+1 384 -> map -> 7x7 -> layer norm"
    )
    assert plan(swin, (7, 7), vit, (14, 14), (64, 64), tokens="cls", policy="never") == (
        "map 7x7 64 -> mean | teacher tokens 14x14+1 64 -> class token"
    )
    assert plan(vit, (14, 14), vector, (1, 1), (192, 768)) == "tokens 14x14+1 192 -> mean -> linear 192->768"


def test_tokens_without_a_grid_are_class_tokens_or_averaged() -> None:
    """Such as cait's class attention, of one token, and a sequence that is no map of the image."""
    _, teacher, *_ = feature((Layout.NC, 0), (1, 1), 4, 0)
    target = FeatureSpec(Tap("t"), Layout.NC, (BATCH, 4), 4)
    one = FeatureSpec(Tap("s"), Layout.NLC, (BATCH, 1, 4), 4, None, 1)
    many = FeatureSpec(Tap("s"), Layout.NLC, (BATCH, 9, 4), 4)
    for spec, tensor, vector in (
        (one, draw(BATCH, 1, 4), lambda tensor: tensor[:, 0]),
        (many, draw(BATCH, 9, 4), lambda tensor: tensor.mean(1)),
    ):
        student, _ = adapt(spec, target, policy="never")(tensor, teacher)
        torch.testing.assert_close(student, vector(tensor))


def test_the_policy_decides_on_the_projector() -> None:
    same, other = (feature((Layout.NCHW, 0), (4, 4), width, 0)[0] for width in (6, 8))

    def parameters(student: FeatureSpec, teacher: FeatureSpec, policy: Any) -> int:
        return adapt(student, teacher, policy=policy).parameter_count

    assert [parameters(same, same, policy) for policy in ("auto", "always", "never", "fixed")] == [42, 42, 0, 0]
    assert [parameters(same, other, policy) for policy in ("auto", "always", "fixed")] == [56, 56, 0]
    with pytest.raises(AdapterError, match="policy 'never' for x <- x: the widths 6 and 8 differ; use policy 'auto'"):
        adapt(same, other, policy="never")


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (8, 3), (5, 5)])
def test_a_fixed_projection_keeps_lengths_as_far_as_it_can_and_is_always_the_same(rows: int, columns: int) -> None:
    matrix = semi_orthogonal(rows, columns)
    small = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(small, torch.eye(min(rows, columns)))
    torch.manual_seed(5)
    assert torch.equal(semi_orthogonal(rows, columns), matrix)
    ours, theirs = (feature((Layout.NHWC, 0), (4, 6), width, 1)[0] for width in (rows, columns))
    _, _, map_, _ = feature((Layout.NHWC, 0), (4, 6), columns, 1)
    _, target = adapt(ours, theirs, policy="fixed")(
        torch.zeros(BATCH, 4, 6, rows), torch.from_numpy(map_).movedim(1, 3)
    )
    np.testing.assert_allclose(target, np.einsum("dc,bchw->bdhw", matrix.numpy(), map_), rtol=1e-4, atol=1e-5)


def test_the_regressor_of_fitnets_is_a_valid_convolution_to_the_teachers_grid() -> None:
    student, tensor, *_ = feature((Layout.NLC, 1), (7, 6), 5, 0)
    teacher, target, *_ = feature((Layout.NCHW, 0), (3, 4), 8, 1)
    adapter = adapt(student, teacher, projector="valid")
    assert str(adapter) == "tokens 7x6+1 5 -> map -> conv5x3 5->8"
    ours, theirs = adapter(tensor, target)
    assert ours.shape == theirs.shape == (BATCH, 8, 3, 4)
    with pytest.raises(AdapterError, match=r"smaller than the teacher's \(7, 6\); use 'linear'"):
        adapt(teacher, student, projector="valid")


def test_a_regressor_ends_in_the_taps_own_nonlinearity_or_in_none() -> None:
    """A ReLU on a signed target is the defect of two well-known repositories: half of it cannot be reached."""
    student = feature((Layout.NCHW, 0), (4, 4), 5, 0)[0]
    signed = feature((Layout.NCHW, 0), (4, 4), 6, 1, "bn2")[0]
    positive = dataclasses.replace(signed, tap=Tap("act2"), activation="relu")
    assert str(adapt(student, positive, activation="tap")).endswith("conv1x1 5->6 -> relu")
    assert str(adapt(student, positive, activation="relu")).endswith("conv1x1 5->6 -> relu")
    assert str(adapt(student, signed, activation="tap")) == str(adapt(student, positive)) == "map 4x4 5 -> conv1x1 5->6"
    with pytest.raises(AdapterError, match="'relu' on a regressor for teacher tap 'bn2', which ends in no activation"):
        adapt(student, signed, activation="relu")
    with pytest.raises(
        AdapterError, match="'gelu' on a regressor for teacher tap 'act2', which ends in relu; use 'tap'"
    ):
        adapt(student, positive, activation="gelu")
    with pytest.raises(AdapterError, match="cannot reach a target that is standardised"):
        adapt(student, positive, activation="tap", normalize="layer")


FLOWS = [((Layout.NCHW, 0), (8, 8)), ((Layout.NHWC, 0), (4, 4)), ((Layout.NLC, 1), (4, 4)), ((Layout.NLC, 0), (8, 8))]


@pytest.mark.parametrize("theirs", FLOWS, ids=str)
@pytest.mark.parametrize("ours", FLOWS, ids=str)
@pytest.mark.parametrize("widths", [(3, 5), (30, 50)], ids=["matrix first", "maps first"])
def test_a_projected_matrix_is_the_matrix_of_projected_maps(
    ours: tuple[Kind, Grid], theirs: tuple[Kind, Grid], widths: tuple[int, int]
) -> None:
    """A1 G A2^T against 1x1 convolutions on the maps, for a block that keeps its grid and for one that halves it."""
    m, n = widths
    for first_grid in (ours[1], (8, 8)):
        ends = [feature(ours[0], grid, width, seed) for grid, width, seed in ((first_grid, m, 1), (ours[1], n, 2))]
        targets = [feature(theirs[0], theirs[1], width, seed) for width, seed in ((6, 3), (7, 4))]
        adapter = adapt_matrices([end[0] for end in ends], [target[0] for target in targets])
        student, teacher = (tuple(side[1] for side in both) for both in (ends, targets))
        seen, wanted = adapter(student, teacher)  # type: ignore[arg-type]

        maps = [torch.from_numpy(np.ascontiguousarray(end[2])).double() for end in ends]
        maps[0] = F.adaptive_max_pool2d(maps[0], ours[1])
        factors = [factor.detach().double() for factor in adapter.parameters()]
        assert [tuple(factor.shape) for factor in factors] == [(6, m), (7, n)]
        assert ("-> project" in str(adapter).split("matrix")[0]) == (m == 30)
        a, b = (F.conv2d(map_, factor[:, :, None, None]) for map_, factor in zip(maps, factors, strict=True))
        expected = torch.einsum("bihw,bjhw->bij", a, b) / (ours[1][0] * ours[1][1])
        torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-5)
        a, b = (torch.from_numpy(np.ascontiguousarray(target[2])).double() for target in targets)
        expected = torch.einsum("bihw,bjhw->bij", a, b) / (theirs[1][0] * theirs[1][1])
        torch.testing.assert_close(wanted.double(), expected, rtol=1e-4, atol=1e-5)


def test_matrices_of_equal_widths_are_compared_as_they_are() -> None:
    wide, narrow = ([feature((Layout.NCHW, 0), (4, 4), width, 0)[0]] * 2 for width in (8, 3))
    assert adapt_matrices(narrow, narrow).parameter_count == 0
    assert adapt_matrices(narrow, narrow, policy="always").parameter_count == 18
    assert adapt_matrices(narrow[:1], wide[:1]).parameter_count == 24  # one map with itself: one factor for both sides
    fixed = adapt_matrices(narrow, wide, policy="fixed")
    assert (fixed.parameter_count, len(list(fixed.buffers()))) == (0, 2)
    assert str(fixed) == "map 4x4 3 -> matrix 3x3 | teacher map 4x4 8 -> fixed 8->3, 8->3 -> matrix 3x3"
    matrix = fixed(*([draw(BATCH, width, 4, 4)] * 2 for width in (3, 8)))[1]
    assert matrix.shape == (BATCH, 3, 3)
    with pytest.raises(AdapterError, match=r"'never'.*\[3, 3\] and \[8, 8\] differ.*'fixed'"):
        adapt_matrices(narrow, wide, policy="never")
    with pytest.raises(AdapterError, match="vector 4, which has no positions"):
        adapt_matrices([feature((Layout.NC, 0), (4, 4), 4, 0)[0]], wide[:1])


def test_maps_of_two_widths_come_to_one_grid_each_with_its_own_channels() -> None:
    student, teacher = feature((Layout.NLC, 1), (8, 8), 3, 0), feature((Layout.NHWC, 0), (4, 4), 7, 1)
    ours, theirs = adapt_maps(student[0], teacher[0])(student[1], teacher[1])
    assert (ours.shape, theirs.shape) == ((BATCH, 3, 4, 4), (BATCH, 7, 4, 4))
    np.testing.assert_allclose(ours, shrink(student[2], (4, 4)), rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="one position in common"):
        adapt_maps(student[0], feature((Layout.NCHW, 0), (1, 1), 7, 1)[0])


def test_outputs_are_compared_class_by_class() -> None:
    three, five = (FeatureSpec(Tap(""), Layout.NC, (BATCH, width), width) for width in (3, 5))
    logits = draw(BATCH, 5)
    assert adapt_outputs(five, five).parameter_count == 0
    _, told = adapt_outputs(three, five, [4, 0, 2])(logits[:, :3], logits)
    assert torch.equal(told, torch.stack([logits[:, 4], logits[:, 0], logits[:, 2]], 1))
    with pytest.raises(AdapterError, match="3 classes and the teacher 5; give a `class_map`"):
        adapt_outputs(three, five)
    for wrong, says in (([0, 1], "2 entries; expected 3 indices"), ([0, 1, 5], "5 is none of the teacher's 5 classes")):
        with pytest.raises(AdapterError, match=says):
            adapt_outputs(three, five, wrong)


@pytest.mark.parametrize("shape", [(BATCH, 4, 5, 6), (BATCH, 4)])
def test_the_target_is_standardised_by_the_formula(shape: tuple[int, ...]) -> None:
    value = (5 + 3 * draw(*shape)).to(torch.bfloat16)
    exact = value.double().numpy()
    for kind, axes in (("layer", (1,)), ("channel", (0, *range(2, len(shape))))):
        by_hand = (exact - exact.mean(axes, keepdims=True)) / np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
        layout, grid = (Layout.NCHW, shape[2:]) if len(shape) == 4 else (Layout.NC, None)
        spec = FeatureSpec(Tap("x"), layout, shape, 4, grid)  # type: ignore[arg-type]
        _, target = adapt(spec, spec, normalize=kind, policy="never")(value, value)  # type: ignore[arg-type]
        assert target.dtype == torch.float32
        np.testing.assert_allclose(target, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_bfloat16_captures_are_brought_together_too(ratio: tuple[Grid, Grid]) -> None:
    spec, student, *_ = feature((Layout.NHWC, 0), ratio[0], 4, 0)
    other, teacher, *_ = feature((Layout.NLC, 1), ratio[1], 6, 1)
    adapter = adapt(spec, other)
    exact = adapter(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = adapter(student.bfloat16(), teacher.bfloat16())
    for got, wanted in zip(rounded, exact, strict=True):
        torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "sometimes"}, "policy 'sometimes': expected one of 'auto', 'always', 'never'"),
        ({"tokens": "class"}, "tokens 'class': expected one of 'drop', 'cls', 'pool'"),
        ({"normalize": "batch"}, "normalize 'batch': expected one of 'none', 'layer', 'channel'"),
        ({"tokens": "cls"}, "neither 'x' nor 'y' has a class token; use 'pool'"),
    ],
)
def test_choices_that_do_not_exist_are_refused(options: Any, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        adapt(feature((Layout.NHWC, 0), (4, 4), 4, 0)[0], feature((Layout.NC, 0), (4, 4), 4, 0, "y")[0], **options)


def test_a_tensor_that_is_no_feature_is_refused_with_its_side_and_shape() -> None:
    good, windows = feature((Layout.NCHW, 0), (4, 4), 4, 0)[0], FeatureSpec(Tap("w"), Layout.OTHER, (320, 49, 96))
    with pytest.raises(AdapterError, match="student tap 'w' yields 320x49x96, which is no feature of single images"):
        adapt(windows, good)
    with pytest.raises(AdapterError, match="teacher tap 'w'"):
        adapt(good, windows)


def test_another_number_of_tokens_than_the_trace_saw_is_refused() -> None:
    spec, tensor, *_ = feature((Layout.NLC, 1), (4, 6), 4, 0)
    adapter = adapt(spec, spec)
    with pytest.raises(AdapterError, match="24 tokens, where the trace saw 4x6 and 1 prefix tokens; trace the model"):
        adapter(tensor[:, 1:], tensor)


IMAGENET = InputSpec((3, 32, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = InputSpec((3, 32, 48), (0.5, 0.4, 0.3), (0.5, 0.25, 0.125))


def normalised(pixels: Tensor, spec: InputSpec) -> Tensor:
    return v2.functional.normalize(pixels, list(spec.mean), list(spec.std))


def test_a_view_is_the_normalisation_that_the_other_model_would_have_got() -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    view = ImageView(PLAIN, IMAGENET)
    torch.testing.assert_close(view(normalised(pixels, PLAIN)), normalised(pixels, IMAGENET), rtol=1e-4, atol=1e-5)
    assert not view.state_dict()
    assert view.double()(normalised(pixels, PLAIN).double()).dtype == torch.float64
    images = normalised(pixels, IMAGENET)
    assert ImageView(IMAGENET, IMAGENET)(images).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("size", [(16, 24), (20, 20), (64, 64)])
def test_a_view_has_the_size_that_the_other_model_expects(size: Grid) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    view = ImageView(PLAIN, InputSpec((3, *size), IMAGENET.mean, IMAGENET.std))
    small = v2.functional.resize(pixels, list(size), antialias=True)
    torch.testing.assert_close(view(normalised(pixels, PLAIN)), normalised(small, IMAGENET), rtol=1e-4, atol=1e-4)


def test_a_grey_image_becomes_three_equal_channels_normalised_each_as_expected() -> None:
    pixels = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    grey = InputSpec((1, 32, 48), (0.5,), (0.25,))
    expected = normalised(pixels.repeat(1, 3, 1, 1), IMAGENET)
    torch.testing.assert_close(ImageView(grey, IMAGENET)((pixels - 0.5) / 0.25), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="images of 3 channels for a model that expects 1"):
        ImageView(IMAGENET, grey)
    for view, images in (
        (ImageView(IMAGENET, IMAGENET), pixels),
        (ImageView(grey, IMAGENET), pixels.repeat(1, 3, 1, 1)),
    ):
        with pytest.raises(AdapterError, match=r"the images are 2x[13]x32x48, and a batch of images of [31] channels"):
            view(images)


def test_average_pooling_is_exact_where_it_divides() -> None:
    map_ = draw(2, 3, 12, 8)
    assert torch.equal(Resize((12, 8), (4, 4))(map_), F.adaptive_avg_pool2d(map_, (4, 4)))
