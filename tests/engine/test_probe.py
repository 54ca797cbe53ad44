"""Probes: every way in which a forward hook is known to lie (design.md, section 5), and what this one does about it."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from probe_kd import Probe, Tap, trace
from probe_kd.errors import TapError


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    """Or the compiler's limit for one function, here `Probe.__call__`, is reached over all tests together."""
    torch._dynamo.reset()


def model(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).eval()


def images(seed: int = 1, size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def hooks_on(net: nn.Module) -> int:
    """Whatever a hook leaves on a module, the flags beside it included."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, store)) for module in net.modules() for store in kept)


def stem(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A resnet's first convolution and normalisation, computed without any module and so without any in-place layer."""
    conv = F.conv2d(x, net.conv1.weight, stride=2, padding=3)
    bn = net.bn1
    return conv, F.batch_norm(conv, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@dataclass
class Found:
    map: Tensor
    scale: float = 1.0


class Odd(nn.Module):
    """What the zoo does here and there: keywords, tuples, dicts, one module called again, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Keywords()
        self.act = nn.ReLU(inplace=True)
        self.never = nn.Linear(4, 4)
        self.held = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        found = self.first(images=x, mask=mask)
        y = self.act(found["pair"][0].clone())
        z = self.act(y - 0.5)
        return {"y": y, "more": [z, Found(self.held[0](z))], "0": z}


class Keywords(nn.Module):
    def forward(self, *, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        return {"pair": (images - 1, images + 1), "none": mask}


def test_captures_are_the_tensors_of_the_forward_and_the_output_is_the_models() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["conv1", "layer1@input", "layer2.0.bn1", "", "@input"])
    for _ in range(2):  # the rehearsal, then an ordinary call
        seen = probe(x)
        assert list(seen) == [Tap("conv1"), Tap("layer1", "input"), Tap("layer2.0.bn1"), Tap(""), Tap("", "input")]
        conv, bn = stem(net, x)
        torch.testing.assert_close(seen[Tap("conv1")], conv)
        pooled = F.max_pool2d(bn.relu(), 3, 2, 1)
        torch.testing.assert_close(seen[Tap("layer1", "input")], pooled)
        assert torch.equal(seen[Tap("")], net(x))
        assert seen[Tap("", "input")] is x or torch.equal(seen[Tap("", "input")], x)


def test_a_capture_that_a_later_layer_overwrites_is_found_and_only_that_one_is_cloned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["conv1", "bn1", "act1@input", "layer1"])
    probe(x)
    cloned = Counter[tuple[int, ...]]()
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self: (cloned.update([tuple(self.shape)]), clone(self))[1])
    seen = probe(x)
    monkeypatch.undo()
    assert cloned == {tuple(seen[Tap("bn1")].shape): 2}  # bn1 and the input of the activation after it are one tensor
    _, bn = stem(net, x)
    torch.testing.assert_close(seen[Tap("bn1")], bn)
    torch.testing.assert_close(seen[Tap("act1", "input")], bn)
    assert bn.min() < 0


def test_a_trace_tells_the_same_overwritten_taps_so_that_no_rehearsal_is_needed() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, [trace(net)["bn1"]])
    calls = count_calls(net)
    seen = probe(x)[Tap("bn1")]
    torch.testing.assert_close(seen, stem(net, x)[1])
    assert "layer1" not in calls


class Moody(nn.Module):
    """Overwrites its first feature in some calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()
        self.spoil = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x + 1)
        if self.spoil:
            y.zero_()
        return self.c(self.b(y * 2))


@pytest.mark.parametrize("taps", [["a", "b"], ["a", ""]])
def test_a_capture_overwritten_only_after_the_rehearsal_is_refused_with_or_without_early_stop(taps: list[str]) -> None:
    net = Moody()
    probe = Probe(net, taps)
    probe(images())
    net.spoil = True
    with pytest.raises(TapError, match="'a': an in-place operation overwrote"):
        probe(images())
    assert hooks_on(net) == 0


def test_one_tap_needs_no_list() -> None:
    for tap in ("layer2", Tap("layer2")):
        assert Probe(timm.create_model("resnet10t"), tap).taps == (Tap("layer2"),)


def test_each_mode_has_its_own_rehearsal() -> None:
    net, x = Moody().train(), images()
    probe = Probe(net, ["a", "b"])
    probe(x)
    net.eval().spoil = True
    for _ in range(2):
        assert torch.equal(probe(x)[Tap("a")], x + 1)


def test_the_input_of_the_model_survives_a_first_layer_that_overwrites_it() -> None:
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)), images()
    probe = Probe(net, ["@input", "0@input", "1"]).attach()
    for run in (probe, probe, torch.compile(probe, backend="eager", fullgraph=True)):
        seen = run(x + 0)
        assert torch.equal(seen[Tap("", "input")], x)
        assert torch.equal(seen[Tap("0", "input")], x)


