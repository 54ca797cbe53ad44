"""Taps: the text form round-trips, and what is no tap is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe_kd import Pair, Tap
from probe_kd.errors import TapError

paths = st.lists(st.text("abcXYZ019_", min_size=1, max_size=6), max_size=4).map(".".join)
keys = st.text("abcXYZ019_.-", min_size=1, max_size=8).filter(lambda key: not key.isdigit())
items = st.lists(st.one_of(st.integers(0, 999), keys), max_size=3).map(tuple)
taps = st.builds(Tap, paths, st.sampled_from(["output", "input"]), st.none() | st.integers(0, 99), items)


@given(taps)
def test_the_text_form_of_a_tap_reads_back_as_the_same_tap(tap: Tap) -> None:
    assert Tap.parse(str(tap)) == tap
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
    ],
)
def test_the_forms_in_the_documentation(text: str, tap: Tap) -> None:
    assert Tap.parse(text) == tap
    assert str(tap) == text


@pytest.mark.parametrize("text", ["a b", "a@inputs", "a#", "a#-1", "a[", "a[]", "a[0", "a@input#1", 3, None])
def test_what_is_no_tap_is_refused(text: object) -> None:
    with pytest.raises(TapError, match="expected"):
        Tap.parse(text)  # type: ignore[arg-type]


def test_a_pair_reads_text_and_puts_the_student_first() -> None:
    pair = Pair("blocks.5", "layer3", weight=2.0)
    assert (pair.student, pair.teacher) == (Tap("blocks.5"), Tap("layer3"))
    assert str(pair) == "blocks.5 <- layer3"
