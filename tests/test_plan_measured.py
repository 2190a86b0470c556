"""Seconds that are predicted of a real step on two ranks of a CPU, against what it takes here: a
wrong unit is a factor of a thousand, a load on this machine is not. `tools/bench/plan.py` is the
measurement itself.
"""

import pytest

from moetrain.planner.gpu import find_gpu
from moetrain.testing.gloo import Workers, apart
from tools.bench import plan

FACTOR = 12  # the table is another CPU's, and this one may do other things


@pytest.mark.gloo
def test_predicted_against_measured(workers: Workers) -> None:
    """Experts on two ranks: operations, an all-to-all, the optimizer and gradients."""
    measured = workers.run(plan.RANKS, plan.measure, 1, plan.STEPS)[0]
    (predicted,) = apart(plan.predict, find_gpu("CPU").name, [1])
    assert 1 / FACTOR < predicted["total"] / measured["measured"] < FACTOR
    assert 1 / FACTOR < predicted["operations"] / measured["busy"] < FACTOR
    assert 0 < sum(predicted["exposed"].values()) < predicted["total"]
