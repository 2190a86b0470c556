"""The layers of a model chunk under either backend: `torch` (this project's modules) and `te`
(Transformer Engine).
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moetrain.engine.layers import attention, mlp, moe
from moetrain.engine.layers.norm import RMSNorm
from moetrain.errors import ConfigError
from moetrain.models.model import Layer, Model
from moetrain.models.parts.moe import Moe

# Transformer Engine keeps a norm inside the linear layer that follows it: its name -> ours.
TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def choose_backend(wanted: str, device: torch.device) -> str:
    """Resolve `model.backend`: te where Transformer Engine imports on a GPU, torch elsewhere and,
    for either, on meta.
    """
    if device.type == "meta" or wanted == "torch":
        return "torch"
    why = "this machine has no GPU"
    if device.type == "cuda":
        try:
            import transformer_engine.pytorch  # noqa: F401

            return "te"
        # Of its libraries, or those of CUDA, the loader says OSError and itself RuntimeError.
        except (ImportError, OSError, RuntimeError) as error:
            why = f"it does not import here: {(str(error) or repr(error)).splitlines()[0]}"
    if wanted == "te":
        raise ConfigError(
            f"model.backend=te needs a GPU and Transformer Engine ({why}). Install the 'te' extra"
            " there, or use backend=torch."
        )
    return "torch"


def config_fields(model: Model, backend: str) -> dict[str, Any]:
    """Of Megatron's TransformerConfig, what the model's parts decide."""
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        **attention.config_fields(model.attention, model.rope),
    )
    if model.moe is not None:
        fields |= moe.config_fields(model.moe)
        fields["moe_layer_freq"] = [int(is_moe) for is_moe in model.moe_layers]
        fields["moe_grouped_gemm"] = backend == "te"
        fields["ffn_hidden_size"] = model.moe.experts.ffn  # read where a layer is dense
    if model.dense is not None:
        fields |= mlp.config_fields(model.dense)
    return fields


def layer_specs(
    config: TransformerConfig,
    model: Model,
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
        first, num_layers = 0, model.num_layers
    else:
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        stage = block.layout[pp_rank][vp_stage or 0]
        num_layers = sum(kind.name == "decoder" for kind in stage)
    layers = model.layers[first : first + num_layers]
    return TransformerBlockSubmodules(
        layer_specs=[make(layer) for layer in layers], layer_norm=_final_norm(backend)
    )


def _final_norm(backend: str) -> Any:
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def _torch_layer(layer: Layer) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention.spec(layer.attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=moe.spec(moe.submodules(layer.mlp)) if isinstance(layer.mlp, Moe) else mlp.spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _te_layer(layer: Layer) -> ModuleSpec:
    """Megatron's own Transformer Engine layer, with packed attention and our router in place of
    upstream's.
    """
    experts = layer.mlp.experts.num if isinstance(layer.mlp, Moe) else None
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts,
        moe_grouped_gemm=experts is not None,
        qk_layernorm=layer.attention.qk_norm,
    )
    submodules: Any = spec.submodules
    heads = submodules.self_attention.submodules
    heads.core_attention = attention.core(layer.attention)
    if layer.attention.output_bias:
        heads.linear_proj = attention.with_bias(heads.linear_proj)
    if isinstance(layer.mlp, Moe):
        upstream: MoESubmodules = submodules.mlp.keywords["submodules"]
        ours = replace(upstream, router=moe.router(layer.mlp))
        if not layer.mlp.experts.fits_te:
            ours = replace(ours, experts=moe.experts(layer.mlp))
        submodules.mlp = moe.spec(ours)
    return spec


def _te_layer_apart(layer: Layer) -> ModuleSpec:
    """The same with norms outside the linear layers, whose input an adapter reads too, and with our
    experts, whose weights are one tensor.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    spec = _te_layer(layer)
    submodules: Any = spec.submodules
    submodules.input_layernorm = TENorm
    submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    submodules.pre_mlp_layernorm = TENorm
    if isinstance(layer.mlp, Moe):
        ours: MoESubmodules = submodules.mlp.keywords["submodules"]
        submodules.mlp = moe.spec(replace(ours, experts=moe.experts(layer.mlp)))
    else:
        submodules.mlp.keywords["submodules"].linear_fc1 = TEColumnParallelLinear
    return spec
