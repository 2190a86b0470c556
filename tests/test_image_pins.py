"""What images install, as their lists say it: no network and no Apptainer."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
EXTRAS = {"cpu": (), "gpu": ("te", "swift", "modelopt"), "rollout": ("vllm",)}
# NVIDIA's own build in the base of the gpu image; servers read no data.
NOT_LISTED = {"cpu": set[str](), "gpu": {"torch"}, "rollout": {"datasets"}}


def lines(function: str, image: str) -> list[str]:
    command = f". containers/packages.sh; {function} {image}"
    return subprocess.check_output(["bash", "-c", command], cwd=ROOT, text=True).split()


def pins(requirements: list[str]) -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in requirements:
        name, _, version = line.partition("==")
        assert canonicalize_name(name) not in found, f"{name} is listed twice: pip refuses that"
        found[canonicalize_name(name)] = Version(version)
    return found


def listed(path: str) -> dict[str, Version]:
    text = (ROOT / path).read_text()
    return pins([line for line in text.splitlines() if line and not line.startswith("#")])


def of_image(image: str) -> dict[str, Version]:
    return pins([line for line in lines("packages_of", image) if "==" in line])


@pytest.mark.parametrize("image", EXTRAS)
def test_each_package_once_and_in_our_ranges(image: str) -> None:
    found = of_image(image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in EXTRAS[image]:
        asked += project["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name not in NOT_LISTED[image]:
            assert requirement.specifier.contains(found[name]), requirement


def test_the_gpu_image_has_what_is_tested_here() -> None:
    """Other versions are ms-swift's wish, of what tests alone import."""
    ours, found = listed("constraints.txt"), of_image("gpu")
    other = {name for name in found.keys() & ours.keys() if found[name] != ours[name]}
    assert other == {"trl"}
    servers = of_image("rollout")
    assert servers["torch"] == ours["torch"] and not servers.keys() & {"datasets", "trl"}


# What compiles Transformer Engine here and is in the base of the image: CUDA's toolkit and, in
# torch, pybind11.
BASE_HAS = {"nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "pybind11", "wheel"}


def test_one_transformer_engine() -> None:
    """Compiled for the image, and here by `make te-cpu`, with all that it imports: its extension
    is source, of which no index says what it asks for.
    """
    here = listed("constraints-te.txt")
    image = of_image("gpu") | pins(lines("sources_of", "gpu"))
    assert {name: image.get(name) for name in here.keys() - BASE_HAS} == {
        name: version for name, version in here.items() if name not in BASE_HAS
    }


def test_apex_is_of_one_commit() -> None:
    """The recipe's own, and the one that a wheelhouse fetches."""
    _, commit = lines("repositories_of", "gpu")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert f"apex={commit}" in (ROOT / "containers/moetrain.def").read_text()


def test_what_is_asked_for_in_vain_is_said(tmp_path: Path) -> None:
    """The image is not built then."""
    complete = ROOT / "containers" / "complete.py"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    base = Path(packaging.__file__).parents[1]  # as an image's base, which is not asked
    (site / "base.pth").write_text(f"{base}\n")
    info = site / "wisher-1.0.dist-info"
    info.mkdir()
    for wish, code in (("packaging>=20", 0), ("packaging>=2000", 1), ("nowhere-to-be-found", 1)):
        text = f"Metadata-Version: 2.1\nName: wisher\nVersion: 1.0\nRequires-Dist: {wish}\n"
        (info / "METADATA").write_text(text)
        for names, wanted in (([], code), (["wisher"], 0)):
            command = [tmp_path / "bin" / "python", complete, *names]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == wanted, done.stdout + done.stderr
