"""Comparing runs: the figures against numpy on the files of the runs, the page as browsers and readers take it."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import NARROW, ROCKET, record
from PIL import Image
from rich.console import Console

from probe_kd.cli import main
from probe_kd.data.loading import loader
from probe_kd.data.record import DataRecord
from probe_kd.errors import RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.results.comparison import IMAGES, LAYERS, RunComparison, compare, doubts, losses_of, read_metrics
from probe_kd.results.evaluation import evaluate
from probe_kd.results.export import export
from probe_kd.results.html import models_of, page, tables, write_page
from probe_kd.training.folder import open_run
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

HOSTILE = "<script>alert('1')</script>&\"\x1b[31m"
ROLES = ("baseline", "student", "teacher")


SMALL = NARROW.replace("hflip: 0.0", "hflip: 0.0\n  holdout: 0.8")  # few images to train on
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("compare", "run")` as in a shell in `tmp_path`: (status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["probe-kd", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what the command said."""
    torch.set_num_threads(1)
    folder, said = tmp_path_factory.mktemp("trained"), StringIO()
    (folder / "tiny.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", f"probe-kd train {folder}/tiny.yaml -q --out {folder}/run-0".split())
        patch.setattr(sys, "stdout", said)
        with pytest.raises(SystemExit, match="0"):
            main()
    return folder / "run-0", said.getvalue()


@pytest.fixture
def seeds(trained: tuple[Path, str], tmp_path: Path) -> Callable[[int], list[Path]]:
    """`seeds(3)`: three runs of one recipe, the first as it was trained, the others with figures of their own."""

    def copies(count: int) -> list[Path]:
        folders = [tmp_path / f"run-{seed}" for seed in range(count)]
        for seed, folder in enumerate(folders):
            shutil.copytree(trained[0], folder)
            (folder / "manifest.json").unlink()  # these are figures of no run, which it would refuse
            if seed:
                reseed(folder, seed)
        return folders

    return copies


