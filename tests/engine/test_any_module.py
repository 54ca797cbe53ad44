"""Modules that are not timm's: wrappers, names, repeated blocks, classifiers of convolutions, decoders, tokens."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from probe_kd import MatchWarning, Pair, Probe, Trace, match, trace
from probe_kd.engine.matching import blocks, doubts, stages
from probe_kd.errors import MatchError
from probe_kd.methods.steps import ToMap


def conv(width: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Mixer(nn.Module):
    """A block of tokens, with two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stage(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(conv(width, out, 2), Residual(out), Residual(out))


class Cnn(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.low, self.middle, self.high = conv(3, 8, 2), stage(8, 16), stage(16, 24), stage(24, 32)
        self.head = nn.Linear(32, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.middle(self.low(self.stem(x)))).mean((2, 3)))


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module, gives: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.gives = model, gives

    def forward(self, x: Tensor) -> Any:
        return self.gives(self.model(x))


class Headed(nn.Module):
    """A backbone without a classifier, and a classifier beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = Cnn(0), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


class Pyramid(nn.Module):
    """A backbone that returns the ends of all stages, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Cnn()

    def forward(self, x: Tensor) -> dict[Any, Any]:
        low = self.backbone.low(self.backbone.stem(x))
        middle = self.backbone.middle(low)
        high = self.backbone.high(middle)
        return {"features": [low, middle, high], 0: self.backbone.head(high.mean((2, 3)))}


GIVES: dict[str, Callable[[Any], Any]] = {
    "vector": lambda y: y,
    "tuple": lambda y: (y, [y]),
    "dict": lambda y: {"0": y},
    "dataclass": lambda y: Answer(y if isinstance(y, Tensor) else torch.zeros(1)),
    "nested": lambda y: {"out": [{"]": y}]},
}


@pytest.fixture(scope="module")
def resnet() -> Trace:
    return trace(timm.create_model("resnet10t"), 64)


def taps(model: nn.Module, size: Any = 64, **options: Any) -> str:
    return " ".join(str(spec.tap) for spec in stages(trace(model, size, **options)))


@pytest.mark.parametrize("gives", GIVES)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("inner", [Cnn, Headed, Pyramid])
def test_a_model_in_wrappers_matches_as_the_bare_one(
    gives: str, depth: int, inner: Callable[[], nn.Module], resnet: Trace
) -> None:
    model, prefix = inner(), "" if inner is Cnn else "backbone."
    for _ in range(depth):
        model, prefix = Wrapper(model, GIVES[gives]), f"model.{prefix}"
    pairs = match(trace(model, 64), resnet)
    assert [str(pair.student).removeprefix(prefix) for pair in pairs] == ["low", "middle", "high"]
    assert [pair.teacher for pair in pairs] == [pair.teacher for pair in match(trace(Cnn(), 64), resnet)]


@pytest.mark.parametrize(
    "key",
    [
        "0",
        "007",
        "a]b",
        "a[0]",
        "x.y",
        "a#1",
        "b@input",
        "",
        " ",
        "'",
        'say "it"',
        "ü",
        3,
        10**12,
        -1,
        True,
        None,
        (1, 2),
    ],
)
def test_an_output_of_any_key_is_traced_tapped_and_read(key: Any) -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return {key: self.body(x), "other": x}

    model = Wrapper(Dict(), lambda y: y)
    (spec,) = [spec for spec in trace(model, 8).specs if spec.tap.module == "model" and spec.channels == 4]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(Probe(model, str(spec.tap))(images)[spec.tap], model.model.body(images))


def test_a_digit_still_selects_a_key_of_text_where_no_number_is_one() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"0": x, "1": x + 1, 1: x + 2}

    images = torch.randn(2, 3, 4, 4)
    captured = Probe(Both(), ["[0]", "[1]", "['1']"])(images)
    assert [round(float((value - images).mean())) for value in captured.values()] == [0, 2, 1]


