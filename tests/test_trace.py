"""A trace without values says what real ranks hold, byte for byte."""

import json
import subprocess
import sys
from typing import Any

import pytest

from moetrain.testing.gloo import Workers

SIZE, RANKS, TRIES = 4, (0, 3), 3
ROLLOUT = {
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 12},
    "rewards": [{"name": "accuracy"}],
}
ADAPTER = {"adapter": {"rank": 4, "target": ["all-linear"], "dropout": 0.1}}
CASES = [
    ({}, {"method": {"name": "sft"}}),
    ({"tp": 2, "ep": 2}, {"method": {"name": "dpo"}}),
    ({"ep": 4}, {"method": {"name": "kto"}, "optim": {"grad_dtype": "bf16"}}),
    ({"tp": 4, "ep": 4}, {"method": {"name": "grpo", "beta": 0.1}} | ROLLOUT),
    ({"pp": 2, "ep": 2}, {"method": {"name": "ppo"}} | ROLLOUT),
    ({"pp": 4}, {"method": {"name": "orpo"}}),
    ({"pp": 2, "vpp": 2}, {"method": {"name": "simpo"}}),
    ({"pp": 2, "tp": 2}, {"method": {"name": "dpo"}} | ADAPTER),
    ({"cp": 2, "ep": 2}, {"method": {"name": "dft"}, "optim": {"name": "muon"}}),
    ({"tp": 2, "cp": 2}, {"method": {"name": "reward"}}),
    ({"ep": 2}, {"train": {"recompute": "full", "micro_batch": 2}}),
    ({"tp": 2}, {"train": {"recompute": "selective", "overlap": False}} | ADAPTER),
]
SCRIPT = """
import json, sys
from moetrain.testing.traced import predicted
print(json.dumps(predicted(*json.loads(sys.argv[1]))))
"""


def traced(cases: Any, rank: int, stands_for: str = "cpu") -> list[dict[str, Any]]:
    given = json.dumps([cases, rank, SIZE, stands_for])
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pairs(workers: Workers) -> list[list[tuple[Any, Any]]]:
    """[first and last rank][case]: (traced, measured). What a thread of gloo's lets go of late
    counts for longer, so a case that differs is measured again.
    """
    from moetrain.testing import traced as both

    wanted = [traced(CASES, rank) for rank in RANKS]
    found: list[Any] = [None] * len(CASES)
    rest = list(range(len(CASES)))
    for _ in range(TRIES):
        seen = workers.run(SIZE, both.measured, [CASES[i] for i in rest])
        for n, i in enumerate(rest):
            found[i] = [seen[rank][n] for rank in RANKS]
        rest = [i for i in rest if found[i] != [each[i] for each in wanted]]
        if not rest:
            break
    return [
        list(zip(each, (own[n] for own in found), strict=True)) for n, each in enumerate(wanted)
    ]


@pytest.mark.parametrize("number", range(len(RANKS)))
def test_bytes_of_a_rank(pairs: list[list[tuple[Any, Any]]], number: int) -> None:
    """In twelve layouts and ten methods, at the peak, by what they are for; and those sent."""
    for case, (wanted, found) in zip(CASES, pairs[number], strict=True):
        assert wanted == found, case
        assert found["at_peak"].keys() >= {"weights", "gradients", "optimizer", "experts"}


def test_a_gpu_keeps_less_of_norms() -> None:
    """Its kernel has no copies in fp32; what matrix products there are is the same."""
    case = CASES[1:2]
    (cpu,), (cuda,) = traced(case, 0), traced(case, 0, "cuda")
    assert cuda["flops"] == cpu["flops"] > 0
    assert cuda["at_peak"]["norms"] < cpu["at_peak"]["norms"] / 2
    assert cuda["at_peak"]["weights"] == cpu["at_peak"]["weights"]
