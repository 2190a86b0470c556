"""What the tests of images share: Apptainer, a Debian to build from, the wheels, and the CPU image.

Each is made once and kept under ~/.cache/moetrain, named by what it depends on.
"""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
APPTAINER = Path(__file__).parent / "bin" / "apptainer"
CACHE = Path.home() / ".cache" / "moetrain"
SUITE = "trixie"
PACKAGES = "python3,python3-venv,ca-certificates,binutils"


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """A program that may take minutes; what it says comes back as text."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"APPTAINER": str(APPTAINER)} | environ,
        timeout=1200,
    )


def must(*command: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """The stdout of a program that may not fail."""
    done = run(*command, cwd=cwd, **environ)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by make(beside it) and renamed when it is not there; processes wait in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_name(f".making-{path.name}")
            must("rm", "-rf", part)
            make(part)
            part.rename(path)
    return path


def debian() -> Path:
    """A root file system of Debian 13 with what the CPU image asks of its base."""

    def make(folder: Path) -> None:
        must(APPTAINER, "--version")  # it brings debootstrap
        mirror = must(
            "sh", "-c", "apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages'"
        ).split()[0]
        options = ["--variant=minbase", f"--include={PACKAGES}"]
        must("debootstrap", *options, SUITE, folder, mirror)
        must("sh", "-c", f"rm -rf {folder}/dev/* {folder}/var/cache/apt/archives/*.deb")

    return once(CACHE / f"debian-{SUITE}", make)


def wheelhouse() -> Path:
    """Every package of the CPU image."""
    wanted = must("bash", "-c", ". containers/packages.sh; packages_of cpu")
    name = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    script = ROOT / "containers" / "wheelhouse.sh"
    return once(
        CACHE / f"wheels-cpu-{name}",
        lambda folder: must(script, "cpu", folder, PYTHON=str(ROOT / ".venv/bin/python")),
    )


def checkout(folder: Path) -> Path:
    """A clean clone of this repository's last commit."""
    must("git", "clone", "--quiet", ROOT, folder)
    return folder


def cpu_image(folder: Path) -> Path:
    """The image of the last commit, tested; `folder` is for the checkout it is built from."""
    commit = must("git", "rev-parse", "HEAD").strip()

    def make(image: Path) -> None:
        must("sh", "-c", f"rm -f {CACHE}/moetrain-cpu-*.sif*")  # of other commits
        source = checkout(folder / "checkout")
        build = [source / "containers" / "build.sh", "cpu", "--base", debian()]
        must(*build, "--wheelhouse", wheelhouse(), "--out", image)
        Path(f"{image}.lock").rename(image.with_name(f"moetrain-cpu-{commit[:12]}.sif.txt"))

    return once(CACHE / f"moetrain-cpu-{commit[:12]}.sif", make)