class Names(nn.Module):
    """Blocks of tokens under any names, which `hold` adds and returns in the order of the forward."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.order = hold(self)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for name in self.order:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean(1))


def attributes(names: str) -> Callable[[nn.Module], list[str]]:
    def hold(model: nn.Module) -> list[str]:
        for name in names.split():
            model.add_module(name, Mixer(16))
        return names.split()

    return hold


def nested(model: nn.Module) -> list[str]:
    model.groups = nn.ModuleList(nn.ModuleList(Mixer(16) for _ in range(2)) for _ in range(2))
    return [f"groups.{group}.{block}" for group in range(2) for block in range(2)]


def sequence(model: nn.Module) -> list[str]:
    model.encoder = nn.Module()
    model.encoder.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", Mixer(16)) for i in range(4)))
    return ["encoder.layers"]


@pytest.mark.parametrize(
    ("hold", "expected"),
    [
        (attributes("block0 block1 block2 block3"), "block0 block1 block2 block3"),
        (attributes("first second third fourth"), "first second third fourth"),
        (attributes("a b c d e f g h"), "b d f h"),
        (nested, "groups.0.0 groups.0.1 groups.1.0 groups.1.1"),
        (sequence, " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(4))),
    ],
    ids=["attributes", "words", "letters", "list under a list", "encoder_layer_0"],
)
def test_blocks_are_found_by_what_repeats(hold: Callable[[nn.Module], Any], expected: str) -> None:
    assert taps(Names(hold)) == expected


def test_of_a_block_that_is_a_list_of_unlike_modules_the_last_counts() -> None:
    class Attention(Mixer):
        pass

    def hold(model: nn.Module) -> list[str]:
        model.layers = nn.ModuleList(nn.ModuleList([Attention(16), Mixer(16)]) for _ in range(4))
        return [f"layers.{block}.{part}" for block in range(4) for part in range(2)]

    assert taps(Names(hold)) == "layers.0.1 layers.1.1 layers.2.1 layers.3.1"


class Repeated(nn.Module):
    """One block that runs several times at each of two strides."""

    def __init__(self, times: int, width: int = 16) -> None:
        super().__init__()
        self.times = times
        self.stem, self.block, self.down = nn.Conv2d(3, width, 4, 4), Residual(width), nn.Conv2d(width, width, 2, 2)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        x = self.down(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_a_block_that_runs_several_times_ends_each_stage_at_its_last_call(times: int) -> None:
    assert taps(Repeated(times)) == f"block#{times - 1} block#{2 * times - 1}"


def test_one_block_of_one_stride_is_paired_by_its_calls(resnet: Trace) -> None:
    def hold(model: nn.Module) -> list[str]:
        model.block = Mixer(16)
        return ["block"] * 6

    pairs = match(trace(Names(hold), 64), resnet)
    assert str(pairs[-1]) == "block#5 <- layer4"
    assert len(blocks(trace(Names(hold), 64))) == 6


class Classifier(nn.Module):
    def __init__(self, head: nn.Module, *, tokens: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8, 2), stage(8, 16), stage(16, 24))
        self.classifier, self.tokens = head, tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        y = self.classifier(x.flatten(2).transpose(1, 2) if self.tokens else x)
        return y.mean(1) if self.tokens else y.mean((2, 3)) if y.ndim == 4 else y


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Dropout(), nn.Conv2d(24, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Conv2d(24, 10, 1),
        nn.Sequential(nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.Conv2d(48, 10, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 10, 1)),
        nn.Sequential(conv(24, 24), conv(24, 24), nn.Conv2d(24, 10, 1), nn.AdaptiveAvgPool2d(1)),
    ],
    ids=["squeezenet", "bare", "two", "after the pooling", "three"],
)
def test_a_classifier_of_convolutions_is_no_stage(head: nn.Module) -> None:
    assert taps(Classifier(head)).split()[-1] == "features.2"


def test_a_linear_classifier_of_every_position_is_no_stage() -> None:
    assert (
        taps(Classifier(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 10)), tokens=True)).split()[-1] == "features.2"
    )


def test_the_last_stage_of_a_model_without_a_classifier_stays_one() -> None:
    assert taps(Cnn(0)) == "stem low middle high"


@pytest.mark.parametrize("pools", [[nn.MaxPool2d(2)], [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(8)]], ids=["one", "two"])
def test_a_pooling_of_a_tapped_layer_is_no_second_target(pools: list[nn.Module]) -> None:
    model = nn.Sequential(conv(3, 8, 2), stage(8, 16), *pools, nn.Flatten(), nn.Linear(16 * 64, 10))
    assert taps(model) == "0 1.2"


class EndsWithItsStride(nn.Module):
    """A block of which two layers go on with the stage before, and the third has the stride (Xception)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        pairs = [(width, out, 1), (out, out, 1), (out, out, stride)]
        self.stack = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, a, 3, s, 1), nn.Conv2d(a, b, 1)) for a, b, s in pairs))
        self.shortcut = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x) + self.shortcut(x)


