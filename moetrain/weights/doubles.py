"""Tensors that a model has no parameter for, held against what stands for them: a weight is never
ignored by its name.
"""

import torch

from moetrain.models import Model
from moetrain.models.parts.rope import Rope
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights.reader import Reader

BLOCK = 64 * 2**20  # bytes of each tensor that are compared at a time


def contradiction(reader: Reader, model: Model) -> str:
    """What the tensors say against the config, "" for nothing.

    A tied model's own lm_head must be its embedding, and rotary frequencies that old transformers
    saved must be those of rope_theta. transformers 5.19 and vLLM 0.32 take such an lm_head, though
    vLLM ties where it starts without weights; both drop frequencies.
    """
    names = reader.names()
    both = model.heads.tied and HEAD in names and EMBEDDING in names
    if both and not _same(reader, HEAD, EMBEDDING):
        return (
            f"config.json says tie_word_embeddings, and {HEAD} is not {EMBEDDING}. Set"
            f" tie_word_embeddings to false in config.json, or remove {HEAD} from the file if it is"
            f" left over."
        )
    for name in sorted(model.rotary_keys & set(names)):
        other = _other_rotation(reader, name, model.rope)
        if other:
            return (
                f"{name} is {other}, config.json asks for {model.rope.head_dim // 2} frequencies of"
                f" rope_theta {model.rope.theta:g}. Give config.json what the model was trained"
                f" with, or remove these tensors from the file."
            )
    return ""


def _same(reader: Reader, a: str, b: str) -> bool:
    """Whether two tensors hold the same values, some rows at a time."""
    shape = reader.shape(a)
    if reader.shape(b) != shape or len(shape) != 2:
        return False
    rows = max(1, BLOCK // max(1, 4 * shape[1]))
    for start in range(0, shape[0], rows):
        cut = (slice(start, min(start + rows, shape[0])), slice(0, shape[1]))
        x, y = reader.read(a, cut).float(), reader.read(b, cut).float()
        if not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _other_rotation(reader: Reader, name: str, rope: Rope) -> str:
    """What saved frequencies are, where they are not the model's; "" where they are."""
    shape, num = reader.shape(name), rope.head_dim // 2
    if shape != (num,):
        return str(list(shape))
    values = reader.read(name, (slice(0, num),)).double()
    # Linear scaling was of positions once, and is of frequencies now.
    factors = {1.0, 1.0 if rope.scaling is None else rope.scaling.factor}
    powers = torch.arange(0, rope.head_dim, 2, dtype=torch.float64) / rope.head_dim
    wanted = rope.theta**-powers
    # As far as bf16 and, for the smallest, fp16 tell numbers apart.
    if any(torch.allclose(values * f, wanted, rtol=0.01, atol=1e-7) for f in factors):
        return ""
    return f"of rope_theta {float(values[0] / values[1]) ** num:.4g}" if num > 1 else str(values)
