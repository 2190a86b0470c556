"""Documents inside a sample of a corpus: what Megatron-LM's --reset-attention-mask,
--reset-position-ids and --eod-mask-loss make of them, as sequences of a pack.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config.recipe import Recipe
from moetrain.data import tokenizer as tokenizers
from moetrain.data.run_tokenizer import tokenizer_of
from moetrain.ops.packed import Packed


@dataclass(frozen=True)
class Boundaries:
    """How samples are cut after each end-of-document token `eod`."""

    eod: int
    apart: bool  # documents do not see each other, and positions begin anew
    unscored: bool  # what an end-of-document token predicts is not learned

    @classmethod
    def of(cls, recipe: Recipe) -> "Boundaries | None":
        """None where samples are one run of tokens."""
        data = recipe.data
        if not (data.document_mask or data.eod_mask_loss):
            return None
        eod = tokenizers.end_of_document(tokenizers.load(tokenizer_of(recipe)))
        return cls(eod, data.document_mask, data.eod_mask_loss)

    def pack(self, tokens: Tensor, labels: Tensor, id: str) -> Packed:
        """[t] tokens and labels -> a pack of [t], a sequence for each document or piece of one."""
        t, ends = tokens.numel(), tokens == self.eod
        cuts = ends.nonzero()[:, 0] + 1 if self.apart else ends.new_zeros(0, dtype=torch.int64)
        bounds = torch.cat([cuts.new_zeros(1), cuts[cuts < t], cuts.new_full((1,), t)])
        lengths = bounds.diff()
        return Packed(
            tokens=tokens.long(),
            labels=labels.long(),
            position_ids=torch.arange(t) - torch.repeat_interleave(bounds[:-1], lengths),
            cu_seqlens=bounds.to(torch.int32),
            loss_mask=(~ends).float() if self.unscored else torch.ones(t),
            valid=torch.ones(t, dtype=torch.bool),
            ids=(id,) * lengths.numel(),
        )
