"""probe-kd: knowledge distillation between any two vision models, by hooks, matching, adapters and losses.

The names below are the whole public interface. Each is loaded when it is first used, so that `import probe_kd` costs
nothing: torch and timm take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from probe_kd.lazy import getter
from probe_kd.version import __version__

_HOME = {
    "Adapter": "methods.adapters",
    "DistillationTask": "methods.timm_task",
    "Distiller": "methods.distiller",
    "FeatureFigures": "methods.feature_figures",
    "FeatureSpec": "engine.spec",
    "InputSpec": "engine.spec",
    "Layout": "engine.spec",
    "LOSSES": "methods.losses.table",
    "Loss": "methods.losses.table",
    "Objective": "methods.objectives",
    "Pair": "engine.spec",
    "Probe": "engine.probe",
    "MatchWarning": "errors",
    "ProbeKDError": "errors",
    "Tap": "engine.spec",
    "Trace": "engine.spec",
    "Schedule": "engine.spec",
    "Share": "engine.spec",
    "Sharing": "methods.sharing",
    "adapt": "methods.adapters",
    "compare": "results.comparison",
    "evaluate": "results.evaluation",
    "export": "results.export",
    "follow_shares": "methods.gradients",
    "freeze": "engine.surgery",
    "graft": "methods.sharing",
    "load_student": "methods.sharing",
    "match": "engine.matching",
    "match_features": "methods.feature_matching",
    "measure_features": "methods.feature_figures",
    "measure_shares": "methods.gradients",
    "replace": "engine.surgery",
    "share": "engine.surgery",
    "share_convolutions": "methods.sharing",
    "share_trunk": "methods.sharing",
    "trace": "engine.tracing",
}

__all__ = [
    "LOSSES",
    "Adapter",
    "DistillationTask",
    "Distiller",
    "FeatureFigures",
    "FeatureSpec",
    "InputSpec",
    "Layout",
    "Loss",
    "MatchWarning",
    "Objective",
    "Pair",
    "Probe",
    "ProbeKDError",
    "Schedule",
    "Share",
    "Sharing",
    "Tap",
    "Trace",
    "__version__",
    "adapt",
    "compare",
    "evaluate",
    "export",
    "follow_shares",
    "freeze",
    "graft",
    "load_student",
    "match",
    "match_features",
    "measure_features",
    "measure_shares",
    "replace",
    "share",
    "share_convolutions",
    "share_trunk",
    "trace",
]

if TYPE_CHECKING:
    from probe_kd.engine.matching import match
    from probe_kd.engine.probe import Probe
    from probe_kd.engine.spec import FeatureSpec, InputSpec, Layout, Pair, Schedule, Share, Tap, Trace
    from probe_kd.engine.surgery import freeze, replace, share
    from probe_kd.engine.tracing import trace
    from probe_kd.errors import MatchWarning, ProbeKDError
    from probe_kd.methods.adapters import Adapter, adapt
    from probe_kd.methods.distiller import Distiller
    from probe_kd.methods.feature_figures import FeatureFigures, measure_features
    from probe_kd.methods.feature_matching import match_features
    from probe_kd.methods.gradients import follow_shares, measure_shares
    from probe_kd.methods.losses.table import LOSSES, Loss
    from probe_kd.methods.objectives import Objective
    from probe_kd.methods.sharing import Sharing, graft, load_student, share_convolutions, share_trunk
    from probe_kd.methods.timm_task import DistillationTask
    from probe_kd.results.comparison import compare
    from probe_kd.results.evaluation import evaluate
    from probe_kd.results.export import export


def __getattr__(name: str) -> Any:
    if name == "losses":  # the functions, by what they read
        return import_module("probe_kd.methods.losses")
    return getter(__name__, _HOME)(name)


def __dir__() -> list[str]:
    return __all__
