"""Losses: each against the paper's equation, written out in float64 numpy over single images."""

from collections.abc import Callable
from typing import Any

import equations
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probe_kd import LOSSES, Loss
from probe_kd.errors import LossError
from probe_kd.methods.losses.features import hint
from probe_kd.methods.losses.labels import balanced_weights, cross_entropy
from probe_kd.methods.losses.maps import attention
from probe_kd.methods.losses.matrices import flow_matrix, fsp, gram
from probe_kd.methods.losses.outputs import dist, hard_labels, logits, soft_targets

Array = NDArray[np.float64]


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


Sizes = st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))


@settings(deadline=None, max_examples=60)
@given(sizes=Sizes, reduction=st.sampled_from(["sum", "mean"]), scale=st.sampled_from([0.1, 2.0, 30.0]))
def test_every_loss_is_its_equation_for_any_size_and_scale(
    sizes: tuple[int, int, int, int, int], reduction: Any, scale: float
) -> None:
    """Each against loops over single images in numpy's float64, from the papers' equations."""
    batch, channels, height, width, seed = sizes
    s, t = (draw(batch, channels, height, width, seed=seed + side, scale=scale) for side in (0, 1))
    z, v = s.flatten(2).mean(2), t.flatten(2).mean(2)

    def mean(event: Callable[[Array, Array], float], ours: Tensor, theirs: Tensor) -> Any:
        values = [event(a, b) for a, b in zip(ours.numpy(), theirs.numpy(), strict=True)]
        return pytest.approx(float(np.mean(values)), rel=1e-8, abs=1e-10)

    def share(numbers: Array) -> float:
        return float(numbers.sum() if reduction == "sum" else numbers.mean())

    def attention_map(map_: Array) -> Array:
        seen = (map_**2).sum(0).ravel()
        return seen / np.linalg.norm(seen)

    assert hint(s, t, reduction=reduction).item() == mean(lambda a, b: share((a - b) ** 2), s, t)
    assert logits(z, v, reduction=reduction).item() == mean(lambda a, b: share((a - b) ** 2), z, v)
    centred = mean(lambda a, b: share((a - a.mean() - b + b.mean()) ** 2), z, v)
    assert logits(z, v, reduction=reduction, center=True).item() == centred
    by_hand = mean(lambda a, b: 9 * float((softmax(b / 3) * np.log(softmax(b / 3) / softmax(a / 3))).sum()), z, v)
    assert soft_targets(z, v, temperature=3.0).item() == by_hand
    matrices = [flow_matrix(side, side[:, :1]) for side in (s, t)]
    flow = mean(lambda a, b: share((written_gram(a, a[:1]) - written_gram(b, b[:1])) ** 2), s, t)
    assert fsp(*matrices, reduction=reduction).item() == flow
    apart = mean(lambda a, b: float(np.linalg.norm(attention_map(a) - attention_map(b))), s, t)
    assert attention(s, t).item() == apart


