"""Seconds from counts: rooflines, links and pipelines by hand."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.builtin import MODELS
from moetrain.config.load import recipe_from
from moetrain.errors import ConfigError
from moetrain.layout.mesh import plan_mesh
from moetrain.models import read_model
from moetrain.planner.allocator import Allocator
from moetrain.planner.cost import flops_per_token, step_seconds
from moetrain.planner.gpu import Curve, find_gpu, known_gpus
from moetrain.planner.links import group_of, seconds_of
from moetrain.planner.roofline import work_of
from moetrain.planner.trace import Trace
from moetrain.planner.watch import Collective, Cost, Op, Profile

H100 = find_gpu("H100-80GB")
MIB = 2**20
HF = MODELS["qwen3-moe-tiny"]


def recipe(**parallel: int):
    return recipe_from(
        {
            "run_dir": "none",
            "model": {"hf": HF, "dtype": "bf16"},
            "method": {"name": "pretrain"},
            "data": {"train": ["none"], "seq_len": 64},
            "train": {"steps": 1, "global_batch": 64},
            "parallel": parallel,
        }
    )


def gemm(times: int) -> tuple[Op, Cost]:
    """A product of 2 TFLOP, at 80.3 % of the peak."""
    op = Op("step", "attention", "mm", ((10000, 10000), (10000, 10000), (10000, 10000)), "bfloat16")
    return op, Cost(times, times * 2 * 10**12, times * 6 * 10**8)


def traced(stage: int, times: int, num: int, **collectives: Cost) -> Trace:
    op, cost = gemm(times)
    kinds = {
        Collective("step", "reduce_scatter", name, 8): cost for name, cost in collectives.items()
    }
    return Trace(0, stage, 0, num, Profile(ops={op: cost}, collectives=kinds))


ONE = 2e12 / (989.4e12 * 0.803)


def test_every_gpu_says_where_its_numbers_are_from() -> None:
    assert known_gpus().keys() >= {"A100-40GB", "A100-80GB", "B200-180GB", "H100-80GB", "CPU"}
    for name in known_gpus():
        gpu = find_gpu(name)
        assert gpu.name == name and gpu.peak("bf16") >= gpu.peak("fp32") / 10
    assert find_gpu("H200-141GB").gemm == H100.gemm
    assert find_gpu("H200-141GB").memory_gbps.value == 4800


def test_a_gpu_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .H100-80GB.\?.*A100-80GB.*bench gpu"):
        find_gpu("H100")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"like": "H100-80GB", "name": "own", "memory_gibs": 3}))
    with pytest.raises(ConfigError, match="unknown key 'memory_gibs'"):
        find_gpu(str(own))
    own = tmp_path / "other.yaml"
    number = {"value": 2000, "source": "here"}
    own.write_text(yaml.safe_dump({"like": "H100-80GB", "name": "own", "memory_gbps": number}))
    assert find_gpu(str(own)).memory_gbps.value == 2000


def test_a_curve_is_straight_on_logarithmic_scales() -> None:
    curve = Curve(points=((10, 0.1), (1000, 0.4)), source="here")
    assert [curve.at(x) for x in (1, 100, 10**6)] == pytest.approx([0.1, 0.2, 0.4])


def test_an_operation_takes_the_longer_of_computing_and_moving() -> None:
    op, cost = gemm(3)
    assert work_of(op, cost, H100).seconds == pytest.approx(3 * ONE)
    add = Op("step", "norms", "add", ((10**9,), (10**9,), (10**9,)), "bfloat16")
    moved = work_of(add, Cost(1, 0, 6 * 10**9), H100).seconds
    assert moved == pytest.approx(6e9 / (3350e9 * 0.754))
    small = Op("step", "norms", "add", ((8,), (8,), (8,)), "bfloat16")
    assert work_of(small, Cost(5, 0, 240), H100).seconds == pytest.approx(5 * 3.4e-6)
    grows = Op("step", "backward", "add_", ((8, 4, 4), (8, 4, 4), (8, 4, 4)), "float32")
    assert work_of(grows, Cost(5, 0, 240), H100, fused=True).launches == 0


def test_links_follow_the_order_of_ranks() -> None:
    plan = plan_mesh(recipe(tp=2, ep=8).parallel, 32)
    assert group_of("TENSOR_MODEL_PARALLEL_GROUP", 2, plan).on_node(8) == 2
    assert group_of("EXPERT_MODEL_PARALLEL_GROUP", 8, plan).on_node(8) == 8
    assert group_of("EXPERT_DATA_PARALLEL_GROUP", 4, plan).on_node(8) == 1
    assert group_of("DATA_PARALLEL_GROUP_WITH_CP", 16, plan).on_node(8) == 4
    cost = Cost(1, 0, 8 * 10**9)
    near = seconds_of(
        Collective("step", "alltoall", "EXPERT_MODEL_PARALLEL_GROUP", 8), cost, plan, H100
    )
    assert near == pytest.approx(40e-6 + 7e9 / (450e9 * 0.82))
    far = seconds_of(
        Collective("step", "allgather", "EXPERT_DATA_PARALLEL_GROUP", 4), cost, plan, H100
    )
    assert far == pytest.approx(118e-6 + 6e9 / (50e9 * 0.95))
    # Four cards of a node carry a ring of four ranks a node.
    ring = seconds_of(
        Collective("step", "allreduce", "DATA_PARALLEL_GROUP_WITH_CP", 16), cost, plan, H100
    )
    assert ring == pytest.approx(118e-6 + 2 * 7.5e9 / (4 * 50e9 * 0.95))


def test_a_dispatcher_that_knows_nodes_sends_a_token_once_to_each() -> None:
    plan = plan_mesh(recipe(ep=8).parallel, 16)
    kind = Collective("step", "alltoall", "EXPERT_MODEL_PARALLEL_GROUP", 16)
    cost = Cost(1, 0, 16 * 10**8)
    plain = seconds_of(kind, cost, plan, H100) - 118e-6
    once = seconds_of(kind, cost, plan, H100, top_k=8) - 118e-6
    assert once / plain == pytest.approx((1 - 0.5**8) / 4)  # of eight copies four went there


def test_the_slowest_stage_sets_the_pace_and_the_others_make_the_bubble() -> None:
    model = read_model(HF)
    pipe = recipe(pp=4)
    traces = [traced(stage, times, 8) for stage, times in enumerate((8, 8, 16, 8))]
    found = step_seconds(pipe, 4, traces, H100, model, num_micro=64)
    assert found.slowest == 2
    assert found.compute["attention"] == pytest.approx(64 * 2 * ONE)
    assert found.bubble == pytest.approx(3 * ONE)
    assert found.total == pytest.approx(67 * 2 * ONE - 3 * ONE)
    tokens = 64 * 64 / found.total / 4
    assert found.tokens_per_s == pytest.approx(tokens)
    assert found.tflops == pytest.approx(tokens * flops_per_token(model, 64) / 1e12)
    # Interleaved: a chunk is half a stage.
    twice = recipe(pp=2, vpp=2)
    traces = [traced(stage, 8, 8) for stage in (0, 1)]
    assert step_seconds(twice, 2, traces, H100, model, num_micro=8).bubble == pytest.approx(ONE / 2)


def test_data_parallel_traffic_hides_behind_a_micro_batch() -> None:
    model = read_model(HF)
    cost = Cost(1, 0, 8 * 10**9)  # 19 ms
    traces = [traced(0, 4, 1, DATA_PARALLEL_GROUP_WITH_CP=cost)]  # 10 ms
    found = step_seconds(recipe(), 8, traces, H100, model, num_micro=8)
    assert found.hidden["DATA_PARALLEL_GROUP_WITH_CP"] == pytest.approx(4 * ONE)
    sent = 40e-6 + 7e9 / (450e9 * 0.82)
    assert found.exposed_s == pytest.approx(sent - 4 * ONE)


def test_a_freed_block_serves_what_is_no_larger() -> None:
    memory = Allocator()
    first, second = memory.take(30 * MIB), memory.take(10 * MIB)
    assert memory.reserved == 40 * MIB
    memory.give(first)
    third = memory.take(32 * MIB)  # the hole of 30 does not take it
    assert memory.reserved == 80 * MIB
    memory.take(29 * MIB)
    memory.take(9 * MIB)  # behind the third, where pages are mapped
    assert memory.reserved == 100 * MIB
    memory.give(second)
    memory.give(third)  # one hole of 1 + 10 + 32
    memory.take(43 * MIB)
    assert memory.reserved == 100 * MIB
    memory.take(1000)
    assert memory.reserved == 102 * MIB  # small ones have pages of their own


@given(st.lists(st.tuples(st.integers(1, 60 * MIB), st.integers(0, 5)), max_size=60))
def test_blocks_do_not_overlap(asked: list[tuple[int, int]]) -> None:
    memory = Allocator()
    held: list[tuple[int, int, int]] = []
    most = 0
    for size, freed in asked:
        held.append(memory.take(size))
        most = max(most, sum(block[2] for block in held))
        held.sort()
        for (pool, start, length), (other, after, _) in itertools.pairwise(held):
            assert pool != other or start + length <= after
        for _ in range(min(freed, len(held))):
            memory.give(held.pop(size % len(held)))
        assert memory.reserved >= most
    for block in held:
        memory.give(block)
    assert all(not pool._by_size and not pool._end for pool in memory.pools)


def test_ranks_wait_for_the_last_of_them_after_work() -> None:
    """A share of the work, by how much of it lies between two collectives."""
    model = read_model(HF)
    curve = {"points": [[ONE, 0.2], [100 * ONE, 0.02]], "source": "here"}
    late = H100.model_copy(update={"skew": Curve.model_validate(curve)})
    cost = Cost(8, 0, 8)
    traces = [traced(0, 8, 8, EXPERT_TENSOR_PARALLEL_GROUP=cost)]  # one after each product
    own = step_seconds(recipe(), 8, traces, H100, model, num_micro=8)
    found = step_seconds(recipe(), 8, traces, late, model, num_micro=8)
    assert found.total - own.total == pytest.approx(0.2 * 8 * ONE)
    assert found.exposed["skew"] == pytest.approx(0.2 * 8 * ONE)
    alone = [traced(0, 8, 8)]
    assert "skew" not in step_seconds(recipe(), 1, alone, late, model, num_micro=8).exposed


def test_a_grouped_product_takes_something_for_each_expert() -> None:
    shapes = ((1024, 256), (64, 256, 128), (64,), (1024, 128))
    op = Op("step", "experts", "_grouped_mm", shapes, "bfloat16")
    cost = Cost(3, 3 * 2 * 1024 * 256 * 128, 0)
    number = {"value": 10, "source": "here"}
    each = H100.model_copy(update={"expert_us": type(H100.launch_us).model_validate(number)})
    more = work_of(op, cost, each).seconds - work_of(op, cost, H100).seconds
    assert more == pytest.approx(3 * 64 * 10e-6)
