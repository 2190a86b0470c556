"""Packing keeps every sequence once, never overfills, and does not depend on chance."""

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.packing import fill, pack

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@given(LENGTHS, st.integers(0, 5))
def test_every_sequence_once_and_no_pack_too_full(lengths: list[int], seed: int) -> None:
    packs = pack(lengths, 64, seed)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(p and sum(lengths[i] for i in p) <= 64 for p in packs)


@given(LENGTHS, st.integers(0, 5))
def test_the_same_again(lengths: list[int], seed: int) -> None:
    assert pack(lengths, 64, seed) == pack(lengths, 64, seed)


@given(LENGTHS)
def test_close_to_the_least_number_of_packs(lengths: list[int]) -> None:
    """The optimum is at least the lengths' sum, and the number of sequences over half a pack."""
    least = -(-sum(lengths) // 64)
    optimum_at_most = max(least, sum(2 * length > 64 for length in lengths))
    packs = pack(lengths, 64, 0)
    assert len(packs) >= least
    # At most one pack is half empty or more, whatever the optimum.
    assert sum(2 * sum(lengths[i] for i in p) <= 64 for p in packs) <= 1
    assert len(packs) <= 2 * optimum_at_most + 1


def test_the_seed_mixes_equal_lengths() -> None:
    assert pack([16] * 40, 64, 0) != pack([16] * 40, 64, 1)


def test_a_hundred_thousand_are_quick_and_nearly_full() -> None:
    rng = random.Random(0)
    lengths = [min(8192, int(rng.lognormvariate(6.5, 0.9)) + 8) for _ in range(100_000)]
    start = time.perf_counter()
    packs = pack(lengths, 8192, 0)
    assert time.perf_counter() - start < 5  # 0.2 s on an idle core
    assert fill(lengths, packs, 8192) > 0.99
