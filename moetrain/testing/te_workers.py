"""Ranks that have Transformer Engine, from the environment that `make te-cpu` makes."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from moetrain.testing.gloo import Workers, own_server, server_of

FOLDER = Path(__file__).parents[2] / ".venv-te"
_PYTHON = str(FOLDER / "bin/python")
_server = server_of("moetrain.testing.te_preload")


@cache
def _site_packages() -> str:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([_PYTHON, "-c", ask], text=True).strip()


@contextmanager
def _te_server() -> Iterator[None]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    multiprocessing.set_executable(_PYTHON)
    sys.path.insert(0, _site_packages())  # a new process takes its parent's
    try:
        with own_server(_server):
            yield
    finally:
        sys.path.pop(0)
        multiprocessing.set_executable(sys.executable)
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


class TeWorkers(Workers):
    """Their engines have the te backend."""

    starts = staticmethod(_te_server)
