"""The losses that a recipe names: those of the table, and custom ones by `package.module:name`."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from probe_kd.engine.models import check_import, import_object, module_of, packages
from probe_kd.errors import LossError, TraceError
from probe_kd.methods.losses.table import LOSSES, Loss, as_loss
from probe_kd.recipe.keys import LossOptions, Recipe
from probe_kd.recipe.yaml_tree import KeyPath

_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


_ALLOWED: set[str] = set()  # names that a caller allowed: a module may be in memory for other reasons


def is_custom(name: str) -> bool:
    """Whether the name of a loss is that of an object in a module, `package.module:name`."""
    return bool(_NAME.fullmatch(name) and module_of(name))


def loss_of(options: LossOptions) -> Loss | None:
    """The loss that a recipe names. None if it does not exist, or if `import_losses` has not imported it."""
    if not is_custom(options.loss):
        return LOSSES.get(options.loss)
    module, _, attribute = options.loss.partition(":")
    value = getattr(sys.modules.get(module), attribute, None) if options.loss in _ALLOWED else None
    try:
        return None if value is None else as_loss(value, options.reads)
    except LossError:  # reported by `import_losses`
        return None


def import_losses(recipe: Recipe, allow_import: Sequence[str]) -> list[tuple[KeyPath, str]]:
    """Import the custom losses of a recipe. Returns what is wrong with their names and kinds, each with its place.

    A module is imported only if `allow_import` names it or its package.
    """
    mistakes: list[tuple[KeyPath, str]] = []
    for place, options in losses_in(recipe):
        if not is_custom(options.loss):
            if options.reads is not None and options.loss in LOSSES:
                reads = LOSSES[options.loss].reads
                message = f"`{options.loss}` reads {reads}; `reads` is for custom losses, so leave it out"
                mistakes.append(((*place, "reads"), message))
            continue
        try:
            check_import(options.loss, allow_import)
            value = import_object(options.loss, "use")
            _ALLOWED.add(options.loss)
        except TraceError as error:
            mistakes.append(((*place, "loss"), str(error)))
            continue
        try:
            loss = as_loss(value, options.reads)
            mistakes += [((*place, *key), message) for key, message in _taken_names(loss, options)]
        except LossError as error:
            to_blame = "loss" if options.reads is None or not callable(value) else "reads"
            mistakes.append(((*place, to_blame), str(error)))
    return mistakes


def _taken_names(loss: Loss, options: LossOptions) -> Iterator[tuple[KeyPath, str]]:
    """The options that a recipe cannot set, because a key of every loss has that name, and that are set or needed."""
    for name in (name for name in loss.options if name in LossOptions.model_fields):
        if name in options.model_fields_set or name in loss.required:
            key = name if name in options.model_fields_set else "loss"
            message = (
                f"`{name}` is a key of every loss, and the loss {loss.name!r} has an option of that name; rename it"
            )
            yield (key,), message


def losses_in(recipe: Recipe) -> Iterator[tuple[KeyPath, LossOptions]]:
    """All losses of all stages, each with its place."""
    for index, stage in enumerate(recipe.stages):
        for name, options in stage.losses.items():
            yield ("stages", index, "losses", name), options


def packages_of(recipe: Recipe) -> list[str]:
    """The packages, other than timm, that the models and losses of a recipe come from."""
    return packages(_imported_names(recipe))


def sources_of(recipe: Recipe) -> list[str]:
    """The files below the current folder that hold custom models and losses of a recipe, if they are imported.

    Installed packages are not listed, which an upgrade changes, nor are files that these modules import.
    """
    modules = (sys.modules.get(module_of(name)) for name in _imported_names(recipe))
    files = (Path(file) for module in modules if (file := getattr(module, "__file__", None)))
    here = Path.cwd()
    own = (file.relative_to(here) for file in files if file.is_relative_to(here))
    return [str(file) for file in own if "site-packages" not in file.parts]


def _imported_names(recipe: Recipe) -> list[str]:
    """The names of models and losses, of which those of custom ones say what is imported."""
    models = [model.model for model in (recipe.student, *recipe.teachers_by_name.values())]
    return [*models, *(options.loss for _, options in losses_in(recipe) if is_custom(options.loss))]