def reseed(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", f"seed: {seed}"))
    summary, rows = json.loads((folder / "summary.json").read_text()), record(folder)
    for row in rows:
        row["accuracy"] = str(rng.uniform())
        row["agreement"] = row["agreement"] and str(rng.uniform())
    for result in summary["results"]:
        last = [row for row in rows if row["role"] == result["role"]][-1]
        result["accuracy"] = float(last["accuracy"])
        result["agreement"] = float(last["agreement"]) if last["agreement"] else None
        result["right"] = [int(rng.integers(0, images + 1)) for images in result["images"]]
    (folder / "summary.json").write_text(json.dumps(summary | {"seed": seed}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def shown(comparison: RunComparison, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=True, _environ={"NO_COLOR": "1"})
    for part in tables(comparison):
        console.print(part, markup=False, highlight=False, soft_wrap=not hasattr(part, "columns"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def last_epochs(folders: list[Path], role: str, measure: str) -> np.ndarray:
    ends = [[row for row in record(folder) if row["role"] == role][-1][measure] for folder in folders]
    return np.array(ends, dtype=np.float64)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_table_is_what_numpy_finds_in_the_metrics(seeds: Callable[[int], list[Path]], count: int) -> None:
    folders = seeds(count)
    comparison = compare(folders[::-1])
    (group,) = comparison.groups
    assert (group.seeds, group.name) == (tuple(range(count))[::-1], "run" if count > 1 else "run-0")
    assert [row.role for row in group.summaries] == list(ROLES)
    told = shown(comparison)
    for row in group.summaries:
        for measure, spread in (("accuracy", row.accuracy), ("agreement", row.agreement)):
            if row.role == "teacher" and measure == "agreement":
                assert spread is None
                continue
            values = last_epochs(folders, row.role, measure)
            assert spread is not None
            assert (spread.mean, spread.low, spread.high) == pytest.approx((values.mean(), values.min(), values.max()))
            assert spread.deviation == (pytest.approx(np.std(values, ddof=1)) if count > 1 else None)
            mean, low, high = (f"{100 * value:.2f}" for value in (values.mean(), values.min(), values.max()))
            spans = {
                1: f"{mean}%",
                2: f"{low}–{high}%",
                3: f"{mean} ± {100 * np.std(values, ddof=1) if count > 1 else 0:.2f}%",
            }
            assert spans[count] in told
    gain = last_epochs(folders, "student", "accuracy") - last_epochs(folders, "baseline", "accuracy")
    assert f"{100 * gain.mean():+.2f} points" in told
    curve = next(curve for curve in group.curves if (curve.role, curve.measure) == ("student", "accuracy"))
    every = np.array([[float(row["accuracy"]) for row in record(f) if row["role"] == "student"] for f in folders])
    expected = np.stack([np.arange(1, 4), every.mean(0), every.min(0), every.max(0)], 1)
    np.testing.assert_allclose(curve.points, expected)
    counts = {role: np.zeros((2, 10)) for role in ROLES}
    for folder in folders:
        for result in json.loads((folder / "summary.json").read_text())["results"]:
            counts[result["role"]] += np.array([result["images"], result["right"]])
    for item in group.classes:
        change = [counts[role][1] / counts[role][0] for role in ("student", "baseline")]
        assert item.change == pytest.approx((change[0] - change[1])[int(item.name)])
    assert [abs(item.change) for item in group.classes] == sorted((abs(i.change) for i in group.classes), reverse=True)


def test_the_classes_are_those_of_the_accuracy(trained: tuple[Path, str]) -> None:
    """What a run counts by class adds up to what it says of all images."""
    for result in json.loads((trained[0] / "summary.json").read_text())["results"]:
        assert sum(result["images"]) == 360
        assert sum(result["right"]) / 360 == pytest.approx(result["accuracy"])


def test_the_end_of_a_run_shows_what_came_of_it_and_what_is_next(trained: tuple[Path, str]) -> None:
    folder, said = trained
    for part in ("baseline", "accuracy", "agreement", "parameters", "MACs", "timm.create_model("):
        assert part in said
    line = next(line for line in said.splitlines() if line.startswith("Next: "))
    assert all(f"probe-kd {verb} {folder}" in line for verb in ("eval", "export", "compare"))
    assert (folder / "report.html").read_text(encoding="utf-8") == page(compare([folder]))


def test_the_cells_are_linear_cka_of_all_test_images(trained: tuple[Path, str]) -> None:
    """By timm's models and hooks of torch alone, in float64; the run looked at 512 images at most, so at all 360."""
    folder, _ = trained
    planned, found = plan(load(folder / "recipe.yaml")), json.loads((folder / LAYERS).read_text())
    assert found["images"] == 360 < IMAGES
    features: dict[str, dict[str, np.ndarray]] = {}
    for side, trace, given in (
        ("student", planned.student, planned.student_input),
        ("teacher", planned.teacher, planned.teacher_input),
    ):
        assert trace is not None
        assert given is not None
        weights = str(folder / f"{side}.safetensors")
        model = timm.create_model(trace.model, checkpoint_path=weights, **trace.model_kwargs).eval()
        seen: dict[str, list[np.ndarray]] = {name: [] for name in found[side]}
        for name, kept in seen.items():
            keep = lambda *call, kept=kept: kept.append(call[2].double().numpy().copy())  # noqa: E731
            model.get_submodule(name).register_forward_hook(keep)
        with torch.no_grad():
            for images, _target in loader(planned.datasets.test, planned.recipe.data, given, training=False):
                model(images)
        whole = {name: np.concatenate(kept) for name, kept in seen.items()}
        features[side] = {n: x.mean((2, 3)) if x.ndim == 4 else x[:, 1:].mean(1) for n, x in whole.items()}
    assert {"blocks.0", "blocks.1"} == set(found["student"])
    assert {"layer2", "layer3"} < set(found["teacher"])
    for row, ours in zip(found["cka"], features["student"].values(), strict=True):
        for cell, theirs in zip(row, features["teacher"].values(), strict=True):
            x, y = (side - side.mean(0) for side in (ours, theirs))
            cka = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            assert cell == pytest.approx(cka, rel=1e-4)
    assert found["pairs"] == [["blocks.0", "layer2"], ["blocks.1", "layer3"]]
    reader = read(page(compare([folder])))
    cells = [float(text) for text in re.findall(r"<td>([\d.]+)</td>", reader.of_class("cka"))]
    np.testing.assert_allclose(cells, np.array(found["cka"]).ravel(), atol=5.1e-5)


def test_layers_are_measured_where_a_run_has_not(
    trained: tuple[Path, str], seeds: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = seeds(1)
    (folder / LAYERS).unlink()
    without = compare([folder])
    assert without.groups[0].similarity is None
    text = page(without)
    assert "not measured" in read(text).text
    assert 'class="arc unknown"' in text
    measured = compare([folder], layers=True)
    assert measured.groups[0].similarity == compare([trained[0]]).groups[0].similarity
    assert (folder / LAYERS).is_file()
    kept = DataRecord.read(folder)
    assert kept is not None
    other = replace(kept.contents["val_split"], looked_into={"image 0": "another"})
    monkeypatch.setattr(DataRecord, "read", lambda _: replace(kept, contents={"val_split": other}))
    (folder / LAYERS).unlink()
    (note,) = set(compare([folder], layers=True).notes) - set(measured.notes)
    assert f"{folder}: these are not the images of the run" in note
    assert note.endswith("'image 0' has other contents")


class Reader(HTMLParser):
    """A page as a strict reader takes it: every element closed in its place, every id once."""

    VOID = ("meta", "br", "img", "hr", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.stack: list[list[str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.elements.append((tag, {key: value or "" for key, value in attrs}, texts))
        if tag not in self.VOID:
            self.open.append(tag)
            self.stack.append(texts)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for texts in self.stack:
            texts.append(data)
        if "style" not in self.open:
            self.text += data

    def all(self, *tags: str) -> list[tuple[dict[str, str], str]]:
        return [(given, "".join(texts).strip()) for tag, given, texts in self.elements if tag in tags]

    def of_class(self, name: str) -> str:
        """The source of the table of this class."""
        return self.source.partition(f'<table class="{name}">')[2].partition("</table>")[0]

    source = ""


def read(text: str) -> Reader:
    reader = Reader()
    reader.source = text
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def hostile(seeds: Callable[[int], list[Path]]) -> RunComparison:
    """Two groups: three seeds, and one with names that somebody chose to do harm."""
    folders = seeds(3)
    evil = folders[0].parent / "<img src=x onerror=alert(1)>"
    shutil.copytree(folders[0], evil)
    recipe = evil / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("temperature: 2.0", "temperature: 4.0") + f"# {HOSTILE[:-5]}\n")
    summary = json.loads((evil / "summary.json").read_text())
    summary["classes"] = [f"{HOSTILE}{index}" for index in range(10)]
    summary["results"][-1]["model"] = HOSTILE
    (evil / "summary.json").write_text(json.dumps(summary))
    return compare([*folders, evil])


def test_the_page_can_be_read_by_everybody(hostile: RunComparison) -> None:
    reader = read(page(hostile))
    assert reader.all("html")[0][0]["lang"] == "en"
    assert reader.all("title")[0][1]
    levels = [int(tag[1]) for tag, _, _ in reader.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 == levels[0]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = {given["id"]: "".join(texts) for _, given, texts in reader.elements if "id" in given}
    assert len(ids) == len([given for _, given, _ in reader.elements if "id" in given])
    drawings = [given for given, _ in reader.all("svg") if given.get("aria-hidden") != "true"]
    assert len(drawings) == 11
    for given in drawings:
        assert given["role"] == "img"
        assert all(ids[name].strip() for name in given["aria-labelledby"].split())
    assert reader.all("img") == []
    assert len(reader.all("figure")) == len([text for _, text in reader.all("figcaption") if text]) == 11
    assert len(reader.all("table")) == len([text for _, text in reader.all("caption") if text])
    assert all(given["scope"] in ("col", "row", "rowgroup") for given, _ in reader.all("th"))
    for given, _ in reader.all("div"):
        if given.get("class") == "scroll":
            assert given["tabindex"] == "0"
            assert given.get("aria-label") or ids[given["aria-labelledby"]]


def test_the_page_loads_and_runs_nothing(hostile: RunComparison) -> None:
    text = page(hostile)
    reader = read(text)
    assert {tag for tag, _, _ in reader.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    for _, given, _ in reader.elements:
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & given.keys()
        assert [key for key in given if key.startswith("on")] == []
    assert re.findall(r"https?:|url\(|@import|//", "".join(text for _, text in reader.all("style"))) == []
    policy = next(given for given, _ in reader.all("meta") if "http-equiv" in given)
    assert policy["content"].startswith("default-src 'none'")
    assert "\x1b" not in text
    assert HOSTILE.replace("\x1b", "?") + "3" in reader.text, "escaped, and not left out"
    assert "<img src=x onerror=alert(1)>" in reader.text


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    """Of WCAG 2.2, of two colours in 0..255."""
    linear = [
        np.where(c / 255 <= 0.04045, c / 255 / 12.92, ((c / 255 + 0.055) / 1.055) ** 2.4) for c in (first, second)
    ]
    low, high = sorted(float(np.dot(c, (0.2126, 0.7152, 0.0722))) for c in linear)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_told_from_the_page_light_and_dark(hostile: RunComparison) -> None:
    """4.5 for letters, 3 for lines (WCAG 2.2, AA)."""
    text = page(hostile)
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(blocks) == 2
    for dark, block in enumerate(blocks):
        colours = {
            name: np.array([int(value[i : i + 2], 16) for i in (0, 2, 4)], float)
            if len(value) == 6
            else np.full(3, 255.0)
            for name, value in re.findall(r"--(\w+): #(\w+)", block)
        }
        for name in ("ink", "quiet", "accent"):
            assert contrast(colours[name], colours["page"]) >= 4.5
        assert contrast(colours["ink"], colours["panel"]) >= 4.5
        assert all(contrast(colours[f"c{number}"], colours["page"]) >= 3 for number in range(8))
        for value in np.linspace(0, 1, 101):
            cell = (0.04 + 0.96 * value) * colours["accent"] + (0.96 - 0.96 * value) * colours["page"]
            white = value < 0.58 if dark else value >= 0.825
            assert contrast(np.full(3, 255.0 * white), cell) >= 4.5, (dark, value)


def test_a_terminal_of_80_columns_folds_no_name_and_shows_no_colour(hostile: RunComparison) -> None:
    text = shown(hostile)
    bare = re.sub(r"\x1b\[[01]?m", "", text)
    assert "\x1b" not in bare
    rows = [line for line in bare.splitlines() if line.lstrip().startswith(ROLES)]
    for role in ROLES:
        assert len([line for line in rows if line.strip().startswith(f"{role} ")]) >= 2
    tabled = re.sub(r"\x1b\[[01]?m", "", shown(replace(hostile, notes=())))  # notes are sentences, and wrap themselves
    table = [line for line in tabled.splitlines() if "%" in line and "points" not in line]
    assert max(map(len, table)) <= 80
    assert "…" not in bare
    assert "stages.1.losses.soft.temperature: 2.0 | 4.0" in bare


def test_runs_of_one_seed_count_once(seeds: Callable[[int], list[Path]]) -> None:
    first, second = seeds(2)
    shutil.copytree(second, second.parent / "twin")
    comparison = compare([first, second, second.parent / "twin", f"{first}/"])
    assert comparison.groups[0].seeds == (0, 1)
    assert [note for note in comparison.notes if "twin is left out" in note and "run-1" in note] == [
        comparison.notes[0]
    ]
    assert comparison.notes[1:] == compare([first, second]).notes


def test_a_teacher_that_knew_less_than_the_student_alone_is_remarked(seeds: Callable[[int], list[Path]]) -> None:
    (folder,) = seeds(1)
    summary = json.loads((folder / "summary.json").read_text())
    for result in summary["results"]:
        result["accuracy"] = {"teacher": 0.6, "baseline": 0.5}.get(result["role"], 0.4)
    (folder / "summary.json").write_text(json.dumps(summary))
    assert compare([folder]).notes == ()
    for result in summary["results"]:
        result["accuracy"] -= 0.5 * (result["role"] == "teacher")
    (folder / "summary.json").write_text(json.dumps(summary))
    (note,) = compare([folder]).notes
    assert "The teacher (10.00%) is worse than the baseline (50.00%)" in note


def test_a_run_of_before_is_read_by_its_former_names(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Until November 2026 the baseline was the student alone, and a role a subject; there were no digests of tables."""
    former = tmp_path / "run-0"
    shutil.copytree(trained[0], former)
    (former / "manifest.json").unlink()
    (former / "baseline.safetensors").rename(former / "student-alone.safetensors")
    for name in ("metrics.csv", "summary.json"):
        text = (former / name).read_text().replace("role,stage", "subject,stage")
        text = text.replace("baseline.safetensors", "student-alone.safetensors").replace("baseline", "student alone")
        assert "student alone" in text
        (former / name).write_text(text)
    summary = json.loads((former / "summary.json").read_text())
    del summary["headline"]  # every run was about its accuracy
    for result in summary["results"]:
        del result["measures"], result["ema_measures"]
    (former / "summary.json").write_text(json.dumps(summary))
    now, then = (compare([folder]).groups[0] for folder in (trained[0], former))
    assert (then.summaries, then.curves, then.gain) == (now.summaries, now.curves, now.gain)
    scores = [(score.role, score.top1, score.nll) for score in evaluate(trained[0]).scores]
    assert [(score.role, score.top1, score.nll) for score in evaluate(former).scores] == scores
    assert export(former, tmp_path / "out", role="baseline").difference == 0.0


def without_classes(folder: Path, values: dict[str, dict[str, float]], headline: str | None) -> None:
    """Give the run the measures of one without classes, by role, and by epoch where the student has them."""
    summary, rows = json.loads((folder / "summary.json").read_text()), record(folder)
    results = {result["role"]: result for result in summary["results"]}
    results["untrained student"] = results.pop("baseline") | {"role": "untrained student", "weights": ""}
    for role, result in results.items():
        result |= {"accuracy": None, "agreement": None, "images": [], "right": [], "measures": values.get(role, {})}
    pair = {"stage": "hint", "loss": "hint", "student": "layer2", "teacher": "layer3", "cosine": None}
    results["student"]["pairs"] = [pair | {"explained_variance": values["student"]["explained_variance"]}]
    summary |= {"headline": headline, "classes": [], "results": list(results.values())}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [row for row in rows if row["role"] == "student"]
    for row in rows:
        del row["accuracy"], row["agreement"]
        row |= {name: str(value) for name, value in values["student"].items()}
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("headline", ["knn", "explained_variance"])
def test_a_run_without_classes_never_speaks_of_accuracy(seeds: Callable[[int], list[Path]], headline: str) -> None:
    folders, rng = seeds(3), np.random.default_rng(0)
    values = [
        {"student": {"explained_variance": rng.uniform(), "cosine": rng.uniform()}, "teacher": {}} for _ in folders
    ]
    for folder, of_run in zip(folders, values, strict=True):
        if headline == "knn":
            for role in ("student", "teacher", "untrained student"):
                of_run.setdefault(role, {})["knn"] = rng.uniform()
        without_classes(folder, of_run, headline)
    comparison = compare(folders)
    (group,) = comparison.groups
    by_role = {row.role: row for row in group.summaries}
    found = np.array([of_run["student"][headline] for of_run in values])
    spread = by_role["student"].of(headline)
    assert spread is not None
    assert (spread.mean, spread.deviation) == pytest.approx((found.mean(), found.std(ddof=1)))
    assert group.headline == headline
    told, text = shown(comparison), page(comparison)
    (pair,) = group.pair_scores
    assert (pair.student, pair.teacher, pair.cosine) == ("layer2", "layer3", None)
    explained = np.array([of_run["student"]["explained_variance"] for of_run in values])
    for shown_as in (f"{explained.mean():.4f} ± {explained.std(ddof=1):.4f}", "layer3", "Features: student <- teacher"):
        assert shown_as in told
    assert f"<td>{explained.mean():.4f} ± {explained.std(ddof=1):.4f}</td><td>-</td>" in text
    assert "ccuracy" not in told + text
    assert "agreement" not in told + text
    assert by_role["teacher"].accuracy is None
    if headline == "knn":
        before, of_teacher = (
            np.array([of_run[role]["knn"] for of_run in values]) for role in ("untrained student", "teacher")
        )
        doubt = f"The teacher ({of_teacher.mean():.2%}) is worse than the untrained student ({before.mean():.2%})"
        assert (of_teacher.mean() < before.mean()) == any(doubt in note for note in comparison.notes)
        assert f"the student over the untrained student: {100 * (found - before).mean():+.2f} points" in told
        assert f"{100 * found.mean():.2f} ± {100 * found.std(ddof=1):.2f}%" in told
    else:
        assert f"{found.mean():.4f} ± {found.std(ddof=1):.4f}" in told
        assert re.search(r"^ teacher +- +- ", told, re.MULTILINE)
    curves = {curve.measure for curve in group.curves if curve.role == "student" and curve.points}
    assert {"explained_variance", "cosine", headline} <= curves
    assert "cosine" not in [curve.measure for curve in losses_of(group)]


def test_a_loss_may_be_called_like_a_measure_that_its_run_does_not_take(seeds: Callable[[int], list[Path]]) -> None:
    (folder,) = seeds(1)
    for name in ("recipe.yaml", "metrics.csv"):
        text = (folder / name).read_text()
        assert "soft" in text
        (folder / name).write_text(re.sub(r"\bsoft\b", "cosine", text))
    (group,) = compare([folder]).groups
    assert [curve.measure for curve in losses_of(group)].count("cosine") == 1
    assert "cosine" not in shown(compare([folder]))


def test_a_loss_may_be_called_as_the_column_of_roles_once_was(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("role,stage,epoch,accuracy,subject\nstudent,task,1,0.5,2.25\n")
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert (row["role"], row["subject"]) == ("student", 2.25)


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    class Stopping(Progress):
        def epoch(self, row: dict[str, object]) -> None:
            if row["role"] == "baseline":
                raise KeyboardInterrupt

    (tmp_path / "tiny.yaml").write_text(SMALL)
    with pytest.raises(KeyboardInterrupt):
        train(plan(load(tmp_path / "tiny.yaml")), tmp_path / "run", Stopping(Console(quiet=True)))
    comparison = compare([tmp_path / "run"])
    assert "teacher is done, baseline is at epoch 1 of stage 'task'" in comparison.notes[0]
    assert "--resume" in comparison.notes[0]
    alone, teacher = comparison.groups[0].summaries
    assert (alone.role, alone.unfinished, alone.parameters) == ("baseline", "epoch 1 of stage 'task'", None)
    assert (teacher.role, teacher.unfinished) == ("teacher", "")
    assert "not finished" in shown(comparison)
    assert "student" in read(page(comparison)).text
    assert models_of(comparison.groups[0]) == [alone.model, teacher.model]  # of its baseline, the student has the name
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.csv").unlink()
    with pytest.raises(RunError, match=r"nothing is measured yet in .*no epoch is done"):
        compare([tmp_path / "run"])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metrics.csv", "role,stage,epoch,accuracy\nstudent,task,1,ninety\n", r"line 2: accuracy is 'ninety'"),
        (
            "metrics.csv",
            "role,stage,epoch,accuracy\nstudent,task,1,0.5\nstudent,task\n",
            r"line 3: expected 4 fields",
        ),
        ("metrics.csv", "role,epoch\n", r"no column 'stage'"),
        ("metrics.csv", "role,stage,epoch,accuracy\nstudent,task,1,\0\n", r"metrics.csv is damaged"),
        (
            "metrics.csv",
            "role,stage,epoch,accuracy\nstudent,task,1,nan\n",
            r"line 2: it has no epoch, or its accuracy is no number",
        ),
        ("summary.json", "{", r"summary.json is damaged"),
        ("summary.json", '{"results": [{"role": "student"}]}', r"summary.json is damaged \(results.0.model"),
        ("layers.json", '{"images": 3}', r"layers.json is damaged"),
        ("recipe.yaml", "student: {", r"not YAML"),
    ],
    ids=lambda value: value[:40],
)
def test_a_damaged_file_is_told_with_its_place(
    seeds: Callable[[int], list[Path]],
    command: Command,
    name: str,
    text: str,
    says: str,
) -> None:
    (folder,) = seeds(1)
    (folder / name).write_text(text)
    status, _, stderr = command("compare", str(folder))
    assert (status, "Traceback" in stderr) == (2, False)
    assert re.search(says, " ".join(stderr.split())), stderr


def test_what_cannot_be_compared_is_told(command: Command, tmp_path: Path, trained: tuple[Path, str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (tmp_path / "there.html").write_text("precious")
    for arguments, says in (
        (["runs"], "runs is not the folder of a run (there is none); did you mean 'run'?"),
        (["run", "-o", "there.html"], "there.html exists; --overwrite replaces it"),
        (["run", "-o", "page.json"], "page.json: a report is HTML; call it so, as in page.html, or take --json"),
        (["run", "-o", "run/recipe.yaml/page.html"], "cannot write run/recipe.yaml/page.html: "),
    ):
        status, _, stderr = command("compare", *arguments)
        assert (status, says in stderr) == (2, True), stderr
    assert (tmp_path / "there.html").read_text() == "precious"
    _, stdout, stderr = command("compare", "run", "--json", "-o", "there.html", "--overwrite")
    assert json.loads(stdout)["groups"][0]["summaries"][1]["role"] == "student"
    assert "wrote there.html" in stderr
    assert read((tmp_path / "there.html").read_text(encoding="utf-8")).all("h1")


def test_what_eval_and_compare_leave_in_a_run_does_not_keep_it_from_being_overwritten(
    command: Command,
    tmp_path: Path,
    trained: tuple[Path, str],
) -> None:
    run, planned = tmp_path / "run", plan(load(trained[0] / "recipe.yaml"))
    shutil.copytree(trained[0], run)
    assert command("eval", "run", "-o", "run/scores.json")[0] == 0
    assert command("compare", "run", "-o", "run/mine.html")[0] == 0
    for name, text in (("notes.json", '{"scores": 1}'), ("notes.html", "<p>years of work")):
        (run / name).write_text(text)
        with pytest.raises(RunError, match=rf"holds more than a run writes \({name}\)"):
            open_run(planned, run, Progress(Console(quiet=True)), resume=False, overwrite=True)
        assert (run / "scores.json").exists()
        (run / name).unlink()
    open_run(planned, run, Progress(Console(quiet=True)), resume=False, overwrite=True)
    assert {file.name for file in run.iterdir()} == {"recipe.yaml", "manifest.json", "data.json"}


def test_a_report_that_fails_does_not_make_the_run_fail(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory for\npictures")

    monkeypatch.setattr("probe_kd.results.comparison.vectors", broken)
    monkeypatch.setattr("probe_kd.results.html.page", broken)
    (tmp_path / "r.yaml").write_text(
        ROCKET.replace("epochs: 2", "epochs: 1").replace("hflip: 0.0", "hflip: 0.0, holdout: 0.8")
    )
    status, stdout, stderr = command("train", "r.yaml", "-q")
    assert status == 0, stderr
    assert "note: the layers are not compared: no memory for pictures" in stderr
    assert "Next: probe-kd eval runs/r | " in stdout
    assert re.search(r"with the student, the teacher (gained|lost) \d+\.\d\d points|is as accurate as alone", stdout)
    assert "teacher baseline" in stdout


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here (Debian: apt-get install chromium)")
@pytest.mark.parametrize(
    ("dark", "background"), [(False, (255, 255, 255)), (True, (20, 23, 27))], ids=["light", "dark"]
)
def test_a_browser_shows_it_in_the_colours_of_the_reader(
    hostile: RunComparison, tmp_path: Path, dark: bool, background: tuple[int, int, int]
) -> None:
    """480 wide, as on a telephone: nothing is wider than the page, and the drawings are there."""
    write_page(hostile, tmp_path / "page.html")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --hide-scrollbars --window-size=480,4000"
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    place = (tmp_path / "page.html").as_uri()
    subprocess.run([str(CHROMIUM), *quiet.split(), *options, place], check=True, capture_output=True, timeout=120)
    seen = np.array(Image.open(tmp_path / "page.png").convert("RGB"))
    assert seen.shape[1] == 480
    assert (seen[:, -16:] == background).all(), "something is wider than the page"
    other = (seen != background).any(2).any(1)
    assert other.sum() > 1500
    blue = np.array([116, 186, 245] if dark else [11, 95, 165])
    assert (seen == blue).all(2).sum() > 1000


def test_a_teacher_that_is_worse_than_the_student_alone_is_remarked() -> None:
    def said(teacher: float, alone: float) -> list[str]:
        return doubts({"teacher": teacher, "baseline": alone})

    assert said(0.9, 0.8) == said(0.8, 0.8) == doubts({"teacher": 0.1}) == []
    (line,) = said(0.801, 0.92)
    assert "teacher (80.10%) is worse than the baseline (92.00%)" in line
