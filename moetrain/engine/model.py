"""Building the model: Megatron's configuration, its layers, and a GPT that takes packs.

Legend: t tokens of the pack, c = t/cp local tokens, h hidden, d head_dim.
"""

import importlib.util
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moetrain.config.megatron import SET_HERE
from moetrain.config.recipe import Recipe
from moetrain.engine import compat_megatron
from moetrain.engine.layers import experts, moe
from moetrain.engine.layers.block import config_fields, layer_specs
from moetrain.engine.layers.rotary import Rotary
from moetrain.engine.world import World
from moetrain.errors import ConfigError
from moetrain.layout.mesh import stage_layers
from moetrain.layout.passed import check_backend, check_passed
from moetrain.models import Model
from moetrain.models.sharding import padded_rows
from moetrain.ops.kinds import kind_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pipeline_layout(model: Model, recipe: Recipe) -> list[list[str]]:
    """Megatron's pipeline_model_parallel_layout for our own split of layers, ordered chunk by chunk
    over the stages.
    """
    p = recipe.parallel
    stages = stage_layers(
        model.num_layers, p.pp, p.vpp or 1, p.first_stage_layers, p.last_stage_layers
    )
    flat = [["decoder"] * len(stages[pp][vpp]) for vpp in range(p.vpp or 1) for pp in range(p.pp)]
    flat[0].insert(0, "embedding")
    flat[-1].append("loss")
    return flat


def transformer_config(
    recipe: Recipe, model: Model, device: torch.device, backend: str
) -> TransformerConfig:
    """Megatron's TransformerConfig for the recipe; `megatron:` fields of it are applied last."""
    dtype = DTYPES[recipe.model.dtype]
    owned: dict[str, Any] = dict(
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        calculate_per_token_loss=True,
        deterministic_mode=recipe.train.deterministic,
        **config_fields(model, backend),
        **_layout_fields(recipe, model),
    )
    assert owned.keys() <= SET_HERE.keys(), f"megatron_fields.py lacks {owned.keys() - SET_HERE}"
    check_passed(recipe, model)
    on_gpu, fuses = kind_of(device) == "cuda", backend == "te" or _has_apex()
    check_backend(recipe, model, backend, on_gpu=on_gpu, fuses=fuses)
    defaults = _default_fields(recipe, model, device, backend)
    try:
        config = TransformerConfig(**owned | defaults | recipe.megatron)
    except (AssertionError, ValueError) as error:
        if not recipe.megatron:
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"megatron: {recipe.megatron} is refused by megatron-core: {why}"
        ) from None
    if model.moe is not None:
        moe.set_pre_softmax(model.moe, config)
    return config


def _layout_fields(recipe: Recipe, model: Model) -> dict[str, Any]:
    p = recipe.parallel
    fields: dict[str, Any] = dict(
        tensor_model_parallel_size=p.tp,
        sequence_parallel=bool(p.sp) and p.tp > 1,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
    )
    if p.pp > 1:
        fields["pipeline_model_parallel_layout"] = pipeline_layout(model, recipe)
    return fields


def _has_apex() -> bool:
    """Its kernel adds a weight's gradient to the fp32 buffer inside the matmul, as Transformer
    Engine's layers do.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _default_fields(
    recipe: Recipe, model: Model, device: torch.device, backend: str
) -> dict[str, Any]:
    """What a recipe's `megatron:` section may change."""
    p, uses_te = recipe.parallel, backend == "te"
    defaults: dict[str, Any] = dict(
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=uses_te,
        gradient_accumulation_fusion=kind_of(device) == "cuda" and (uses_te or _has_apex()),
        overlap_p2p_comm=bool(p.vpp),
        batch_p2p_comm=not p.vpp,
    )
    if model.moe is not None:
        # gloo has no uneven all-gather, which all-to-all needs when experts are tensor parallel.
        uneven = device.type == "cpu" and p.etp > 1
        defaults["moe_token_dispatcher_type"] = "allgather" if uneven else "alltoall"
        defaults["moe_permute_fusion"] = uses_te
    if recipe.train.recompute == "full":
        defaults |= dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif recipe.train.recompute == "selective":
        defaults |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return defaults


