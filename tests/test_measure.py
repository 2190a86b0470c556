"""How the bench measures: operations in turn, and what the machine's others did least beside."""

import itertools
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from moetrain.config.recipe import ParallelConfig
from moetrain.planner.measure import ROUNDS, Clock, Operation
from moetrain.testing.gloo import Workers

BURNS = "import time\nwhile time.process_time() < 1: pass"


def test_operations_take_turns() -> None:
    """What is done twice in succession finds its tensors in the cache, as in no step."""
    done: list[int] = []
    operations = [
        Operation(("memory", "stream"), i, None, 1, lambda i=i: done.append(i)) for i in range(7)
    ]
    assert len(Clock(torch.device("cpu")).in_turn(operations)) == 7
    assert set(Counter(done).values()) == {ROUNDS + 1}
    assert all(a != b for a, b in itertools.pairwise(done))


def _with_a_burner() -> list[tuple[tuple[int, float], float]]:
    from moetrain.engine.world import open_world
    from moetrain.planner.calm import calmest

    world = open_world(ParallelConfig(), 0)
    tries: list[int] = []

    def do() -> tuple[int, float]:
        tries.append(len(tries))
        start = time.monotonic()
        if len(tries) == 1:
            subprocess.run([sys.executable, "-c", BURNS], check=True)
        else:
            time.sleep(0.3)
        return tries[-1], time.monotonic() - start

    return calmest(world, do, 3, 3)


@pytest.mark.gloo
def test_the_calmest_come_first(workers: Workers) -> None:
    """A second of a core that another process has counts as others', whatever else there is."""
    (found,) = workers.run(1, _with_a_burner)
    shares = [share for _, share in found]
    assert shares == sorted(shares)
    ((seconds, share),) = [(s, share) for (i, s), share in found if i == 0]
    assert share * seconds * (os.cpu_count() or 1) > 0.9
