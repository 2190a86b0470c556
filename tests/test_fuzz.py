"""Broken inputs by the thousand, and that the fuzzer sees what it is to see."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUZZ = ROOT / "tools" / "fuzz"


def fuzz(*argv: str | Path, folder: Path = FUZZ) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, folder / "run.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_five_thousand_broken_inputs_are_used_or_refused() -> None:
    """`make prove` goes through 50,000. Both ends are reached by every kind of input, else the
    changes are too small or too large to find anything.
    """
    done = fuzz("--num", "5000", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()[:-2]
    }
    for name, refused in (("records", "rejected"), *((n, "refused") for n in REFUSED)):
        assert counts[f"{name} used"] > 10 and counts[f"{name} {refused}"] > 10, counts


REFUSED = (
    *("answers", "recipes", "overrides", "commands", "prompts", "samples", "benches", "cases"),
    *("reports", "indexes", "tables", "saved", "sides", "rollouts", "gpus", "judged"),
)
PLANTED = {
    "raise KeyError('x')": "KeyError",
    "raise MoetrainError(' ')": "a refusal without a word",
    "sum(i for i in range(10**11))": "hang",
    "while True: pass": "hang",
    "kept.append(bytearray(700 << 20)); time.sleep(30)": "growth",
    "os._exit(3)": "the process ended with 3",
}


@pytest.mark.parametrize(("code", "kind"), PLANTED.items())
def test_the_fuzzer_sees_faults(tmp_path: Path, code: str, kind: str) -> None:
    """And goes on behind them: the inputs after it are counted."""
    run = (FUZZ / "run.py").read_text().replace("parents[2]", "parent")
    (tmp_path / "run.py").write_text(run.replace("SECONDS = 5.0", "SECONDS = 0.5"))
    (tmp_path / "moetrain").symlink_to(ROOT / "moetrain")
    (tmp_path / "targets.py").write_text(
        "import os, time\nfrom dataclasses import dataclass\nfrom typing import Any\n"
        "from moetrain.errors import MoetrainError\n"
        "@dataclass\nclass Target:\n    weight: int\n    make: Any\n    run: Any\n"
        "class Bench:\n    def __init__(self, folder):\n        self.seen = 0\n"
        "kept = []\n"
        "def run(bench, made):\n    bench.seen += 1\n    time.sleep(0.002)\n"
        f"    if made % 41 == 0:\n        {code}\n    return 'used'\n"
        "numbers = iter(range(1, 10**9))\n"
        "TARGETS = {'x': Target(1, lambda rng: next(numbers), run)}\n"
    )
    done = fuzz("--num", "50", folder=tmp_path)
    assert done.returncode == 1
    assert f"1 x {kind}" in done.stdout, done.stdout + done.stderr
    assert "faults of 1 kinds" in done.stdout
    assert re.search(r"^ +\d+  x used$", done.stdout, re.MULTILINE)
