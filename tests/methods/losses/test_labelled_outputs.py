"""DKD, NKD and OFA against their equations, written in numpy's float64 over single images; extremes and refusals."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm import create_model
from torch import Tensor, nn

from probe_kd import Distiller, Objective
from probe_kd.engine.spec import FeatureSpec, InputSpec, Layout, Tap
from probe_kd.errors import LossError
from probe_kd.methods.losses import labelled_outputs
from probe_kd.methods.losses import labels as labels_module
from probe_kd.methods.losses.labelled_outputs import OFAExits, dkd, nkd, ofa
from probe_kd.methods.losses.labels import cross_entropy
from probe_kd.methods.losses.outputs import soft_targets
from probe_kd.methods.terms import Terms

Row = NDArray[np.float64]
LOSSES = {"dkd": dkd, "nkd": nkd, "ofa": ofa}
NAMES = list(LOSSES)


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(row: Row) -> Row:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def sum_of(shares: Row, logs: Row) -> float:
    """sum p log q, with 0 log 0 = 0."""
    return float((shares[shares > 0] * logs[shares > 0]).sum())


def of_one_image(name: str, z: Row, v: Row, y: int, temperature: float, **options: float) -> float:
    """The papers' equations, for the logits of one image."""
    others = np.arange(len(z)) != y
    log_p, log_q = (log_softmax(row[others] / temperature) for row in (z, v))
    p, q = (np.exp(log_softmax(row / temperature)) for row in (z, v))
    if name == "dkd":
        b_p, b_q = (np.array([side[y], side[others].sum()]) for side in (p, q))
        tckd = sum_of(b_q, np.log(b_q) - np.log(b_p))
        nckd = sum_of(np.exp(log_q), log_q - log_p)
        return temperature**2 * (options["alpha"] * tckd + options["beta"] * nckd)
    if name == "nkd":
        label = -np.exp(log_softmax(v))[y] * log_softmax(z)[y]
        return float(label - options["gamma"] * temperature**2 * sum_of(np.exp(log_q), log_p))
    one_hot = np.eye(len(z))[y]
    return -sum_of((q + one_hot) ** options["eps"] - one_hot, log_softmax(z / temperature))


OPTIONS = {"dkd": {"alpha": 0.7, "beta": 3.0}, "nkd": {"gamma": 1.2}, "ofa": {"eps": 1.4}}


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.tuples(st.integers(1, 5), st.integers(2, 12), st.integers(0, 99)),
    scale=st.sampled_from([0.0, 0.1, 2.0, 10.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 1000.0]),
)
def test_each_is_its_equation_and_its_gradient_that_of_finite_differences(
    name: str, sizes: tuple[int, int, int], scale: float, temperature: float
) -> None:
    batch, classes, seed = sizes
    z, v = (draw(batch, classes, seed=seed + side, scale=scale) for side in (0, 1))
    y = torch.arange(seed, seed + batch) % classes
    rows = zip(z.numpy(), v.numpy(), y.tolist(), strict=True)
    options: Any = OPTIONS[name] | {"temperature": temperature}
    expected = np.mean([of_one_image(name, *row, **options) for row in rows])
    assert LOSSES[name](z, v, y, **options).item() == pytest.approx(expected, rel=1e-7, abs=1e-8)
    single = LOSSES[name](z.float(), v.float(), y, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-4 * max(1.0, scale))
    z.requires_grad_()
    step = 1e-5 * max(1.0, temperature)  # of a loss that is nearly quadratic in z / T
    assert torch.autograd.gradcheck(lambda it: LOSSES[name](it, v, y, **options), (z,), eps=step, atol=1e-5)


def test_dkd_is_soft_targets_when_beta_is_what_the_teacher_leaves_to_the_other_classes() -> None:
    z, v, y = draw(1, 7), draw(1, 7, seed=1), torch.tensor([3])
    beta = 1 - float((v / 4).softmax(1)[0, 3])
    value = dkd(z, v, y, alpha=1.0, beta=beta, temperature=4.0)
    assert value.item() == pytest.approx(soft_targets(z, v, temperature=4.0).item(), rel=1e-12)