def test_cross_entropy_is_minus_log_of_the_probability_of_the_label() -> None:
    z, y = draw(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = np.mean([-np.log(softmax(row)[label]) for row, label in zip(z.numpy(), y, strict=True)])
    assert cross_entropy(z, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_distributions_and_label_smoothing(smoothing: float) -> None:
    z, y = draw(5, 7), draw(5, 7, seed=1).softmax(1)
    mixed = y.numpy() * (1 - smoothing) + smoothing / 7
    expected = np.mean([-(q * np.log(softmax(row))).sum() for row, q in zip(z.numpy(), mixed, strict=True)])
    assert cross_entropy(z, y, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)
    labels = torch.tensor([0, 6, 3, 3, 1])
    one_hot, by_label = (
        cross_entropy(z, target, label_smoothing=smoothing) for target in (torch.eye(7).double()[labels], labels)
    )
    torch.testing.assert_close(one_hot, by_label, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_are_the_papers_cross_entropy_less_the_teachers_entropy(temperature: float) -> None:
    z, v = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    value = soft_targets(z, v, temperature=temperature)
    (gradient,) = torch.autograd.grad(value, z)
    rows = [
        (softmax(a / temperature), softmax(b / temperature)) for a, b in zip(z.detach().numpy(), v.numpy(), strict=True)
    ]
    expected = temperature**2 * np.mean([(p * (np.log(p) - np.log(q))).sum() for q, p in rows])
    assert value.item() == pytest.approx(expected, rel=1e-9)
    # Hinton et al. 2015, eq. 2: dC/dz_i = (q_i - p_i) / T, times T^2, over the batch
    by_hand = np.stack([temperature * (q - p) / 5 for q, p in rows])
    np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-9, atol=1e-15)


def test_soft_targets_of_a_high_temperature_are_centred_logit_regression() -> None:
    z, v = draw(5, 7) + 3, draw(5, 7, seed=1) - 1
    limit = logits(z, v, center=True, reduction="sum") / (2 * 7)
    assert soft_targets(z, v, temperature=1e4).item() == pytest.approx(limit.item(), rel=1e-3)
    assert logits(z, v, reduction="sum").item() > 2 * logits(z, v, center=True, reduction="sum").item()


@pytest.mark.parametrize("loss", [logits, hint])
def test_squared_errors_sum_or_average_one_image_and_average_the_batch(loss: Callable[..., Tensor]) -> None:
    shape = (5, 7) if loss is logits else (5, 3, 4, 2)
    s, t = draw(*shape), draw(*shape, seed=1)
    per_image = [((a - b) ** 2).sum() for a, b in zip(s.numpy(), t.numpy(), strict=True)]
    assert loss(s, t, reduction="sum").item() == pytest.approx(np.mean(per_image), rel=1e-12)
    assert loss(s, t).item() == pytest.approx(np.mean(per_image) / s[0].numel(), rel=1e-12)


def written_gram(first: Array, second: Array) -> Array:
    """Yim et al. 2017, eq. 1, as it stands there: sums over positions, for maps (channels, height, width)."""
    _, height, width = second.shape
    matrix = np.zeros((len(first), len(second)))
    for i, j, s, t in np.ndindex(len(first), len(second), height, width):
        matrix[i, j] += first[i, s, t] * second[j, s, t] / (height * width)
    return matrix


def halve(map_: Array) -> Array:
    """2x2 max pooling."""
    channels, height, width = map_.shape
    return map_.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))


@pytest.mark.parametrize("downsamples", [False, True])
def test_fsp_is_the_squared_distance_of_the_flow_matrices(downsamples: bool) -> None:
    inner, outer = (4, 6), (2, 3) if downsamples else (4, 6)
    student = draw(3, 2, *inner), draw(3, 5, *outer, seed=1)
    teacher = draw(3, 2, 6, 6, seed=2), draw(3, 5, 6, 6, seed=3)  # another grid than the student's: no matter
    shrink = halve if downsamples else np.asarray
    expected = [
        ((written_gram(shrink(a), b) - written_gram(c, d)) ** 2).sum()
        for a, b, c, d in zip(*(map_.numpy() for map_ in (*student, *teacher)), strict=True)
    ]
    ours, theirs = flow_matrix(*student), flow_matrix(*teacher)
    assert fsp(ours, theirs).item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert fsp(ours, theirs, reduction="mean").item() == pytest.approx(np.mean(expected) / 10, rel=1e-12)
    mean = np.mean([written_gram(c, d) for c, d in zip(*(map_.numpy() for map_ in teacher), strict=True)], 0)
    spread = [
        ((written_gram(c, d) - mean) ** 2).sum() for c, d in zip(*(map_.numpy() for map_ in teacher), strict=True)
    ]
    relative = np.mean(expected) / (np.sum(spread) / (3 - 1))
    assert fsp(ours, theirs, relative=True).item() == pytest.approx(relative, rel=1e-12)


