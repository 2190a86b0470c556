"""One process as any rank of any layout, on the meta device: what torch 2.13 and megatron-core
0.19.2 cannot do without values, answered by shapes.

tests/test_meta.py takes whole steps by it.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from moetrain.engine import compat_megatron, compat_torch

META = torch.device("meta")


def install(rank: int, size: int) -> torch.device:
    """Be rank `rank` of `size`: torch's fake process group, whose collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    compat_torch.install(META)
    compat_megatron.install(on_gpu=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    _mend_megatron()
    return META


def _mend_megatron() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.transformer.moe.moe_layer as moe_layer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    class OneByOne(contextlib.nullcontext[Any]):
        """Coalesced collectives have no meta kernel."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(self)

        def wait(self) -> None:
            pass

    class Balanced(MoEAlltoAllTokenDispatcher):
        """How many tokens go to which expert is a value: here every expert gets as many."""

        def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
            each = routing_map.size(0) * self.config.moe_router_topk // self.num_experts
            local = self.num_local_experts

            def full(*shape: int) -> torch.Tensor:
                return torch.full(shape, each, dtype=torch.long, device="cpu")

            self.num_out_tokens = each * self.num_experts
            self.input_splits = self.output_splits = (full(self.ep_size) * local).numpy()
            self.output_splits_tp = (full(self.tp_size) * local * self.ep_size).numpy()
            ranks = self.tp_size * self.ep_size
            self.num_global_tokens_per_local_expert = full(ranks, local)
            return full(local) * ranks

        def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
            return tokens_per_expert

    upstream: Any = buffers
    upstream._coalescing_manager = OneByOne
    moe_layer.MoEAlltoAllTokenDispatcher = Balanced  # type: ignore[misc]
