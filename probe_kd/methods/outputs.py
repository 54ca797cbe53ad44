"""Outputs: the taps that losses of outputs and labels read, and an error where one yields no vector per image."""

from dataclasses import replace

from probe_kd.engine.spec import FeatureSpec, Layout, Tap, Trace, Traces
from probe_kd.errors import AdapterError, TraceError

_SEGMENTATION = "; logits of every pixel are for the library (docs/segmentation.md)"


def output_spec(trace: Trace | Traces, tap: Tap, side: str) -> FeatureSpec:
    """Return the spec of a tap that a loss of outputs or labels reads, which is one vector per image.

    Raises TapError for a tap that does not exist or never fires, TraceError for an output of several tensors of which
    none is named, and AdapterError for a tap that yields anything but one vector per image. The last two name the
    nearest taps that yield vectors.
    """
    if isinstance(trace, Traces):
        named = trace.named(tap)
        spec = output_spec(trace.by_model[named.model], named.local, f"{side} {named.model}".strip())
        return replace(spec, tap=replace(spec.tap, model=named.model))
    spec = tensor_at(trace, tap, side)
    if spec.layout is not Layout.NC:
        where = f"the {side}'s {f'tap {str(tap)!r}' if tap.module or tap.items else 'output'}"
        raise AdapterError(
            f"{where} is {' x '.join(map(str, spec.shape[1:]))} an image, and losses of outputs compare one row of "
            f"classes an image; {_advice(trace, tap, side)}{_SEGMENTATION if len(spec.shape) == 4 else ''}"
        )
    return spec


def tensor_at(trace: Trace | Traces, tap: Tap, side: str) -> FeatureSpec:
    """Return `trace[tap]`. Raises TraceError for an output of several tensors of which none is named."""
    if isinstance(trace, Traces):
        trace, tap = trace.by_model[tap.model], tap.local
    if tap == Tap("") and not any(spec.tap == tap for spec in trace.specs):
        raise TraceError(_several(trace, side))
    return trace[tap]


def vectors_near(trace: Trace, tap: Tap, count: int = 3) -> list[FeatureSpec]:
    """List the taps nearest to a tap that yield one vector per image: items of one output first, then the latest."""
    order = max((spec.order for spec in trace.specs if spec.tap.module == tap.module), default=len(trace.specs))
    vectors = [spec for spec in trace.specs if spec.layout is Layout.NC and spec.tap.port == "output"]
    inside = [spec for spec in vectors if spec.tap.module == tap.module]
    vectors = inside + sorted(vectors, key=lambda spec: abs(order - spec.order))
    outermost = dict[int, FeatureSpec]()  # of the modules that yield one tensor
    for spec in vectors:
        other = outermost.setdefault(spec.tensor, spec)
        if spec.tap.module.count(".") < other.tap.module.count("."):
            outermost[spec.tensor] = spec
    return list(outermost.values())[:count]


def _several(trace: Trace, side: str) -> str:
    taps = [str(spec.tap) for spec in trace.specs if spec.tap.is_output]
    problem = f"gives several tensors ({', '.join(taps)})" if taps else "gives no tensor"
    return f"the {side} {trace.model} {problem}, and a loss reads one; {_advice(trace, Tap(''), side)}"


def _advice(trace: Trace, tap: Tap, side: str) -> str:
    near = vectors_near(trace, tap)
    if not near:
        return "no tap of it yields a vector, so pair its layers by `hint`, or wrap it in a module that returns one"
    names = ", ".join(f"'{spec.tap}' ({spec.channels})" for spec in near)
    return (
        f"the nearest taps that yield a vector: {names}; name one as `output` of the {side}, or as `{side}` of the "
        "loss, or pair the layer by `hint`"
    )