def test_a_gram_matrix_is_the_flow_of_a_map_with_itself_and_gatys_is_a_quarter_of_its_mean() -> None:
    student, teacher = draw(3, 4, 5, 2), draw(3, 4, 3, 3, seed=1)
    ours, theirs = flow_matrix(student, student), flow_matrix(teacher, teacher)
    expected = [
        ((written_gram(a, a) - written_gram(b, b)) ** 2).sum()
        for a, b in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    assert gram(ours, theirs).item() == pytest.approx(np.mean(expected) / 16, rel=1e-12)
    assert gram(ours, theirs, reduction="sum").item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_dist_is_one_less_pearsons_correlation_over_classes_and_over_images() -> None:
    z, v, temperature = draw(6, 4), draw(6, 4, seed=1), 2.0
    p, q = (np.stack([softmax(row / temperature) for row in side.numpy()]) for side in (z, v))
    inter = np.mean([1 - np.corrcoef(p[row], q[row])[0, 1] for row in range(6)])
    intra = np.mean([1 - np.corrcoef(p[:, column], q[:, column])[0, 1] for column in range(4)])
    value = dist(z, v, temperature=temperature, inter=2.0, intra=0.5)
    assert value.item() == pytest.approx(temperature**2 * (2.0 * inter + 0.5 * intra), rel=1e-6)


def test_attention_has_the_papers_form_and_that_of_the_authors_code() -> None:
    student, teacher = draw(3, 4, 5, 2), draw(3, 7, 5, 2, seed=1)  # other channels, no matter
    maps = [(side.numpy() ** 2).sum(1).reshape(3, -1) for side in (student, teacher)]
    ours, theirs = (map_ / np.linalg.norm(map_, axis=1, keepdims=True) for map_ in maps)
    norms = np.linalg.norm(ours - theirs, axis=1)
    assert attention(student, teacher).item() == pytest.approx(norms.mean(), rel=1e-12)
    assert attention(student, teacher, form="code").item() == pytest.approx((norms**2 / 10).mean(), rel=1e-12)


def test_standardized_logits_are_z_scores_of_each_image() -> None:
    z, v = draw(5, 7) * 3 + 1, draw(5, 7, seed=1)
    scores = [(side - side.mean(1, keepdim=True)) / side.std(1, keepdim=True) for side in (z, v)]
    torch.testing.assert_close(logits(z, v, standardize=True), logits(*scores), rtol=1e-6, atol=0)
    expected = soft_targets(*scores, temperature=2.0)
    torch.testing.assert_close(soft_targets(z, v, temperature=2.0, standardize=True), expected, rtol=1e-6, atol=0)
    assert soft_targets(3 * z + 1, z, standardize=True).item() == pytest.approx(0, abs=1e-10)


CASES: dict[str, Callable[[int], Tensor]] = {
    "soft_targets": lambda seed: draw(5, 7, seed=seed),
    "multilabel_soft_targets": lambda seed: draw(5, 7, seed=seed),
    "logits": lambda seed: draw(5, 7, seed=seed),
    "dist": lambda seed: draw(5, 7, seed=seed),
    "hint": lambda seed: draw(5, 3, 4, 4, seed=seed),
    "fsp": lambda seed: draw(5, 3, 4, seed=seed),
    "gram": lambda seed: draw(5, 3, 3, seed=seed),
    "attention": lambda seed: draw(5, 3, 4, 4, seed=seed),
    "token_match": lambda seed: draw(5, 3, 4, 4, seed=seed),
    "patch_similarity": lambda seed: draw(5, 3, 4, 4, seed=seed),
    **{
        name: lambda seed: draw(5, 3, 4, 4, seed=seed)
        for name in ("smooth_l1", "pkd", "cwd", "ickd", "nst", "gram_tokens")
    },
    **{name: lambda seed: draw(5, 7, seed=seed) for name in ("rkd", "sp", "pkt", "cc")},
}


def test_every_loss_is_tested_here() -> None:
    """Except for those that read labels or have parameters, whose tests are in the folder of the losses."""
    of_two = {name for name, it in LOSSES.items() if it.reads != "labels" and not (it.also or it.builds_module)}
    assert {*CASES, "hard_labels"} == of_two


@pytest.mark.parametrize("name", CASES)
def test_zero_at_equality_and_a_gradient_for_the_student_only(name: str) -> None:
    loss, student, teacher = LOSSES[name].function, CASES[name](0), CASES[name](1)
    assert loss(student, CASES[name](0)).item() == pytest.approx(0, abs=1e-12)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    loss(student, teacher, block_gradient=False).backward()
    assert teacher.grad is not None
    assert teacher.grad.abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_a_teacher_given_by_keyword_would_keep_its_gradient_and_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="teacher"):
        LOSSES[name].function(CASES[name](0), teacher=CASES[name](1))


