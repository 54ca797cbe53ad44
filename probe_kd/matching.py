"""Which layer of the student learns from which layer of the teacher, found from two traces alone."""

from typing import Literal

from probe_kd.errors import MatchError
from probe_kd.spec import FeatureSpec, Pair, Trace

Level = Literal["stage", "block"]


def stages(trace: Trace) -> list[FeatureSpec]:
    """The stage ends: the last feature at each stride, under the shortest name of that tensor."""
    last: dict[float, FeatureSpec] = {}
    for spec in trace.specs:
        known = spec.reduction is not None and spec.tap.port == "output" and spec.tap.module != ""
        if known and spec.calls == 1:
            last[spec.reduction or 0] = spec
    ends = []
    for end in last.values():
        twins = [spec for spec in trace.specs if spec.tensor == end.tensor and spec.tap.module and spec.calls == 1]
        ends.append(min((t for t in twins if t.tap.port == "output"), key=lambda spec: spec.tap.module.count(".")))
    return sorted(ends, key=lambda spec: spec.order)


def match(student: Trace, teacher: Trace, *, level: Level = "stage", num_pairs: int | None = None) -> tuple[Pair, ...]:
    """Pair the stage ends of two models from the top. Raises MatchError where one has none."""
    ours, theirs = stages(student), stages(teacher)
    if not ours or not theirs:
        raise MatchError("no stages")
    count = min(len(ours), len(theirs), num_pairs or len(ours))
    return tuple(Pair(a.tap, b.tap, reason="") for a, b in zip(ours[-count:], theirs[-count:], strict=True))


def blocks(trace: Trace) -> list[FeatureSpec]:
    return stages(trace)
