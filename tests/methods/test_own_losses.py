"""Losses of one's own in a Distiller: what each kind reads, whose parameters they are, and what is told of mistakes."""

from functools import wraps
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe_kd import Distiller, FeatureSpec, InputSpec, Loss, Objective
from probe_kd.errors import LossError
from probe_kd.methods.losses.outputs import soft_targets
from probe_kd.methods.losses.table import LOSSES, as_loss

IMAGES = InputSpec((3, 32, 32), 0.5, 0.25)
PAIRS = {"layer2": "blocks.1", "layer4": "blocks.3"}


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = timm.create_model("resnet10t", channels=[8, 8, 8, 16], stem_width=8, num_classes=5)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return student, timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)


def distiller(*objectives: Objective, **options: Any) -> Distiller:
    return Distiller(*models(), objectives, student_input=IMAGES, teacher_input=IMAGES, **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 4])


class Regression(nn.Module):
    """A map from the student's vector to the teacher's, with a count of its calls."""

    def __init__(self, student: FeatureSpec, teacher: FeatureSpec, *, scale: float = 2.0) -> None:
        super().__init__()
        self.map = nn.Linear(student.channels, teacher.channels)
        self.scale = scale
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * F.mse_loss(self.map(student), teacher)


def seen_by(reads: Any, **options: Any) -> list[Any]:
    """What a loss of this kind is called with."""
    calls: list[Any] = []

    def spy(student: Any, teacher: Any, *also: Any) -> Tensor:
        calls.append((student, teacher, *also))
        return sum(side.square().mean() for side in (student if isinstance(student, tuple) else (student,)))

    step = distiller(Objective(as_loss(spy, reads), "own", **options))
    result = step(*batch(), index=torch.arange(4))
    result["loss"].backward()
    step.close()
    assert any(parameter.grad is not None for parameter in step.student.parameters())
    for teacher in step.frozen_teachers.values():
        assert all(parameter.grad is None for parameter in teacher.parameters())
    return calls


def shapes(value: Any) -> Any:
    return tuple(map(shapes, value)) if isinstance(value, tuple) else tuple(value.shape)


@pytest.mark.parametrize(
    ("reads", "options", "expected"),
    [
        ("outputs", {}, [((4, 5), (4, 5))]),
        (["outputs", "labels"], {}, [((4, 5), (4, 5), (4,))]),
        (["labels", "index"], {}, [((4, 5), (4,), (4,))]),
        ("features", {"pairs": PAIRS}, [((4, 24, 4, 4), (4, 24, 4, 4)), ((4, 24, 1, 1), (4, 24, 1, 1))]),
        ("vectors", {"pairs": PAIRS}, [((4, 8), (4, 24)), ((4, 16), (4, 24))]),
        ("vectors", {"pairs": PAIRS, "tokens": "flatten"}, [((4, 128), (4, 384)), ((4, 16), (4, 384))]),
        (["vectors", "labels", "index"], {"pairs": {"layer4": ""}}, [((4, 16), (4, 5), (4,), (4,))]),
        ("maps", {"pairs": {"layer2": "blocks.1"}}, [((4, 8, 4, 4), (4, 24, 4, 4))]),
        ("grams", {"pairs": {"layer2": "blocks.1"}}, [((4, 24, 24), (4, 24, 24))]),
        (
            "all_pairs",
            {"pairs": {**PAIRS, "": ""}},
            [(((4, 8, 4, 4), (4, 16, 1, 1), (4, 5)), ((4, 24, 4, 4), (4, 24, 4, 4), (4, 5)))],
        ),
    ],
)
def test_a_loss_of_each_kind_is_called_with_what_it_reads(
    reads: Any, options: dict[str, Any], expected: list[Any]
) -> None:
    assert [shapes(call) for call in seen_by(reads, **options)] == expected