@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_autocast_change_nothing_but_the_inputs(name: str) -> None:
    loss = LOSSES[name].function
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = CASES[name](0).to(dtype), CASES[name](1).to(dtype)
        exact = loss(student.float(), teacher.float())
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert torch.equal(value, exact)


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("in_cache", [1, 300, 2**17])  # numbers: one image at a time, two, or all
def test_a_hint_of_half_precision_keeps_its_maps_as_they_are(
    kinds: tuple[torch.dtype, torch.dtype], reduction: Any, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is, with both gradients, what float32 gives for the same numbers."""
    monkeypatch.setattr("probe_kd.methods.losses.parts.IN_CACHE", in_cache)
    sides = [torch.randn(5, 8, 4, 4).to(kind).requires_grad_() for kind in kinds]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda it: kept.append(it) or it, lambda it: it):
        value = hint(*sides, reduction=reduction, block_gradient=False)
    expected = hint(*(side.float() for side in sides), reduction=reduction, block_gradient=False)
    torch.testing.assert_close(value, expected)
    assert sum(it.nbytes for it in kept if it.numel() > 1) == sum(side.nbytes for side in sides)
    for mine, other in zip(torch.autograd.grad(value, sides), torch.autograd.grad(expected, sides), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_float16_gram_matrix_of_large_values_does_not_overflow() -> None:
    flow = torch.full((2, 3, 8, 8), 3e4, dtype=torch.float16), torch.full((2, 3, 8, 8), 3e4, dtype=torch.float16)
    assert torch.isinf(flow[0] * flow[1]).all()
    with torch.autocast("cpu", torch.bfloat16):
        matrix = flow_matrix(*flow)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, torch.full((2, 3, 3), torch.tensor(3e4).half().item() ** 2))


@pytest.mark.parametrize("name", ["soft_targets", "logits", "hint"])
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    with pytest.raises(LossError, match=r"\(5, 7\) and teacher \(5, 1\) differ in shape.*probe_kd.adapt"):
        LOSSES[name].function(draw(5, 7), draw(5, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (draw(5, 16, 3), draw(5, 16, 2), r"two maps.*\(5, 16, 3\)"),
        (draw(5, 3, 4, 4), draw(2, 2, 4, 4), r"two maps.*\(2, 2, 4, 4\)"),
    ],
)
def test_maps_that_make_no_flow_are_refused(student: Tensor, teacher: Tensor, words: str) -> None:
    with pytest.raises(LossError, match=words):
        flow_matrix(student, teacher)


def test_what_a_loss_cannot_compare_is_refused() -> None:
    with pytest.raises(LossError, match=r"fsp: student \(5, 3, 2\) and teacher \(5, 3, 6\)"):
        fsp(draw(5, 3, 2), draw(5, 3, 6))
    with pytest.raises(LossError, match="`relative` divides by the variance over a batch, and this one has a single"):
        fsp(draw(1, 3, 2), draw(1, 3, 2), relative=True)
    with pytest.raises(LossError, match=r"one batch and grid, got student \(5, 3, 4, 4\) and teacher \(5, 3, 2, 2\)"):
        attention(draw(5, 3, 4, 4), draw(5, 3, 2, 2))
    with pytest.raises(LossError, match="form 'papers'; expected 'paper' or 'code'"):
        attention(draw(5, 3, 4, 4), draw(5, 3, 4, 4), form="papers")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_what_a_loss_gives_holds_the_memory_of_one_number(name: str) -> None:
    """A step keeps every term, and torch's own squared error holds a tensor of the feature's size behind its number."""
    value = LOSSES[name].function(CASES[name](0), CASES[name](1))
    assert value.untyped_storage().nbytes() == value.element_size()


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations make and do not merely look at."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self.known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known |= {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in self.known:
            self.made += output.untyped_storage().nbytes()
        return output


@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_a_flow_matrix_takes_no_memory_besides_its_inputs_and_itself(layout: str) -> None:
    first, second = draw(4, 16, 32, 32).float(), draw(4, 24, 32, 32).float()
    if layout == "tokens":  # as an adapter makes maps of them
        first, second = (m.flatten(2).transpose(1, 2).contiguous().mT.unflatten(2, (32, 32)) for m in (first, second))
    with Allocations() as seen:
        matrix = flow_matrix(first, second)
    assert seen.made == matrix.untyped_storage().nbytes()


def test_gradients_of_a_flow_matrix_keep_channels_last() -> None:
    ends = [draw(4, c, 8, 8).to(memory_format=torch.channels_last).requires_grad_() for c in (5, 7)]
    gradients = torch.autograd.grad(flow_matrix(*ends).square().sum(), ends)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients)


@pytest.mark.parametrize(("shape", "kind"), [((5, 8), "probabilities"), ((4,), "class indices")])
def test_targets_that_do_not_fit_the_logits_are_refused(shape: tuple[int, ...], kind: str) -> None:
    target = torch.zeros(shape) if kind == "probabilities" else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(LossError, match=rf"logits \(5, 7\) with a target .*{kind}"):
        cross_entropy(draw(5, 7), target)


def test_values_of_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(LossError, match="reduction 'batchmean': expected 'sum' or 'mean'"):
        hint(draw(5, 7), draw(5, 7), reduction="batchmean")  # type: ignore[arg-type]
    with pytest.raises(LossError, match="reduction 'median': expected 'sum' or 'mean'"):
        fsp(draw(5, 3, 2), draw(5, 3, 2), relative=True, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(LossError, match="relative 7: expected true or false"):
        fsp(draw(5, 3, 2), draw(5, 3, 2), relative=7)  # type: ignore[arg-type]
    with pytest.raises(LossError, match=r"temperature 0.*positive"):
        soft_targets(draw(5, 7), draw(5, 7), temperature=0)


def test_an_option_that_a_loss_does_not_have_gets_the_nearest_that_it_has() -> None:
    LOSSES["soft_targets"].check_options("soft_targets", {"temperature": 2.0})
    with pytest.raises(LossError, match="'soft_targets' has no option 'temprature'; did you mean 'temperature'"):
        LOSSES["soft_targets"].check_options("soft_targets", {"temprature": 2.0})
    with pytest.raises(LossError, match="it has none"):
        Loss(lambda student, teacher: student, "outputs").check_options("mine", {"a": 1})


OUTPUTS = ("soft_targets", "hard_labels", "logits", "dist")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*OUTPUTS, "hint", "fsp", "gram", "attention")},
    "soft_targets of z-scores": ("soft_targets", {"standardize": True}),
    "logits of z-scores": ("logits", {"standardize": True}),
    "centred logits": ("logits", {"center": True}),
    "relative fsp": ("fsp", {"relative": True}),
    "attention as in the code": ("attention", {"form": "code"}),
}


def pearson(a: Array, b: Array) -> float:
    a, b = (side - side.mean() if np.ptp(side) > 1e-14 * side.max() else 0 * side for side in (a, b))
    a, b = (side / (np.abs(side).max() or 1.0) for side in (a, b))
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths > 0 else 0.0


def z_score(row: Array) -> Array:
    spread = row.std(ddof=1) if len(row) > 1 and np.ptp(row) > 0 else 1.0
    return (row - row.mean()) / spread


def reference(form: str, s: Array, t: Array, temperature: float) -> float:
    """The equation of a loss in float64; what has no variance has a correlation and z-scores of zero."""

    def divergence(a: Array, b: Array) -> float:
        shifted = [side / temperature - (side / temperature).max() for side in (a, b)]
        p, q = (side - np.log(np.exp(side).sum()) for side in shifted)  # log-probabilities
        there = np.isfinite(q)
        return temperature**2 * float((np.exp(q[there]) * (q[there] - p[there])).sum())

    def unit(map_: Array) -> Array:
        seen = (map_**2).mean(0).ravel()
        return seen / (np.linalg.norm(seen) or 1.0)

    match form:
        case "soft_targets":
            return float(np.mean([divergence(a, b) for a, b in zip(s, t, strict=True)]))
        case "soft_targets of z-scores":
            return float(np.mean([divergence(z_score(a), z_score(b)) for a, b in zip(s, t, strict=True)]))
        case "hard_labels":
            return float(
                np.mean([a.max() - a[b.argmax()] - np.log(softmax(a).max()) for a, b in zip(s, t, strict=True)])
            )
        case "logits of z-scores":
            return float(np.mean([(z_score(a) - z_score(b)) ** 2 for a, b in zip(s, t, strict=True)]))
        case "centred logits":
            return float(np.mean(((s - s.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))) ** 2))
        case "dist":
            p, q = (np.stack([softmax(row / temperature) for row in side]) for side in (s, t))
            inter = np.mean([1 - pearson(a, b) for a, b in zip(p, q, strict=True)])
            return float(temperature**2 * (inter + np.mean([1 - pearson(a, b) for a, b in zip(p.T, q.T, strict=True)])))
        case "fsp":
            return float(((s - t) ** 2).sum() / len(s))
        case "relative fsp":
            variance = t.var(0, ddof=1).sum() if np.ptp(t, axis=0).any() else 0.0  # rounding is no variance
            square = (t**2).sum() / len(t)
            return float(((s - t) ** 2).sum() / len(s) / (variance or square or 1.0))
        case "attention":
            return float(np.mean([np.linalg.norm(unit(a) - unit(b)) for a, b in zip(s, t, strict=True)]))
        case "attention as in the code":
            return float(np.mean([(unit(a) - unit(b)) ** 2 for a, b in zip(s, t, strict=True)]))
    return float(np.mean((s - t) ** 2))


CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    **equations.CONTENTS,
    "large": lambda it: 1e6 * it,
    "huge": lambda it: 1e15 * it,
}


@settings(deadline=None, max_examples=400, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    contents=st.tuples(*[st.sampled_from(list(CONTENTS))] * 2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 21.0, 100.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_every_loss_of_any_numbers_is_its_equation_or_says_why_not(
    form: str, contents: Any, sizes: tuple[int, int], temperature: float, dtype: torch.dtype, seed: int
) -> None:
    """Constants, one class, one image, temperatures of 1e4, activations of 1e15, every precision."""
    name, options = FORMS[form]
    tail = {"fsp": (2,), "gram": (sizes[1],), "hint": (2, 2), "attention": (2, 3)}.get(name, ())
    s, t = (CONTENTS[content](draw(*sizes, *tail, seed=seed + side)).to(dtype) for side, content in enumerate(contents))
    if name in ("soft_targets", "dist"):
        options = {**options, "temperature": temperature}
    if not (s.isfinite().all() and t.isfinite().all()):  # 1e15 in float16
        return
    student = s.clone().requires_grad_()
    reasons = ["larger than"] * any("large" in content or content == "huge" for content in contents)
    reasons += ["single image"] * (sizes[0] == 1 and ("relative" in options or name == "dist"))
    try:
        value = LOSSES[name].function(student, t, **options)
    except LossError as refusal:
        if not any(reason in str(refusal) for reason in reasons):
            raise
        return
    (gradient,) = torch.autograd.grad(value, student)
    if dtype != torch.float16 or temperature <= 4:  # T^2 of a high one is no number of float16
        assert gradient.isfinite().all()
    expected = reference(form, s.double().numpy(), t.double().numpy(), options.get("temperature", 1.0))
    scale = options.get("temperature", 1.0) ** 2 if name == "dist" else 1.0
    assert value.item() == pytest.approx(expected, rel=2e-3, abs=2e-4 * max(1.0, scale / 100))


@pytest.mark.parametrize("form", ["soft_targets", "dist"])
def test_classes_that_the_teacher_masks_count_for_nothing(form: str) -> None:
    z, v = draw(4, 6).float().requires_grad_(), draw(4, 6, seed=1).float()
    v[:, 2], v[1, 4] = -torch.inf, -torch.inf
    for both in (False, True):  # a student that masks them too
        given = z.detach().masked_fill(v == -torch.inf, -torch.inf).requires_grad_() if both else z
        value = LOSSES[form].function(given, v)
        expected = reference(
            form, *(side.detach().double().numpy() for side in (given, v)), {"dist": 1.0}.get(form, 4.0)
        )
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert torch.autograd.grad(value, given)[0].isfinite().all()


@pytest.mark.parametrize("form", ["logits", "logits of z-scores", "soft_targets of z-scores"])
def test_a_masked_teacher_is_refused_where_its_mask_has_no_meaning(form: str) -> None:
    name, options = FORMS[form]
    v = draw(4, 6, seed=1).float()
    v[:, 2] = -torch.inf
    z = draw(4, 6).float()
    for student in (z, z.masked_fill(v == -torch.inf, -torch.inf)):  # that masks them too
        with pytest.raises(LossError, match=r"the teacher's side \(4, 6\) holds -?(inf|nan).*Masked classes"):
            LOSSES[name].function(student, v, **options)
    z[0, 0] = torch.nan  # of a training that diverged, which the loop tells
    assert LOSSES[name].function(z, v, **options).isnan()


@pytest.mark.parametrize(
    ("name", "options"), [FORMS[f] for f in ("soft_targets of z-scores", "logits of z-scores", "dist")]
)
def test_the_gradient_of_a_classifier_near_zero_is_no_larger_than_elsewhere(name: str, options: Any) -> None:
    """Divided by the deviation of flat logits it was 1e7 times as large, which AdamW does not forget."""
    loss, v, directions = LOSSES[name].function, draw(8, 10, seed=1).float(), draw(8, 10).float()
    norms = {}
    for scale in (0.0, 1e-30, 1e-8, 1e-4, 1e-2, 1.0):
        z = (scale * directions).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, v, **options), z)
        norms[scale] = float(gradient.norm())
    assert all(norms[1.0] / 30 < norm < 30 * norms[1.0] for norm in norms.values()), norms


def test_the_gradient_of_logits_that_say_something_is_the_equations() -> None:
    v = draw(6, 5, seed=1)
    for name, options in (FORMS["soft_targets of z-scores"], FORMS["logits of z-scores"], FORMS["dist"]):
        loss = LOSSES[name].function
        z = (draw(6, 5) + 4 * torch.eye(5)[[0, 1, 2, 3, 4, 0]]).requires_grad_()
        assert torch.autograd.gradcheck(lambda it, loss=loss, o=options: loss(it, v, **o), (z,), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 5, 3), (5,), (), (0, 5), (2, 0)])
@pytest.mark.parametrize("name", [*OUTPUTS, "cross_entropy"])
def test_outputs_are_one_row_of_classes_an_image(name: str, shape: tuple[int, ...]) -> None:
    """A softmax over axis 1 of a map or of tokens is a number, and another loss."""
    target = torch.zeros(shape[:1], dtype=torch.long) if name == "cross_entropy" else torch.randn(shape)
    with pytest.raises(LossError, match=r"expected \(batch, classes\)|nothing to compare"):
        LOSSES[name].function(torch.randn(shape), target)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.tensor([[1.0, 1, 0, 1, 0]] * 3), "row 0 of the target sums to 3, least 0"),
        (torch.tensor([[1.0, 0, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [0, 1, 0, 0, 0]]), "row 1 .* least -0.5"),
        (torch.zeros(3, 5), "row 0 of the target sums to 0"),
        (torch.full((3, 5), torch.nan), "row 0 of the target sums to nan"),
        (torch.tensor([0, 5, 1]), "label 5 of 5 classes; expected 0 to 4"),
        (torch.tensor([0, -100, 1]), "label -100 of 5 classes"),
        (torch.tensor([0.0, 1.0, 2.0]), r"\(3,\) of torch.float32; expected \(3,\) class indices \(whole numbers\)"),
        (torch.tensor([True, False, True]), r"\(3,\) of torch.bool"),
        (torch.zeros(3, 5, dtype=torch.long), r"\(3, 5\) of torch.int64; expected"),
        (torch.zeros(4, dtype=torch.long), r"\(4,\) of torch.int64"),
        (np.zeros(3, dtype=np.int64), "the target is a ndarray; expected a torch.Tensor"),
    ],
)
def test_a_target_that_is_neither_indices_nor_distributions_is_refused(target: Any, says: str) -> None:
    with pytest.raises(LossError, match=says):
        cross_entropy(torch.randn(3, 5), target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_class_indices_may_be_whole_numbers_of_any_width(dtype: torch.dtype) -> None:
    z, y = draw(4, 5), torch.tensor([0, 4, 2, 2])
    assert torch.equal(cross_entropy(z, y.to(dtype)), cross_entropy(z, y))


def test_a_loss_of_what_is_no_tensor_of_real_numbers_is_refused() -> None:
    with pytest.raises(LossError, match="hint: the student is a ndarray"):
        hint(np.zeros((2, 3)), torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(LossError, match=r"soft_targets: the student's side \(2, 3\) is torch.int64"):
        soft_targets(torch.zeros(2, 3).long(), torch.zeros(2, 3))
    with pytest.raises(LossError, match=r"soft_targets: the teacher's side \(2, 3\) is torch.uint8"):
        soft_targets(torch.zeros(2, 3), torch.zeros(2, 3).byte())
    with pytest.raises(LossError, match="on cpu and the target on meta"):
        hint(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))


def test_a_teacher_whose_class_is_no_number_is_refused_by_hard_labels() -> None:
    v = draw(3, 4).float()
    v[1, 2] = torch.nan
    with pytest.raises(LossError, match=r"the teacher's side \(3, 4\) holds nan"):
        hard_labels(draw(3, 4).float(), v)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_weigh_each_class_and_not_the_batch(smoothing: float) -> None:
    z, y, weights = draw(5, 3), torch.tensor([0, 2, 2, 1, 2]), [0.5, 2.0, 0.0]
    smooth = np.eye(3)[y] * (1 - smoothing) + smoothing / 3
    expected = -np.mean([(weights * q * np.log(softmax(row))).sum() for row, q in zip(z.numpy(), smooth, strict=True)])
    by_index = cross_entropy(z, y, class_weights=weights, label_smoothing=smoothing)
    assert by_index.item() == pytest.approx(expected, rel=1e-12)
    one_hot = cross_entropy(z, torch.eye(3).double()[y], class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(one_hot, by_index, rtol=1e-12, atol=0)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    y = np.repeat([0, 1, 3], [2, 30, 5])
    expected = compute_class_weight("balanced", classes=np.unique(y), y=y)
    np.testing.assert_allclose(
        balanced_weights(np.bincount(y, minlength=5).tolist()), [*expected[:2], 0, expected[2], 0]
    )
    for weights, says in (
        (["balanced"], "numbers from 0 on"),
        ("balanced", "is for recipes"),
        ([1.0], "has 1 numbers"),
    ):
        with pytest.raises(LossError, match=says):
            cross_entropy(draw(2, 1 if weights == ["balanced"] else 3), torch.tensor([0, 0]), class_weights=weights)  # type: ignore[arg-type]