def test_ofa_without_eps_is_the_cross_entropy_with_the_teachers_probabilities() -> None:
    z, v, y = draw(5, 7), draw(5, 7, seed=1), torch.arange(5)
    assert ofa(z, v, y, eps=1.0).item() == pytest.approx(cross_entropy(z, v.softmax(1)).item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_label_of_a_distribution_is_its_largest_share(name: str) -> None:
    z, v, y = draw(5, 7), draw(5, 7, seed=1), torch.tensor([6, 0, 3, 3, 1])
    mixed = 0.7 * torch.eye(7).double()[y] + 0.3 / 7
    assert torch.equal(LOSSES[name](z, v, mixed), LOSSES[name](z, v, y))
    assert torch.equal(LOSSES[name](z, v, y.to(torch.uint8)), LOSSES[name](z, v, y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_and_a_teacher_that_are_sure_and_disagree_have_a_finite_loss_and_gradient(
    name: str, dtype: torch.dtype
) -> None:
    """The logarithm of a softmax, as public code computes it, is minus infinity from a difference of 104 on."""
    for scale in (1e4, 1e30 if dtype == torch.bfloat16 else 1e4):
        z = (scale * torch.eye(6)).to(dtype).requires_grad_()
        for shift in range(3):
            value = LOSSES[name](z, (scale * torch.eye(6).roll(1, 0)).to(dtype), (torch.arange(6) + shift) % 6)
            assert value.isfinite()
            assert torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_classes_that_the_teacher_masks_count_for_nothing(name: str) -> None:
    """Even the label's, and whether or not the student masks them too, and with gradients into both models."""
    z, v, left = draw(4, 6), draw(4, 6, seed=1), [0, 1, 2, 4, 5]
    expected = LOSSES[name](z[:, left], v[:, left], torch.tensor([0, 2, 4, 3]))
    z_masked, v_masked = (side.index_fill(1, torch.tensor([3]), -torch.inf) for side in (z, v))
    assert LOSSES[name](z_masked, v_masked, torch.tensor([0, 2, 5, 4])).item() == pytest.approx(expected.item())
    for student, labels in ((z_masked, [0, 2, 5, 4]), (z, [0, 2, 5, 4]), (z, [3, 3, 0, 1])):
        sides = student.clone().requires_grad_(), v_masked.clone().requires_grad_()
        value = LOSSES[name](*sides, torch.tensor(labels), block_gradient=False)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, sides))


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_and_the_labels_get_no_gradient(name: str) -> None:
    z, v, y = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_(), torch.eye(4, 6).requires_grad_()
    LOSSES[name](z, v, y).backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert v.grad is None
    assert y.grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "shape", "says"),
    [
        (torch.tensor([0, 6]), (2, 6), "label 6 of 6 classes; expected 0 to 5"),
        (torch.tensor([0, -100]), (2, 6), "label -100 of 6 classes"),
        (torch.tensor([0, 1, 2]), (2, 6), r"logits \(2, 6\) with a target \(3,\) of torch.int64"),
        (torch.tensor([[1.0, 1, 0], [0, 1, 0]]), (2, 3), "row 0 of the target sums to 2.*Several labels an image"),
        (torch.tensor([0, 1]), (2, 6, 2, 2), r"expected \(batch, classes\)"),
    ],
)
def test_labels_and_outputs_that_do_not_fit_are_refused(
    name: str, labels: Tensor, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(LossError, match=f"{name}: .*{says}"):
        LOSSES[name](torch.randn(shape), torch.randn(shape), labels)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_and_options_that_mean_nothing_are_refused(name: str) -> None:
    one = torch.randn(3, 1), torch.randn(3, 1), torch.zeros(3, dtype=torch.long)
    if name == "ofa":
        assert ofa(*one).item() == 0
        with pytest.raises(LossError, match=r"ofa: eps 0\.5; expected a number from 1 on"):
            ofa(*one, eps=0.5)
    else:
        with pytest.raises(LossError, match=f"{name}: it compares the classes beside the label"):
            LOSSES[name](*one)
        factor = "beta" if name == "dkd" else "gamma"
        with pytest.raises(LossError, match=f"{name}: {factor} -1.0; expected a number from 0 on"):
            LOSSES[name](torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 1]), **{factor: -1.0})
    for temperature in (0.0, torch.nan, True):
        with pytest.raises(LossError, match=f"{name}: temperature .* has to be positive, and finite"):
            LOSSES[name](torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 1]), temperature=temperature)


