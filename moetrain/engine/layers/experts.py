"""Experts of the torch backend: one grouped matmul for all local experts.

Legend: e local experts, f the expert's hidden size on this expert-tensor rank, h hidden, t tokens
    that arrived here.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from moetrain.ops.grouped import grouped_linear
from moetrain.ops.swiglu import weighted_swiglu


def mark(chunk: nn.Module) -> None:
    """Send the gradients of experts through the expert data-parallel group, which is the right one
    at every EP and ETP, and gives them an optimizer of their own.

    megatron-core 0.19.2 marks Transformer Engine's only where that group is another than the dense
    one. The checkpoint of one optimizer would not be read where there are two.
    """
    for name, param in chunk.named_parameters():
        if ".mlp.experts." in name:
            param.allreduce = False  # type: ignore[attr-defined]


class _GroupedWeight(nn.Module):
    """Holds one parameter `weight [e, out, in]`, named as Transformer Engine's grouped linear names
    its module.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [t, in] sorted by expert, ends [e] int32 where each expert's rows end -> [t, out]."""
        return grouped_linear(x, self.weight, ends)


class GroupedExperts(MegatronModule):
    """SwiGLU experts: `linear_fc1.weight [e, 2f, h]` (gate rows, then up rows) and
    `linear_fc2.weight [e, h, f]`.
    """

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any, name: str | None = None
    ):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        f, rest = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        assert rest == 0, "plan.check_layout lets no such layout through"
        h = config.hidden_size
        self.linear_fc1 = _GroupedWeight((num_local_experts, 2 * f, h), config.params_dtype)
        self.linear_fc2 = _GroupedWeight((num_local_experts, h, f), config.params_dtype)
        for weight, dim in ((self.linear_fc1.weight, 1), (self.linear_fc2.weight, 2)):
            weight.tensor_model_parallel = self.tp_group.size() > 1  # type: ignore[attr-defined]
            weight.partition_dim, weight.partition_stride = dim, 1  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """hidden [t, h] sorted by local expert, tokens_per_expert [e], probs [t] fp32 -> [t, h]
        times its probability.
        """
        ends = tokens_per_expert.to(hidden.device).cumsum(0).to(torch.int32)
        act = weighted_swiglu(self.linear_fc1(hidden, ends), probs)  # [t, f]
        return self.linear_fc2(act, ends), None

    def backward_dw(self) -> None:
        """Weight gradients are computed with the rest of the backward pass."""
