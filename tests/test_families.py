"""Every family's table against what transformers writes on disk, and what a config may not say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moetrain.config.builtin import published
from moetrain.config.hub_models import PUBLISHED
from moetrain.errors import ConfigError
from moetrain.models import FAMILIES, Model, read_model
from moetrain.models import architecture as architecture_of
from moetrain.models.parts.rope import Linear, Llama3, Yarn
from moetrain.models.rules import Weight
from moetrain.models.sharding import Copy
from moetrain.weights.fused import groups, matrix_in

# Asymmetric on purpose: heads, groups, head_dim and experts all differ; hidden is no product.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "GptOssForCausalLM": {
        **SIZES,
        "model_type": "gpt_oss",
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 14,
    },
    "LlamaForCausalLM": {**SIZES, "model_type": "llama"},
    "MixtralForCausalLM": {
        **SIZES,
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
    },
    "Qwen2ForCausalLM": {**SIZES, "model_type": "qwen2"},
    "Qwen2MoeForCausalLM": {
        **SIZES,
        "head_dim": 4,  # transformers takes hidden_size / num_attention_heads
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
        "mlp_only_layers": [1],
    },
    "Qwen3ForCausalLM": {**SIZES, "model_type": "qwen3"},
    "Qwen3MoeForCausalLM": {
        **SIZES,
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 14,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}
MOE = {name: hf for name, hf in CONFIGS.items() if FAMILIES[name].build(hf).moe is not None}


def on_disk(architecture: str, folder: Path, **changes: Any) -> tuple[Model, dict[str, Any]]:
    """Save a tiny random model as transformers does; (model, state dict on disk)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fused = changes.pop("fused", False)
    config = AutoConfig.for_model(**{**CONFIGS[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, save_original_format=not fused)
    hf = json.loads((folder / "config.json").read_text())
    assert hf["architectures"] == [architecture]
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    model = read_model(hf)
    if not fused:  # files of some families hold experts in no other way
        for key, cut in model.fused_slices.items():
            if cut.interleaved:
                tensors[key] = matrix_in(tensors[cut.key], cut)
        tensors = {key: t for key, t in tensors.items() if key not in groups(model.table)}
    return model, tensors


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_names_and_shapes_are_transformers(architecture: str, tied: bool, tmp_path: Path) -> None:
    model, tensors = on_disk(architecture, tmp_path, tie_word_embeddings=tied)
    assert model.heads.tied is tied
    table = model.table
    expected = {
        key: shape
        for bound in table.values()
        for key, shape in zip(bound.hf, bound.hf_shapes, strict=True)
    }
    assert expected == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    num_params = sum(bound.num_params for bound in table.values())
    assert num_params == sum(tensor.numel() for tensor in tensors.values())
    assert not model.ignored_keys & tensors.keys()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_parameter_packs_and_unpacks(architecture: str, tp: int, tmp_path: Path) -> None:
    model, tensors = on_disk(architecture, tmp_path)
    for bound in model.table.values():
        sharding = bound.sharding
        ranks: list[tuple[torch.Tensor, ...]] = []
        for rank in range(tp):
            slices = sharding.parts(rank, tp)
            parts = tuple(tensors[k][cut] for k, cut in zip(bound.hf, slices, strict=True))
            local = sharding.pack(parts, rank, tp)
            assert tuple(local.shape) == bound.local_shape(rank, tp)
            ranks.append(sharding.unpack(local, rank, tp))
        for number, key in enumerate(bound.hf):
            own = [parts[number] for parts in ranks]
            whole = own[0] if sharding.dim is None else torch.cat(own, dim=sharding.dim)
            assert whole.equal(tensors[key])


@pytest.mark.parametrize("architecture", MOE)
def test_fused_keys_are_transformers_5(architecture: str, tmp_path: Path) -> None:
    """The same weights saved fused and per expert: `fused` finds every expert's rows."""
    torch.manual_seed(0)
    model, apart = on_disk(architecture, tmp_path / "apart")
    torch.manual_seed(0)
    _, fused = on_disk(architecture, tmp_path / "fused", fused=True)
    where = model.fused_slices
    assert {place.key for place in where.values()} | (apart.keys() - where.keys()) == fused.keys()
    for name, place in where.items():
        assert matrix_in(fused[place.key], place).equal(apart[name]), name


def test_the_parts_of_qwen3_moe() -> None:
    hf = CONFIGS["Qwen3MoeForCausalLM"]
    model = read_model(hf)
    assert model.moe_layers == (True, False, True)
    assert model.moe is not None and model.dense is not None and model.moe.shared is None
    assert (model.moe.experts.num, model.moe.experts.top_k, model.moe.experts.ffn) == (5, 3, 14)
    assert model.dense.ffn == 20
    heads = model.attention
    assert (heads.heads, heads.groups, heads.head_dim, heads.hidden) == (6, 2, 8, 24)
    assert heads.qk_norm and not heads.qkv_bias and model.moe.router.renormalise
    assert not model.heads.tied and model.rope.scaling is None
    every_other = {**hf, "mlp_only_layers": [], "decoder_sparse_step": 2}
    assert read_model(every_other).moe_layers == (False, True, False)


def test_a_model_is_read_once() -> None:
    """Its table of 235B takes a second, and an adapter's three."""
    hf = CONFIGS["Qwen3MoeForCausalLM"]
    assert read_model(hf) is read_model(dict(reversed(hf.items())))
    assert read_model(hf) is not read_model(hf, value_head=True)


def test_bound_rules_carry_global_layer_and_expert_numbers() -> None:
    table = read_model(CONFIGS["Qwen3MoeForCausalLM"]).table
    bound = table["decoder.layers.2.mlp.experts.linear_fc1.weight4"]
    assert (bound.layer, bound.expert) == (2, 4)
    assert bound.hf[0] == "model.layers.2.mlp.experts.4.gate_proj.weight"
    assert bound.hf_shapes == ((14, 24), (14, 24))
    assert bound.local_shape(0, 2) == (14, 24)
    assert "decoder.layers.1.mlp.linear_fc1.weight" in table
    assert "decoder.layers.1.mlp.router.weight" not in table
    whole_model = {name for name, bound in table.items() if bound.layer is None}
    assert whole_model == {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }
    assert all(bound.expert is None or ".experts." in name for name, bound in table.items())


def test_a_window_that_is_off_is_no_window() -> None:
    """Qwen2.5 ships `sliding_window` with `use_sliding_window: false`, which switches it off."""
    config = CONFIGS["Qwen2ForCausalLM"]
    window = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2}
    assert read_model({**config, **window}) == read_model(config)


def test_qkv_bias_has_its_rule() -> None:
    table = read_model(CONFIGS["Qwen2ForCausalLM"]).table
    bound = table["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert bound.hf_shapes == ((48,), (16,), (16,))
    assert bound.local_shape(1, 2) == (40,)


def test_a_table_that_takes_something_twice_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(CONFIGS["LlamaForCausalLM"])
    own = list(model.heads.weights())
    norm = next(weight for weight in own if weight.mcore == "decoder.final_layernorm.weight")
    for extra in (norm, replace(norm, mcore="other"), Weight("x", norm.hf, Copy((24,)))):
        with monkeypatch.context() as patched, pytest.raises(AssertionError):
            patched.setattr(type(model.heads), "weights", lambda _, new=extra: [*own, new])
            assert replace(model).table


# As published: the tables count the parameters that the model cards' safetensors do (tied output
# layers once).
NUM_PARAMS = {
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
}
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    table = read_model(PUBLISHED[name]).table
    assert sum(bound.num_params for bound in table.values()) == NUM_PARAMS[name]


def test_mixtral_has_its_published_number_of_parameters() -> None:
    table = read_model({**MIXTRAL, "model_type": "mixtral"}).table
    assert sum(bound.num_params for bound in table.values()) == 46_702_792_704


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-72B-Instruct", "Qwen2.5-72B"),
        ("models/Qwen2.5-1.5B", "Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "Qwen2.5-Coder-32B"),
        ("Qwen/Qwen2.5-Math-7B", "Qwen2.5-Math-7B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
        ("Qwen/Qwen2-57B-A14B-Instruct", None),
        ("Qwen/Qwen3-Embedding-8B", None),
    ],
)
def test_a_published_model_is_known_by_its_name(path: str, wanted: str | None) -> None:
    assert published(path) == (None if wanted is None else PUBLISHED[wanted])


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, (5e5, None)),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
            (7.0, Linear(2.0)),
        ),
        (
            {
                "max_position_embeddings": 77,
                "rope_parameters": {
                    "rope_theta": 5e5,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            },
            (5e5, Llama3(8.0, 1.0, 4.0, 77)),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
            (10000.0, Yarn(4.0, 2048, 1.5)),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 1,
                    "beta_fast": 0,
                    "mscale": 0,
                    "truncate": None,
                }
            },
            (10000.0, Yarn(1.0, 2048, 1.0, truncate=False)),
        ),
    ],
)
def test_rope_is_read_in_both_spellings(hf: dict[str, Any], expected: tuple[float, Any]) -> None:
    rope = read_model({**SIZES, **hf, "model_type": "llama"}).rope
    assert (rope.theta, rope.scaling) == expected