def test_an_exit_is_ofa_of_a_linear_classifier_that_trains_with_the_layers_below() -> None:
    specs = [FeatureSpec(Tap("x"), Layout.NC, (2, channels), channels) for channels in (5, 7)]
    module = OFAExits(*specs, eps=1.4).double()
    assert module.exit.weight.std().item() == pytest.approx(0.02, rel=0.4)
    z, v, y = draw(4, 5).requires_grad_(), draw(4, 7, seed=1), torch.tensor([0, 6, 3, 3])
    weight, bias = (parameter.detach().numpy() for parameter in (module.exit.weight, module.exit.bias))
    rows = zip(z.detach().numpy() @ weight.T + bias, v.numpy(), y.tolist(), strict=True)
    value = module(z, v, y)
    expected = np.mean([of_one_image("ofa", *row, temperature=1.0, eps=1.4) for row in rows])
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(value, (z, *module.parameters())))
    with pytest.raises(LossError, match="ofa_exits: label 7 of 7 classes"):
        module(z, v, torch.tensor([0, 1, 2, 7]))
    with pytest.raises(LossError, match=r"ofa_exits: eps 0\.9"):
        OFAExits(*specs, eps=0.9)


MODELS: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": [8, 8, 8, 16]},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
    },
    "gmixer_12_224": {"img_size": 32},
}
LAYERS = dict(zip(MODELS, ("layer3", "blocks.0", "layers.2", "blocks.1"), strict=True))  # Swin's are NHWC


@cache
def model(name: str, classes: int) -> nn.Module:
    return create_model(name, num_classes=classes, **MODELS[name])  # type: ignore[no-any-return]


@pytest.mark.parametrize("student", MODELS)
def test_a_step_between_unlike_models_trains_the_student_and_its_exits(student: str) -> None:
    """With a teacher of other classes, of which a class map selects the labels'."""
    torch.manual_seed(0)
    objectives = [*map(Objective, NAMES), Objective("ofa_exits", pairs={LAYERS[student]: ""})]
    for teacher in MODELS:
        models = model(student, 5), model(teacher, 7)
        models[0].zero_grad()
        seen = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
        choices: Any = {"class_map": [6, 2, 3, 4, 5], "student_input": seen, "teacher_input": seen}
        distiller = Distiller(*models, objectives, **choices)
        output = distiller(torch.randn(2, 3, 32, 32), torch.tensor([4, 1]))
        output["loss"].backward()
        ((exits,),) = distiller.losses.values()
        assert exits.exit.weight.shape[0] == 5
        trained = [*distiller.student.parameters(), *exits.parameters()]
        assert all(it.grad is not None and it.grad.isfinite().all() for it in trained if it.requires_grad)
        assert exits.exit.weight.grad.abs().sum() > 0
        assert all(it.grad is None for it in models[1].parameters())
        distiller.close()


@pytest.mark.parametrize("name", ["dkd", "nkd", "ofa", "cross_entropy"])
def test_the_first_step_on_a_gpu_checks_the_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a label out of range would be an assertion of the device, after which its process cannot go on."""
    for module in (labelled_outputs, labels_module):
        monkeypatch.setattr(module, "has_values", lambda tensor: False)  # as on a GPU
    monkeypatch.setattr(Terms, "_checks_values", lambda terms, tensor: not terms.checked)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2))
    size = InputSpec((3, 2, 2), 0.0, 1.0)
    step = Distiller(student, teacher, [Objective(name)], student_input=size, teacher_input=size)
    with pytest.raises(LossError, match=f"{name}: label 7 of 5 classes"):
        step(torch.randn(2, 3, 2, 2), torch.tensor([1, 7]))