def test_a_module_is_built_for_what_it_sees_and_belongs_to_the_distiller() -> None:
    step = distiller(Objective(Loss(Regression, "vectors"), "own", pairs=PAIRS, options={"scale": 3.0}))
    names = {name for name, _ in step.named_parameters() if name.startswith("losses")}
    assert names == {f"losses.own_.{number}.map.{kind}" for number in (0, 1) for kind in ("weight", "bias")}
    assert step.losses["own_"][1].map.weight.shape == (24, 16)
    before = step.losses["own_"][0].map.weight.detach().clone()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    loss = step(*batch())["loss"]
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, step.losses["own_"][0].map.weight)
    assert {int(module.calls) for module in step.losses["own_"]} == {1}
    other = distiller(Objective(Loss(Regression, "vectors"), "own", pairs=PAIRS, options={"scale": 3.0}))
    other.load_state_dict(step.state_dict())
    assert torch.equal(other.eval()(*batch())["own"], step.eval()(*batch())["own"])
    assert not any("losses" in name for name in step.student.state_dict())


def test_a_module_has_the_teachers_classifier_and_the_number_of_images() -> None:
    def build(student: FeatureSpec, teacher: FeatureSpec, *, classifier: nn.Module, num_images: int) -> nn.Module:
        module = Regression(student, teacher)
        module.classifier, module.memory = classifier, nn.Buffer(torch.zeros(num_images, 2))
        return module

    loss = Loss(build, "vectors", builds_module=True)
    assert loss.options == ()
    step = distiller(Objective(loss, "own", pairs={"layer4": "blocks.3"}), num_images=7)
    module = step.losses["own_"][0]
    assert module.memory.shape == (7, 2)
    assert torch.equal(module.classifier.weight, step.frozen_teacher.head.weight)
    assert not module.classifier.weight.requires_grad
    with pytest.raises(LossError, match="num_images"):
        distiller(Objective(loss, "own", pairs={"layer4": "blocks.3"}))


def typed(
    student: "torch.Nothing",  # type: ignore[name-defined]
    teacher: Tensor,
    scale: float = 1.0,
    *,
    width: int | None = None,
    kind: str | None = "a",
) -> Tensor:
    return scale * F.mse_loss(student, teacher)


def gives(value: Any) -> Any:
    return lambda student, teacher: value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_loss(F.mse_loss), "nothing says what the loss 'mse_loss' reads.*features"),
        (lambda: as_loss(F.mse_loss, "feature"), "'feature'; did you mean 'features'"),
        (lambda: as_loss(F.mse_loss, ["outputs", "label"]), "cannot also read 'label'"),
        (lambda: Loss(3, "outputs"), "a loss is a int; expected a function"),  # type: ignore[arg-type]
        (lambda: Loss(dict, "outputs"), "does not inherit from nn.Module"),
        (lambda: Loss(Regression, "labels"), "'Regression' of labels builds a module.*give a function"),
        (lambda: Objective(as_loss(lambda student: student, "outputs"), "own"), "called with .student, teacher."),
        (lambda: Objective(as_loss(gives(0), ["outputs", "labels"]), "own"), "student, teacher, labels"),
        (lambda: Objective(Loss(Regression, "vectors"), "own", options={"scal": 1}), "did you mean 'scale'"),
        (lambda: Objective(Loss(Regression, "vectors"), "own", options={"scale": "1"}), "expected a finite number"),
        (lambda: Objective(Loss(Regression, "vectors"), "own", options={"scale": 10**400}), "expected a finite number"),
        (lambda: as_loss(F.mse_loss, 3), "a loss reads 3"),
        (lambda: as_loss(F.mse_loss, []), r"a loss reads \[\]"),
        (lambda: as_loss(F.mse_loss, {"outputs"}), "a loss reads {'outputs'}"),
        (lambda: as_loss(F.mse_loss, ["outputs", "labels", "labels"]), "reads 'labels' twice"),
        (
            lambda: Loss(nn.Bilinear(2, 2, 1), "vectors"),
            "'Bilinear' is a module that was built already.*give its class",
        ),
        (lambda: Objective(as_loss(typed, "outputs"), "own", options={"width": "big"}), "a whole number or null"),
        (lambda: Objective(as_loss(typed, "outputs"), "own", options={"kind": 3}), "kind is 3; expected text"),
        (lambda: Objective(as_loss(typed, "outputs"), "own", options={"scale": 3}), "an option comes after a `.`"),
        (lambda: Objective("mylosses.cosine", "own"), "one of your own is written `package.module:name`"),
    ],
)
def test_a_mistake_in_a_loss_is_told_at_once(make: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "returned a float; expected one number"),
        (torch.zeros(4), r"returned a tensor \(4,\)"),
        (torch.tensor(float("nan")), "own is nan"),
        (torch.tensor(1), "expected one real number"),
    ],
)
def test_a_value_that_is_no_loss_is_told_in_the_step(value: Any, message: str) -> None:
    with distiller_of(gives(value)) as step, pytest.raises(LossError, match=message):
        step(*batch())


