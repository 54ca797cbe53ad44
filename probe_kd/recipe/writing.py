"""What is written about a recipe: its YAML, the files that it names, and the command that resumes its run."""

from io import StringIO
from pathlib import Path
from shlex import quote
from typing import Any

from ruamel.yaml import YAML

from probe_kd.engine.models import files_of, packages
from probe_kd.errors import RecipeError
from probe_kd.recipe.keys import Recipe, TeacherOptions
from probe_kd.recipe.reading import load


def inputs_of(recipe: Recipe, *, trained: bool = False) -> list[str]:
    """The files that a run of this recipe reads besides its images; once it is `trained`, those its models still need.

    A teacher that is not trained first is read again whenever it is measured, and a student's weights are the run's.
    """
    teacher, found = recipe.teacher, list[str | Path]()
    for model in filter(None, (recipe.student, teacher)):
        whole = not trained or (isinstance(model, TeacherOptions) and model.train is None)
        found += [model.checkpoint] if model.checkpoint and whole else []
        found += files_of(model.model, pretrained=model.pretrained and whole)
    found += [teacher.class_map] if teacher and isinstance(teacher.class_map, str) else []
    return list(dict.fromkeys(map(str, found)))


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return _as_yaml(recipe.model_dump(mode="json", exclude_none=True))


def command_to_go_on(folder: Path) -> str:
    """The command that goes on with the run in a folder, whose own recipe has all that `--set` and `--seed` changed."""
    try:
        found = load(folder / "recipe.yaml").recipe
        allowed = packages(model.model for model in (found.student, found.teacher) if model is not None)
    except RecipeError:  # which the command tells
        allowed = []
    options = "".join(f" --allow-import {package}" for package in allowed)
    return f"probe-kd train {quote(str(folder / 'recipe.yaml'))} --out {quote(str(folder))}{options} --resume"


def rewritten(text: str) -> str:
    """A recipe's YAML in the form that `dump` writes, without comments, and with the defaults as they were."""
    return _as_yaml(YAML(typ="safe").load(text))


def _as_yaml(values: Any) -> str:
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(values, stream)
    return stream.getvalue()
