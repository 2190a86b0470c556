"""Mixtral (8x7B, 8x22B): experts in every layer, their probabilities always renormalised."""

from moetrain.models.dims import Dims, HfConfig, read_dims, read_experts, read_int, refuse_but
from moetrain.models.rules import ATTENTION, MODEL, Family, H, fused_experts, moe_mlp

_EXPERT = ("block_sparse_moe", "w1", "w3", "w2")  # w1 gate, w3 up, w2 down


def dims(hf: HfConfig) -> Dims:
    """Sizes from config.json. Raises ConfigError."""
    refuse_but(hf, "sliding_window", None)  # no use_sliding_window here: a number switches it on
    return read_dims(
        hf,
        qk_norm=False,
        norm_eps=1e-5,
        rope_theta=1e6,
        max_positions=131072,
        experts=read_experts(hf),
        top_k=read_int(hf, "num_experts_per_tok", 2),
        moe_ffn=read_int(hf, "intermediate_size"),
        moe_layers=(True,) * read_int(hf, "num_hidden_layers"),
        norm_topk=True,
    )


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    dims=dims,
    rules=(*MODEL, *ATTENTION, *moe_mlp(*_EXPERT)),
    fused={
        **fused_experts(*_EXPERT),
        H + "mlp.gate.weight": (H + "block_sparse_moe.gate.weight",),
    },
)
