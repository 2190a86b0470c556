"""The configs of published models, as far as sizes go: what a dry run counts with when a model's
folder, known by its name, is not here. Facts of their public config.json files.
"""

from typing import Any


def _qwen3_moe(**sizes: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "head_dim": 128,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        **sizes,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
    }


# Of dense models: hidden_size, intermediate_size, layers, heads, key/value heads, vocabulary, tied.
type Sizes = tuple[int, int, int, int, int, int, bool]


def _dense(sizes: Sizes, **more: Any) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups, vocab, tied = sizes
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **more,
    }


def _qwen2(sizes: Sizes, positions: int = 32768) -> dict[str, Any]:
    return _dense(
        sizes,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        max_position_embeddings=positions,
        rope_theta=1000000.0,
        use_sliding_window=False,
    )


def _qwen3(sizes: Sizes) -> dict[str, Any]:
    return _dense(
        sizes,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
    )


def _llama3(sizes: Sizes, factor: float, head_dim: int = 128) -> dict[str, Any]:
    return _dense(
        sizes,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


_QWEN2: dict[str, Sizes] = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
_QWEN3: dict[str, Sizes] = {
    "0.6B": (1024, 3072, 28, 16, 8, 151936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 151936, False),
    "14B": (5120, 17408, 40, 40, 8, 151936, False),
    "32B": (5120, 25600, 64, 64, 8, 151936, False),
}
_LLAMA_8B: Sizes = (4096, 14336, 32, 32, 8, 128256, False)
_LLAMA_70B: Sizes = (8192, 28672, 80, 64, 8, 128256, False)
# The sizes that each line of Qwen2's kin has.
_LINES: dict[str, str] = {
    "Qwen2": "0.5B 1.5B 7B 72B",
    "Qwen2.5": "0.5B 1.5B 3B 7B 14B 32B 72B",
    "Qwen2.5-Coder": "0.5B 1.5B 3B 7B 14B 32B",
    "QwQ": "32B",
    "DeepSeek-R1-Distill-Qwen": "7B 14B 32B",
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": _qwen3_moe(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
    ),
    "Qwen3-235B-A22B": _qwen3_moe(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
    ),
    **{
        f"{line}-{size}": _qwen2(_QWEN2[size])
        for line, sizes in _LINES.items()
        for size in sizes.split()
    },
    **{f"Qwen2.5-Math-{size}": _qwen2(_QWEN2[size], 4096) for size in ("1.5B", "7B", "72B")},
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2((*_QWEN2["1.5B"][:-1], False), 131072),
    **{f"Qwen3-{size}": _qwen3(sizes) for size, sizes in _QWEN3.items()},
    **{f"{line}-8B": _llama3(_LLAMA_8B, 8.0) for line in ("Llama-3.1", "Meta-Llama-3.1")},
    **{f"{line}-70B": _llama3(_LLAMA_70B, 8.0) for line in ("Llama-3.1", "Meta-Llama-3.1")},
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "Llama-3.3-70B": _llama3(_LLAMA_70B, 8.0),
    "DeepSeek-R1-Distill-Llama-8B": _llama3(_LLAMA_8B, 8.0),
    "DeepSeek-R1-Distill-Llama-70B": _llama3(_LLAMA_70B, 8.0),
    "Llama-3.2-1B": _llama3((2048, 8192, 16, 32, 8, 128256, True), 32.0, 64),
    "Llama-3.2-3B": _llama3((3072, 8192, 28, 24, 8, 128256, True), 32.0),
}