def test_under_inference_mode_captures_are_right_and_nothing_is_learned_from_it() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["bn1"])
    for _ in range(2):
        with torch.inference_mode():
            seen = probe(x)[Tap("bn1")]
        torch.testing.assert_close(seen.clone(), stem(net, x)[1])
    torch.testing.assert_close(probe(x)[Tap("bn1")], stem(net, x)[1])
    torch.testing.assert_close(probe(x)[Tap("bn1")], stem(net, x)[1])


def test_a_module_called_several_times_needs_an_index() -> None:
    net, x = Odd(), images()
    with pytest.raises(TapError, match=r"'act' is called 2 times in one forward; write which, 'act#0' to 'act#1'"):
        Probe(net, ["act"])(x)
    with pytest.raises(TapError, match=r"'act#2': 'act' is called 2 times in one forward; the last is 'act#1'"):
        Probe(net, ["act#2"])(x)
    with pytest.raises(TapError, match=r"'#1': the model itself runs once; write ''"):
        Probe(net, ["#1"])
    probe = Probe(net, ["act#1", "act#0", "act#1@input"])
    for _ in range(2):
        seen = probe(x)
        assert torch.equal(seen[Tap("act", call=0)], (x - 1).relu())
        assert torch.equal(seen[Tap("act", "input", 1)], (x - 1).relu() - 0.5)
        assert torch.equal(seen[Tap("act", call=1)], ((x - 1).relu() - 0.5).relu())


@pytest.mark.parametrize(
    ("make", "tap", "cause", "near"),
    [
        (Odd, "never", "this Linear takes no part in the forward", "held.0"),
        (Odd, "held", "a ModuleList only holds its children and is never called", "held.0"),
        (lambda: model("test_vit"), "blocks.1.attn.attn_drop", "fused attention computes it", "blocks.1.attn"),
        (lambda: checkpointed("resnet18"), "layer1", "its children are called one by one, but the module", "layer1.1"),
    ],
)
def test_a_module_that_never_fires_is_refused_with_the_cause_and_the_nearest_that_does(
    make: Callable[[], nn.Module], tap: str, cause: str, near: str
) -> None:
    net, size = make(), 160 if tap.startswith("blocks") else 64
    with pytest.raises(TapError, match=f"'{tap}' never fires: {cause}.*nearest module that is called is '{near}"):
        Probe(net, [tap])(images(size=size))
    assert hooks_on(net) == 0


def test_names_that_do_not_exist_are_refused_at_once_with_the_nearest() -> None:
    with pytest.raises(TapError, match=r"ResNet has no module 'layer5'; did you mean 'layer\d'"):
        Probe(model("resnet18"), ["layer5"])
    with pytest.raises(TapError, match="has no module 'zzz'; its top-level modules: conv1, bn1, act1"):
        Probe(model("resnet18"), ["zzz"])


def test_values_that_are_no_tensors_are_refused_with_the_items_there_are() -> None:
    net, x = Odd(), images()
    with pytest.raises(TapError, match=r"'first' yields a dict of 2, not a tensor; write one of 'first\[pair\]', "):
        Probe(net, ["first"])(x)
    with pytest.raises(TapError, match=r"'first\[pear\]': no item \[pear\] in a dict of 2; items there: pair, none"):
        Probe(net, ["first[pear]"])(x)
    with pytest.raises(TapError, match=r"yields a value of type NoneType"):
        Probe(net, ["first[none]"])(x)
    with pytest.raises(TapError, match=r"not called with an argument \[mast\]; its arguments: \[images\], \[mask\]"):
        Probe(net, ["first@input[mast]"])(x)


