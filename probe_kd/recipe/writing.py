"""What is written about a recipe: its YAML, the files that it names, and the command that resumes its run."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from shlex import quote
from typing import Any

from ruamel.yaml import YAML

from probe_kd.engine.models import files_of
from probe_kd.errors import RecipeError
from probe_kd.recipe.keys import Recipe, TeacherOptions
from probe_kd.recipe.loss_names import packages_of, sources_of
from probe_kd.recipe.reading import load
from probe_kd.recipe.yaml_tree import KeyPath


def inputs_of(recipe: Recipe, *, trained: bool = False) -> list[str]:
    """The files that a run of this recipe reads besides its images.

    With `trained`, only those that are still needed after training: the run has saved the student's weights, but reads
    those of a teacher that it did not train each time the teacher is evaluated.
    """
    teachers, files = recipe.teachers_by_name.values(), list[str | Path]()
    for model in (recipe.student, *teachers):
        reads_weights = not trained or (isinstance(model, TeacherOptions) and model.train is None)
        files += [model.checkpoint] if model.checkpoint and reads_weights else []
        files += files_of(model.model, pretrained=model.pretrained and reads_weights)
    files += [] if trained else sources_of(recipe)  # what was trained is in the weights
    files += [teacher.class_map for teacher in teachers if isinstance(teacher.class_map, str)]
    return list(dict.fromkeys(map(str, files)))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out."""
    return as_yaml(recipe.model_dump(mode="json", exclude_none=True))


def command_to_go_on(folder: Path) -> str:
    """The command that resumes the run in a folder, whose recipe.yaml includes what `--set` and `--seed` changed."""
    try:
        recipe = load(folder / "recipe.yaml").recipe
        allowed = packages_of(recipe)
    except RecipeError:  # the command reports it
        allowed = []
    options = "".join(f" --allow-import {package}" for package in allowed)
    return f"probe-kd train {quote(str(folder / 'recipe.yaml'))} --out {quote(str(folder))}{options} --resume"


def rewritten(text: str) -> str:
    """Format the YAML of a recipe as `dump` does, without comments and without adding defaults."""
    return as_yaml(YAML(typ="safe").load(text))


def with_values(text: str, values: Mapping[KeyPath, Any]) -> str:
    """The YAML of a recipe with other values at these places and without `tune`, and with its comments."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # of lines that are not to be folded
    tree = yaml.load(text)
    tree.pop("tune", None)
    for place, value in values.items():
        inner = tree
        for step in place[:-1]:
            if isinstance(inner, dict) and step not in inner:
                inner[step] = {}
            inner = inner[step]
        inner[place[-1]] = value
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def as_yaml(values: Any) -> str:
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(values, stream)
    return stream.getvalue()
