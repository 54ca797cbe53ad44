"""Patterns over names: what `fnmatch` says, in time that no pattern makes long."""

import time
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe_kd.engine.patterns import MAX_LENGTH, expression, glob
from probe_kd.errors import TapError

SIGNS = st.text(r"ab.*?[]!-^\&~|()+{}" + "\n é", max_size=12)


@settings(max_examples=1000, deadline=None)
@given(SIGNS, SIGNS)
def test_a_glob_matches_what_fnmatch_does(pattern: str, name: str) -> None:
    assert glob(pattern)(name) == fnmatchcase(name, pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(.+)+x", "(a|a|aa)*b", "(a*)*b", ".?" * 400 + "Z", "([ab.]*)*c", "((a?){30}){30}b", ".*" * 499 + "x"],
)
def test_an_expression_takes_no_longer_than_pattern_and_name(pattern: str) -> None:
    begun = time.process_time()
    assert not expression(pattern)("a" * 2000)
    assert not glob("*a" * 400 + "b")("a" * 2000)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "pattern", [r"(.)\1", "(?=a)b", "layer(", "a{9}{9}", "a{1001}", "x" * (MAX_LENGTH + 1), "\ud800"]
)
def test_what_is_no_expression_is_refused_in_words(pattern: str) -> None:
    with pytest.raises(TapError, match=r"is no regular expression of RE2|expected at most 1000|half a character"):
        expression(pattern)
