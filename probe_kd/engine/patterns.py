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
    """Return a function that tests whether a whole name matches a regular expression of RE2.

    Raises TapError if the pattern is not a valid expression.
    """
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
    """Return a function that tests whether a name matches a shell pattern, as `fnmatch` reads it.

    `*` also matches dots, and `[!a]` matches anything but `a`. Raises TapError if the pattern is too long.
    """
    _check_length(pattern)
    parts, rest = [], pattern
    while rest:
        character, rest = rest[0], rest[1:]
        end = rest.find("]", 2 if rest.startswith("!") else 1) if character == "[" else -1
        if character in "*?":
            parts.append(".*" if character == "*" else ".")
        elif end > 0:
            parts.append(_any_of(rest[:end]))
            rest = rest[end + 1 :]
        else:
            parts.append(_literal(character))
    return _matcher("(?s:" + "".join(parts) + ")")


def _any_of(characters: str) -> str:
    """Translate the inside of brackets to a character class of RE2. Reversed ranges match nothing, as in `fnmatch`."""
    negated, characters = characters.startswith("!"), characters.removeprefix("!")
    ranges, index = [], 0
    while index < len(characters):
        last = index + 2 if characters[index + 1 : index + 2] == "-" and index + 2 < len(characters) else index
        if characters[index] <= characters[last]:
            ranges.append(f"{_literal(characters[index])}-{_literal(characters[last])}")
        index = last + 1
    inside = "".join(ranges)
    if not inside:
        return "." if negated else r"[^\x{0}-\x{10ffff}]"
    return f"[{'^' if negated else ''}{inside}]"


def _literal(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):x}}}"
