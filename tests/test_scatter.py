"""A batch of rollouts lies on the first rank; every rank gets its part of the packs."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.config.load import recipe_from
from moetrain.config.recipe import ParallelConfig
from moetrain.data.groups import GradedAnswer, Group, pack_groups
from moetrain.data.samples import Kept, Prompt, Sample
from moetrain.data.trajectories import Trajectory, narrow
from moetrain.engine import scatter
from moetrain.engine.layers.router import sequence_table
from moetrain.errors import DataError
from moetrain.layout.activations import in_flight, num_micro_batches
from moetrain.layout.batch import batch_bytes, routed_layers
from moetrain.layout.mesh import plan_mesh
from moetrain.loops.batch_values import with_targets
from moetrain.loops.learn import all_packs, answer_values, with_known
from moetrain.loops.outline import outline_of
from moetrain.loops.parts import Parts
from moetrain.loops.store import Batch
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.models import read_model
from moetrain.ops.packed import concat, pad_to
from moetrain.ops.routes import in_bytes, pack_routes, unpack_routes
from moetrain.testing import scattered
from moetrain.testing.gloo import Workers
from moetrain.testing.scattered import bytes_of, tensors_of
from moetrain.testing.tiny import CONFIGS

LAYERS, EXPERTS, K = 4, 6, 2  # of the tiny model


def groups(
    sizes: list[int], num: int, *, routes: bool = True, kept: bool = False, answer: int = 0
) -> list[Group]:
    """A group of `num` answers of many lengths, or of `answer` tokens, for prompts of `sizes`."""
    rng = random.Random(4)
    made: list[Group] = []
    for p, size in enumerate(sizes):
        prompt = tuple(rng.randrange(1, 200) for _ in range(size))
        answers: list[GradedAnswer] = []
        shared = np.array([chosen(rng) for _ in range(size - 1)]).reshape(-1, LAYERS, K)
        for index in range(num):
            tokens = tuple(rng.randrange(1, 200) for _ in range(answer or rng.randrange(1, 8)))
            own = np.array([chosen(rng) for _ in tokens])
            sample = Sample(
                f"p{p}", index, tokens, tuple(-rng.random() for _ in tokens), "", "stop", 0,
                routes=np.concatenate([shared, own]).astype(np.int16) if routes else None,
                kept=Kept.of([[token, (token + 1) % 200] for token in tokens]) if kept else None,
            )  # fmt: skip
            answers.append(GradedAnswer(Trajectory.of(sample), rng.uniform(-1, 1)))
        made.append(Group(Prompt(f"p{p}", prompt, {}), tuple(answers)))
    return made


def chosen(rng: random.Random) -> list[list[int]]:
    return [rng.sample(range(EXPERTS), K) for _ in range(LAYERS)]


# Of bytes


@given(
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_what_is_sent_arrives(sizes: list[int], piece: int, rng: random.Random) -> None:
    kinds = [torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16]
    tensors = [torch.randint(0, 2, (size, 2)).to(rng.choice(kinds)) for size in sizes]
    value = {"all": tensors, "again": tensors[:1], "turned": [x.T for x in tensors], "n": piece}
    sent: deque[Tensor] = deque()

    def put(values: Tensor) -> Tensor:
        sent.append(values.clone())
        return values

    before, scatter.PIECE = scatter.PIECE, piece
    try:
        scatter.send(value, put, torch.device("cpu"))
        largest = max((one.numel() for one in list(sent)[2:]), default=0)
        found = scatter.receive(lambda values: values.copy_(sent.popleft()), torch.device("cpu"))
    finally:
        scatter.PIECE = before
    assert not sent and largest <= piece and found["n"] == piece
    for name in ("all", "again", "turned"):
        for ours, theirs in zip(found[name], value[name], strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert not tensors or found["again"][0] is found["all"][0]  # once on the way


@given(st.sampled_from([2, 8, 254, 255, 256, 257, 512]), st.integers(1, 4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_choices_come_out_of_their_bytes(num: int, k: int, rng: random.Random) -> None:
    k = min(k, num)
    rows = [[x + 1 for x in rng.sample(range(num), k)] for _ in range(5)] + [[0] * k]
    rows.append(list(range(num - k + 1, num + 1)))  # with the last expert
    routes = torch.tensor(rows, dtype=torch.int16)[:, None]
    packed = pack_routes(routes, num)
    assert (packed.dtype == torch.uint8) == in_bytes(num, k) == (num + (k == 1) <= 256)
    assert torch.equal(unpack_routes(packed, num).long(), routes.long())
    assert pack_routes(packed, num) is packed


@pytest.mark.parametrize("num", [200, 256, 300])
def test_packs_have_the_choices_that_were_made(num: int) -> None:
    rng = np.random.default_rng(0)
    group = groups([3], 2)[0]
    made: list[GradedAnswer] = []
    chosen: list[Any] = []
    for answer in group.answers:
        (branch,) = answer.trajectory.branches
        assert branch.routes is not None
        routes = rng.integers(0, num - 1, branch.routes.shape)
        routes[..., 0] = num - 1  # the last, in every layer
        routes[:2] = 5  # the prompt's, which stand once
        chosen.append(routes[2:])
        branch = replace(branch, routes=narrow(routes.astype(np.int16)))
        made.append(replace(answer, trajectory=replace(answer.trajectory, branches=(branch,))))
    group = replace(group, answers=tuple(made))

    def packed(num_experts: int) -> Tensor:
        options: Any = {"seq_len": 40, "min_packs": 1, "num_experts": num_experts}
        return pack_groups([group], {}, **options)[0].per_token["routes"]

    routes = packed(num)
    assert (routes.dtype == torch.uint8) == (num <= 256)
    wanted = torch.from_numpy(np.concatenate([np.full((2, LAYERS, K), 5), *chosen]))
    assert torch.equal(unpack_routes(routes, num).long(), wanted + 1)
    assert torch.equal(packed(0).long(), wanted + 1)
    with pytest.raises(DataError, match=f"chose expert {num - 1}, and the model has {num - 1}"):
        packed(num - 1)


# Of parts

SPLITS: list[dict[str, int]] = [
    {},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 4},
    {"pp": 2, "first_stage_layers": 1},
    {"pp": 3, "last_stage_layers": 1},
]


@given(
    st.sampled_from(SPLITS),
    st.integers(1, 3),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS),
)
@settings(max_examples=40, deadline=None)
def test_the_parts_are_the_whole(
    parallel: dict[str, int], dp: int, sizes: list[int], dense: list[bool]
) -> None:
    """Every pack once; every choice of an expert on the stage whose layer it is for."""
    is_dense = [i for i, own in enumerate(dense) if own]
    model = read_model(CONFIGS["qwen3_moe"] | {"mlp_only_layers": is_dense})
    num_moe = LAYERS - len(is_dense)
    layers = routed_layers(model, ParallelConfig(**parallel))  # type: ignore[arg-type]
    assert sorted(chain(*layers)) == list(range(num_moe))
    found = groups(sizes, 3, kept=True)
    values = {"reward": torch.arange(3.0 * len(sizes))}
    packs = pack_groups(found, values, seq_len=40, min_packs=dp)
    for pack in packs:
        pack.per_token["routes"] = pack.per_token["routes"][:, :num_moe]
    parts = Parts(layers, dp, EXPERTS)
    stages = range(len(layers))
    for replica in range(dp):
        own = [parts.of_rank([packs], replica, stage)[0] for stage in stages]
        for whole, *split in zip(packs[replica::dp], *own, strict=True):
            choices = torch.zeros_like(whole.per_token["routes"])
            for stage, pack in enumerate(split):
                routes = pack.per_token["routes"]
                assert routes.dtype == torch.uint8 and routes.size(1) == len(layers[stage])
                choices[:, layers[stage]] = routes.to(choices.dtype)
                assert ("kept" in pack.per_token) == (stage == len(layers) - 1)
                for name, value in tensors_of(pack).items():
                    assert name == "routes" or value is tensors_of(whole)[name]
            assert torch.equal(choices, whole.per_token["routes"])
    others = Parts(layers, dp, EXPERTS, with_routes=False).of_rank([packs], 0, 0)
    assert all("routes" not in pack.per_token for pack in others[0])


CHANGES: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"repetition_penalty": 1.1},
    {"routing_replay": False},
]


def recipe_with(parallel: dict[str, Any], rollout: dict[str, Any], seq_len: int = 64) -> Any:
    return recipe_from(
        {
            "run_dir": "none",
            "model": {"path": "none"},
            "parallel": parallel,
            "method": {"name": "grpo"},
            "data": {"train": "none", "seq_len": seq_len},
            "train": {"steps": 1},
            "rollout": rollout,
            "rewards": ["accuracy"],
        }
    )


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("parallel", SPLITS[:4], ids=str)
def test_a_dry_run_says_the_bytes_of_a_batch(
    parallel: dict[str, int], dp: int, changes: dict[str, Any]
) -> None:
    """Of answers that are all as long as they may be: what is measured."""
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_tokens": 10, "routing_replay": True}
    recipe = recipe_with(parallel, rollout | changes)
    model = read_model(CONFIGS["qwen3_moe"])
    plan = plan_mesh(recipe.parallel, dp * parallel.get("pp", 1))
    replayed = recipe.rollout.routing_replay
    found = groups([5] * 4, 4, routes=replayed, kept="top_k" in changes, answer=10)
    known = outline_of(Batch(1, tuple(found), 0))
    online = METHODS["grpo"].online
    assert online is not None
    held = scattered.held(Batch(1, tuple(found), 0))
    packs = all_packs(recipe, held, answer_values(recipe, online, known), dp, EXPERTS)
    parts = Parts.of(recipe, model, dp)
    said = batch_bytes(recipe, model, plan, prompt=5)
    assert said.packs == bytes_of(packs)
    shares = [
        [bytes_of(parts.of_rank(packs, replica, stage)) for replica in range(dp)]
        for stage in range(plan.pp)
    ]
    assert list(said.shares) == [max(own) for own in shares]
    if replayed:
        branches = [a.trajectory.branches[0] for group in found for a in group.answers]
        arrays = [x for s in branches for x in (s.tokens, s.logprobs, s.routes)]
        measured = sum(x.nbytes for x in arrays if x is not None)
        assert said.answers == measured + 16 * 10 * 8 * ("top_k" in changes)
    bound = batch_bytes(recipe, model, plan)  # behind prompts of a quarter of a pack
    assert bound.driver > said.driver and bound.on_gpu == said.on_gpu
    for stage, num_bytes in enumerate(said.on_gpu):
        pack = parts.of_rank(packs, 0, stage)[0][0]
        (pack,) = with_known([pack], [Out(torch.zeros(pack.num_tokens))], [None])
        (pack,) = with_targets([pack], online, recipe.method, known.rewards, known.group, None)
        pack = pad_to(pack, recipe.data.seq_len)
        routes = pack.per_token.get("routes")
        if routes is not None:
            routes = routes[:, : routes.size(1) // parallel.get("vpp", 1)]
        table = sequence_table(pack.sequence_ids, 1, None, routes)
        of_tokens = [x.nbytes for x in tensors_of(pack).values() if len(x) == pack.num_tokens]
        flight = in_flight(plan, stage, num_micro_batches(recipe, plan))
        assert num_bytes == (sum(of_tokens) + table.nbytes) * flight


# Of ranks

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2-pp2": (4, {"pp": 2}),
}
METHOD = {"name": "grpo", "beta": 0.05, "clip_high": 0.3, "inner_steps": 2}
HEAD = 4096  # bytes a rank may get beside its part: names, shapes, what every rank knows


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_its_part_and_learns_the_same(
    workers: Workers, tiny: Callable[[str], tuple[str, Any]], layout: str
) -> None:
    """As if it had packed the whole batch, bit for bit; and no more bytes than that."""
    folder, _ = tiny("qwen3_moe")
    size, parallel = LAYOUTS[layout]
    found = groups([1, 4, 9, 3, 12, 5], 3, kept=True)
    rollout = {"routing_replay": True, "top_k": 2, "max_tokens": 8}
    sections = {"method": METHOD, "rollout": rollout, "rewards": ["length"]}
    said = workers.run(size, scattered.scattered, folder, parallel, found, sections)
    stages = parallel.get("pp", 1)
    for rank in said:
        assert not rank["differences"]
        assert rank["said"][0] == rank["said"][1] == said[0]["said"][0]
        assert rank["received"] <= rank["share"] + HEAD
        assert rank["share"] < rank["all"]
    assert {rank["place"] for rank in said} == {
        (dp, pp) for dp in range(size // stages // parallel.get("tp", 1) // parallel.get("cp", 1))
        for pp in range(stages)
    }  # fmt: skip


@pytest.mark.gloo
def test_an_answer_that_does_not_fit_ends_all_ranks(
    workers: Workers, tiny: Callable[[str], tuple[str, Any]]
) -> None:
    folder, _ = tiny("qwen3_moe")
    found = groups([60], 3, answer=9)
    sections = {"method": {"name": "grpo"}, "rollout": {"max_tokens": 9}, "rewards": ["length"]}
    with pytest.raises(DataError, match="does not fit"):
        workers.run(2, scattered.scattered, folder, {"pp": 2}, found, sections)


def test_one_pack_alone_is_not_copied() -> None:
    pack = pack_groups(groups([3], 2), {}, seq_len=40, min_packs=1)[0]
    assert concat([pack]) is pack
