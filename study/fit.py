"""Is FSP easier to fit than hints? What of a teacher's features each of them makes a student predict, without labels.

    python study/fit.py                   # after study.py, whose teachers it takes

A student that is new is trained by one loss at one stage of the teacher, for the same steps, on the same images in the
same order; on images that neither has seen, what share of the variance of the loss's own target does it explain? Each
loss has a learned map of the student's side, and FSP has the same parameters as hints at both ends of the stage.
The learning rate is the best for the first seed. docs/study/fit.csv has the curves.

Then the student is frozen, and only a new map is trained, for the other target: who has learned hints, does he know
the flow too, and the other way round? docs/study/crossfit.csv has that too for a student that has learned nothing (what
the map does alone), and for another teacher of the same kind.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from run_table import Rows, beside, choose
from torch import Tensor, nn
from torch.utils.data import Subset

from probe_kd import Distiller, InputSpec, Objective, Pair, Probe, Tap, load_student, trace
from probe_kd.data.loading import loader
from probe_kd.engine.matching import stages
from probe_kd.engine.models import build_model
from probe_kd.engine.spec import Layout
from probe_kd.methods.similarity import explained_variance, variance_sums
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.training.records import write_metrics
from study import (
    ALLOWED,
    PAIRS,
    RECIPES,
    ROOT,
    Settings,
    bring_images,
    run_teacher,
    teacher_folder,
)

STAGES = {
    "resnet-resnet": ("layer2", "layer2"),
    "vit-resnet": ("blocks.2", "layer3"),
    "resnet-vit": ("layer3", "blocks.5"),
    "mixer-convnext": ("blocks.2", "stages.2"),
}
RATES = (5e-4, 2e-3, 8e-3, 3e-2, 1e-1)  # the best with both neighbours tried, as in study.py
MAP_RATES = (2e-3, 8e-3)  # of a map alone
LOOKS = (0, 5, 10, 20, 40, 80, 150, 300)  # steps after which the held-out images are looked at
STEPS, BATCH, TRAIN, HELD_OUT = LOOKS[-1], 64, 5000, 1000
HINTS, FLOW = "hints at both ends", "FSP"


def arms(student: str, teacher: str) -> dict[str, Objective]:
    out = Pair(Tap(student), Tap(teacher))
    into = Pair(Tap(student, "input"), Tap(teacher, "input"))
    relative = {"relative": True}
    return {
        "hint": Objective("hint", pairs=[out], policy="always"),
        HINTS: Objective("hint", pairs=[into, out], policy="always"),
        "hints, normalised": Objective("hint", pairs=[into, out], policy="always", normalize="layer"),
        FLOW: Objective("fsp", pairs=[out], policy="always", options=relative),
        "Gram": Objective("gram", pairs=[out], policy="always", options=relative),
        "attention": Objective("attention", pairs=[out]),
    }


@dataclass
class Bench:
    """One pair of models with its images, and what the teacher gives for all of them."""

    pair: str
    teacher: nn.Module
    train: Tensor
    held_out: Tensor
    student: tuple[str, Mapping[str, Any]]
    input: InputSpec
    answers: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, pair: str, out: Path) -> "Bench":
        found = plan(load(RECIPES / f"{pair}.yaml", sets=["data.fraction=1.0"]), allow_import=ALLOWED)
        teacher = load_student(teacher_folder(PAIRS[pair], out) / "student.safetensors", allow_import=ALLOWED).eval()
        parts = [(found.datasets.train, TRAIN), (found.datasets.held_out, HELD_OUT)]
        images = []
        for dataset, count in parts:
            assert dataset is not None
            some = Subset(dataset, range(count))
            batches = loader(some, found.recipe.data, found.student_input, training=False)
            images.append(torch.cat([seen for seen, _ in batches]))
        return cls(pair, teacher, *images, (found.student.model, found.student.model_kwargs), found.student_input)

    def new_student(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_model(*self.student)

    @torch.no_grad()
    def told(self, distiller: Distiller, name: str) -> list[Tensor]:
        """What the teacher gives at these taps for all training images, asked once."""
        if name not in self.answers:
            parts = [distiller.teacher_targets(batch) for batch in self.train.split(500)]
            self.answers[name] = [torch.cat(tap) for tap in zip(*parts, strict=True)]
        return self.answers[name]


@torch.no_grad()
def explained(bench: Bench, distiller: Distiller, objective: Objective) -> tuple[float, float]:
    """On held-out images, the share of the target's variance that is predicted; and of its square, without centring."""
    distiller.eval()
    (adapters,) = distiller.adapters.children()
    ours, theirs = objective.taps
    with Probe(distiller.student, ours) as student, Probe(bench.teacher, theirs) as teacher:
        seen, wanted = student(bench.held_out), teacher(bench.held_out)
    shares, raw = [], []
    for comparison, adapter in zip(objective.comparisons, adapters.children(), strict=True):  # type: ignore[arg-type]
        matrices = objective.resolved.reads_matrices
        mine = comparison.features("student", seen, several=matrices)
        predicted, target = adapter(mine, comparison.features("teacher", wanted, several=matrices))
        if objective.resolved.reads == "maps":  # the attention maps, which are what is compared
            predicted, target = (F.normalize(it.square().mean(1).flatten(1), dim=1) for it in (predicted, target))
        shares.append(explained_variance(variance_sums(predicted, target)))
        raw.append(float(1 - (predicted - target).square().sum() / target.square().sum()))
    return sum(shares) / len(shares), sum(raw) / len(raw)


