"""Layouts are exact, invertible and Megatron's: properties over random sizes, ranks and dtypes."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.errors import LayoutError
from moetrain.models import Dims, Layout
from moetrain.models.sharding import QKV, Cols, Copy, GateUp, Piece, Rows, Vocab

DIMS = Dims(
    num_layers=1,
    hidden=6,
    ffn=8,
    heads=8,
    groups=2,
    head_dim=4,
    vocab=11,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied=False,
    qk_norm=True,
    max_positions=64,
    moe_layers=(True,),
    experts=5,
    top_k=2,
    moe_ffn=16,
)

LAYOUTS = {
    "norm": Copy(("hidden",)),
    "router": Copy(("experts", "hidden")),
    "rows": Rows(("ffn", "hidden")),
    "cols": Cols(("hidden", "ffn")),
    "proj": Cols(("hidden", "queries")),
    "gate_up": GateUp(("ffn", "hidden")),
    "expert_gate_up": GateUp(("moe_ffn", "hidden")),
    "vocab": Vocab(("vocab", "hidden")),
    "qkv": QKV(("queries", "hidden")),
    "qkv_bias": QKV(("queries",)),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Dims, int]:
    """Sizes and a tensor-parallel size that divides them; more ranks than groups included."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8, 16) if g % tp == 0 or tp % g == 0]))
    queries = draw(st.integers(1, 4)) * max(tp // groups, 1)  # per group
    head_dim = 2 * draw(st.integers(1, 3)) * max(tp // groups // 4, 1)
    return (
        replace(
            DIMS,
            heads=groups * queries,
            groups=groups,
            head_dim=head_dim,
            ffn=tp * draw(st.integers(1, 5)),
            moe_ffn=tp * draw(st.integers(1, 5)),
            vocab=draw(st.integers(1, 2500)),
            hidden=draw(st.integers(1, 7)),
        ),
        tp,
    )


def hf_tensors(layout: Layout, dims: Dims) -> tuple[Tensor, ...]:
    """Every element of every HF tensor of a layout its own number, none of them 0."""
    result: list[Tensor] = []
    next_value = 1
    for shape in layout.hf_shapes(dims):
        count = torch.Size(shape).numel()
        result.append(torch.arange(next_value, next_value + count).reshape(shape))
        next_value += count
    return tuple(result)


def shards(layout: Layout, dims: Dims, tp: int) -> list[Tensor]:
    """What each rank packs, reading nothing but its slices."""
    full = hf_tensors(layout, dims)
    result: list[Tensor] = []
    for rank in range(tp):
        slices = layout.parts(dims, rank, tp)
        parts = tuple(tensor[cut] for tensor, cut in zip(full, slices, strict=True))
        result.append(layout.pack(parts, dims, rank, tp))
    return result


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_pack_and_unpack_are_inverse_and_ranks_make_up_the_whole(
    name: str, case: tuple[Dims, int]
) -> None:
    dims, tp = case
    layout = LAYOUTS[name]
    full = hf_tensors(layout, dims)
    unpacked: list[tuple[Tensor, ...]] = []
    for rank, local in enumerate(shards(layout, dims, tp)):
        assert tuple(local.shape) == layout.local_shape(dims, rank, tp)
        parts = layout.unpack(local, dims, rank, tp)
        for part, tensor, cut in zip(parts, full, layout.parts(dims, rank, tp), strict=True):
            assert part.equal(tensor[cut])
        assert layout.pack(parts, dims, rank, tp).equal(local)
        unpacked.append(parts)
    for number, tensor in enumerate(full):
        own = [parts[number] for parts in unpacked]
        if layout.dim is None:
            assert all(part.equal(tensor) for part in own)
        else:
            assert torch.cat(own, dim=layout.dim).equal(tensor)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_qkv_is_what_megatron_attention_takes_apart(case: tuple[Dims, int]) -> None:
    """`SelfAttention.get_query_key_value_tensors` step by step, on weights for activations."""
    dims, tp = case
    layout = LAYOUTS["qkv"]
    d, per_group = dims.head_dim, dims.heads // dims.groups
    q, k, v = (t.reshape(-1, d, dims.hidden) for t in hf_tensors(layout, dims))
    local = shards(layout, dims, tp)
    for rank in range(tp):
        mixed, num_groups, heads = local[rank], dims.groups // tp, slice(None)
        first_group = rank * num_groups
        if dims.groups < tp:
            ranks_per_group = tp // dims.groups
            first_group, num_groups = rank // ranks_per_group, 1
            gathered = torch.cat(local)
            size = gathered.shape[0] // dims.groups
            mixed = gathered[first_group * size : (first_group + 1) * size]
            share = per_group // ranks_per_group
            begin = rank % ranks_per_group * share
            heads = slice(begin, begin + share)
        split = mixed.reshape(num_groups, per_group + 2, d, dims.hidden)
        query = split[:, :per_group].reshape(-1, d, dims.hidden)[heads]
        num_heads = dims.heads // tp
        assert query.equal(q[rank * num_heads : (rank + 1) * num_heads])
        assert split[:, per_group].equal(k[first_group : first_group + num_groups])
        assert split[:, per_group + 1].equal(v[first_group : first_group + num_groups])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gate_and_up_are_the_chunks_of_each_shard(tp: int) -> None:
    layout = LAYOUTS["gate_up"]
    gate, up = hf_tensors(layout, DIMS)
    for rank, local in enumerate(shards(layout, DIMS, tp)):
        first, second = torch.chunk(local, 2)
        assert first.equal(gate.chunk(tp)[rank])
        assert second.equal(up.chunk(tp)[rank])


@pytest.mark.parametrize(("vocab", "tp"), [(11, 1), (11, 2), (128, 2), (300, 2), (130, 4)])
def test_vocabulary_is_padded_with_zeros_to_128_rows_a_rank(vocab: int, tp: int) -> None:
    dims = replace(DIMS, vocab=vocab)
    layout = LAYOUTS["vocab"]
    local = shards(layout, dims, tp)
    whole = torch.cat(local)
    assert all(shard.shape[0] % 128 == 0 for shard in local)
    assert whole.shape[0] == dims.padded_vocab(tp)
    assert whole[:vocab].equal(hf_tensors(layout, dims)[0])
    assert not whole[vocab:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_values_and_dtype_survive(dtype: torch.dtype) -> None:
    layout = LAYOUTS["qkv"]
    full = tuple(torch.randn(s).to(dtype) for s in layout.hf_shapes(DIMS))
    slices = layout.parts(DIMS, 1, 4)
    parts = tuple(tensor[cut] for tensor, cut in zip(full, slices, strict=True))
    local = layout.pack(parts, DIMS, 1, 4)
    assert local.dtype == dtype
    for part, again in zip(parts, layout.unpack(local, DIMS, 1, 4), strict=True):
        assert part.view(torch.uint8).equal(again.view(torch.uint8))


def test_packing_lets_gradients_through_and_runs_on_meta() -> None:
    layout = LAYOUTS["gate_up"]
    parts = tuple(torch.ones(8, 6, requires_grad=True) for _ in range(2))
    layout.pack(parts, DIMS, 0, 1)[:8].sum().backward()
    assert parts[0].grad is not None
    assert parts[0].grad.equal(torch.ones(8, 6))
    meta = tuple(part.detach().to("meta") for part in parts)
    assert layout.pack(meta, DIMS, 0, 1).shape == (16, 6)


@pytest.mark.parametrize(
    ("layout", "tp", "words"),
    [
        (LAYOUTS["rows"], 3, "ffn 8 does not divide by tensor-parallel size 3"),
        (LAYOUTS["cols"], 16, "ffn 8 does not divide"),
        (LAYOUTS["qkv"], 16, "attention heads 8 does not divide"),
        (LAYOUTS["qkv"], 3, "attention heads 8 does not divide"),
    ],
)
def test_a_size_that_does_not_divide_is_named(layout: Layout, tp: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        layout.parts(DIMS, 0, tp)


def test_groups_that_do_not_fit_the_ranks_are_named() -> None:
    dims = replace(DIMS, heads=12, groups=3)
    with pytest.raises(LayoutError, match="neither a divisor nor a multiple of the 3 key/value"):
        LAYOUTS["qkv"].parts(dims, 0, 2)


def test_a_layout_can_be_replaced_by_a_wrong_one() -> None:
    """What the mutation tests on logits do; the round trip alone would not notice."""

    @dataclass(frozen=True)
    class UpGate(GateUp):
        def pieces(self, dims: Dims, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
            gate, up = super().pieces(dims, tp_rank, tp_size)
            return replace(up, local_start=0), replace(gate, local_start=up.length)

    right, wrong = LAYOUTS["gate_up"], UpGate(("ffn", "hidden"))
    assert not shards(right, DIMS, 2)[0].equal(shards(wrong, DIMS, 2)[0])
    full = hf_tensors(wrong, DIMS)
    again = wrong.unpack(shards(wrong, DIMS, 1)[0], DIMS, 0, 1)
    assert all(a.equal(b) for a, b in zip(full, again, strict=True))
