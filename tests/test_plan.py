"""Layouts and bytes, against counts made another way. No torch."""

import inspect
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.builtin import MODELS
from moetrain.config.load import recipe_from
from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import ConfigError, LayoutError
from moetrain.layout import activations
from moetrain.layout.activations import activation_bytes, shares_of
from moetrain.layout.memory import StageBytes, static_bytes
from moetrain.layout.mesh import check_layout, plan_mesh, rank_table, stage_layers
from moetrain.models import read_model
from moetrain.models.lookup import find_model
from moetrain.run.dry_run import check, dry_run, world_size

TINY = MODELS["qwen3-moe-tiny"]
# Qwen/Qwen3-235B-A22B's config.json, as far as sizes go.
BIG: dict[str, Any] = TINY | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}

# Qwen/Qwen3-30B-A3B's config.json, as far as sizes go.
MIDDLE: dict[str, Any] = TINY | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def recipe(hf: dict[str, Any] = TINY, **sections: Any) -> Recipe:
    content: dict[str, Any] = {
        "run_dir": "r",
        "model": {"hf": hf, **sections.pop("model", {})},
        "method": "pretrain",
        "data": {"train": ["a"], "seq_len": 64},
        "train": {"steps": 1},
    }
    return recipe_from(content | sections)


def bytes_of(r: Recipe, num_ranks: int) -> list[StageBytes]:
    return static_bytes(check(r, num_ranks), plan_mesh(r.parallel, num_ranks), r)


sizes = st.sampled_from([1, 2, 3, 4])


@given(tp=sizes, pp=sizes, ep=sizes, etp=sizes, cp=sizes, world=st.integers(1, 200))
def test_axes_fill_the_world(tp: int, pp: int, ep: int, etp: int, cp: int, world: int) -> None:
    parallel = ParallelConfig(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
    divides = world % (tp * cp * pp) == 0 and world % (etp * ep * pp) == 0
    if not divides:
        with pytest.raises(LayoutError, match=rf"^{world} ranks? do(es)? not divide"):
            plan_mesh(parallel, world)
        return
    plan = plan_mesh(parallel, world)
    assert plan.tp * plan.cp * plan.dp * plan.pp == plan.etp * plan.ep * plan.edp * plan.pp == world
    rows = rank_table(plan)
    dense = [(row["pp"], row["dp"], row["cp"], row["tp"]) for row in rows]
    expert = [(row["pp"], row["edp"], row["ep"], row["etp"]) for row in rows]
    # Rank order is the mixed radix of the coordinates, the first axis running fastest.
    assert dense == list(product(range(pp), range(plan.dp), range(cp), range(tp)))
    assert expert == list(product(range(pp), range(plan.edp), range(ep), range(etp)))


def test_the_named_worlds_fit() -> None:
    parallel = ParallelConfig(tp=2, ep=3)
    with pytest.raises(LayoutError, match="Use 6 or 12 ranks"):
        plan_mesh(parallel, 8)
    assert {plan_mesh(parallel, n).dp for n in (6, 12)} == {3, 6}
    with pytest.raises(LayoutError, match="Use 6 ranks"):
        plan_mesh(parallel, 1)


@given(layers=st.integers(1, 100), pp=st.integers(1, 8), vpp=st.integers(1, 4))
def test_stages_hold_each_layer_once(layers: int, pp: int, vpp: int) -> None:
    if layers < pp * vpp:
        with pytest.raises(LayoutError, match=f"{layers} layers do not fill {pp * vpp}"):
            stage_layers(layers, pp, vpp)
        return
    stages = stage_layers(layers, pp, vpp)
    in_order = [stages[r][v] for v in range(vpp) for r in range(pp)]  # as a token meets them
    assert [layer for chunk in in_order for layer in chunk] == list(range(layers))
    counts = [len(chunk) for chunk in in_order]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)  # earlier ones take what is left over


def test_uneven_stages() -> None:
    counts = [len(stage[0]) for stage in stage_layers(94, 8, 1, 11, 11)]
    assert counts == [11, 12, 12, 12, 12, 12, 12, 11]
    assert stage_layers(5, 2, 1, 2, 3) == [[range(0, 2)], [range(2, 5)]]
    assert [len(stage[0]) for stage in stage_layers(7, 3, 1, None, 1)] == [3, 3, 1]


