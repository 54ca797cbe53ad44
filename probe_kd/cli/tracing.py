"""Models that are named on the command line."""

import os
import sys
from typing import TYPE_CHECKING, Any

from probe_kd.errors import RunError

if TYPE_CHECKING:
    from probe_kd.engine.spec import Trace


def trace_both(
    student: str,
    teacher: str,
    size: str | None,
    teacher_size: str | None,
    student_kwargs: list[str] | None,
    teacher_kwargs: list[str] | None,
) -> "tuple[Trace, Trace]":
    """Trace a student, and a teacher as `trace_teacher` does."""
    student_trace = trace_named(student, size, student_kwargs, training=True)
    return student_trace, trace_teacher(teacher, student_trace, size, teacher_size, teacher_kwargs)


def trace_teacher(
    teacher: str, student: "Trace", size: str | None, teacher_size: str | None, teacher_kwargs: list[str] | None
) -> "Trace":
    """Trace a teacher at the student's size; if no size was given and it refuses, at its own."""
    requested_size = teacher_size or size or "x".join(map(str, student.input_size))
    return trace_named(teacher, requested_size, teacher_kwargs, or_own_size=teacher_size is None and size is None)


def trace_named(
    model: str, size: str | None, kwargs: list[str] | None, *, training: bool = False, or_own_size: bool = False
) -> "Trace":
    from probe_kd.engine.models import packages
    from probe_kd.engine.tracing import trace
    from probe_kd.errors import TraceError

    allow(packages([model]))  # a user who types a name has allowed it
    arguments = dict(_key_value(text) for text in kwargs or ())
    try:
        return trace(model, _sides(size), training=training, model_kwargs=arguments)
    except TraceError:
        if not or_own_size:
            raise
        return trace(model, training=training, model_kwargs=arguments)


def _sides(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if not 1 <= len(parts) <= 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RunError(f"input size {text!r}; expected `224`, `224x192` (height x width) or `3x224x192`")
    return [int(part) for part in parts]


def _key_value(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE, and read the value as YAML, as `--set` does."""
    from probe_kd.recipe.yaml_tree import read_value

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RunError(f"model argument {text!r}; expected KEY=VALUE, as in `depth=6`")
    return key, read_value(value, f"--model-kwargs {key}")


def about(trace: "Trace") -> dict[str, Any]:
    """Return the traced model and how it was traced, for JSON."""
    return {
        "model": trace.model,
        "model_kwargs": dict(trace.model_kwargs),
        "input_size": trace.input_size,
        "parameters": trace.parameters,
        "macs": trace.macs,
    }


def allow(packages: list[str] | None) -> list[str]:
    """Return the packages that may be imported, and make them importable from the current folder.

    Without such packages, nothing is imported from there: a stray `yaml.py` must not replace the library.
    """
    if packages:
        sys.path.insert(0, os.getcwd())
    return packages or []
