"""How a run is executed: `torchcompile`, `channels_last`, `trackers`."""

from collections.abc import Iterator

import torch

from probe_kd.engine.models import breaks_channels_last, build_on_meta
from probe_kd.errors import nearest
from probe_kd.recipe.keys import CompileOptions, Recipe
from probe_kd.recipe.sections.mistakes import Mistake
from probe_kd.recipe.sections.models import Models


def check_execution(recipe: Recipe, models: Models) -> list[Mistake]:
    mistakes = [*_check_trackers(recipe), *_check_layout(recipe, models)]
    if recipe.torchcompile is not None:
        mistakes += [*_check_compiler(recipe.torchcompile), *_check_compiled(recipe, recipe.torchcompile)]
    return mistakes


def _check_trackers(recipe: Recipe) -> Iterator[Mistake]:
    if not recipe.trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    trackers, installed = list(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
    for index, name in enumerate(recipe.trackers):
        if name not in trackers:
            message = f"accelerate has no tracker {name!r}{nearest(name, trackers)}; it has {', '.join(trackers)}"
            yield ("trackers", index), message
        elif name not in installed:
            yield ("trackers", index), f"tracker {name!r} is not installed here; `pip install {name}`"


def _check_layout(recipe: Recipe, models: Models) -> Iterator[Mistake]:
    """Refuse `channels_last: true` where torch would corrupt memory, because the run would crash without a message."""
    if not recipe.channels_last or torch.cuda.is_available():
        return
    teachers = [(f"teacher {name}".strip(), trace_) for name, trace_ in models.teachers.items()]
    for side, trace_ in (("student", models.student), *teachers):
        layer = breaks_channels_last(build_on_meta(trace_.model, trace_.model_kwargs)) if trace_ else ""
        if layer:
            message = (
                f"with channels last on a CPU the backward of {layer!r} of the {side}, a convolution of kernel 1 "
                "and stride 2 over few channels, corrupts memory in torch 2.14; leave `channels_last` out"
            )
            yield ("channels_last",), message


def _check_compiler(options: CompileOptions) -> Iterator[Mistake]:
    """Check the backend and mode against torch's."""
    import torch._dynamo

    backends, modes = torch._dynamo.list_backends(exclude_tags=()), list(torch._inductor.list_mode_options())
    if options.backend not in backends:
        message = f"torch.compile has no backend {options.backend!r}{nearest(options.backend, backends)}"
        yield ("torchcompile", "backend"), message
    if options.mode is not None and options.mode not in modes:
        hint = f"{nearest(options.mode, modes)}; it has {', '.join(modes)}"
        yield ("torchcompile", "mode"), f"torch.compile has no mode {options.mode!r}{hint}"


def _check_compiled(recipe: Recipe, options: CompileOptions) -> Iterator[Mistake]:
    """Refuse what cannot be compiled."""
    graphs = torch._inductor.list_mode_options().get(options.mode or "", {}).get("triton.cudagraphs")
    if graphs and any(stage.grad_accum_steps > 1 for stage in recipe.stages):
        message = (
            f"mode {options.mode!r} replays CUDA graphs, which write every batch's gradients into the same memory, "
            "so `grad_accum_steps` would add up the wrong ones; take another mode, or a larger `batch_size`"
        )
        yield ("torchcompile", "mode"), message
    if graphs and options.target == "teacher" and len(recipe.teachers_by_name) > 1:
        message = (
            f"mode {options.mode!r} replays CUDA graphs, and the graph of each teacher would overwrite what the one "
            "before it gave; take `target: step`, or another mode"
        )
        yield ("torchcompile", "mode"), message
    share = recipe.share
    if share is not None and (share.form in ("trunk", "graft") or share.block in ("params", "trunk")):
        message = (
            f"with `share: {{form: {share.form}, block: {share.block}}}` layers give what they gave before, or are "
            "constants for a while, which compiled code does not notice; leave `torchcompile` out"
        )
        yield ("torchcompile",), message
    if options.target == "teacher" and not recipe.teachers_by_name:
        yield ("torchcompile", "target"), "there is no teacher to compile"
