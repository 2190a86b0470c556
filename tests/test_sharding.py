"""Shardings are exact, invertible and Megatron's: properties over sizes, ranks and dtypes."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.errors import LayoutError
from moetrain.models.sharding import (
    QKV,
    Cols,
    Copy,
    GateUp,
    Piece,
    Sharding,
    Vocab,
    padded_rows,
)


@dataclass(frozen=True)
class Sizes:
    """Of a model, asymmetric on purpose."""

    hidden: int = 6
    ffn: int = 8
    heads: int = 8
    groups: int = 2
    head_dim: int = 4
    vocab: int = 11
    experts: int = 5
    moe_ffn: int = 16

    def sharding(self, name: str) -> Sharding:
        queries = self.heads * self.head_dim
        made: dict[str, Sharding] = {
            "norm": Copy((self.hidden,)),
            "router": Copy((self.experts, self.hidden)),
            "cols": Cols((self.hidden, self.ffn)),
            "proj": Cols((self.hidden, queries)),
            "gate_up": GateUp((self.ffn, self.hidden)),
            "expert_gate_up": GateUp((self.moe_ffn, self.hidden)),
            "vocab": Vocab((self.vocab, self.hidden)),
            "qkv": QKV((queries, self.hidden), self.groups, self.head_dim),
            "qkv_bias": QKV((queries,), self.groups, self.head_dim),
        }
        return made[name]


NAMES = "norm router cols proj gate_up expert_gate_up vocab qkv qkv_bias".split()
SIZES = Sizes()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sizes, int]:
    """Sizes and a tensor-parallel size that divides them; more ranks than groups included."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8, 16) if g % tp == 0 or tp % g == 0]))
    queries = draw(st.integers(1, 4)) * max(tp // groups, 1)  # per group
    head_dim = 2 * draw(st.integers(1, 3)) * max(tp // groups // 4, 1)
    return (
        Sizes(
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


def hf_tensors(sharding: Sharding) -> tuple[Tensor, ...]:
    """Every element of every HF tensor of a sharding its own number, none of them 0."""
    result: list[Tensor] = []
    next_value = 1
    for shape in sharding.hf_shapes():
        count = torch.Size(shape).numel()
        result.append(torch.arange(next_value, next_value + count).reshape(shape))
        next_value += count
    return tuple(result)


def shards(sharding: Sharding, tp: int) -> list[Tensor]:
    """What each rank packs, reading nothing but its slices."""
    full = hf_tensors(sharding)
    result: list[Tensor] = []
    for rank in range(tp):
        slices = sharding.parts(rank, tp)
        parts = tuple(tensor[cut] for tensor, cut in zip(full, slices, strict=True))
        result.append(sharding.pack(parts, rank, tp))
    return result


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_pack_and_unpack_are_inverse_and_ranks_make_up_the_whole(
    name: str, case: tuple[Sizes, int]
) -> None:
    sizes, tp = case
    sharding = sizes.sharding(name)
    full = hf_tensors(sharding)
    unpacked: list[tuple[Tensor, ...]] = []
    for rank, local in enumerate(shards(sharding, tp)):
        assert tuple(local.shape) == sharding.local_shape(rank, tp)
        parts = sharding.unpack(local, rank, tp)
        for part, tensor, cut in zip(parts, full, sharding.parts(rank, tp), strict=True):
            assert part.equal(tensor[cut])
        assert sharding.pack(parts, rank, tp).equal(local)
        unpacked.append(parts)
    for number, tensor in enumerate(full):
        own = [parts[number] for parts in unpacked]
        if sharding.dim is None:
            assert all(part.equal(tensor) for part in own)
        else:
            assert torch.cat(own, dim=sharding.dim).equal(tensor)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_qkv_is_what_megatron_attention_takes_apart(case: tuple[Sizes, int]) -> None:
    """`SelfAttention.get_query_key_value_tensors` step by step, on weights for activations."""
    sizes, tp = case
    sharding = sizes.sharding("qkv")
    d, per_group = sizes.head_dim, sizes.heads // sizes.groups
    q, k, v = (t.reshape(-1, d, sizes.hidden) for t in hf_tensors(sharding))
    local = shards(sharding, tp)
    for rank in range(tp):
        mixed, num_groups, heads = local[rank], sizes.groups // tp, slice(None)
        first_group = rank * num_groups
        if sizes.groups < tp:
            ranks_per_group = tp // sizes.groups
            first_group, num_groups = rank // ranks_per_group, 1
            gathered = torch.cat(local)
            size = gathered.shape[0] // sizes.groups
            mixed = gathered[first_group * size : (first_group + 1) * size]
            share = per_group // ranks_per_group
            begin = rank % ranks_per_group * share
            heads = slice(begin, begin + share)
        split = mixed.reshape(num_groups, per_group + 2, d, sizes.hidden)
        query = split[:, :per_group].reshape(-1, d, sizes.hidden)[heads]
        num_heads = sizes.heads // tp
        assert query.equal(q[rank * num_heads : (rank + 1) * num_heads])
        assert split[:, per_group].equal(k[first_group : first_group + num_groups])
        assert split[:, per_group + 1].equal(v[first_group : first_group + num_groups])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gate_and_up_are_the_chunks_of_each_shard(tp: int) -> None:
    sharding = SIZES.sharding("gate_up")
    gate, up = hf_tensors(sharding)
    for rank, local in enumerate(shards(sharding, tp)):
        first, second = torch.chunk(local, 2)
        assert first.equal(gate.chunk(tp)[rank])
        assert second.equal(up.chunk(tp)[rank])


@pytest.mark.parametrize(("vocab", "tp"), [(11, 1), (11, 2), (128, 2), (300, 2), (130, 4)])
def test_vocabulary_is_padded_with_zeros_to_128_rows_a_rank(vocab: int, tp: int) -> None:
    sharding = replace(SIZES, vocab=vocab).sharding("vocab")
    local = shards(sharding, tp)
    whole = torch.cat(local)
    assert all(shard.shape[0] % 128 == 0 for shard in local)
    assert whole.shape[0] == padded_rows(vocab, tp)
    assert whole[:vocab].equal(hf_tensors(sharding)[0])
    assert not whole[vocab:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_values_and_dtype_survive(dtype: torch.dtype) -> None:
    sharding = SIZES.sharding("qkv")
    full = tuple(torch.randn(s).to(dtype) for s in sharding.hf_shapes())
    slices = sharding.parts(1, 4)
    parts = tuple(tensor[cut] for tensor, cut in zip(full, slices, strict=True))
    local = sharding.pack(parts, 1, 4)
    assert local.dtype == dtype
    for part, again in zip(parts, sharding.unpack(local, 1, 4), strict=True):
        assert part.view(torch.uint8).equal(again.view(torch.uint8))


def test_packing_lets_gradients_through_and_runs_on_meta() -> None:
    sharding = SIZES.sharding("gate_up")
    parts = tuple(torch.ones(8, 6, requires_grad=True) for _ in range(2))
    sharding.pack(parts, 0, 1)[:8].sum().backward()
    assert parts[0].grad is not None
    assert parts[0].grad.equal(torch.ones(8, 6))
    meta = tuple(part.detach().to("meta") for part in parts)
    assert sharding.pack(meta, 0, 1).shape == (16, 6)


@pytest.mark.parametrize(
    ("sharding", "tp", "words"),
    [
        (SIZES.sharding("gate_up"), 3, "8 rows do not divide by tensor-parallel size 3"),
        (SIZES.sharding("cols"), 16, "8 columns do not divide"),
        (SIZES.sharding("qkv"), 16, "8 attention heads do not divide"),
        (SIZES.sharding("qkv"), 3, "8 attention heads do not divide"),
    ],
)
def test_a_size_that_does_not_divide_is_named(sharding: Sharding, tp: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        sharding.parts(0, tp)


def test_groups_that_do_not_fit_the_ranks_are_named() -> None:
    sizes = replace(SIZES, heads=12, groups=3)
    with pytest.raises(LayoutError, match="neither a divisor nor a multiple of the 3 key/value"):
        sizes.sharding("qkv").parts(0, 2)


def test_a_layout_can_be_replaced_by_a_wrong_one() -> None:
    """What the mutation tests on logits do; the round trip alone would not notice."""

    @dataclass(frozen=True)
    class UpGate(GateUp):
        def pieces(self, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
            gate, up = super().pieces(tp_rank, tp_size)
            return replace(up, local_start=0), replace(gate, local_start=up.length)

    right, wrong = SIZES.sharding("gate_up"), UpGate((SIZES.ffn, SIZES.hidden))
    assert not shards(right, 2)[0].equal(shards(wrong, 2)[0])
    full = hf_tensors(wrong)
    again = wrong.unpack(shards(wrong, 1)[0], 0, 1)
    assert all(a.equal(b) for a, b in zip(full, again, strict=True))
