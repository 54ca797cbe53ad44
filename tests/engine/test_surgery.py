"""Surgery: what is displaced comes back, every parent is re-pointed, and a refusal changes nothing."""

import pytest
import timm
import torch
from torch import Tensor, nn

from probe_kd import freeze, replace, share
from probe_kd.engine.surgery import get
from probe_kd.errors import TapError


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return -self.inner(x)


def small() -> nn.Module:
    return timm.create_model("test_resnet")


def test_replace_re_points_every_parent_and_every_name_and_can_be_undone() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Sequential(shared, nn.Tanh()), shared)
    model[0].add_module("again", shared)
    new = nn.Sigmoid()
    assert replace(model, "0.0", new) is shared
    assert (model[0][0], model[0].again, model[1]) == (new, new, new)
    assert replace(model, "1", shared) is new
    assert (model[0][0], model[0].again, model[1]) == (shared, shared, shared)


def test_a_module_can_be_replaced_by_one_that_wraps_it() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    old = replace(model, "0", Wrapped(model[0]))
    assert model[0].inner is old
    x = torch.randn(3)
    assert torch.equal(model(x), torch.tanh(-x.relu()))


def test_share_gives_the_student_the_teachers_modules_and_returns_its_own() -> None:
    student, teacher = small(), small()
    own = student.conv1, student.layer1
    old = share(student, teacher, {"conv1": "conv1", "layer1": "layer1"})
    assert (student.conv1, student.layer1) == (teacher.conv1, teacher.layer1)
    assert (old["conv1"], old["layer1"]) == own
    assert student.layer2 is not teacher.layer2


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"conv1": "conv1", "layer1": "layer2"}, "'layer1' of the student cannot be 'layer2' of the teacher: '.*' is "),
        ({"conv1": "conv1", "layer1": "bn1"}, "only the (student|teacher) has '"),
        ({"conv1": "conv1", "layr1": "layer1"}, "ResNet has no module 'layr1'; did you mean 'layer1'"),
        ({"conv1": "conv1", "layer1": "layer9"}, "no module 'layer9'; did you mean 'layer"),
    ],
)
def test_share_refuses_before_anything_is_changed(names: dict[str, str], says: str) -> None:
    student, teacher = small(), small()
    with pytest.raises(TapError, match=says):
        share(student, teacher, names)
    assert student.conv1 is not teacher.conv1


def test_freeze_takes_globs_and_module_names_and_returns_what_was_trainable() -> None:
    model = small()
    model.bn1.weight.requires_grad_(False)
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if name.startswith(("bn1.", "layer1.")) or name.endswith("conv2.weight")}
    assert set(freeze(model, ["bn1", "layer1.*", "*.conv2.weight"])) == expected - {"bn1.weight"}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == expected
    assert freeze(model, ["bn1"]) == []


def test_freeze_does_not_take_a_name_for_its_beginning() -> None:
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    assert freeze(model, ["layer1"]) == ["layer1.weight", "layer1.bias"]


def test_patterns_that_match_nothing_are_refused_before_anything_is_frozen() -> None:
    model = small()
    with pytest.raises(TapError, match=r"no parameter of ResNet matches 'fc.wieght'; did you mean 'fc.weight'"):
        freeze(model, ["layer1", "fc.wieght"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_names_are_looked_up_with_the_nearest() -> None:
    model = small()
    assert get(model, "layer1.0.conv1") is model.layer1[0].conv1
    assert get(model, "") is model
    with pytest.raises(TapError, match=r"no module 'layer1.0.conv9'; did you mean 'layer1.0.conv"):
        get(model, "layer1.0.conv9")
    with pytest.raises(TapError, match="the model itself cannot be replaced inside itself"):
        replace(model, "", model)
