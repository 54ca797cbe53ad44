"""Several machines in one run: what they do not have in common is refused in words, in all processes."""

import json
import os
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from running import finish, start

from probe_kd.errors import RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training import machines
from probe_kd.training.processes import by_first, own_accelerator

RECIPE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
data: {root: ROOT, input_size: [3, 16, 16], batch_size: 2}
stages:
  - epochs: 1
    losses: {task: {loss: cross_entropy}}
seed: 0
"""


def meet(folder: Path) -> None:
    """What each of two processes is told where the second has something else, and where it has not."""
    rank, told = int(os.environ["RANK"]), {}
    machines.PATIENCE = 0.5
    text = RECIPE.replace("ROOT", str(folder / "images 0"))
    other = text.replace("images 0", f"images {rank}")
    own, shared = folder / str(rank), folder / "shared"
    shared.mkdir(exist_ok=True)
    own.mkdir()

    def write(place: Path) -> None:
        (place / "file").write_text("by the first")

    with own_accelerator() as accelerator:
        told["same"] = _told(accelerator, text)
        told["seed"] = _told(accelerator, text.replace("seed: 0", f"seed: {rank}"))
        told["images"] = _told(accelerator, other)
        for name, place in (("shared", shared), ("own", own)):
            by_first(accelerator, lambda place=place: write(place))  # type: ignore[misc]
            told[name] = _refused(lambda place=place: machines.check_shared(accelerator, place / "file", "the folder"))
    (folder / f"{rank}.json").write_text(json.dumps(told))


def _told(accelerator: Accelerator, text: str) -> str:
    planned = plan(parse(text))
    return _refused(lambda: machines.check_machines(planned, accelerator))


def _refused(check: object) -> str:
    try:
        check()  # type: ignore[operator]
    except RunError as refusal:
        return str(refusal)
    return ""


def test_what_machines_do_not_have_in_common_is_told_by_all(tmp_path: Path) -> None:
    for rank in (0, 1):
        for name in ["a/0.png", "b/0.png", *["b/1.png"] * rank]:
            for split in ("train", "validation"):
                file = tmp_path / f"images {rank}" / split / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((16, 16), 50 + len(split)).convert("RGB").save(file)
    assert finish(*start(meet, tmp_path)) == ["done", "done"]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["same"] == first["shared"] == ""
    host = os.uname().nodename
    given = "was given another recipe (`seed: 1`, not `seed: 0`)"
    assert first["seed"] == f"process 1 on {host} {given} than process 0 on {host}"
    assert "reads other images (in train_split 'b/1.png' is new" in first["images"]
    assert f"does not see the folder {tmp_path / '1'}, which process 0 on {host} writes" in first["own"]