def test_a_stage_goes_on_in_a_block_whose_last_layer_has_the_stride() -> None:
    widths = [(8, 16, 2), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1)]
    blocks = [EndsWithItsStride(*width) for width in widths]
    model = nn.Sequential(conv(3, 8, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    assert taps(model, 128) == "1.stack.1 2.stack.1 4.stack.1 5"


class LastConvolution(nn.Module):
    """Stages and a last convolution, in their list or after it."""

    def __init__(self, width: int, *, in_list: bool) -> None:
        super().__init__()
        last = conv(24, width)
        self.stages = nn.Sequential(nn.Sequential(conv(3, 8, 2)), stage(8, 16), stage(16, 24))
        self.stages.append(nn.Sequential(last)) if in_list else self.add_module("last", last)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)
        return self.fc((self.last(x) if hasattr(self, "last") else x).mean((2, 3)))


@pytest.mark.parametrize(
    ("width", "in_list", "last", "other"),
    [
        (96, True, "stages.3", "or 'stages.2' of the student, before its last convolution"),
        (96, False, "stages.2", "or 'last' of the student, its last convolution"),
        (20, False, "last", ""),
    ],
)
def test_where_authors_differ_on_a_last_convolution_the_reason_names_the_other_choice(
    width: int, in_list: bool, last: str, other: str, resnet: Trace
) -> None:
    pair = match(trace(LastConvolution(width, in_list=in_list), 64), resnet)[-1]
    assert str(pair.student) == last
    assert pair.reason.partition("; or")[2] == other.removeprefix("or")


class Stages(nn.Module):
    """The stages of a backbone; the last has a stride or, dilated, none."""

    def __init__(self, *, dilated: bool) -> None:
        super().__init__()
        self.stem, self.low, self.middle = conv(3, 8, 2), stage(8, 16), stage(16, 24)
        self.high = nn.Sequential(conv(24, 32), Residual(32)) if dilated else stage(24, 32)

    def stages(self, x: Tensor) -> list[Tensor]:
        low = self.low(self.stem(x))
        middle = self.middle(low)
        return [low, middle, self.high(middle)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.stages(x)


class Unet(nn.Module):
    """An encoder and a decoder side by side, or each in a module; `wide` makes the decoder most of the compute."""

    def __init__(self, *, wide: int = 1, form: str = "flat") -> None:
        super().__init__()
        self.form = form
        downs = nn.ModuleList([conv(3, 8, 2), stage(8, 16), stage(16, 24)])
        ups = nn.ModuleList([conv(40, 16 * wide), conv(16 * wide + 8, 8 * wide)])
        if form == "flat":
            self.down0, self.down1, self.down2 = downs
            self.up0, self.up1 = ups
        else:
            self.encoder, self.decoder = nn.Module(), nn.Module()
            self.encoder.downs, self.decoder.ups = downs, ups
        self.head = nn.Conv2d(8 * wide, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.form == "flat"
        downs = [self.down0, self.down1, self.down2] if flat else self.encoder.downs
        ups = [self.up0, self.up1] if flat else self.decoder.ups
        features = []
        for down in downs:
            features.append(x := down(x))
        for up, skip in zip(ups, features[-2::-1], strict=True):
            x = up(torch.cat([nn.functional.interpolate(x, skip.shape[2:]), skip], 1))
        return self.head(x)


@pytest.mark.parametrize("wide", [1, 4, 16])
@pytest.mark.parametrize(
    ("form", "ends", "decoder"),
    [
        ("flat", "down0 down1 down2", "up0 up1"),
        ("held", "encoder.downs.0 encoder.downs.1 encoder.downs.2", "decoder.ups.0 decoder.ups.1"),
    ],
)
def test_the_encoder_of_a_u_net_is_paired_and_its_decoder_on_demand(
    wide: int, form: str, ends: str, decoder: str
) -> None:
    traced = trace(Unet(wide=wide, form=form), 64)
    assert " ".join(str(spec.tap) for spec in stages(traced)) == ends
    plain = match(traced, traced)
    with_decoder = match(traced, traced, decoder=True)
    assert [str(pair.student) for pair in with_decoder] == [*(str(pair.student) for pair in plain), *decoder.split()]
    with pytest.raises(MatchError, match="Cnn has no decoder"):
        match(traced, trace(Cnn(), 64), decoder=True)


def test_a_decoder_beside_an_encoder_that_returns_its_stages_is_paired_on_demand() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.ups = Stages(dilated=False), nn.ModuleList([conv(56, 24), conv(40, 16)])
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            low, middle, x = self.encoder(x)
            for up, skip in zip(self.ups, (middle, low), strict=True):
                x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2), skip], 1))
            return self.head(x)

    traced = trace(Segmenter(), 64)
    pairs = [str(pair.student) for pair in match(traced, traced, decoder=True)]
    assert pairs == ["encoder.low", "encoder.middle", "encoder.high", "ups.0", "ups.1"]


