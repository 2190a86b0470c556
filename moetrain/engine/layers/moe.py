"""A mixture of experts over packs: Megatron's layer with our router and experts.

Legend: c local tokens, h hidden, n sequences of the pack, k experts a token.
"""

from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from moetrain.engine.dropout import Draws, dispatched
from moetrain.engine.layers import mlp
from moetrain.engine.layers.experts import GroupedExperts
from moetrain.engine.layers.router import PackedRouter
from moetrain.models.parts.moe import Moe


def config_fields(part: Moe) -> dict[str, Any]:
    """Of Megatron's TransformerConfig, but for what depends on all layers or on the machine."""
    router, shared = part.router, part.shared
    fields: dict[str, Any] = dict(
        num_moe_experts=router.experts,
        moe_router_topk=router.top_k,
        moe_ffn_hidden_size=part.experts.ffn,
        # Megatron refuses one renormalised expert per token, whose weight is always 1:
        # `set_pre_softmax`.
        moe_router_pre_softmax=not router.renormalise or router.top_k == 1,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        gated_linear_unit=True,
        activation_func=F.silu,
    )
    if shared is not None:
        fields["moe_shared_expert_intermediate_size"] = shared.ffn
        fields["moe_shared_expert_gate"] = shared.gated
    return fields


def set_pre_softmax(part: Moe, config: Any) -> None:
    """What Megatron's checks would not let pass."""
    config.moe_router_pre_softmax = not part.router.renormalise


def router(part: Moe) -> Any:
    """Of either backend."""
    return partial(cast(Any, PackedRouter), biased=part.router.bias)


def experts(part: Moe) -> Any:
    """Ours, of either backend."""
    return partial(cast(Any, GroupedExperts), part=part.experts)


def submodules(part: Moe) -> MoESubmodules:
    """Of the torch backend."""
    return MoESubmodules(
        router=router(part),
        experts=experts(part),
        shared_experts=None
        if part.shared is None
        else partial(cast(Any, SharedExpertMLP), submodules=mlp.LINEAR),
    )


def spec(modules: MoESubmodules) -> Any:
    """The layer around them, of either backend."""
    return partial(cast(Any, PackedMoE), submodules=modules)


class PackedMoE(MoELayer):
    """Megatron's MoE layer, which hands the router the sequence ids that arrive in `padding_mask`.

    Upstream turns `padding_mask` into a bool; the ids must reach the router whole. They are set and
    used inside one call of forward, so recomputation, which calls forward again with the same
    arguments, sees the same ids.
    """

    draws: Draws | None = None

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [c, 1, h]; `padding_mask` is what `sequence_table` makes."""
        assert padding_mask is not None
        self.router.num_sequences = padding_mask.size(0)
        table = padding_mask[0]
        self.router.sequence_ids = table[0]
        self.router.routes = None
        if table.size(0) > 2:
            k = self.config.moe_router_topk
            before = self.router.place * k
            self.router.routes = table[2 + before : 2 + before + k].T
        return super().forward(hidden_states, intermediate_tensors=intermediate_tensors)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As upstream's; the keys of a dropout before the experts' adapters go ahead."""
        if self.draws is not None and self.training:
            keys = self.draws.of(hidden_states)
            self.draws.at_experts = dispatched(keys, probs, routing_map, self.token_dispatcher)
        return super().preprocess(hidden_states, probs, routing_map)  # type: ignore[no-any-return]
