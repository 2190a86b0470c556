"""What small steps say of a rank of a large one is what a whole trace of it says."""

from typing import Any

import pytest

from moetrain.testing.gloo import apart
from moetrain.testing.ranks import recipe_for
from moetrain.testing.tiny import CONFIGS
from moetrain.testing.traced import HF, extended

ROLLOUT = {
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 12},
    "rewards": [{"name": "accuracy"}],
}
LORA = {"adapter": {"rank": 4, "target": ["all-linear"]}, "train": {"recompute": "full"}}
WINDOWS = {
    "path": None,
    "hf": CONFIGS["gpt_oss"] | {"num_hidden_layers": 8},
    "dtype": "bf16",
    "init": "random",
}
CASES: list[tuple[dict[str, Any], dict[str, Any], int, int, int]] = [
    # parallel, other sections, ranks, layers, micro-batches
    ({"ep": 2}, {}, 2, 5, 4),
    ({"tp": 2, "pp": 2, "ep": 4}, {"method": {"name": "dpo"}} | LORA, 8, 9, 5),
    ({"pp": 4, "cp": 2}, {"train": {"recompute": "full"}}, 8, 22, 7),
    ({"pp": 2, "vpp": 2}, {"method": {"name": "simpo"}}, 4, 12, 6),
    ({"tp": 2}, {"method": {"name": "grpo", "beta": 0.1}} | ROLLOUT, 2, 4, 3),
    # Windows in turn, which change no size.
    ({"pp": 2, "ep": 2}, {"model": WINDOWS}, 4, 8, 4),
    # Too few layers for smaller models, and many micro-batches.
    ({"tp": 2}, {"method": {"name": "grpo", "beta": 0.1}} | ROLLOUT, 2, 3, 8),
    ({"pp": 2, "vpp": 2}, {"method": {"name": "dpo"}}, 2, 4, 10),
]
SMALL = 8192  # bytes of counters that grow with the step
SHARE = 0.01  # where stages interleave, which the small steps do not


@pytest.fixture(scope="module")
def both() -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """[case][first and last rank]: (from small steps, whole)."""
    return apart(extended, CASES, timeout=300)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_from_small_steps(case: int, both: list[list[tuple[Any, Any]]]) -> None:
    share = SHARE if "vpp" in CASES[case][0] else 0
    for fast, whole in both[case]:
        slack = max(SMALL, share * max(whole["peaks"].values()))
        for phase in whole["peaks"].keys() - {"build"}:
            assert abs(fast["peaks"][phase] - whole["peaks"][phase]) <= slack
        # Two moments that hold nearly as much may change places there.
        compared = {"weights", "gradients", "optimizer"} if share else whole["at_peak"]
        for category in compared:
            assert abs(fast["at_peak"][category] - whole["at_peak"][category]) <= slack, category
        assert fast["flops"] == whole["flops"] > 0
        assert fast["params"] == whole["params"]
        for kind, sent in whole["sent"].items():
            assert abs(fast["sent"][kind] - sent) <= SMALL, kind


def _timelines() -> list[list[dict[str, int]]]:
    from moetrain.planner.trace import timeline

    sections = {"model": {"path": None, "hf": HF | {"num_hidden_layers": 2}, "init": "random"}}
    train = [{"global_batch": num} for num in (4, 64)]
    recipes = [recipe_for("-", {}, **sections, train=each) for each in train]
    return [timeline(recipe, 0, 1) for recipe in recipes]


def test_a_charts_micro_batches_do_not_grow_with_the_step() -> None:
    """Four fill the pipeline of one stage; of 64 so many are traced, which hold the same."""
    few, many = apart(_timelines)
    assert few == many and len(few) > 100
