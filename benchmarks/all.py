"""Every benchmark as a process of its own, into one dated page.

python benchmarks/all.py [-o benchmarks/results.md]

`--only NAME` measures these again, and leaves the other sections of the page as they are.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from measure import machine

HERE = Path(__file__).parent
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in {"all", "measure", "foreign_stages"})
# Measured on request only: two ask about the whole zoo of timm, one about a GPU (`make gpu`), one needs timm's script.
APART = {"match_zoo", "families", "gpu", "timm_script"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every benchmark and write one page of results.")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, metavar="NAME", help="names of scripts, such as `step`")
    wishes = parser.parse_args()
    # In every process, so that a busy core costs less noise.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    names = wishes.only or [name for name in SCRIPTS if name not in APART]
    page = wishes.output.read_text(encoding="utf-8") if wishes.only and wishes.output.is_file() else ""
    page = page or f"# Benchmarks\n\n`python benchmarks/all.py`. {machine()}\n"
    failed = []
    for name in names:
        print(f"== {name}", file=sys.stderr, flush=True)
        run = _run(name, wishes.device)
        if run.returncode:
            failed.append(name)
        found = run.stdout if not run.returncode else f"## {name}\n\nIt failed with status {run.returncode}.\n"
        page = replaced(page, name, f"{found}\nMeasured apart: {machine()}\n" if wishes.only else found)
        wishes.output.write_text(page, encoding="utf-8")  # after each: all of them take 40 minutes
    print(f"== {wishes.output}", file=sys.stderr)
    if failed:
        raise SystemExit(f"these failed: {', '.join(failed)}")


def replaced(page: str, name: str, found: str) -> str:
    """The page with what a script found in the place of its former sections, or at the end; all others are left."""
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    own = [re.match(rf"## ({name}\n|.*\n\n`python \S*\b{name}\.py\b)", section) is not None for section in sections]
    at = own.index(True) if any(own) else len(sections)
    others = [section for section, mine in zip(sections, own, strict=True) if not mine]
    return "\n".join(part.strip("\n") + "\n" for part in (head, *others[:at], found, *others[at:]))


def _run(name: str, device: str) -> "subprocess.CompletedProcess[str]":
    script = os.path.relpath(HERE / f"{name}.py")
    arguments = [] if device == "cpu" else ["--device", device]
    return subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