def test_embeddings_and_blocks_in_lists_of_their_own_are_stages_together() -> None:
    class Segformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.ModuleList([nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 24, 2, 2)])
            self.blocks = nn.ModuleList(nn.ModuleList(Mixer(width) for _ in range(2)) for width in (16, 24))
            self.out = nn.Conv2d(40, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = []
            for embed, group in zip(self.embed, self.blocks, strict=True):
                x = embed(x)
                tokens = x.flatten(2).mT
                for block in group:
                    tokens = block(tokens)
                features.append(x := tokens.mT.reshape(x.shape))
            return self.out(torch.cat([features[0], nn.functional.interpolate(features[1], scale_factor=2)], 1))

    assert taps(Segformer()) == "blocks.0.1 blocks.1.1"


def test_of_two_images_through_one_encoder_the_last_pass_is_read() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fc = Stages(dilated=False), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.net(view)[-1].mean((2, 3)) for view in x.split(3, 1)], 1))

    assert taps(Twin(), (6, 64, 64)) == "net.stem#1 net.low#1 net.middle#1 net.high#1"


def test_blocks_of_stages_with_a_stride_of_3_are_counted() -> None:
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 3), Residual(b), Residual(b)) for a, b in [(3, 8), (8, 16), (16, 24)]]
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    assert [str(spec.tap) for spec in blocks(trace(model, 81))] == ["0.1", "0.2", "1.1", "1.2", "2.1", "2.2"]


def test_a_head_at_the_stride_of_the_last_stage_is_no_stage() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(conv(3, 8, 2), stage(8, 16), stage(16, 24))
            self.classifier = nn.Sequential(conv(24, 24), Residual(24), nn.Conv2d(24, 5, 1))

        def forward(self, x: Tensor) -> Any:
            return {"out": nn.functional.interpolate(self.classifier(self.backbone(x)), x.shape[2:])}

    assert taps(Dense()) == "backbone.0 backbone.1 backbone.2"


class Nested(nn.Module):
    """A U-Net of which each level holds the next (pix2pix)."""

    def __init__(self, widths: tuple[int, ...], inner: nn.Module | None = None) -> None:
        super().__init__()
        outer, width, *deeper = widths
        self.down, self.up = conv(outer, width, 2), nn.ConvTranspose2d(width, outer, 2, 2)
        self.inner = Nested((width, *deeper)) if deeper else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.inner(self.down(x)))


def test_a_u_net_of_nested_levels_is_opened_level_by_level() -> None:
    ends = [f"{'inner.' * depth}down" for depth in range(4)]
    assert taps(Nested((3, 8, 16, 24, 32))) == " ".join(ends)


