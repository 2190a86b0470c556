"""A prompt computed once for several answers is the same as one computed for each."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moetrain.ops.packed import Packed, concat, pack_one, select
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
Tiny = Callable[[str], tuple[str, Any]]


def answer(tokens: list[int], start: int, first: int, role: int) -> Packed:
    """The sequence from position `start` on, scored from `first` on, for a pack that may share what
    comes before.
    """
    ids = torch.tensor(tokens)
    labels = torch.cat([ids[1:], ids.new_zeros(1)])
    mask = (torch.arange(len(tokens)) >= first).float()
    mask[-1] = 0
    extras = {"role": torch.tensor([role])}
    pack = pack_one(ids[start:], labels[start:], mask[start:], id="answer", extras=extras)
    return replace(pack, position_ids=pack.position_ids + start)


def groups(*, shared: bool) -> list[Packed]:
    """Six prompts with two answers each, of many lengths."""
    rng = random.Random(5)
    made: list[Packed] = []
    for size in (9, 3, 14, 6, 1, 11):
        prompt = [rng.randrange(200) for _ in range(size)]
        answers = [prompt + [rng.randrange(200) for _ in range(rng.randrange(2, 9))]
                   for _ in range(2)]  # fmt: skip
        start = size - 1 if shared else 0
        parts = [answer(a, start, size - 1, role) for role, a in enumerate(answers, 1)]
        if shared and start:
            ids = torch.tensor(prompt[:-1])
            extras = {"role": torch.tensor([0])}
            parts.insert(0, pack_one(ids, ids, torch.zeros(start), id="prompt", extras=extras))
            pack = concat(parts)
            made.append(replace(pack, prefix=torch.tensor([-1, 0, 0], dtype=torch.int32)))
        else:
            made.append(concat(parts))
    return made


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2-ep2": (2, {"ep": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_prompt_changes_nothing(workers: Workers, tiny: Tiny, layout: str) -> None:
    folder, _ = tiny("qwen3_moe")
    whole, shared = groups(shared=False), groups(shared=True)
    assert sum(p.num_tokens for p in shared) < sum(p.num_tokens for p in whole)
    loss, _, wanted = workers.run(1, ranks.gradients_of_packs, folder, {}, whole, {})[0]
    world, parallel = LAYOUTS[layout]
    packs = [concat(shared[i::2]) for i in range(2)]
    found_loss, _, found = workers.run(
        world, ranks.gradients_of_packs, folder, parallel, packs, {}
    )[0]
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_select_keeps_what_an_answer_needs() -> None:
    pack = concat(groups(shared=True))
    chosen = select(pack, pack.extras["role"] == 1)
    assert chosen.prefix is not None
    roles = chosen.extras["role"].tolist()
    for sequence, parent in enumerate(chosen.prefix.tolist()):
        if roles[sequence] == 1 and parent >= 0:
            assert roles[parent] == 0 and parent == sequence - 1
            begin = int(chosen.cu_seqlens[parent])
            size = int(chosen.cu_seqlens[parent + 1]) - begin
            assert chosen.position_ids[int(chosen.cu_seqlens[sequence])] == size
    assert 2 not in roles and roles.count(1) == 6
    rest = select(pack, pack.extras["role"] != 1)
    assert rest.num_tokens + chosen.num_tokens == pack.num_tokens + sum(
        int(n) for n, r in zip(chosen.cu_seqlens.diff(), roles, strict=True) if r == 0
    )