def test_defaults_are_transformers() -> None:
    """Keys that old configs leave out, as AutoConfig fills them in."""
    from transformers import AutoConfig

    for architecture, config in CONFIGS.items():
        given = {key: value for key, value in config.items() if key != "head_dim"}
        full = AutoConfig.for_model(**given).to_dict()
        head_dim = full.get("head_dim") or SIZES["hidden_size"] // SIZES["num_attention_heads"]
        full = {**full, "head_dim": head_dim}
        build = FAMILIES[architecture].build
        assert build(given) == build(full), architecture


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("Qwen3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = true .* false"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = true .* false"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
            "use_sliding_window = true",
        ),
        ("Qwen2ForCausalLM", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ("GptOssForCausalLM", {"layer_types": 5}, "layer_types = 5 is no list of 3"),
        ("GptOssForCausalLM", {"layer_types": [["full_attention"]] * 3}, "is no list of 3"),
        ("GptOssForCausalLM", {"layer_types": ["full_attention"]}, "is no list of 3"),
        ("GptOssForCausalLM", {"sliding_window": None}, "sliding_window is missing"),
        ("Qwen2ForCausalLM", {"attention_bias": True}, "attention_bias = true"),
        ("MixtralForCausalLM", {"attention_bias": True}, "attention_bias = true"),
        ("Qwen3ForCausalLM", {"attention_bias": 1}, "attention_bias = 1 is not true or false"),
        ("Qwen3ForCausalLM", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias = true"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, 'hidden_act = "gelu" .* "silu"'),
        ("LlamaForCausalLM", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        (
            "LlamaForCausalLM",
            {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_theta = 1 must be above 1",
        ),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ("LlamaForCausalLM", {"rope_scaling": [1]}, "not a mapping"),
        (
            "LlamaForCausalLM",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6},
            },
            "rope_scaling hides rope_parameters.rope_theta = 1000000.0.*reads 10000",
        ),
        (
            "LlamaForCausalLM",
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta = 500000.0 and rope_parameters.rope_theta = 1000000.0 differ",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"factor": 2}},
            "rope_scaling = .* and rope_parameters = .* differ",
        ),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("LlamaForCausalLM", {"hidden_size": None}, "hidden_size is missing"),
        ("LlamaForCausalLM", {"hidden_size": "24"}, "hidden_size = '24' is not a whole number"),
        ("LlamaForCausalLM", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ("LlamaForCausalLM", {"num_hidden_layers": True}, "num_hidden_layers = True"),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
        ("LlamaForCausalLM", {"head_dim": 7}, "head_dim = 7 is odd"),
        ("LlamaForCausalLM", {"head_dim": None, "hidden_size": 25}, "give head_dim"),
        ("LlamaForCausalLM", {"rms_norm_eps": 0}, "rms_norm_eps = 0 is not a positive"),
        ("LlamaForCausalLM", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ("MixtralForCausalLM", {"sliding_window": 4096}, "sliding_window = 4096 .* null"),
        ("MixtralForCausalLM", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("MixtralForCausalLM", {"num_experts": 4}, "num_experts and num_local_experts differ"),
        ("Qwen3MoeForCausalLM", {"num_experts": None}, "num_experts is missing"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 6}, "6 is more than the 5 experts"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": "1"}, "mlp_only_layers = '1'"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["1"]}, "mlp_only_layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    architecture: str, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        FAMILIES[architecture].build({**CONFIGS[architecture], **change})
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'Qwen3MoForCausalLM' is unknown; known: GptOss.* mean"):
        architecture_of({"architectures": ["Qwen3MoForCausalLM"]})
    for other in ("Qwen3NextForCausalLM", "MistralForCausalLM"):
        with pytest.raises(ConfigError, match=rf"'{other}' is unknown; known: [\w, ]+\.$"):
            architecture_of({"architectures": [other]})  # another family's is no slip of the pen
    with pytest.raises(ConfigError, match="model_type = None"):
        architecture_of({})
    assert architecture_of({"model_type": "mixtral"}) == "MixtralForCausalLM"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_dictionary_is_keyed_by_architecture(name: str) -> None:
    assert read_model(CONFIGS[name]).architecture == name


def test_families_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, moetrain.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("architecture", CONFIGS)
def test_flops_are_those_that_torch_counts(architecture: str) -> None:
    """Of transformers' forward pass, whose eager attention computes all pairs."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[architecture])
    config._attn_implementation = config._experts_implementation = "eager"
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None])
    wanted = counter.get_total_flops()
    assert read_model(CONFIGS[architecture]).flops(tokens, tokens**2) == wanted
