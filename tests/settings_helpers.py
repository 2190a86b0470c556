"""What the tests of a recipe's keys share."""

import copy
from collections.abc import Callable
from typing import Any

from moetrain.errors import MoetrainError
from moetrain.testing.tiny import CONFIGS

REFUSED = "refused"
HF: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], **CONFIGS["qwen3_moe"]}
HF |= {"vocab_size": 512, "decoder_sparse_step": 2, "max_position_embeddings": 4096}

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"hf": HF},
    "method": "sft",
    "data": {"train": ["a.jsonl"], "seq_len": 512},
    "train": {"steps": 3, "global_batch": 48},
}


def laid(over: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, Any]:
    """`over` laid over `base`, two levels deep."""
    found = copy.deepcopy(base)
    for name, value in over.items():
        own = found.get(name)
        found[name] = own | value if isinstance(own, dict) and isinstance(value, dict) else value
    return found


def seen(look: Callable[[dict[str, Any]], Any], content: dict[str, Any]) -> Any:
    """What `look` finds under `content`, or that it is refused."""
    try:
        return look(copy.deepcopy(content))
    except (MoetrainError, ValueError):
        return REFUSED
