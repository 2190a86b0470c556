"""One process as any rank of any layout, on the meta device: what torch 2.13 and megatron-core
0.19.2 cannot do without values, answered by shapes.

tests/test_meta.py takes whole steps by it.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moetrain.engine import compat_megatron, compat_torch
from moetrain.ops.kinds import kind_of, meta_is

META = torch.device("meta")
_kernels: torch.library.Library | None = None  # are there as long as this is


def install(rank: int, size: int, stands_for: str) -> torch.device:
    """Be rank `rank` of `size`: torch's fake process group, whose collectives move nothing. The
    meta device takes the kernels of `stands_for`: cpu or cuda.
    """
    meta_is(stands_for)
    compat_torch.install(META)
    compat_megatron.install(on_gpu=False)
    be_alone(rank, size)
    _mend_torch()
    return META


def be_alone(rank: int, size: int) -> None:
    """Be rank `rank` of `size` without the others, and without values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    _mend_megatron()


def _mend_torch() -> None:
    """Kernels that a CPU has and meta has not, so that a step keeps here what it keeps there:
    attention without scores, AdamW without copies.
    """
    global _kernels
    if _kernels is not None:
        return
    _kernels = torch.library.Library("aten", "IMPL")
    _kernels.impl("_fused_adamw_", lambda *args, **kwargs: None, "Meta")
    torch.optim.Adam._init_group.__globals__["_device_dtype_check_for_fused"] = lambda *a, **k: None
    plain = F.scaled_dot_product_attention

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not q.is_meta:
            return plain(q, k, v, attn_mask, is_causal=is_causal, scale=scale, **kwargs)
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    norm = F.rms_norm

    def rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
        if kind_of(x) == "cuda" and x.is_meta:
            return FusedNorm.apply(x, weight)
        return norm(x, shape, weight, eps)

    F.rms_norm = rms_norm


class FusedNorm(torch.autograd.Function):
    """What CUDA's kernel keeps: its input and one number per row; meta's makes copies in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), weight)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _mend_megatron() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.transformer.moe.moe_layer as moe_layer
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    class OneByOne(contextlib.nullcontext[Any]):
        """Coalesced collectives have no meta kernel, nor have batches of sends."""

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
            if ranks > 1:  # as upstream tells all ranks how many come
                counts = routing_map.sum(dim=0).long()
                gather_from_sequence_parallel_region(counts, group=self.tp_ep_group)
            self.num_global_tokens_per_local_expert = full(ranks, local)
            return full(local) * ranks

        def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
            return tokens_per_expert

    upstream: Any = dist
    upstream.batch_isend_irecv = lambda ops: [op.op(op.tensor, op.peer, op.group) for op in ops]
    upstream = buffers
    upstream._coalescing_manager = OneByOne
    moe_layer.MoEAlltoAllTokenDispatcher = Balanced  # type: ignore[misc]