class _Head(ColumnParallelLinear):
    """The output projection as a weight: logits are never made, but calling it runs the
    parameter-gather hooks.
    """

    def forward(self) -> Tensor | None:  # type: ignore[override]
        return self.weight  # None where the first stage's embedding is the output projection too


class PackedGPT(GPTModel):
    """Megatron's GPT with our own forward: packs in, final hidden states out. No logits are made
    here.
    """

    def __init__(self, *args: Any, model: Model, **kwargs: Any):
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rotary = Rotary(model.rope)
        self.has_scalar_head = self.post_process and model.heads.scalar
        if self.has_scalar_head:
            like = self.output_layer.weight
            self.output_layer = nn.Linear(
                model.hidden, 1, bias=False, dtype=like.dtype, device=like.device
            )
        elif self.post_process:
            self.output_layer.__class__ = _Head
        if self.post_process and model.heads.value:
            like = next(self.decoder.parameters())
            self.value_head = nn.Linear(
                model.hidden, 1, bias=False, dtype=like.dtype, device=like.device
            )

    def forward(
        self, tokens: Tensor, position_ids: Tensor, segments: Tensor, sequences: Tensor
    ) -> Tensor:
        """tokens, position_ids [c], segments [2, n+1] (attention.segment_table), sequences
        [n, 1, c] (router.sequence_table) -> [c, 1, h], over tp with SP.

        The last stage returns hidden states gathered over tensor ranks [c, 1, h], ready for
        `token_logprobs`.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(tokens[None], position_ids[None])
            if torch.is_grad_enabled() and not hidden.requires_grad:
                hidden.requires_grad_()  # frozen embeddings: recomputation follows its inputs
        out = self.decoder(
            hidden_states=hidden,
            attention_mask=segments,
            rotary_pos_emb=self.rotary(position_ids),
            padding_mask=sequences,
        )
        if not self.post_process:
            return out
        if self.config.sequence_parallel:
            # Vocabulary rows give each rank a part of the gradient, a scalar head the whole of it.
            parts = not self.has_scalar_head
            return gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=parts)
        return out if self.has_scalar_head else copy_to_tensor_model_parallel_region(out)

    def scores(self, hidden: Tensor) -> Tensor:
        """[c, h] -> [c] fp32: the scalar head's number at every token."""
        assert self.has_scalar_head, "this stage has no scalar head"
        return self.output_layer(hidden).squeeze(-1).float()

    def values(self, hidden: Tensor) -> Tensor:
        """[c, h] -> [c] fp32: the value head's number at every token.

        Every tensor rank computes all of it, and the gradients of their hidden states are summed as
        the vocabulary's parts are: so each gives its share.
        """
        share = 1 / self.config.tensor_model_parallel_size
        shared = hidden * share + hidden.detach() * (1 - share)
        return self.value_head(shared).squeeze(-1).float()

    def head_weight(self) -> Tensor:
        """[v_local, h]: this tensor rank's rows of the output projection.

        A last stage's own copy of tied embeddings is asked for by a call too: its parameter gather
        is waited for nowhere else.
        """
        weight = self.output_layer()
        return self.shared_embedding_or_output_weight() if weight is None else weight


def build(
    config: TransformerConfig,
    model: Model,
    world: World,
    backend: str,
    adapted: bool = False,
) -> list[PackedGPT]:
    """This rank's model chunks, one per virtual pipeline stage, with uninitialised weights;
    `adapted` when adapters will be put beside their layers.
    """
    plan = world.plan
    if backend == "te":
        compat_megatron.fuse_without_apex()
    chunks: list[PackedGPT] = []
    for vp_stage in range(max(plan.vpp, 1)):
        stage = vp_stage if plan.vpp > 1 else None
        chunk = PackedGPT(
            config,
            layer_specs(config, model, backend, stage, world.pp_rank, adapted),
            vocab_size=padded_rows(model.heads.vocab, plan.tp),
            max_sequence_length=model.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            share_embeddings_and_output_weights=model.heads.tied,
            vp_stage=stage,
            model=model,
        )
        chunks.append(chunk)
        experts.mark(chunk)
    return chunks