def test_an_error_inside_a_loss_names_the_loss_and_the_line() -> None:
    def broken(student: Tensor, teacher: Tensor) -> Tensor:
        return F.linear(student, teacher.T)  # which is not square: torch notices it

    with (
        distiller_of(broken) as step,
        pytest.raises(LossError, match=r"'own' of \(4, 5\), \(4, 5\) raised RuntimeError.*test_own_losses.py"),
    ):
        step(*batch())


def test_a_loss_that_changes_what_other_losses_read_is_refused() -> None:
    def double(student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher.mul_(2))

    with (
        distiller_of(double) as step,
        pytest.raises(LossError, match=r"'own' changes a tensor that it is given.*clone"),
    ):
        step(*batch())


def test_a_function_around_one_of_our_losses_is_called_as_itself() -> None:
    @wraps(soft_targets)
    def half(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        assert not options
        return soft_targets(student, teacher) / 2

    with distiller_of(half) as own, distiller_of(soft_targets) as whole:
        assert torch.equal(own(*batch())["own"] * 2, whole(*batch())["own"])


def test_an_error_while_a_module_is_built_names_the_loss_and_the_line() -> None:
    def build(student: FeatureSpec, teacher: FeatureSpec) -> nn.Module:
        raise RuntimeError("no such file")

    with pytest.raises(
        LossError, match=r"'own' cannot be built: RuntimeError: no such file \(test_own_losses.py, line"
    ):
        distiller(Objective(Loss(build, "vectors", builds_module=True), "own", pairs=PAIRS))


class distiller_of:  # a context that is called like the function beside it
    """A Distiller of one function of outputs, closed at the end."""

    def __init__(self, function: Any) -> None:
        self.step = distiller(Objective(as_loss(function, "outputs"), "own"))

    def __enter__(self) -> Distiller:
        return self.step

    def __exit__(self, *_: object) -> None:
        self.step.close()


def test_a_loss_of_one_s_own_computes_in_float32_and_moves_no_teacher() -> None:
    kinds = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        kinds.append((student.dtype, teacher.dtype, teacher.requires_grad))
        return (student @ teacher.T).mean()

    with distiller_of(loss) as step, torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(*batch())["own"].dtype == torch.float32
    assert kinds == [(torch.float32, torch.float32, False)]


def test_all_pairs_of_several_teachers_are_compared_teacher_by_teacher() -> None:
    student, teacher = models()
    counts = []

    def loss(students: tuple[Tensor, ...], teachers: tuple[Tensor, ...]) -> Tensor:
        counts.append(len(students))
        return students[0].mean() - teachers[0].mean()

    pairs = [("layer2", "a:blocks.1"), ("layer4", "a:blocks.3"), ("layer4", "b:blocks.3")]
    step = Distiller(
        student,
        {"a": teacher, "b": models()[1]},
        Objective(as_loss(loss, "all_pairs"), "own", pairs=pairs),
        student_input=IMAGES,
        teacher_input={"a": IMAGES, "b": IMAGES},
        teacher_weight={"a": 1.0, "b": 3.0},
    )
    result = step(*batch())
    assert counts == [2, 1]
    assert [comparison.weight for _, comparison, _ in step.plan] == [1.0, 3.0]
    assert result["loss"].isfinite()


def test_only_losses_that_bring_values_together_have_an_explained_variance() -> None:
    """Of a correlation the student's values may be anything, and an explained variance would say that it failed."""
    predicting = {name for name, loss in LOSSES.items() if loss.predicts_features}
    assert predicting == {"hint", "token_match", "smooth_l1", "vid"}

    def correlation(student: Tensor, teacher: Tensor) -> Tensor:
        return student.mean() - teacher.mean()

    assert as_loss(correlation, "features").predicts_features
    correlation.predicts = False
    assert not as_loss(correlation, "features").predicts_features
