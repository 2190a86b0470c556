"""A trace without values says what real ranks hold, byte for byte."""

from typing import Any

import pytest

from moetrain.testing import traced
from moetrain.testing.gloo import Workers, apart

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


@pytest.fixture(scope="module")
def pairs(workers: Workers) -> list[list[tuple[Any, Any]]]:
    """[first and last rank][case]: (traced, measured). What a thread of gloo's lets go of late
    counts for longer, so a case that differs is measured again.
    """
    wanted = [apart(traced.predicted, CASES, rank, SIZE, timeout=300) for rank in RANKS]
    found: list[Any] = [None] * len(CASES)
    rest = list(range(len(CASES)))
    for _ in range(TRIES):
        for i in rest:  # each alone: what earlier worlds leave behind costs more than a start
            seen = workers.run(SIZE, traced.measured, CASES[i])
            found[i] = [seen[rank] for rank in RANKS]
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
    (cpu,), (cuda,) = (apart(traced.predicted, case, 0, SIZE, kind) for kind in ("cpu", "cuda"))
    assert cuda["flops"] == cpu["flops"] > 0
    assert cuda["at_peak"]["norms"] < cpu["at_peak"]["norms"] / 2
    assert cuda["at_peak"]["weights"] == cpu["at_peak"]["weights"]