@pytest.mark.parametrize(
    "arguments", [(4, 2, 1, 1, 1), (4, 2, 1, 4), (4, 3, 1, 3, 1), (4, 1, 1, 4), (8, 2, 2, 1)]
)
def test_stages_that_cannot_be(arguments: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"last"):
        stage_layers(*arguments)


@pytest.mark.parametrize(
    ("parallel", "changed", "words"),
    [
        ({"tp": 3}, {}, ["tp=3", "8 heads", "1, 2, 4, 8"]),
        ({"tp": 4}, {"num_attention_heads": 12, "num_key_value_heads": 3}, ["tp=4", "3 KV"]),
        ({"ep": 3}, {}, ["ep=3", "8 experts", "1, 2, 4, 8"]),
        ({"etp": 5}, {}, ["etp=5", "96"]),
        ({"tp": 2, "sp": False}, {}, ["sequence parallelism"]),
        ({"tp": 8}, {"intermediate_size": 250, "mlp_only_layers": [0]}, ["tp=8", "250"]),
        ({"pp": 5}, {}, ["4 layers", "pp=5"]),
        ({"pp": 2, "vpp": 3}, {}, ["4 layers", "vpp=3"]),
        ({"cp": 3}, {}, ["64", "multiple of 6", "Use 66"]),
    ],
)
def test_layout_that_does_not_divide(
    parallel: dict[str, Any], changed: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(read_model(TINY | changed), ParallelConfig(**parallel), 64)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_layouts_that_divide() -> None:
    check_layout(read_model(TINY), ParallelConfig(tp=8, ep=8, pp=2, vpp=2), 64)  # tp > KV heads
    check_layout(read_model(BIG), ParallelConfig(tp=2, ep=32, pp=8), 4096)  # 94 over 8


def test_dense_model_has_no_expert_axes() -> None:
    dense = {**TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    with pytest.raises(LayoutError, match=r"ep=2.*no experts"):
        check_layout(read_model(dense), ParallelConfig(ep=2), 64)


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch=8.*3 data-parallel.*Use 9"):
        check(recipe(), 3)


def test_continued_pretraining_wants_weights() -> None:
    with pytest.raises(ConfigError, match=r"cpt goes on from given weights"):
        check(recipe(method="cpt"), 1)


def test_fp32_has_nothing_to_offload() -> None:
    with pytest.raises(ConfigError, match=r"optim\.offload.*model\.dtype=fp32"):
        check(recipe(model={"dtype": "fp32"}, optim={"offload": 0.5}), 1)


def by_hand(hf: dict[str, Any], layers: int) -> tuple[int, int]:
    """Dense and expert parameters of `layers` decoder layers, written out."""
    h, d = hf["hidden_size"], hf["head_dim"]
    q, kv = hf["num_attention_heads"] * d, hf["num_key_value_heads"] * d
    dense = h * (q + 2 * kv) + q * h + 2 * d + 2 * h + hf["num_experts"] * h
    return layers * dense, layers * hf["num_experts"] * 3 * h * hf["moe_intermediate_size"]


def test_bytes_of_one_rank() -> None:
    dense, expert = by_hand(TINY, 4)
    params = dense + expert + 2 * 2048 * 128 + 128
    (fp32,) = bytes_of(recipe(model={"dtype": "fp32"}), 1)
    assert fp32 == StageBytes(0, params, 4 * params, 4 * params, 8 * params)  # no main copy
    (bf16,) = bytes_of(recipe(), 1)
    assert bf16 == StageBytes(0, params, 2 * params, 4 * params, 12 * params)
    (small,) = bytes_of(recipe(optim={"grad_dtype": "bf16", "state_dtype": "bf16"}), 1)
    assert small == StageBytes(0, params, 2 * params, 2 * params, 8 * params)
    (host,) = bytes_of(recipe(optim={"offload": 0.35}), 1)
    assert host.optimizer == round(12 * params * 0.65)
    (none,) = bytes_of(recipe(optim={"offload": 1}), 1)
    assert none.optimizer == 0


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B-MXFP4", "x/Qwen3-235B-A22B-GPTQ-Int4"])
def test_a_published_model_that_is_quantised_is_no_model_to_train(name: str) -> None:
    asked = recipe(model={"hf": None, "path": name})
    with pytest.raises(ConfigError, match="is quantised") as caught:
        check(asked, 1, dry=True)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    for name in ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-FP8"):  # read as bf16
        assert check(recipe(model={"hf": None, "path": name}), 1, dry=True).num_layers == 48


def test_published_sizes() -> None:
    """The bf16 `total_size` of the published index is 61,064,245,248 bytes."""
    for hf, published in ((MIDDLE, 61_064_245_248 // 2), (BIG, 235_093_634_560)):
        assert sum(rule.num_params for rule in read_model(hf).table.values()) == published


def test_bytes_at_tp2_pp2_ep2() -> None:
    """Written out: 8 heads and 4 KV heads of 32, hidden 128, 8 experts of 96, 2048 words."""
    r = recipe(parallel={"tp": 2, "pp": 2, "ep": 2})
    attention = 128 * (4 + 2 + 2) * 32 + 4 * 32 * 128  # half of the heads
    layer = attention + 2 * 32 + 2 * 128 + 8 * 128  # norms and router on each tensor rank
    experts = 4 * 3 * 128 * 96  # half of them, each whole: etp is 1
    half_vocab = 1024 * 128
    first, last = (2 * layer + half_vocab, 2 * layer + half_vocab + 128)  # the final norm
    stages = bytes_of(r, 8)  # dp 2, edp 2
    for stage, dense in zip(stages, (first, last), strict=True):
        params = dense + 2 * experts
        assert stage.num_params == params
        assert (stage.weights, stage.gradients) == (2 * params, 4 * params)
        assert stage.optimizer == 12 * (dense // 2 + experts)
        assert stage.total == stage.weights + stage.gradients + stage.optimizer


@pytest.mark.parametrize("pp", [4, 8, 16])
def test_94_layers(pp: int) -> None:
    counts = [len(stage[0]) for stage in stage_layers(94, pp, 1)]
    assert counts == [94 // pp + 1] * (94 % pp) + [94 // pp] * (pp - 94 % pp)


def test_bytes_of_a_stage_in_the_middle() -> None:
    """What is sharded over what: 235B on 256 GPUs, tp 2, pp 8, ep 32; a middle stage of 12."""
    r = recipe(BIG, parallel={"tp": 2, "pp": 8, "ep": 32}, train={"steps": 1, "global_batch": 16})
    stages = bytes_of(r, 256)
    dense, expert = by_hand(BIG, 12)
    unsharded = 12 * (2 * 4096 + 2 * 128 + 128 * 4096)  # norms and router, whole on each tp rank
    local, experts = (dense - unsharded) // 2 + unsharded, expert // 32
    assert stages[1].num_params == local + experts
    assert stages[1].weights == 2 * (local + experts)
    assert stages[1].gradients == 4 * (local + experts)
    assert stages[1].optimizer == 12 * (local // 16 + experts)  # dp 16, edp 1
    # 94 = 6 of 12 and 2 of 11; DESIGN.md's measured rank 0 of this job: 1.651 B, 0.906 B experts
    assert experts == pytest.approx(0.906e9, rel=1e-3)
    assert stages[0].num_params == pytest.approx(1.651e9, rel=1e-3)


def test_context_parallel_ranks_share_the_optimizer() -> None:
    plain = bytes_of(recipe(), 2)[0]
    cp = bytes_of(recipe(parallel={"cp": 2}), 2)[0]
    assert plain == cp


def test_tied_embedding_is_on_both_ends() -> None:
    tied = {**TINY, "tie_word_embeddings": True}
    one, two = (bytes_of(recipe(tied, parallel={"pp": pp}), pp) for pp in (1, 2))
    assert sum(s.num_params for s in two) - one[0].num_params == 2048 * 128


def test_world_size_of_a_dry_run() -> None:
    layout = {"tp": 2, "ep": 3}
    assert world_size(recipe(parallel=layout), None) == 6
    assert world_size(recipe(parallel=layout), 12) == 12
    assert world_size(recipe(cluster={"nodes": 3, "gpus_per_node": 4}), None) == 12
    assert world_size(recipe(cluster={"nodes": 3, "world_size": 5}), None) == 5


def test_dry_run_warns() -> None:
    layout = {"tp": 2, "pp": 8, "ep": 2}
    r = recipe(BIG, parallel=layout, train={"steps": 1, "global_batch": 64})
    text = dry_run(r, 128)
    worst = float(text.split(" GiB before activations")[0].split()[-1])
    totals = [float(line.split()[-1]) for line in text.splitlines()[-9:-1]]
    assert worst == pytest.approx(max(totals), abs=0.06)
    assert worst > 79.6
    assert "H100-80GB has 79.6" in text
    assert "128 ranks" in text
    assert "and 64 more" in text
    assert "235.094 B parameters" in text
    assert "22.191 B parameters act on a token" in text


def test_dry_run_of_a_small_model() -> None:
    text = dry_run(recipe(), 1)
    assert "Static MiB" in text  # GiB would be a column of zeros
    assert "WARNING" not in text
    (one,) = bytes_of(recipe(), 1)
    assert float(text.split()[-1]) == pytest.approx(one.total / 2**20, abs=0.01)
    with pytest.raises(ConfigError, match=r"H100 is not known. Did you mean 'H100-80GB'"):
        dry_run(recipe(cluster={"gpu": "H100"}), 1)


def test_activations_of_a_layer_by_hand() -> None:
    """And what makes the bound smaller."""
    from moetrain.ops.logprob import token_logprobs

    assert inspect.signature(token_logprobs).parameters["chunk"].default == activations.CHUNK
    r = recipe(BIG, model={"dtype": "bf16"})
    model = read_model(BIG)
    plan = plan_mesh(r.parallel, 1)
    attention = 2 * (8192 + 2 * 512) + (8192 + 512) * (2 + 8) + 2 * 2 * 8192
    experts = 8 * 2 * (2 * 4096 + 5 * 1536) + 16 * 128
    by_hand = 4096 * (2 * (8 + 2) + 4) + attention + experts
    assert model.layers[0].activations(shares_of(plan, r)) == by_hand

    def bound(size: int, **sections: Any) -> int:
        other = recipe(BIG, **sections)
        return max(activation_bytes(model, plan_mesh(other.parallel, size), other))

    whole = bound(4)
    assert bound(4, train={"steps": 1, "recompute": "full"}) < whole / 10
    assert bound(4, parallel={"cp": 4}) < whole / 3
    assert bound(4, parallel={"tp": 4}) < whole / 1.5  # experts are not split by it
    assert bound(4, parallel={"pp": 4}) < 1.1 * whole  # four micro-batches of a quarter


@settings(deadline=None)
@given(pp=st.sampled_from([1, 2, 4]), ep=st.sampled_from([1, 2, 4, 8]))
def test_stages_and_expert_ranks_hold_the_model_once(pp: int, ep: int) -> None:
    stages = bytes_of(recipe(parallel={"pp": pp, "ep": ep}), pp * ep)
    dense, expert = by_hand(TINY, 4)
    assert sum(s.num_params for s in stages) == dense + 2 * 2048 * 128 + 128 + expert // ep


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", ["config.json: not JSON"]),
        ("config.json", "[]", ["config.json: a mapping"]),
        ("moetrain.json", "{}", ["moetrain.json has no 'hf'"]),
        ("config.json", '{"architectures": ["Qwen3MoeForCausalLm"]}', ["Qwen3MoeForCausalLM"]),
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', ["GPT2LMHeadModel", "known"]),
        ("other.json", "{}", ["no config.json or moetrain.json"]),
        ("moetrain.json", '{"adapter_of": "b", "hf": {}}', ["an adapter of b", "tools/convert"]),
    ],
)
def test_unusable_model_folder(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    r = recipe(model={"hf": None, "path": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        check(r, 1)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_builtin_model() -> None:
    r = recipe(model={"hf": None, "path": "builtin:qwen3-moe-tiny"})
    assert find_model(r.model).hf is TINY
    with pytest.raises(ConfigError, match="known built-in models: qwen3-moe-tiny"):
        find_model(recipe(model={"hf": None, "path": "builtin:x"}).model)
