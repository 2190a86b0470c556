"""What a sampler makes of logits before it draws, as vLLM 0.32 does it on the CPU.

Legend: b answers drawn together, v vocabulary.
"""

import torch
from torch import Tensor

from moetrain.rollout.base import Sampling


def shaped(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs [b, v] fp32 of the distribution that is drawn from, -inf where nothing is drawn.

    logits [b, v] fp32; seen [b, v] bool: tokens of the prompt and of the answer so far. In this
    order: the repetition penalty, the temperature, min_p, top_k, top_p. Tokens that are level with
    the k-th stay; of tokens level with the last of top_p the sort decides, as in vLLM.
    """
    if sampling.repetition_penalty != 1:
        penalty = torch.tensor(sampling.repetition_penalty)
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if not sampling.temperature:
        return torch.log_softmax(logits, -1)
    logits = logits / sampling.temperature
    if sampling.min_p:
        share = torch.softmax(logits, -1)
        least = sampling.min_p * share.amax(-1, keepdim=True)
        logits = logits.masked_fill(share < least, -torch.inf)
    if 0 < sampling.top_k < logits.size(1):
        last = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(-1)
        out = torch.softmax(ordered, -1).cumsum(-1) <= 1 - torch.tensor(sampling.top_p)
        out[:, -1] = False
        ordered = ordered.masked_fill(out, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, places, ordered)
    return torch.log_softmax(logits, -1)