def test_keyword_inputs_and_items_of_tuples_dicts_and_dataclasses() -> None:
    net, x, mask = Odd(), images(), images(2)
    taps = ["first@input", "first@input[mask]", "first[pair][1]", "[y]", "[more][0]", "[more][1][map]", "[0]", "@input"]
    probe = Probe(net, taps)
    for _ in range(2):
        seen = [*probe(x, mask=mask).values()]
        z = ((x - 1).relu() - 0.5).relu()
        for got, expected in zip(seen, [x, mask, x + 1, (x - 1).relu(), z, net.held[0](z), z, x], strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(Probe(net, ["@input[x]"])(x=x)[Tap("", "input", None, ("x",))], x)


def count_calls(net: nn.Module) -> Counter[str]:
    calls = Counter[str]()

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.update([name]), forward(*args, **kwargs))[1]

    for name, module in net.named_modules():
        module.forward = counted(name, module.forward)
    return calls


def test_the_forward_ends_at_the_last_tap_after_a_whole_rehearsal() -> None:
    net, x = model("resnet50"), images()
    expected = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x))))))
    calls = count_calls(net)
    probe = Probe(net, ["layer1", "layer2"])
    probe(x)
    assert calls["fc"] == 1
    calls.clear()
    assert torch.equal(probe(x)[Tap("layer2")], expected)
    assert calls["layer2"] == 1
    assert not {"layer3", "layer3.0", "fc"} & set(calls)
    calls.clear()
    before = Probe(net, ["layer3@input"])
    before(x), calls.clear()
    assert torch.equal(before(x)[Tap("layer3", "input")], expected)
    assert "layer3" not in calls
    whole = Probe(net, ["layer2"], stop_early=False)
    whole(x), calls.clear()
    whole(x)
    assert calls["fc"] == 1


def checkpointed(name: str, **kwargs: Any) -> nn.Module:
    net = model(name, **kwargs).train()
    net.set_grad_checkpointing()
    return net


@pytest.mark.parametrize("taps", [["blocks.1", "blocks.0.mlp.fc1", ""], ["blocks.1", "blocks.0.mlp.fc1"]])
def test_gradient_checkpointing_changes_neither_captures_nor_gradients(taps: list[str]) -> None:
    plain, saving, x = model("test_vit").train(), checkpointed("test_vit"), images(size=160)
    found: list[tuple[dict[Tap, Tensor], list[Tensor | None]]] = []
    for net in (plain, saving):
        probe = Probe(net, taps).attach()
        probe(x)
        net.zero_grad()
        calls = count_calls(net)
        seen = probe(x)
        sum(feature.square().mean() for feature in seen.values()).backward()
        found.append((seen, [parameter.grad for parameter in net.parameters()]))
        assert calls["blocks.1.mlp.fc1"] == 1 + (net is saving)  # the checkpoints ran again in the backward pass
    (seen, gradients), (seen_again, gradients_again) = found
    assert all(torch.equal(seen[tap], seen_again[tap]) for tap in seen)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True) if a is not None)
    assert [gradient is None for gradient in gradients] == [gradient is None for gradient in gradients_again]


def test_nothing_is_left_on_the_model_and_close_twice_is_as_good_as_once() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["layer1", "layer2@input"])
    probe(x)
    assert hooks_on(net) == 0
    probe.attach().attach()
    assert hooks_on(net) == 8  # two modules, each with two hooks and their flags
    probe.close()
    probe.close()
    assert hooks_on(net) == 0
    with probe:
        assert hooks_on(net) == 8
    assert hooks_on(net) == 0
    assert "layer1" in {tap.module for tap in probe(x)}  # and works again


def test_an_exception_inside_the_forward_leaves_no_hook_and_no_tensor() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["layer1", ""])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            probe(x[:, :2])
        assert hooks_on(net) == 0
        net.layer3.forward = lambda _: 1 / 0
        with pytest.raises(ZeroDivisionError):
            probe(x)
        assert hooks_on(net) == 0
        assert held(probe) == 0
        del net.layer3.forward
        assert torch.equal(probe(x)[Tap("")], net(x))


def held(probe: Probe) -> int:
    return sum(tensor is not None for tensor in probe._store.values()) + len(probe._versions)


def test_a_copy_or_a_pickle_of_an_attached_model_never_writes_into_the_probe() -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["layer1", ""]).attach()
    probe(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        net.layer2.forward = lambda y, twin=twin: (twin(x), type(net.layer2).forward(net.layer2, y))[1]
        assert torch.equal(probe(x)[Tap("layer1")], stem_to_layer1(net, x))
        del net.layer2.forward
        assert torch.equal(twin(x), net(x))
    assert held(probe) == 0


def stem_to_layer1(net: nn.Module, x: Tensor) -> Tensor:
    return net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda probe: pickle.loads(pickle.dumps(probe))])