class Retina(nn.Module):
    """A pyramid with one level more, and a head that runs at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Stages(dilated=False)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (16, 24, 32))
        self.extra, self.head = nn.Conv2d(32, 16, 3, 2, 1), nn.Sequential(conv(16, 16), conv(16, 16), conv(16, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        levels = [layer(feature) for layer, feature in zip(self.lateral, features, strict=True)]
        levels[0] = levels[0] + nn.functional.interpolate(levels[1], scale_factor=2)
        return {
            "boxes": torch.cat([self.head(level).flatten(2).mT for level in [*levels, self.extra(features[-1])]], 1)
        }


class FlatPyramid(Stages):
    """A pyramid beside the stages, in one module, which returns its levels."""

    def __init__(self) -> None:
        super().__init__(dilated=False)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (16, 24, 32))
        self.smooth = nn.ModuleList(conv(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        low, middle, high = (layer(feature) for layer, feature in zip(self.lateral, self.stages(x), strict=True))
        middle = middle + nn.functional.interpolate(high, scale_factor=2)
        levels = [low + nn.functional.interpolate(middle, scale_factor=2), middle, high]
        return [layer(level) for layer, level in zip(self.smooth, levels, strict=True)]


class FlatAspp(Stages):
    """Branches beside each other that read the last stage, and a head that reads the first one too."""

    def __init__(self) -> None:
        super().__init__(dilated=True)
        self.branches = nn.ModuleList(conv(32, 16) for _ in range(3))
        self.fuse = nn.Sequential(conv(64, 16), conv(16, 16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        low, _, high = self.stages(x)
        deep = torch.cat([branch(high) for branch in self.branches], 1)
        return self.fuse(torch.cat([nn.functional.interpolate(deep, scale_factor=2), low], 1))


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (Retina, "backbone.stem backbone.low backbone.middle backbone.high"),
        (FlatPyramid, "stem low middle high"),
        (FlatAspp, "stem low high"),
    ],
)
def test_what_reads_the_stages_is_none_of_them(model: Callable[[], nn.Module], ends: str) -> None:
    assert taps(model()) == ends


class Tokens(nn.Module):
    """A transformer with `before` tokens before the grid, and `after` after it, each in a concatenation of its own."""

    def __init__(self, before: int, after: int, *, batch_first: bool = True, linear: bool = False) -> None:
        super().__init__()
        self.patch: nn.Module = nn.Linear(192, 16) if linear else nn.Conv2d(3, 16, 8, 8)
        self.before, self.after = nn.Parameter(torch.zeros(1, before, 16)), nn.Parameter(torch.zeros(1, after, 16))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.ModuleList(Mixer(16) for _ in range(4))
        self.fc, self.batch_first, self.linear = nn.Linear(16, 10), batch_first, linear

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            b, c, h, w = x.shape
            x = self.patch(x.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 192))
        else:
            x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        x = torch.cat([x[:, :1], self.before.expand(len(x), -1, -1), x[:, 1:], self.after.expand(len(x), -1, -1)], 1)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x[:, 0] if self.batch_first else x[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "size", "grid"),
    [
        (0, 0, 64, (8, 8)),
        (4, 0, 32, (4, 4)),
        (3, 0, 64, (8, 8)),
        (0, 4, 32, (4, 4)),
        (8, 2, (40, 24), (5, 3)),
        (40, 0, 16, (2, 2)),
    ],
)
def test_tokens_of_the_grid_are_those_that_came_from_the_patches(
    batch_first: bool, linear: bool, before: int, after: int, size: Any, grid: tuple[int, int]
) -> None:
    model = Tokens(before, after, batch_first=batch_first, linear=linear)
    traced = trace(model, size)
    spec = traced["blocks.2"]
    assert (spec.layout, spec.grid, spec.prefix_tokens, spec.suffix_tokens) == ("NLC", grid, before + 1, after)
    images = torch.randn(2, *traced.input_size)
    feature = Probe(model, [spec])(images)[spec.tap]
    assert feature.shape[1:] == spec.shape[1:]
    assert ToMap.of(spec)(feature).shape == (2, 16, *grid)
    raw = Probe(model, "blocks.2")(images)[spec.tap]
    assert torch.equal(raw if batch_first else raw.transpose(0, 1), feature)


class Experts(nn.Module):
    """A block with several layers beside each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(expert(x) for expert in self.experts)


def test_experts_beside_each_other_are_one_block() -> None:
    def hold(model: nn.Module) -> list[str]:
        model.blocks = nn.ModuleList(Experts(16) for _ in range(4))
        return [f"blocks.{index}" for index in range(4)]

    assert taps(Names(hold)) == "blocks.0 blocks.1 blocks.2 blocks.3"


