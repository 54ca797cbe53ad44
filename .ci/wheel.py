"""Build the sdist and the wheel, and try the wheel in a fresh environment: `make wheel`.

The fresh environment has probe-kd from the wheel, and torch, timm and the other dependencies from the environment that
runs this script, so that nothing large is downloaded. What is built is left in dist/.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
NEEDED = ("probe_kd/py.typed", "probe_kd/results/templates/report.html", "probe_kd/version.py")


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """The output of a command that must succeed, without the variables that would lead back to the checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    print("==", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n== failed with status {done.returncode}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A new virtual environment; its folder of programs."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    python = environment(folder) / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build")
    run(python, "-m", "build", "--outdir", DIST, ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path, version: str) -> None:
    """Every module, the files that are no modules, and the version, in both."""
    modules = {str(path.relative_to(ROOT).as_posix()) for path in ROOT.glob("probe_kd/**/*.py")}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    for what, names in ((wheel, in_wheel), (sdist, in_sdist)):
        missing = sorted((modules | set(NEEDED)) - names)
        if missing:
            sys.exit(f"{what.name} lacks {', '.join(missing)}")
        if f"-{version}" not in what.name:
            sys.exit(f"{what.name} is not of version {version}")
    foreign = sorted(name for name in in_wheel if not name.startswith(("probe_kd/", "probe_kd-")))
    if foreign:
        sys.exit(f"{wheel.name} would also install {', '.join(foreign[:5])}")


def try_wheel(folder: Path, wheel: Path, version: str) -> None:
    """Install the wheel and run it away from the checkout."""
    programs = environment(folder)
    site = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", wheel, folder=folder)
    place = run(programs / "python", "-c", "import probe_kd; print(probe_kd.__file__)", folder=folder).strip()
    if not Path(place).is_relative_to(site):
        sys.exit(f"probe_kd was imported from {place}, not from the wheel")
    probe_kd = programs / "probe-kd"
    if run(probe_kd, "--version", folder=folder).split() != ["probe-kd", version]:
        sys.exit("the command has another version")
    run(probe_kd, "--help", folder=folder)
    if "layer4" not in run(probe_kd, "inspect", "resnet18", folder=folder):
        sys.exit("`probe-kd inspect resnet18` does not list its layers")


def main() -> None:
    names: dict[str, str] = {}
    exec((ROOT / "probe_kd" / "version.py").read_text(encoding="utf-8"), names)
    version = names["__version__"]
    with tempfile.TemporaryDirectory() as folder:
        sdist, wheel = build(Path(folder) / "build")
        check_contents(sdist, wheel, version)
        try_wheel(Path(folder) / "fresh", wheel, version)
    print(f"== {sdist.name} and {wheel.name} are good")


if __name__ == "__main__":
    main()
