"""Experts of the torch backend: one grouped matmul for all local experts.

Legend: e local experts, f the expert's hidden size on this expert-tensor rank, h hidden, t tokens
    that arrived here.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from moetrain.models.parts.moe import Experts
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
    """Holds one parameter `weight [e, out, in]`, and `bias [e, out]` where there is one, named as
    Transformer Engine's grouped linear names its module.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[:2], dtype=dtype, device=device))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [t, in] sorted by expert, ends [e] int32 where each expert's rows end -> [t, out],
        without the bias.
        """
        return grouped_linear(x, self.weight, ends)

    def bias_of(self, counts: Tensor, num: int) -> Tensor:
        """[num, out]: each row's, where expert i has counts[i] of the `num` rows; `num` is given so
        that the host need not wait for the device.
        """
        assert self.bias is not None
        return self.bias.repeat_interleave(counts, 0, output_size=num)


class GroupedExperts(MegatronModule):
    """SwiGLU experts: `linear_fc1.weight [e, 2f, h]` (gate rows, then up rows) and
    `linear_fc2.weight [e, h, f]`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        pg_collection: Any,
        name: str | None = None,
        *,
        part: Experts,
    ):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        f, rest = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        assert rest == 0, "plan.check_layout lets no such layout through"
        h = config.hidden_size
        dtype, self.glu = config.params_dtype, part.glu
        self.linear_fc1 = _GroupedWeight((num_local_experts, 2 * f, h), dtype, bias=part.bias)
        self.linear_fc2 = _GroupedWeight((num_local_experts, h, f), dtype, bias=part.bias)
        split = (
            (self.linear_fc1.weight, 1),
            (self.linear_fc1.bias, 1),
            (self.linear_fc2.weight, 2),
        )
        for param, dim in split:
            if param is not None:
                set_tensor_model_parallel_attributes(param, self.tp_group.size() > 1, dim, 1)

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """hidden [t, h] sorted by local expert, tokens_per_expert [e], probs [t] fp32 -> [t, h]
        times its probability.
        """
        counts = tokens_per_expert.to(hidden.device)
        ends = counts.cumsum(0).to(torch.int32)
        wide = self.linear_fc1(hidden, ends)
        if self.linear_fc1.bias is None:
            return self.linear_fc2(weighted_swiglu(wide, probs, self.glu), ends), None
        bias = self.linear_fc1.bias_of(counts, len(hidden))
        act = weighted_swiglu(wide + bias, probs, self.glu)  # [t, f]
        bias = self.linear_fc2.bias_of(counts, len(hidden))
        if (size := self.tp_group.size()) > 1:
            # All expert-tensor ranks have it, and their outputs are added up: a part of it, with
            # the whole gradient.
            bias = bias + bias.detach() * (1 / size - 1)
        return self.linear_fc2(act, ends) + (bias * probs[:, None]).to(act.dtype), None

    def backward_dw(self) -> None:
        """Weight gradients are computed with the rest of the backward pass."""
