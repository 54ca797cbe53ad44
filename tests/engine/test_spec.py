"""Values of a library call. Taps: the text form round-trips, and what is no tap is refused."""

from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from probe_kd import InputSpec, Pair, Tap
from probe_kd.errors import DataError, TapError

paths = st.lists(st.text("abcXYZ019_", min_size=1, max_size=6), max_size=4).map(".".join) | st.text(max_size=8)
keys = st.text("abcXYZ019_.-", min_size=1, max_size=8) | st.text(max_size=8)
items = st.lists(st.one_of(st.integers(0, 999), keys), max_size=3).map(tuple)
names = st.just("") | st.from_regex(r"[a-zA-Z_]\w{0,5}", fullmatch=True).filter(lambda name: name not in ("glob", "re"))
paths |= st.builds("{}:{}".format, paths, paths)  # a ModuleDict may have such keys
taps = st.builds(Tap, paths, st.sampled_from(["output", "input"]), st.none() | st.integers(0, 99), items, names)


@given(taps)
def test_the_text_form_of_a_tap_reads_back_as_the_same_tap(tap: Tap) -> None:
    assert Tap.parse(str(tap)) == tap
    stream = StringIO()
    YAML().dump({str(tap): [str(tap)]}, stream)
    assert YAML(typ="safe").load(stream.getvalue()) == {str(tap): [str(tap)]}
    assert Tap.parse(tap) is tap


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("layer3", Tap("layer3")),
        ("layer3@input", Tap("layer3", "input")),
        ("blocks.5#1", Tap("blocks.5", call=1)),
        ("head[0]", Tap("head", items=(0,))),
        ("head[logits][1]", Tap("head", items=("logits", 1))),
        ("", Tap("")),
        ("@input", Tap("", "input")),
        ("a.b#2@input[x]", Tap("a.b", "input", 2, ("x",))),
        ("dino:blocks.11", Tap("blocks.11", model="dino")),
        ("siglip:[pooler_output]", Tap("", items=("pooler_output",), model="siglip")),
        ("dino:", Tap("", model="dino")),
        (":dino:blocks.11", Tap("dino:blocks.11")),
        ("['0']", Tap("", items=("0",))),
        ("fpn['a]b'][0]['']", Tap("fpn", items=("a]b", 0, ""))),
        ("""a["it's"]""", Tap("a", items=("it's",))),
        ("a[x@y]", Tap("a", items=("x@y",))),
        ("'a b.0'#1@input", Tap("a b.0", "input", 1)),
    ],
)
def test_the_forms_in_the_documentation(text: str, tap: Tap) -> None:
    assert Tap.parse(text) == tap
    assert str(tap) == text


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "di no:a",
        "a@inputs",
        "a#",
        "a#-1",
        "a[",
        "a[]",
        "a[0",
        "a@input#1",
        "a[b c]",
        "a['x]y']]",
        "a['\\x']",
        3,
        None,
    ],
)
def test_what_is_no_tap_is_refused(text: object) -> None:
    with pytest.raises(TapError, match="expected"):
        Tap.parse(text)  # type: ignore[arg-type]


def test_a_pair_reads_text_and_puts_the_student_first() -> None:
    pair = Pair("blocks.5", "layer3", weight=2.0)
    assert (pair.student, pair.teacher) == (Tap("blocks.5"), Tap("layer3"))
    assert str(pair) == "blocks.5 <- layer3"


@pytest.mark.parametrize(
    "numbers",
    [
        [0.5, 0.25, 0.75],
        np.array([0.5, 0.25, 0.75], np.float32),
        torch.tensor([0.5, 0.25, 0.75]),
        torch.tensor([0.5, 0.25, 0.75]).view(1, 3, 1, 1),
        torch.tensor([0.5, 0.25, 0.75]).view(3, 1, 1),
        list(torch.tensor([0.5, 0.25, 0.75])),
    ],
    ids=["list", "array", "tensor", "broadcast", "of a map", "of tensors"],
)
def test_an_input_takes_its_numbers_as_any_sequence_array_or_tensor(numbers: Any) -> None:
    plain = InputSpec((3, 32, 32), (0.5, 0.25, 0.75), (0.5, 0.25, 0.75))
    assert InputSpec(torch.Size([3, 32, 32]), numbers, numbers) == plain
    assert InputSpec([3, np.int64(32), 32], mean=torch.tensor(0.5)) == InputSpec((3, 32, 32), 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((32,), r"size 32 of an input: expected \(channels, height, width\).*did you mean \(3, 32, 32\)\?"),
        (((32, 48),), r"size \(32, 48\) of an input.*did you mean \(3, 32, 48\)\?"),
        (((3, 32, 0),), "three whole numbers above 0"),
        (((3, 32.5, 32),), "three whole numbers"),
        (((True, 32, 32),), "three whole numbers"),
        (("32x32",), "size '32x32' of an input: expected"),
        ((None,), "size None of an input"),
        (((3, 32, 32), True), "mean True of an input: expected a number"),
        (((3, 32, 32), "0.5"), "mean '0.5' of an input: expected a number"),
        (((3, 32, 32), 0.5, {"r": 0.5}), "std {'r': 0.5} of an input: expected a number"),
        (((3, 32, 32), torch.zeros(3, 2)), "mean tensor.* of an input: expected a number"),
        (((3, 32, 32), [0.1, 0.2]), "expected 1 or 3 values"),
        (((3, 32, 32), float("nan")), "expected finite numbers"),
    ],
)
def test_what_is_no_input_is_refused(arguments: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        InputSpec(*arguments)
