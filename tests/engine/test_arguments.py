"""What is handed on to a model builds it, and fetches, reads and writes nothing."""

import json
import sys
from collections import defaultdict
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import TINY
from timm.models import build_model_with_cfg

from probe_kd.engine.arguments import COMMON, MAX_NUMBER, PLACES, architecture_parameters, check_arguments, is_truth
from probe_kd.engine.models import build_on_meta
from probe_kd.engine.tracing import trace
from probe_kd.engine.weights import save_weights
from probe_kd.errors import RecipeError, TraceError
from probe_kd.methods.sharing import load_student
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse

# What timm's loader takes, whatever this version of it calls that.
LOADER = {*signature(timm.create_model).parameters, *signature(build_model_with_cfg).parameters} - {"kwargs"}
ADDRESS = {"url": "http://127.0.0.1:9/x.pth", "hf_hub_id": None, "source": "url"}


def folder_of(path: Path, **config: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": {}, **config}))
    return f"local-dir:{path}"


@pytest.mark.parametrize("key", sorted(LOADER | {"device", "dtype", "pruned", "whatever"}))
def test_an_argument_that_is_not_of_the_architecture_is_refused_wherever_it_stands(key: str, tmp_path: Path) -> None:
    value = {"num_classes": 10} if key.endswith("cfg") else ADDRESS
    says = f"`{key}` is no argument of the architecture of "
    text = TINY.replace("depth: 2", f"depth: 2, {key}: {json.dumps(value)}")
    with pytest.raises(RecipeError, match=says):
        plan(parse(text))
    with pytest.raises(RecipeError, match=says):
        plan(parse(TINY, sets=[f"teacher.model_kwargs.{key}={json.dumps(value)}"]))
    save_weights(timm.create_model("test_resnet"), tmp_path / "x", {"model": "resnet10t", "model_kwargs": {key: value}})
    for call in (
        lambda: trace("resnet10t", model_kwargs={key: value}),
        lambda: build_on_meta(folder_of(tmp_path / "dir", model_args={key: value}), {}),
        lambda: load_student(tmp_path / "x"),
    ):
        with pytest.raises(TraceError, match=says):
            call()


def test_the_config_of_a_folder_is_plain_and_small(tmp_path: Path) -> None:
    good = folder_of(tmp_path / "good", model_args={"channels": [8, 8, 8, 8]}, pretrained_cfg=ADDRESS)
    assert build_on_meta(good, {"num_classes": 3}).pretrained_cfg["source"] == "local-dir"  # type: ignore[index]
    for config in (
        {"architecture": 3},
        {"architecture": "resnet"},
        {"model_args": []},
        {"model_args": {"channels": [1e30]}},
        {"pretrained_cfg": {"mean": "x"}},
        {"pretrained_cfg": {"input_size": [3, "a", 4]}},
        {"pretrained_cfg": 3},
    ):
        with pytest.raises(TraceError):
            trace(folder_of(tmp_path / "bad", **config))
    for content in (b"", b"[" * 100_000, b"\xff", b"[]", b"3", b'{"a": 1}' + b" " * 10**6):
        (tmp_path / "bad" / "config.json").write_bytes(content)
        with pytest.raises(TraceError, match=r"cannot build local-dir|names no architecture"):
            trace(f"local-dir:{tmp_path / 'bad'}")
    (tmp_path / "bad" / "config.json").unlink()
    (tmp_path / "bad" / "config.json").symlink_to("/dev/zero")
    with pytest.raises(TraceError, match="no regular file"):
        trace(f"local-dir:{tmp_path / 'bad'}")


def test_a_model_that_would_be_built_for_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probe_kd.engine.models.MAX_CALLS", 12_000)
    for kwargs in (
        {"depth": 10**9},
        {"depth": 10**6, "embed_dim": 64, "num_heads": 1},
        {"num_classes": MAX_NUMBER + 1},
    ):
        with pytest.raises(TraceError, match=r"expected no number above|more parts than any other"):
            build_on_meta("vit_tiny_patch16_224", kwargs)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(bool, True), (bool | None, True), ("Optional[bool]", True), (str, False), (bool | str, False), (int, False)],
)
def test_what_is_true_or_false_is_known_by_its_annotation(kind: Any, expected: bool) -> None:
    assert is_truth(Parameter("x", Parameter.KEYWORD_ONLY, annotation=kind, default=3)) is expected
    assert is_truth(Parameter("x", Parameter.KEYWORD_ONLY, default=expected))  # which False is as well


class _Called(Exception):
    pass


def arguments_in_the_zoo(monkeypatch: pytest.MonkeyPatch) -> dict[type, tuple[str, set[str]]]:
    """By class of model: one architecture of it, and all that timm itself gives to any of the class."""

    def called(kind: type, *_: Any, **given: Any) -> None:
        raise _Called(kind, set(given))

    for name, module in list(sys.modules.items()):
        if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
            monkeypatch.setattr(module, "build_model_with_cfg", called)
    names: dict[type, list[str]] = defaultdict(list)
    given: dict[type, set[str]] = defaultdict(set)
    for name in timm.list_models():
        with pytest.raises(_Called) as caught:
            timm.models.model_entrypoint(name)()
        kind, keys = caught.value.args
        names[kind].append(name)
        given[kind] |= keys
    monkeypatch.undo()
    return {kind: (min(found, key=len), given[kind]) for kind, found in names.items()}


def refused_in_the_zoo(found: dict[type, tuple[str, set[str]]], some: int | None = None) -> set[str]:
    rows = sorted(found.values())[:: len(found) // some if some else 1]
    left = {
        f"{name}: {key}"
        for name, keys in rows
        for key in keys - COMMON - PLACES - LOADER - {*architecture_parameters(name)}
    }
    # Of timm's own use: a table in its folders, and what its features of HRNet have.
    return {entry for entry in left - {"hrnet_w18: head_conv_bias"} if not entry.endswith(": pruned")}


def test_what_timm_gives_its_own_models_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    found = arguments_in_the_zoo(monkeypatch)
    assert len(found) > 80
    assert refused_in_the_zoo(found, some=8) == set()
    check_arguments("x", "coatnet_0_224", {"transformer_window_size": [7, 7], "stem_width": [8, 8]})


@pytest.mark.zoo
def test_what_timm_gives_any_of_its_models_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused_in_the_zoo(arguments_in_the_zoo(monkeypatch)) == set()