def test_a_copy_or_a_pickle_of_a_probe_is_a_probe_of_the_copied_model(twin_of: Callable[[Probe], Probe]) -> None:
    net, x = model("resnet18"), images()
    probe = Probe(net, ["bn1", "layer1"]).attach()
    probe(x)
    twin = twin_of(probe)
    twin.model.bn1.bias.data += 1
    compiled = torch.compile(twin, backend="eager", fullgraph=True)  # which needs the hooks attached
    calls = count_calls(twin.model)
    torch.testing.assert_close(twin(x)[Tap("bn1")], probe(x)[Tap("bn1")] + 1)
    assert calls["layer1"] == 1
    assert "layer2" not in calls  # what the rehearsal found is known
    torch.testing.assert_close(compiled(x)[Tap("bn1")], probe(x)[Tap("bn1")] + 1)
    probe.close()
    assert hooks_on(net) == 0


def test_two_probes_of_models_that_share_a_module_keep_apart() -> None:
    ours, theirs = model("resnet18"), model("resnet18").requires_grad_(False)
    theirs.conv1.weight.mul_(-1)
    theirs.layer1 = ours.layer1
    x = images()
    a, b = Probe(ours, ["layer1", ""]).attach(), Probe(theirs, ["layer1", ""]).attach()
    a(x), b(x)
    expected = stem_to_layer1(ours, x), stem_to_layer1(theirs, x)
    assert not torch.equal(*expected)
    for _ in range(2):
        assert torch.equal(a(x)[Tap("layer1")], expected[0])
        assert held(b) == 0
        assert torch.equal(b(x)[Tap("layer1")], expected[1])
        assert held(a) == 0


def test_one_module_under_two_names_is_one_module() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), images()
    net.add_module("again", net[0])
    probe = Probe(net, ["again#1", "0#0"])
    for _ in range(2):
        seen = probe(x)
        assert torch.equal(seen[Tap("again", call=1)], net(x))
        assert torch.equal(seen[Tap("0", call=0)], net[0](x))
    with pytest.raises(TapError, match="'again' is called 2 times"):
        Probe(net, ["again"])(x)


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_compiled_probe_is_one_graph_and_its_captures_are_fresh(rehearsed: bool) -> None:
    net = model("resnet18")
    taps = ["bn1", "layer1", "layer3.0.act1@input", ""]
    probe, eager = Probe(net, taps).attach(), Probe(copy.deepcopy(net), taps)
    if rehearsed:
        probe(images())
    counter = CompileCounter()
    compiled = torch.compile(probe, backend=counter, fullgraph=True)
    for seed in range(4):
        seen, expected = compiled(images(seed)), eager(images(seed))
        assert all(torch.equal(seen[tap], expected[tap]) for tap in probe.taps)
    assert counter.frame_count == 1


def test_a_whole_graph_without_hooks_is_refused() -> None:
    compiled = torch.compile(Probe(model("test_resnet"), ["layer1"]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call probe.attach\(\) before compiling"):
        compiled(images())


class Breaking(nn.Module):
    """Its second half runs outside any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.a(x))

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.c(self.b(x))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("make", [Breaking, lambda: model("test_resnet")])
def test_captures_are_right_where_the_compiler_breaks_the_graph(make: Callable[[], nn.Module], attached: bool) -> None:
    net = make().eval()
    taps = ["a", "b"] if isinstance(net, Breaking) else ["bn1", "layer1"]
    probe, eager = Probe(net, taps), Probe(copy.deepcopy(net), taps)
    compiled = torch.compile(probe.attach() if attached else probe, backend="eager")
    for seed in range(3):
        seen, expected = compiled(images(seed)), eager(images(seed))
        assert all(torch.equal(seen[tap], expected[tap]) for tap in probe.taps)


def test_hooks_that_would_never_fire_are_refused() -> None:
    net = model("test_resnet")
    with pytest.raises(TapError, match="compiled already"):
        Probe(torch.compile(net, backend="eager"), ["layer1"])
    with pytest.raises(TapError, match="TorchScript"):
        Probe(torch.jit.trace(nn.Sequential(nn.ReLU()), images()), ["0"])
    net.compile(backend="eager")
    with pytest.raises(TapError, match="compiled already"):
        Probe(net, ["layer1"])