@torch.no_grad()
def channels(bench: Bench) -> Rows:
    """Of every stage of the teacher, how the variance on held-out images is shared out among its channels.

    `effective` is the participation ratio (sum v)^2 / sum v^2: as many channels of equal variance would have it.
    """
    known = trace(bench.teacher, bench.input.size)
    rows: Rows = []
    with Probe(bench.teacher, [spec.tap for spec in stages(known)]) as probe:
        for tap, feature in probe(bench.held_out).items():
            wide = (
                feature.movedim(1, -1) if known[tap].layout is Layout.NCHW else feature[:, known[tap].prefix_tokens :]
            )
            variances = wide.flatten(0, -2).double().var(0).sort(descending=True).values
            total, count = variances.sum(), len(variances)
            rows.append(
                {
                    "teacher": PAIRS[bench.pair],
                    "layer": str(tap),
                    "channels": count,
                    "largest": round(float(variances[0] / total), 4),
                    "largest 5 %": round(float(variances[: max(1, count // 20)].sum() / total), 4),
                    "effective": round(float(total**2 / variances.square().sum()), 1),
                }
            )
    return rows


def fit(
    bench: Bench, student: nn.Module, arm: str, *, rate: float, seed: int, frozen: bool = False, steps: int = STEPS
) -> Rows:
    """Train the student and the map, or with `frozen` the map alone. Returns what is explained on the way."""
    objective = arms(*STAGES[bench.pair])[arm]
    torch.manual_seed(seed)
    distiller = Distiller(student, bench.teacher, [objective], student_input=bench.input, teacher_input=bench.input)
    trained = distiller.adapters if frozen else distiller
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    told, rows = bench.told(distiller, arm), []
    for step in range(steps + 1):
        if step in LOOKS or step == steps:
            share, raw = explained(bench, distiller, objective)
            rows.append({"step": step, "explained": round(share, 5), "uncentred": round(raw, 5)})
        if step == steps:
            break
        distiller.train()
        if frozen:
            student.eval()
        chosen = torch.randint(len(bench.train), (BATCH,), generator=order)
        loss = distiller(bench.train[chosen], None, [feature[chosen] for feature in told])["loss"]
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    distiller.close()
    return rows


def remembered(place: Path, make: Any) -> Any:
    """What was made before, or is made now: so that the study goes on where it was stopped."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        value = make()
        place.write_text(json.dumps(value), encoding="utf-8")
    return json.loads(place.read_text(encoding="utf-8"))


def run_pair(bench: Bench, out: Path, seeds: Sequence[int]) -> tuple[Rows, Rows]:
    pair = bench.pair
    home = out / "fit" / pair
    curves: Rows = []
    crossed: Rows = []
    for arm in arms(*STAGES[pair]):

        def reached(rate: float, arm: str = arm) -> float:
            place = home / f"{arm}-{rate:g}-{seeds[0]}.json"
            rows: Rows = remembered(place, lambda: _trained(bench, arm, rate, seeds[0], home))
            return float(rows[-1]["explained"])

        best, _ = choose(reached, RATES, first=(8e-3,))
        for seed in seeds:
            place = home / f"{arm}-{best:g}-{seed}.json"
            rows = remembered(place, lambda a=arm, s=seed, b=best: _trained(bench, a, b, s, home))
            curves += [{"pair": pair, "arm": arm, "lr": best, "seed": seed, **row} for row in rows]
            if arm in (HINTS, FLOW):
                crossed += _cross(bench, home, arm, best, seed)
        print(f"{pair} {arm}: {reached(best):.3f} at {best:g}", flush=True)
    for seed in seeds:
        crossed += _cross(bench, home, "nothing", 0.0, seed)
    if pair == "resnet-resnet":  # whose teachers have the student's layers
        run_teacher("resnet", Settings(out), seed=1)
        crossed += _cross(bench, home, "another teacher", 0.0, seeds[0], teacher_folder("resnet", out, seed=1))
    return curves, crossed


def _trained(bench: Bench, arm: str, rate: float, seed: int, home: Path) -> Rows:
    student = bench.new_student(seed)
    rows = fit(bench, student, arm, rate=rate, seed=seed)
    torch.save(student.state_dict(), home / f"{arm}-{rate:g}-{seed}.pt")
    return rows


def _cross(bench: Bench, home: Path, backbone: str, rate: float, seed: int, other: Path | None = None) -> Rows:
    """What a frozen student explains of hints and of flows, by a map that is trained for each."""
    found = []
    for target in (HINTS, FLOW):

        def measure(target: str = target) -> float:
            student = bench.new_student(seed)
            if other is not None:
                student = load_student(other / "student.safetensors", allow_import=ALLOWED)
            elif rate:
                student.load_state_dict(torch.load(home / f"{backbone}-{rate:g}-{seed}.pt"))
            student.requires_grad_(False)
            return max(
                fit(bench, student, target, rate=lr, seed=seed, frozen=True, steps=150)[-1]["explained"]
                for lr in MAP_RATES
            )

        share = remembered(home / f"cross-{backbone}-{seed}-{target}.json", measure)
        found.append({"pair": bench.pair, "backbone": backbone, "target": target, "seed": seed, "explained": share})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="append", choices=STAGES, help="only this pair of models; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--tables", type=Path, default=ROOT / "docs" / "study")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bring_images(options.out / "data")
    options.tables.mkdir(parents=True, exist_ok=True)
    curves: Rows = []
    crossed: Rows = []
    spectra: Rows = []
    for pair in options.pair or STAGES:
        bench = Bench.of(pair, options.out)
        if PAIRS[pair] not in {row["teacher"] for row in spectra}:
            spectra += channels(bench)
            _write(spectra, options.tables / "channels.csv", "teacher", list(PAIRS.values()))
        more = run_pair(bench, options.out, range(options.seeds))
        curves, crossed = curves + more[0], crossed + more[1]
        _write(curves, options.tables / "fit.csv", "pair", list(STAGES))
        _write(crossed, options.tables / "crossfit.csv", "pair", list(STAGES))


def _write(rows: Rows, path: Path, key: str, order: Sequence[str]) -> None:
    write_metrics(sorted(beside(rows, path, key), key=lambda row: order.index(row[key])), path)


if __name__ == "__main__":
    main()
