"""Gloo's receiver threads do not preempt others when they wake."""

import os
import threading
from pathlib import Path

import pytest

from moetrain.engine.scheduling import non_preempting_threads
from moetrain.testing.gloo import Workers, apart

NAMES = {os.SCHED_OTHER: "other", os.SCHED_BATCH: "batch", os.SCHED_IDLE: "idle"}


def policies(parallel: dict[str, int]) -> dict[str, set[str]]:
    """Of this rank's threads: name -> policies."""
    from moetrain.engine.world import open_world
    from moetrain.testing.ranks import recipe_for

    open_world(recipe_for("/none", parallel).parallel, 1)
    found: dict[str, set[str]] = {}
    for task in Path("/proc/self/task").iterdir():
        name = "main" if int(task.name) == os.getpid() else (task / "comm").read_text().strip()
        found.setdefault(name, set()).add(NAMES[os.sched_getscheduler(int(task.name))])
    return found


@pytest.mark.gloo
@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "ep": 2}, {"pp": 2}], ids=str)
def test_gloos_threads_do_not_preempt(workers: Workers, parallel: dict[str, int]) -> None:
    for found in workers.run(2, policies, parallel):
        assert found["main"] == {"other"}
        gloo = {name: seen for name, seen in found.items() if "gloo" in name}
        assert gloo and set.union(*gloo.values()) == {"batch"}, found


def chosen_before() -> tuple[int, int, int]:
    """The policy before, inside and after, where a user has chosen one."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with non_preempting_threads():
        inside = os.sched_getscheduler(0)
    return os.SCHED_IDLE, inside, os.sched_getscheduler(0)


def test_a_chosen_policy_stays() -> None:
    assert len(set(apart(chosen_before))) == 1


def test_it_is_as_before_also_where_something_fails() -> None:
    inside: list[int] = []

    def look() -> None:
        inside.append(os.sched_getscheduler(0))

    with pytest.raises(ZeroDivisionError), non_preempting_threads():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        _ = 1 / 0
    assert inside == [os.SCHED_BATCH] and os.sched_getscheduler(0) == os.SCHED_OTHER
