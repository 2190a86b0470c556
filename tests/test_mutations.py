"""A wrong weight table survives the round trip bit for bit; the logits gate is what catches it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.mutations import DENSE_MUTATIONS, MUTATIONS

CASES = [("qwen3_moe", mutation) for mutation in MUTATIONS]
CASES += [("qwen2", mutation) for mutation in DENSE_MUTATIONS]


@pytest.mark.parametrize(("family", "mutation"), CASES)
def test_logits_catch_what_the_round_trip_does_not(
    workers: Workers, tiny: Callable[[str], tuple[str, Any]], family: str, mutation: str
) -> None:
    folder, model = tiny(family)
    tokens = [3, 14, 15, 92, 65, 35, 89, 79, 32]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    found, exact = workers.run(1, ranks.mutated_logits, folder, tokens, mutation)[0]
    assert exact, "the round trip is meant not to notice"
    gap = (found - wanted).abs().max().item()
    assert gap <= 1e-4 if mutation == "none" else gap > 1e-2, gap
