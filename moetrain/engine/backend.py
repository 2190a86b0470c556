"""The two backends behind one layer spec: `torch` (this project's modules) and `te` (Transformer
Engine).
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from moetrain.engine.attention import PackedAttention
from moetrain.engine.experts import GroupedExperts
from moetrain.engine.router import PackedMoE, PackedRouter
from moetrain.errors import ConfigError
from moetrain.models.dims import Dims

# Transformer Engine keeps a norm inside the linear layer that follows it: its name -> ours.
TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def _names_on_disk(moe: bool) -> dict[str, str]:
    """Checkpoints have Transformer Engine's names whatever wrote them, so that a run may change its
    backend; a norm before experts stands alone there too.
    """
    return {ours: te for te, ours in TE_NAMES.items() if not (moe and te.startswith("mlp."))}


def choose_backend(wanted: str, device: torch.device) -> str:
    """Resolve `model.backend`: te where Transformer Engine imports on a GPU, torch elsewhere."""
    try:
        import transformer_engine.pytorch  # noqa: F401

        has_te = device.type == "cuda"
    except ImportError:
        has_te = False
    if wanted == "te" and not has_te:
        raise ConfigError(
            "model.backend=te needs a GPU and Transformer Engine. Install the 'te' extra there, "
            "or use backend=torch."
        )
    return "te" if has_te and wanted != "torch" else "torch"


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight says whether its gradient is summed over sequence-parallel
    ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ):
        super().__init__()
        self.eps = eps
        weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]; the mean square is taken in fp32 inside torch's kernel."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def layer_specs(
    config: TransformerConfig,
    dims: Dims,
    backend: str,
    vp_stage: int | None,
    pp_rank: int,
    adapted: bool,
) -> TransformerBlockSubmodules:
    """The specs of this chunk's layers and the norm after the last; `adapted` when adapters will
    stand beside them.
    """
    make = _torch_layer
    if backend == "te":
        make = _te_layer_apart if adapted else _te_layer
    block = config.pipeline_model_parallel_layout
    if block is None:
        first, num_layers = 0, dims.num_layers
    else:
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        stage = block.layout[pp_rank][vp_stage or 0]
        num_layers = sum(kind.name == "decoder" for kind in stage)
    is_moe = dims.moe_layers[first : first + num_layers]
    return TransformerBlockSubmodules(
        layer_specs=[make(config, dims, moe) for moe in is_moe], layer_norm=_final_norm(backend)
    )


def _final_norm(backend: str) -> Any:
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def _torch_layer(config: TransformerConfig, dims: Dims, moe: bool) -> ModuleSpec:
    if moe:
        mlp: Any = partial(
            cast(Any, PackedMoE),
            submodules=MoESubmodules(router=PackedRouter, experts=GroupedExperts),
        )
    else:
        dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = partial(MLP.as_mlp_submodule, submodules=dense)
    head_norm = RMSNorm if dims.qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_names_on_disk(moe),
        ),
    )


def _te_layer(config: TransformerConfig, dims: Dims, moe: bool) -> ModuleSpec:
    """Megatron's own Transformer Engine layer, with packed attention and our router in place of
    upstream's.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=dims.experts if moe else None, moe_grouped_gemm=moe, qk_layernorm=dims.qk_norm
    )
    layer: Any = spec.submodules
    layer.self_attention.submodules.core_attention = PackedAttention
    if moe:
        upstream: MoESubmodules = layer.mlp.keywords["submodules"]
        layer.mlp = partial(cast(Any, PackedMoE), submodules=replace(upstream, router=PackedRouter))
    return spec


def _te_layer_apart(config: TransformerConfig, dims: Dims, moe: bool) -> ModuleSpec:
    """The same with norms outside the linear layers, whose input an adapter reads too, and with our
    experts, whose weights are one tensor. Not yet run: it takes a GPU.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    spec = _te_layer(config, dims, moe)
    layer: Any = spec.submodules
    layer.input_layernorm = TENorm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.pre_mlp_layernorm = TENorm
    layer.sharded_state_dict_keys_map = _names_on_disk(moe)
    if moe:
        ours: MoESubmodules = layer.mlp.keywords["submodules"]
        layer.mlp = partial(cast(Any, PackedMoE), submodules=replace(ours, experts=GroupedExperts))
    else:
        layer.mlp.keywords["submodules"].linear_fc1 = TEColumnParallelLinear
    return spec
