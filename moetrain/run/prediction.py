"""What a run's step was predicted to take and hold, made beside the run while it loads its model.
No torch in this process.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moetrain.config.load import dump_recipe
from moetrain.config.recipe import Recipe
from moetrain.observe.report_memory import FILE
from moetrain.parent import die_with
from moetrain.planner.fit import is_predicted
from moetrain.planner.gpu import find_gpu

WAIT_SECONDS = 60.0  # for it, once the model is there


class Prediction:
    """Of a run on `size` ranks, where its recipe names the GPU that it is on.

    on_gpu: whether the ranks are on GPUs.
    """

    def __init__(self, recipe: Recipe, size: int, *, on_gpu: bool):
        self._samples = recipe.method.samples
        self._on_gpu = on_gpu
        self._process: subprocess.Popen[str] | None = None
        self._said = ""
        if not is_predicted(recipe):
            return
        gpu = find_gpu(recipe.cluster.gpu_name, "cluster.gpu")
        if gpu.asynchronous == on_gpu:
            cluster = recipe.cluster.model_copy(update={"world_size": size, "nodes": None})
            alone = recipe.model_copy(update={"cluster": cluster})
            words = ["plan", "/dev/stdin", "--as-is", "--json"]
            if on_gpu:
                words += ["--chart", str(recipe.run_dir.absolute() / FILE)]  # for the report
            hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
            env = {name: value for name, value in os.environ.items() if name not in hidden}
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "moetrain", *words],
                env=env | {"CUDA_VISIBLE_DEVICES": ""},  # it would take memory of one
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
            file, self._process.stdin = self._process.stdin, None  # `communicate` writes nothing
            assert file is not None
            with suppress(BrokenPipeError), file:
                file.write(dump_recipe(alone))
        self._said = f"on {size} x {gpu.name}"

    def figures(self, *, on_gpu: bool) -> dict[str, float]:
        """What rows of the ledger have beside what is measured: `predicted/seconds`, and on a GPU
        `predicted/memory_gib`, of the first rank's tensors. Empty where nothing is predicted, or
        not in time.

        A step that learns from rollouts has no seconds: how long answers will be is not known.
        """
        process, self._process = self._process, None
        if process is None or on_gpu != self._on_gpu:
            return {}
        try:
            (row,) = json.loads(_line(process, WAIT_SECONDS))["layouts"]
        except (ValueError, KeyError):
            process.kill()
            return {}
        found: dict[str, float] = {}
        if not self._samples:
            found["predicted/seconds"] = row["step_s"]
        if self._on_gpu:
            found["predicted/memory_gib"] = row["first_rank_gib"]
        return found

    def lines(self, figures: Mapping[str, float]) -> list[str]:
        """What to tell of it, where there is something."""
        names = {"predicted/seconds": "{:.3g} s a step", "predicted/memory_gib": "{:.1f} GiB"}
        texts = [names[name].format(value) for name, value in figures.items()]
        return [f"predicted {self._said}: {', '.join(texts)}"] if texts else []


def _line(process: subprocess.Popen[str], seconds: float) -> bytes:
    """The first that it prints; less where it ends or the time does. It goes on with the chart."""
    assert process.stdout is not None
    text, end = b"", time.monotonic() + seconds
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready or not (part := os.read(process.stdout.fileno(), 1 << 16)):
            break
        text += part
    return text


def has_gpus() -> bool:
    """Whether this machine's devices are GPUs."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
