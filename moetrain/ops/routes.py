"""A router's choices in few bytes: experts from 1, 0 where the router chooses by itself.

Legend: t tokens, l MoE layers, k experts a token, E experts.
"""

import torch
from torch import Tensor

BYTE = 255  # the largest number in one


def in_bytes(num_experts: int, top_k: int) -> bool:
    """Whether a choice fits one byte. With 256 experts the last is written as 0, which the token's
    other choices tell from none: where there are others.
    """
    return num_experts <= BYTE or (num_experts == BYTE + 1 and top_k > 1)


def pack_routes(routes: Tensor, num_experts: int) -> Tensor:
    """[t, l, k] integers, experts from 1 -> uint8 where E <= 256, else int16. What is packed
    already stays as it is.
    """
    if routes.dtype == torch.uint8:
        return routes
    if not in_bytes(num_experts, routes.size(-1)):
        return routes.to(torch.int16)
    return routes.to(torch.uint8)


def unpack_routes(routes: Tensor, num_experts: int) -> Tensor:
    """What `pack_routes` packed [t, l, k]: integers, experts from 1. Routes of another dtype than
    uint8 are as they are.
    """
    if routes.dtype != torch.uint8 or num_experts != BYTE + 1:
        return routes
    last = (routes == 0) & (routes != 0).any(-1, keepdim=True)
    return routes.to(torch.int16).masked_fill_(last, num_experts)
