"""Patterns over the names of layers and parameters, matched in time that grows with the pattern and the name alone.

A recipe may come from anybody, and Python's own engine can search one name for years. RE2 cannot: it has neither
backreferences nor lookaround, and follows all ways at once.
"""

from collections.abc import Callable
from functools import lru_cache

from probe_kd.errors import TapError

MAX_LENGTH = 1000


@lru_cache(maxsize=256)
def expression(pattern: str) -> Callable[[str], bool]:
    """Whether a whole name matches a regular expression of RE2. Raises TapError for what is none."""
    _check_length(pattern)
    return _matcher(pattern)


def _check_length(pattern: str) -> None:
    if len(pattern) > MAX_LENGTH:
        raise TapError(f"'{pattern[:40]}...' is a pattern of {len(pattern)} characters; expected at most {MAX_LENGTH}")


def _matcher(pattern: str) -> Callable[[str], bool]:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as refusal:
        why = refusal.args[0] if refusal.args else refusal
        text = why.decode(errors="replace") if isinstance(why, bytes) else str(why)
        raise TapError(f"'re:{pattern}' is no regular expression of RE2: {text[:200]}") from None
    except UnicodeEncodeError:
        raise TapError(f"{pattern!a} is no pattern: it holds half a character") from None
    return lambda name: compiled.fullmatch(name) is not None


@lru_cache(maxsize=256)
def glob(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches a shell's pattern, as `fnmatch` reads it: `*` also passes dots, `[!a]` is not `a`.

    Raises TapError for a pattern that is too long.
    """
    _check_length(pattern)
    parts, rest = [], pattern
    while rest:
        sign, rest = rest[0], rest[1:]
        end = rest.find("]", 2 if rest.startswith("!") else 1) if sign == "[" else -1
        if sign in "*?":
            parts.append(".*" if sign == "*" else ".")
        elif end > 0:
            parts.append(_any_of(rest[:end]))
            rest = rest[end + 1 :]
        else:
            parts.append(_literal(sign))
    return _matcher("(?s:" + "".join(parts) + ")")


def _any_of(signs: str) -> str:
    """The inside of brackets as a class of RE2; ranges that run backwards hold nothing, as in `fnmatch`."""
    negated, signs = signs.startswith("!"), signs.removeprefix("!")
    ranges, index = [], 0
    while index < len(signs):
        last = index + 2 if signs[index + 1 : index + 2] == "-" and index + 2 < len(signs) else index
        if signs[index] <= signs[last]:
            ranges.append(f"{_literal(signs[index])}-{_literal(signs[last])}")
        index = last + 1
    inside = "".join(ranges)
    if not inside:
        return "." if negated else r"[^\x{0}-\x{10ffff}]"
    return f"[{'^' if negated else ''}{inside}]"


def _literal(sign: str) -> str:
    return sign if sign.isalnum() and sign.isascii() else f"\\x{{{ord(sign):x}}}"
