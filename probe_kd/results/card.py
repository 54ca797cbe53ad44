"""The model card of an exported folder: a README.md with the front matter that the Hugging Face hub reads."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe_kd.engine.models import build_on_meta, built_by_timm
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import TraceError
from probe_kd.files.atomic import whole_text
from probe_kd.measures import MEASURES
from probe_kd.recipe.keys import ModelOptions, Recipe
from probe_kd.recipe.writing import as_yaml

MARK = "- probe-kd\n"  # a tag of the card, by which an export is recognised


@dataclass(frozen=True)
class Card:
    """What a card is about: a model of a run, and the form in which it was exported.

    `outputs` are `logits` or, of a backbone, `features`. `weights` is the file of the run, and `about` its header.
    """

    name: str
    run: Path
    recipe: Recipe
    role: str
    weights: Path
    about: Mapping[str, Any]
    given: InputSpec
    outputs: str
    in_timm: bool
    in_onnx: bool
    notes: tuple[str, ...] = ()


def card_text(card: Card) -> str:
    """Return the text of README.md."""
    heading, figures, measured_on = _figures(card)
    lines = [
        f"- Model: `{_public(str(card.about['model']))}`, images {'x'.join(map(str, card.given.size))}",
        f"- Weights: `{card.weights.name}` of a run of probe-kd {card.about.get('probe_kd', '')}".rstrip(),
        *_origins(card),
        f"- Data: `{_public(card.recipe.data.dataset) or 'a folder of images'}`"
        + ", without labels" * (card.recipe.data.labels == "none"),
        *(f"- {heading}: {text}" for text in figures),
        *[f"- Measured: {measured_on}"] * bool(figures and measured_on),
        *(f"- Note: {note}" for note in card.notes),
    ]
    recipe = _without_paths(card.recipe.model_dump(mode="json", exclude_none=True))
    task = "image-classification" if card.outputs == "logits" else "image-feature-extraction"
    convert = '"L"' if card.given.size[0] == 1 else '"RGB"'
    fine_tune = _FINE_TUNE if card.outputs == "features" else ""
    parts = [
        _FRONT.format(task=task, library="timm" if card.in_timm else "onnx", mark=MARK, name=card.name),
        "\n".join(lines),
        _WITH_TIMM.format(convert=convert, outputs=card.outputs) + fine_tune if card.in_timm else "",
        _WITH_ONNX.format(given=card.given, outputs=card.outputs) if card.in_onnx else "",
        f"## The recipe\n\n```yaml\n{as_yaml(recipe)}```\n",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


_FRONT = """\
---
tags:
- {task}
- timm
- knowledge-distillation
{mark}pipeline_tag: {task}
library_name: {library}
---
# {name}
"""

_WITH_TIMM = """\
## With timm

```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder; or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    {outputs} = model(transform(Image.open("image.png").convert({convert})).unsqueeze(0))
```
"""

_FINE_TUNE = """
`num_classes=10` gives it a new classifier to fine-tune, and `features_only=True` its maps, where timm has them.
"""

_WITH_ONNX = """\
## With ONNX

`model.onnx` takes `images`, float32 (batch, {given.size[0]}, {given.size[1]}, {given.size[2]}), between 0 and 1 and
then normalised by the mean {given.mean} and the standard deviation {given.std}, and gives `{outputs}`.
"""


def teachers_of(recipe: Recipe) -> dict[str, ModelOptions]:
    """Return the teachers of a recipe by name; the name of a single one is empty."""
    return dict(recipe.teachers_by_name)


def _origins(card: Card) -> Iterator[str]:
    """Lines on the weights that the model was made from, with their licences as far as their configs state them."""
    name = card.role.removeprefix("teacher-") if card.recipe.teachers else ""
    own = teachers_of(card.recipe).get(name) if card.role.startswith("teacher") else card.recipe.student
    if own is not None and (own.pretrained or own.checkpoint):
        yield f"- Began as `{_public(own.model)}` ({licence(own)})"
    if card.role == "student":
        for name, teacher in teachers_of(card.recipe).items():
            which = f"{name}, " * bool(name)
            yield f"- Distilled from `{_public(teacher.model)}` ({which}{licence(teacher)})"


def licence(options: ModelOptions) -> str:
    """Return what is known of the licence of a model's weights: timm's config says it of weights of its own."""
    if not (options.pretrained or options.checkpoint):
        return "trained in this run"
    stated = ""
    if options.pretrained and built_by_timm(options.model):
        try:
            model = build_on_meta(options.model, options.model_kwargs)
        except TraceError:  # a folder that is gone, a hub that is not reached
            model = None
        stated = str((getattr(model, "pretrained_cfg", None) or {}).get("license") or "")
    return f"licence of the weights: {stated or 'not stated'}"


def _figures(card: Card) -> tuple[str, list[str], str]:
    """The headline, its values for this and the run's other models, and the images used; else empty.

    Read from summary.json.
    """
    try:
        summary = json.loads(whole_text(card.run / "summary.json"))
        headline = MEASURES[summary.get("headline", "accuracy")]
        by_role = {result["role"].replace(" ", "-"): result for result in summary["results"]}
        start = "ema_" if card.weights.stem.endswith("-ema") else ""
        values = {card.role: _value(by_role.pop(card.role), headline.name, start)}
        values |= {role: _value(result, headline.name) for role, result in by_role.items()}
        lines = [
            f"{headline.text(value)} ({role.replace('-', ' ')})" for role, value in values.items() if value is not None
        ]
        measured_on = {name: summary.get("measured_on", "") for name in MEASURES} | summary.get("labelled_sets", {})
        return headline.heading, lines, str(measured_on[headline.name])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "", [], ""


def _value(result: Mapping[str, Any], measure: str, start: str = "") -> float | None:
    """A measure of a result in summary.json; `start` is `ema_` for that of the moving average."""
    own: float | None = result.get(f"{start}{measure}")
    others: Mapping[str, float] = result.get(f"{start}measures", {})
    return others.get(measure, own)


_FILES, _FOLDERS = ("checkpoint", "class_map"), ("root", "cache")


def _without_paths(value: Any, key: str = "") -> Any:
    """Return the values of a recipe without the paths of this machine, because a card may be published."""
    if isinstance(value, Mapping):
        return {name: _without_paths(item, str(name)) for name, item in value.items() if name not in _FOLDERS}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if key in _FILES else _public(value)


def _public(text: str) -> str:
    """A name, with the last part alone of an absolute path or of one that leads out of the folder."""
    kind, colon, place = text.rpartition(":")
    for start in ("csv/", "hfds/", "wds/"):
        if place.startswith(start):
            kind, colon, place = f"{kind}{colon}{start}", "", place.removeprefix(start)
    if place.startswith(("/", "~", ".")) or Path(place).is_absolute():
        place = Path(place).name
    return f"{kind}{colon}{place}"
