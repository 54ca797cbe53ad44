"""The options that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer

MODEL_HELP = (
    "A timm name, `hf-hub:...`, `local-dir:...`, `transformers:...`, `open_clip:...`, or `package.module:function` for "
    "your own nn.Module."
)
Kwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwargs", metavar="KEY=VALUE", help="An argument for the model, as in `depth=6`; may be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
InputSize = Annotated[
    str | None,
    typer.Option(help="Size of the images: `224`, `224x192` (height x width) or `3x224x192`. Default: the model's."),
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import",
        metavar="PACKAGE",
        help="Allow the recipe to import models from this package or module, and run its code; may be repeated.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="The random seed, in place of the recipe's.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the results, and on stderr what changes their meaning.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, as in `stages.0.epochs=5`; the value is YAML; may be repeated.",
    ),
]


class LevelChoice(StrEnum):
    stage = "stage"
    block = "block"


class ByChoice(StrEnum):
    trace = "trace"
    features = "features"


class SplitChoice(StrEnum):
    test = "test"
    val = "val"
    train = "train"
    held_out = "held_out"


Student = Annotated[str, typer.Option(help=MODEL_HELP)]
Teacher = Annotated[str, typer.Option(help="The teacher, named as the student is.")]
Level = Annotated[LevelChoice, typer.Option(help="Pair the ends of stages, or also the blocks between them.")]
NumPairs = Annotated[
    int | None, typer.Option(min=1, help="Number of pairs, evenly spaced; the deepest is always kept. Default: all.")
]
TeacherInputSize = Annotated[str | None, typer.Option(help="Size of the teacher's images, if it differs.")]
SideKwargs = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An argument for that model, as in `depth=6`; may be repeated."),
]
