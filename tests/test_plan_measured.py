"""Seconds that are predicted of a real step on two ranks of a CPU, against what it takes here: a
wrong unit is a factor of a thousand, a load on this machine is not. `tools/bench/plan.py` is the
measurement itself.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from moetrain.planner.gpu import find_gpu

FACTOR = 12  # the table is another CPU's, and this one may do other things


def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "bench" / "plan.py"
    spec = importlib.util.spec_from_file_location("bench_plan", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_predicted_against_measured() -> None:
    """Experts on two ranks: operations, an all-to-all, the optimizer and gradients."""
    (row,) = bench().both(find_gpu("CPU").name, [1])
    assert 1 / FACTOR < row["total"] / row["measured"] < FACTOR
    assert 1 / FACTOR < row["operations"] / row["busy"] < FACTOR
    assert 0 < sum(row["exposed"].values()) < row["total"]