class Fewer(nn.Module):
    """Blocks on fewer tokens than patches: some of these (a masked autoencoder), or queries that read them all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.patch = how, nn.Conv2d(3, 16, 8, 8)
        self.queries, self.mask = nn.Parameter(torch.zeros(1, 25, 16)), nn.Parameter(torch.zeros(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.Sequential(*(Mixer(16) for _ in range(8)))
        self.decoder, self.fc = Mixer(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.how == "queries":
            return self.fc(self.blocks(self.attention(self.queries.expand(len(x), -1, -1), x, x)[0]).mean(1))
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)[..., None].expand_as(x)
        x = self.blocks(x.gather(1, order[:, :16]))
        x = torch.cat([x, self.mask.expand(len(x), 48, -1)], 1).gather(1, order.argsort(1))
        return self.decoder(x).mean(1)


@pytest.mark.parametrize("how", ["queries", "selected"])
def test_tokens_that_are_no_patches_have_no_grid_and_a_model_of_them_is_told(how: str, resnet: Trace) -> None:
    traced = trace(Fewer(how), 64)
    assert traced["blocks.3"].grid is None
    if how == "selected":
        assert traced["decoder"].grid == (8, 8)
    with pytest.warns(MatchWarning, match=r"^[0-9]+% of the compute of Fewer is in layers without positions"):
        match(traced, resnet)


def test_the_map_that_a_model_of_windows_returns_is_its_end(resnet: Trace) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(*(Mixer(16) for _ in range(4)))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.patch(x).unflatten(3, (4, 4)).unflatten(2, (4, 4))
            x = self.blocks(x.permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 16))
            x = x.reshape(-1, 4, 4, 4, 4, 16).permute(0, 5, 1, 3, 2, 4)
            return {"map": x.reshape(-1, 16, 16, 16)}

    traced = trace(Windows(), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [str(pair) for pair in match(traced, resnet)] == ["[map] <- layer4"]


def test_a_stage_that_holds_its_patch_embedding_counts_its_blocks() -> None:
    widths = [(3, 8), (8, 16)]
    parts = [nn.Sequential(nn.Conv2d(a, b, 4, 4), nn.Sequential(Residual(b), Residual(b))) for a, b in widths]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    assert [str(spec.tap) for spec in blocks(trace(model, 64))] == ["0.1.0", "0.1.1", "1.1.0", "1.1.1"]


def test_a_sequence_as_long_as_the_batch_is_told_from_it() -> None:
    spec = trace(Tokens(0, 0, batch_first=False), 16)["blocks.1"]
    assert (spec.grid, spec.prefix_tokens, spec.batch_axis) == ((2, 2), 1, 1)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 8, 16])
def test_a_model_that_minds_its_batch_is_traced_with_one_that_it_takes(multiple: int) -> None:
    class Minding(Cnn):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, multiple, *x.shape[1:]).flatten(0, 1))

    assert taps(Minding()) == "stem low middle high"


def test_maps_of_a_video_are_averaged_over_its_frames() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv3d(3, 8, 3, 2, 1), nn.Conv3d(8, 16, 3, 2, 1)
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x).relu()).mean((2, 3, 4)))

    model = Video()
    spec = trace(model, (3, 8, 32, 32))["body"]
    assert (spec.layout, spec.grid, spec.frames, spec.describe()) == ("NCDHW", (8, 8), 2, "map 2x8x8 16")
    feature = Probe(model, [spec])(torch.randn(2, 3, 8, 32, 32))[spec.tap]
    assert torch.allclose(ToMap.of(spec)(feature), feature.mean(2))


def test_a_model_is_traced_at_the_size_of_its_config() -> None:
    model = Wrapper(Tokens(0, 0), lambda y: y)
    model.model.config = SimpleNamespace(image_size=96, num_channels=3)
    assert trace(model).input_size == (3, 96, 96)


def test_of_two_branches_the_one_with_the_compute_is_paired() -> None:
    class Two(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            self.order = order.split()
            self.large = nn.Sequential(conv(3, 16, 2), stage(16, 32), stage(32, 64))
            self.small = nn.Sequential(conv(3, 4, 2), stage(4, 8), stage(8, 16))
            self.fc = nn.Linear(80, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.get_submodule(name)(x).mean((2, 3)) for name in self.order], 1))

    assert taps(Two("large small")) == taps(Two("small large")) == "large.0 large.1 large.2"
    assert str(stages(trace("crossvit_tiny_240"))[-1].tap) == "blocks.2[1]"


def test_what_is_probably_not_meant_is_told() -> None:
    deep = trace(Cnn(), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match(deep, deep)
    pairs = [Pair("low.1", "high.2"), Pair("@input", "low"), Pair("head", "high"), Pair("low", "low")]
    texts = doubts(pairs, deep, deep)
    assert [text.split(":")[0] for text in texts] == [f"pair {pair}" for pair in pairs[:3]]
    assert [word in text for word, text in zip(("depths", "images", "output"), texts, strict=True)] == [True] * 3
    with pytest.raises(MatchError, match="3 modules ran and yielded 3 vectors"):
        stages(trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 8))


def test_frames_that_are_merged_into_the_batch_are_told() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Cnn()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    with pytest.raises(MatchError, match="match the module in it that reads single images"):
        stages(trace(Frames(), (4, 3, 64, 64)))


def test_match_warns_with_a_class_of_our_own(monkeypatch: pytest.MonkeyPatch, resnet: Trace) -> None:
    monkeypatch.setattr("probe_kd.engine.matching.MOST_APART", 0.01)
    with pytest.warns(MatchWarning, match="differ by more than half"):
        match(trace("convnext_atto", 64), resnet)
