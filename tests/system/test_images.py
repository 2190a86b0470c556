"""A real Apptainer builds the CPU image from this commit; its %test trains and converts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.images import APPTAINER, ROOT, checkout, cpu_image, debian, must, run

pytestmark = pytest.mark.timeout(1800)
DOCTOR = (sys.executable, "-m", "moetrain", "doctor")


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpu_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("clone") / "moetrain")


def image_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line[6:21].strip() == "image"]
    return line


def test_it_builds_passes_its_test_and_is_locked(image: Path) -> None:
    """build.sh keeps no image whose %test fails."""
    lock = image.with_suffix(".sif.txt").read_text()
    commit = must("git", "rev-parse", "HEAD").strip()
    assert f"of commit {commit}" in lock
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = [line for line in pinned if line.startswith("torch==")]
    assert torch in lock.splitlines()
    assert "deb python3=" in lock
    assert 100 < image.stat().st_size / 2**20 < 1500  # 5 GB with all of CUDA's libraries


def test_it_runs_as_moetrain(image: Path) -> None:
    assert must(APPTAINER, "run", image, "--version").startswith("moetrain 0.1.0")
    code = "import moetrain; print(moetrain.__file__)"
    where = must(APPTAINER, "exec", image, "python", "-P", "-c", code, PYTHONPATH=str(ROOT))
    assert where.startswith("/opt/venv/lib/python3.13")  # not the host's, whatever it exports


def test_the_doctor_takes_it_for_this_checkout(image: Path) -> None:
    done = run(*DOCTOR, MOETRAIN_IMAGE=str(image), PATH=f"{APPTAINER.parent}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout
    assert image_line(done.stdout).startswith(f"ok    image           {image}: moetrain 0.1.0")
    inside = run(APPTAINER, "run", image, "doctor")
    assert inside.returncode == 0, inside.stdout + inside.stderr
    assert image_line(inside.stdout).startswith("ok")


def test_the_doctor_refuses_it_for_another_checkout(image: Path, clone: Path) -> None:
    """Another commit is a warning; another range is one line and exit code 2."""
    environ = {"MOETRAIN_IMAGE": str(image), "PATH": f"{APPTAINER.parent}:/usr/bin:/bin"}
    environ["PYTHONPATH"] = str(ROOT)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(clone))
    must(*git, "commit", "--quiet", "--allow-empty", "-m", "another")
    done = run(*DOCTOR, cwd=clone, **environ)
    assert done.returncode == 1
    assert "it was built from commit" in image_line(done.stdout)
    project = clone / "pyproject.toml"
    project.write_text(project.read_text().replace("peft>=0.20,<0.21", "peft>=0.21"))
    done = run(*DOCTOR, cwd=clone, **environ)
    assert done.returncode == 2
    assert "in it, peft 0.20.0 is not >=0.21" in image_line(done.stdout)
    must(*git, "checkout", "--quiet", "pyproject.toml")
    (clone / "not.sif").write_text("no image\n")
    done = run(*DOCTOR, cwd=clone, **(environ | {"MOETRAIN_IMAGE": f"{clone}/not.sif"}))
    assert done.returncode == 2
    assert "is no image that apptainer reads" in image_line(done.stdout)
    (clone / "not.sif").unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cpu", "--wheelhouse", "/none"], "/none is no wheelhouse"),
        (["cpu", "--out", "/none/x.sif"], "/none is not there"),
        (["cpu", "--out", "README.md"], "README.md exists"),
    ],
)
def test_a_build_that_cannot_be(words: list[str], said: str, clone: Path) -> None:
    done = run("containers/build.sh", *words, cwd=clone)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not must("git", "status", "--porcelain", cwd=clone)


def test_a_dirty_checkout_is_refused(clone: Path) -> None:
    (clone / "new.txt").write_text("x")
    try:
        done = run("containers/build.sh", "cpu", cwd=clone)
    finally:
        (clone / "new.txt").unlink()
    assert done.returncode == 2
    assert "the checkout has changes (new.txt first)" in done.stderr
    assert not list(clone.glob("*.sif*"))


def test_a_build_that_fails_leaves_nothing(clone: Path, tmp_path: Path) -> None:
    """An empty wheelhouse: pip finds no wheel, in the image's own %post."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "requirements.txt").touch()
    build = ["containers/build.sh", "cpu", "--base", debian(), "--out", tmp_path / "x.sif"]
    done = run(*build, "--wheelhouse", tmp_path / "wheels", cwd=clone)
    assert done.returncode != 0
    assert "No matching distribution found" in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_scripts_are_sound() -> None:
    """Also the %post of images that need a registry: as far as a shell's grammar goes."""
    scripts = [*ROOT.glob("containers/*.sh"), APPTAINER]
    if subprocess.run(["sh", "-c", "command -v shellcheck"], capture_output=True).returncode:
        must("apt-get", "install", "-y", "-qq", "shellcheck")
    must("shellcheck", "-x", *scripts)
    for recipe in ROOT.glob("containers/*.def"):
        post = section(recipe.read_text(), "post")
        done = subprocess.run(
            ["shellcheck", "-s", "sh", "-e", "SC1091,SC1083,SC2046", "-"],
            input=post,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{recipe.name}\n{done.stdout}"


def section(recipe: str, name: str) -> str:
    """The lines of %name."""
    return recipe.partition(f"%{name}\n")[2].split("\n%")[0] + "\n"


def test_labels_are_json_for_other_tools(image: Path) -> None:
    content = json.loads(must(APPTAINER, "inspect", "--labels", "--json", image))
    labels = content["data"]["attributes"]["labels"]
    assert labels["org.moetrain.version"] == "0.1.0"
    assert labels["org.moetrain.package.megatron-core"]
