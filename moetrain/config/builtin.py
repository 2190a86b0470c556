"""Models that come with the package: their Hugging Face configs, readable without torch."""

from typing import Any

from moetrain.config.hub_models import PUBLISHED

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-moe-tiny": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 2048,
        "eos_token_id": 2,  # of builtin:stdlib-tokenizer, as is the next
        "pad_token_id": 0,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "float32",
    },
}


# What names of published weights that are quantised as nothing here reads hold between hyphens and
# dots. FP8 and NVFP4 are read.
_QUANTISED = frozenset(
    "fp4 mxfp4 w8a8 w4a16 int8 int4 8bit 4bit bnb awq gptq gguf mlx eetq hqq exl2".split()
)


def quantised_name(path: str) -> str | None:
    """The word in the last part of a path that says that a model is quantised as nothing here reads
    it.
    """
    name = path.rstrip("/").rpartition("/")[2]
    words = name.replace("_", "-").replace(".", "-").split("-")
    return next((word for word in words if word.lower() in _QUANTISED), None)


def published(path: str) -> dict[str, Any] | None:
    """The config of the published model that a path ends in, in any of its variants."""
    name = path.rstrip("/").rpartition("/")[2]
    return next((config for known, config in PUBLISHED.items() if name.startswith(known)), None)
