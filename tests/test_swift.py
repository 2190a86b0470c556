"""ms-swift's commands and recipes: both directions, and what is said about the rest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moetrain.config.load import load_recipe, recipe_from
from moetrain.config.method import MethodConfig
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError
from moetrain.interop.swift import from_swift, to_swift
from moetrain.interop.swift.convert import keys_of
from moetrain.interop.swift.decides import DECIDING, SAMPLED
from moetrain.interop.swift.shell import read_command
from moetrain.run.dry_run import dry_run

ROOT = Path(__file__).parent.parent
BASE = "megatron sft --model /m --dataset d.jsonl --output_dir o --train_iters 100 --max_length 512"
DPO = BASE.replace("sft", "rlhf --rlhf_type dpo", 1)
LORA = f"{BASE} --tuner_type lora"
EPOCHS = BASE.replace("--train_iters 100", "--num_train_epochs 2")
GRPO = DPO.replace("dpo", "grpo") + " --reward_funcs accuracy"
UNCARRIED = ("not carried", "check")


def notes(text: str, *kinds: str, steps: int | None = None) -> dict[str, str]:
    return {n.what: n.why for n in from_swift(text, steps).notes if n.kind in kinds}


def keys(text: str) -> dict[str, Any]:
    """Every key of the recipe that the command makes, defaults too."""
    return keys_of(recipe_from(from_swift(text).content).model_dump(mode="json"))


# What each flag means, told apart from the table.
MEANINGS = [
    (BASE, "--seed 7", {"seed": 7}),
    (BASE, "--tensor_model_parallel_size 4", {"parallel.tp": 4, "parallel.sp": False}),
    (BASE, "--tensor_model_parallel_size 4 --sequence_parallel true", {"parallel.sp": True}),
    (BASE, "--pipeline_model_parallel_size 2", {"parallel.pp": 2}),
    (
        BASE,
        "--pipeline_model_parallel_size 4 --virtual_pipeline_model_parallel_size 2"
        " --decoder_first_pipeline_num_layers 3 --decoder_last_pipeline_num_layers 5",
        {"parallel.vpp": 2, "parallel.first_stage_layers": 3, "parallel.last_stage_layers": 5},
    ),
    (BASE, "--expert_model_parallel_size 8", {"parallel.ep": 8}),
    (BASE, "--expert_tensor_parallel_size 2", {"parallel.etp": 2}),
    (BASE, "--context_parallel_size 2", {"parallel.cp": 2}),
    (BASE, "--torch_dtype float32 --fp16 false", {"model.dtype": "fp32"}),
    (BASE, "--torch_dtype bfloat16", {"model.dtype": "bf16"}),
    (BASE, "--enable_dft_loss true", {"method.name": "dft"}),
    (DPO, "--beta 0.075", {"method.name": "dpo", "method.beta": 0.075}),
    (DPO, "--label_smoothing 0.1", {"method.label_smoothing": 0.1}),
    (DPO, "--rpo_alpha 1", {"method.rpo_alpha": 1.0}),
    (DPO, "--loss_type ipo", {"method.name": "ipo"}),
    (DPO, "--loss_type apo_zero", {"method.name": "dpo", "method.loss_type": ["apo_zero"]}),
    (DPO, "--loss_type sppo_hard --beta 0.4", {"method.loss_type": ["sppo_hard"]}),
    (DPO, "--loss_type exo_pair", {"method.label_smoothing": 1e-3}),
    (
        DPO,
        "--rlhf_type kto --loss_type apo_zero_unpaired",
        {"method.name": "kto", "method.loss_type": "apo_zero_unpaired"},
    ),
    (DPO, "", {"method.reference": "start"}),
    (DPO, "--tuner_type lora", {"method.reference": "start"}),
    (DPO, "--ref_model /m", {"method.reference": "start"}),
    (DPO, "--ref_model /other", {"method.reference": "/other"}),
    (DPO, "--adapters /a", {"method.reference": "base"}),
    (DPO, "--adapters /a --ref_adapters /a", {"method.reference": "start"}),
    (DPO, "--loss_type hinge", {"method.name": "hinge"}),
    (DPO, "--loss_type robust", {"method.name": "robust", "method.label_smoothing": 0.0}),
    (DPO, "--loss_type robust --label_smoothing 0.2", {"method.label_smoothing": 0.2}),
    (
        DPO,
        "--rlhf_type kto --desirable_weight 2 --undesirable_weight 0.5",
        {"method.name": "kto", "method.desirable_weight": 2.0, "method.undesirable_weight": 0.5},
    ),
    (
        DPO,
        "--rlhf_type rm --center_rewards_coefficient 0.01",
        {"method.name": "reward", "method.center_rewards": 0.01},
    ),
    (LORA, "--lora_rank 16", {"adapter.rank": 16, "adapter.alpha": 32.0, "adapter.type": "lora"}),
    (LORA, "--lora_alpha 64", {"adapter.alpha": 64.0, "adapter.rank": 8}),
    (LORA, "--use_rslora true", {"adapter.type": "rslora"}),
    (LORA, "--target_modules all-linear all-router", {"adapter.target": ["all-router"]}),
    (LORA, "--target_modules all-router", {"adapter.target": ["mlp.gate"]}),
    (
        LORA,
        "--target_modules linear_qkv linear_proj",
        {"adapter.target": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    (
        LORA,
        "--target_modules linear_fc1 linear_fc2",
        {"adapter.target": ["gate_proj", "up_proj", "down_proj"]},
    ),
    (BASE, "--adapters /peft", {"adapter.path": "/peft"}),
    (BASE, "--packing true", {"data.pack": True}),
    (BASE, "--packing false", {"data.pack": False}),
    (BASE, "--max_length 8192", {"data.seq_len": 8192}),
    (BASE, "--split_dataset_ratio 0.01", {"data.eval_share": 0.01, "train.eval_every": 500}),
    (BASE, "--split_dataset_ratio 0", {"data.eval_share": 0, "train.eval_every": None}),
    (
        BASE,
        "--split_dataset_ratio 0.01 --save_steps 200",
        {"data.eval_share": 0.01, "train.eval_every": 200},
    ),
    (BASE, "--dataset a.jsonl#500", {"data.train": ["a.jsonl"], "data.take": [500]}),
    (
        BASE,
        "--dataset a.jsonl b.jsonl#20 'c d.jsonl#7'",
        {"data.train": ["a.jsonl", "b.jsonl", "c d.jsonl"], "data.take": [None, 20, 7]},
    ),
    (BASE, "--system 'You are terse.'", {"data.system": "You are terse."}),
    (BASE, "--system 'one\\ntwo'", {"data.system": "one\ntwo"}),
    (BASE, "--val_dataset a.jsonl b.jsonl", {"data.eval": ["a.jsonl", "b.jsonl"]}),
    (BASE, "--truncation_strategy delete", {"data.too_long": "reject"}),
    (BASE, "--truncation_strategy right", {"data.too_long": "truncate"}),
    (BASE, "--truncation_strategy left", {"data.too_long": "keep_end"}),
    (BASE, "--dataset_num_proc 8", {"data.num_workers": 8}),
    (BASE, "--train_dataloader_shuffle false", {"data.shuffle": False}),
    (BASE, "--micro_batch_size 2 --global_batch_size 32", {"train.global_batch": 32}),
    (BASE, "--train_iters 7", {"train.steps": 7}),
    (BASE, "--lr 2e-5 --min_lr 2e-6", {"optim.lr": 2e-5, "optim.min_lr": 2e-6}),
    (BASE, "--lr_warmup_iters 10", {"optim.warmup": 10}),
    (BASE, "--lr_warmup_fraction 0.05", {"optim.warmup": 5}),
    (BASE, "--lr_warmup_iters 10 --lr_decay_iters 60", {"optim.decay_steps": 50}),
    (BASE, "--lr_decay_style constant", {"optim.schedule": "constant"}),
    (
        BASE,
        "--lr_decay_style linear --lr_warmup_iters 10",
        {"optim.schedule": "linear", "optim.warmup": 10, "optim.decay_steps": None},
    ),
    (
        BASE,
        "--lr_decay_style linear --lr_warmup_iters 10 --lr_decay_iters 60",
        {"optim.schedule": "linear", "optim.decay_steps": 50},
    ),
    (EPOCHS, "--lr_warmup_fraction 0.05", {"optim.warmup": 0.05, "train.epochs": 2}),
    (EPOCHS, "--lr_warmup_fraction 0", {"optim.warmup": 0}),
    (EPOCHS, "--lr_warmup_fraction 0.1 --lr_warmup_iters 7", {"optim.warmup": 0.1}),
    (EPOCHS, "--lr_warmup_iters 7", {"optim.warmup": 7}),
    (EPOCHS, "--lr_decay_style linear", {"optim.schedule": "linear"}),
    (
        BASE,
        "--lr_decay_style WSD --lr_wsd_decay_style minus_sqrt --lr_wsd_decay_iters 20",
        {"optim.schedule": "wsd", "optim.wsd_decay": "minus_sqrt", "optim.decay_steps": 20},
    ),
    (
        BASE,
        "--lr_decay_style WSD --lr_wsd_decay_style cosine --lr_wsd_decay_iters 20",
        {"optim.schedule": "wsd", "optim.wsd_decay": "cosine", "optim.decay_steps": 20},
    ),
    (BASE, "--weight_decay 0 --clip_grad 0.5", {"optim.weight_decay": 0, "optim.clip_grad": 0.5}),
    (BASE, "--adam_beta1 0.8 --adam_beta2 0.9", {"optim.beta1": 0.8, "optim.beta2": 0.9}),
    (BASE, "--adam_eps 1e-6", {"optim.eps": 1e-6}),
    (
        BASE,
        "--optimizer muon",
        {
            "optim.name": "muon",
            "optim.muon_momentum": 0.9,
            "optim.muon_nesterov": False,
            "optim.muon_num_ns_steps": 5,
            "optim.muon_scale_mode": "spectral",
            "optim.muon_extra_scale_factor": 1.0,
        },
    ),
    (BASE, "--optimizer muon --muon_momentum 0.8", {"optim.muon_momentum": 0.8}),
    (BASE, "--optimizer muon --muon_use_nesterov true", {"optim.muon_nesterov": True}),
    (BASE, "--optimizer muon --muon_num_ns_steps 7", {"optim.muon_num_ns_steps": 7}),
    (
        BASE,
        "--optimizer muon --muon_scale_mode unit_rms_norm --muon_extra_scale_factor 0.2",
        {"optim.muon_scale_mode": "unit_rms_norm", "optim.muon_extra_scale_factor": 0.2},
    ),
    (
        BASE,
        "--optimizer_cpu_offload true --optimizer_offload_fraction 0.7",
        {"optim.offload": 0.7},
    ),
    (BASE, "--exp_avg_dtype bf16 --exp_avg_sq_dtype bf16", {"optim.state_dtype": "bf16"}),
    (BASE, "--main_grads_dtype bf16", {"optim.grad_dtype": "bf16"}),
    (
        BASE,
        "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
        {"train.recompute": "full"},
    ),
    (BASE, "--recompute_granularity none", {"train.recompute": "none"}),
    (
        BASE,
        "--recompute_granularity full --recompute_method block --recompute_num_layers 4",
        {
            "train.recompute": "full",
            "megatron": {"recompute_method": "block", "recompute_num_layers": 4},
        },
    ),
    (
        BASE,
        "--recompute_modules core_attn mlp",
        {"train.recompute": "selective", "megatron": {"recompute_modules": ["core_attn", "mlp"]}},
    ),
    (BASE, "--save_steps 50", {"checkpoint.every": 50}),
    (BASE, "--val_dataset a.jsonl --save_steps 50", {"train.eval_every": 50}),
    (BASE, "--val_dataset a.jsonl --eval_steps 20", {"train.eval_every": 20}),
    (BASE, "--val_dataset a.jsonl --eval_iters 3", {"train.eval_packs": 48}),
    (BASE, "--save_total_limit 4", {"checkpoint.keep": 4, "checkpoint.best": None}),
    (
        BASE,
        "--val_dataset e.jsonl --save_total_limit 4 --metric_for_best_model loss",
        {"checkpoint.keep": 3, "checkpoint.best": "eval_loss"},
    ),
    (BASE, "--no_save_optim true", {"checkpoint.save_optimizer": False}),
    (BASE, "--save_safetensors false", {"checkpoint.export_hf": False}),
    (LORA, "--save_safetensors true", {"checkpoint.export_hf": True}),
    (LORA, "--save_safetensors true --merge_lora false", {"checkpoint.export_hf": False}),
    (BASE, "--moe_aux_loss_coeff 1e-3", {"router.aux_loss": 1e-3}),
    (
        BASE,
        "--moe_aux_loss_coeff 1e-3 --moe_router_load_balancing_type global_aux_loss",
        {"router.aux_loss": 1e-3, "router.balance": "global"},
    ),
    (LORA, "", {"adapter.dropout": 0.05}),
    (LORA, "--lora_dropout 0.1", {"adapter.dropout": 0.1}),
    (LORA, "--lorap_lr_ratio 16", {"adapter.loraplus_lr_ratio": 16}),
    (BASE, "--moe_z_loss_coeff 1e-3", {"router.z_loss": 1e-3}),
    (
        BASE,
        "--report_to wandb --wandb_project p --wandb_exp_name n",
        {"observe.wandb": {"project": "p", "name": "n"}, "observe.tensorboard": False},
    ),
    (
        BASE,
        """--megatron_extra_kwargs '{"moe_permute_fusion": true}'""",
        {"megatron": {"moe_permute_fusion": True}},
    ),
    # what ms-swift takes without a flag
    (
        BASE,
        "",
        {
            "method.name": "sft",
            "seed": 42,
            "data.pack": False,
            "data.too_long": "reject",
            "train.global_batch": 16,
            "train.recompute": "selective",
            "checkpoint.every": 500,
            "checkpoint.export_hf": True,
            "optim.lr": 1e-5,
            "optim.min_lr": 0,
            "optim.schedule": "cosine",
            "optim.warmup": 0,
            "optim.decay_steps": None,
            "optim.beta1": 0.9,
            "optim.beta2": 0.95,
            "optim.eps": 1e-8,
            "optim.weight_decay": 0.1,
            "optim.clip_grad": 1,
            "optim.offload": 0,
            "train.micro_batch": 1,
            "router.aux_loss": 0,
            "router.z_loss": 0,
            "checkpoint.save_optimizer": True,
            "observe.tensorboard": True,
            "adapter.rank": None,
            "cluster.nodes": None,
        },
    ),
    (LORA, "", {"optim.lr": 1e-4, "adapter.rank": 8, "adapter.target": ["all-linear"]}),
    (BASE.replace("sft", "rlhf"), "", {"method.name": "dpo", "method.beta": 0.1}),
    (BASE.replace("sft", "pt"), "", {"method.name": "cpt"}),
    (
        GRPO,
        "",
        {
            "method.name": "grpo",
            "method.beta": 0.04,
            "method.clip_low": 0.2,
            "method.clip_high": 0.2,
            "method.mismatch": "none",
            "method.inner_steps": 1,
            "rollout.engine": "vllm",
            "rollout.group_size": 8,
            "rollout.prompts_per_step": 2,
            "rollout.max_tokens": 512,
            "rollout.temperature": 0.9,
            "data.seq_len": 1024,  # --max_length 512 is the prompt's
            "train.steps": 100,
            "checkpoint.every": 500,
        },
    ),
    (
        GRPO,
        "--global_batch_size 64 --num_generations 4 --steps_per_generation 2 --save_steps 50"
        " --max_completion_length 2048 --temperature 1.0 --beta 0 --epsilon 0.1 --epsilon_high 0.3",
        {
            "rollout.prompts_per_step": 32,
            "rollout.group_size": 4,
            "method.inner_steps": 2,
            "train.steps": 50,
            "checkpoint.every": 25,
            "rollout.max_tokens": 2048,
            "data.seq_len": 2560,
            "rollout.temperature": 1.0,
            "method.beta": 0,
            "method.clip_low": 0.1,
            "method.clip_high": 0.3,
        },
    ),
    (GRPO, "--generation_batch_size 64", {"method.inner_steps": 4, "rollout.prompts_per_step": 8}),
    (
        GRPO,
        "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4",
        {"method.name": "gspo", "method.clip_low": 3e-4, "method.clip_high": 4e-4},
    ),
    (
        GRPO,
        "--importance_sampling_level sequence_token --delta 1.5 --top_entropy_quantile 0.2"
        " --off_policy_sequence_mask_delta 0.1",
        {
            "method.name": "gspo",
            "method.delta": 1.5,
            "method.off_policy_mask_threshold": 0.1,
            "method.top_entropy_quantile": 0.2,
        },
    ),
    (GRPO, "--delta none", {"method.delta": None, "method.scale_rewards": "group"}),
    (GRPO, "--loss_type dr_grpo", {"method.scale_rewards": "group"}),
    (
        GRPO,
        "--loss_type cispo --epsilon_high 5 --importance_sampling_level sequence",
        {"method.clip_high": 4.0, "method.importance_sampling_level": "sequence"},
    ),
    (GRPO, "--loss_type cispo", {"method.name": "cispo", "method.clip_high": -0.8}),
    (
        GRPO,
        "--loss_type sapo --tau_neg 2",
        {"method.name": "sapo", "method.tau_pos": 1.0, "method.tau_neg": 2.0},
    ),
    (
        GRPO,
        "--advantage_estimator rloo --kl_in_reward true",
        {
            "method.advantage_estimator": "rloo",
            "method.kl_in_reward": True,
            "method.use_bias_correction_kl": True,
        },
    ),
    (
        GRPO,
        "--advantage_estimator reinforce_plus_plus --scale_rewards batch",
        {
            "method.advantage_estimator": "reinforce_plus_plus_baseline",
            "method.scale_rewards": "batch",
        },
    ),
    (
        GRPO,
        "--advantage_estimator reinforce_plus_plus --scale_rewards none",
        {"method.advantage_estimator": "grpo", "method.scale_rewards": "none"},
    ),
    (
        GRPO.replace("megatron", "swift"),
        "--advantage_estimator rloo",
        {
            "method.advantage_estimator": "rloo",
            "method.scale_rewards": "none",
            "method.kl_in_reward": True,
        },
    ),
    (
        GRPO,
        "--loss_type dr_grpo --scale_rewards none --max_completion_length 64",
        {"method.name": "dr_grpo", "rollout.max_tokens": 64, "method.length": 64},
    ),
    (
        GRPO,
        "--loss_type dapo --dynamic_sample true --epsilon_high 0.28",
        {
            "method.name": "dapo",
            "method.dynamic_sampling": True,
            "method.clip_high": 0.28,
            "method.max_rounds": 3,
        },
    ),
    (
        GRPO,
        "--dynamic_sample true --max_resample_times 5 --reward_funcs accuracy soft_overlong"
        " --soft_cache_length 100 --soft_max_length 400",
        {
            "method.name": "grpo",
            "method.dynamic_sampling": True,
            "method.max_rounds": 5,
            "method.max_length": 400,
            "method.soft_length": 100,
        },
    ),
    (
        GRPO,
        "--loss_type dapo --reward_funcs accuracy soft_overlong --soft_cache_length 100",
        {
            "method.dynamic_sampling": False,
            "method.max_length": 512,
            "method.soft_length": 100,
        },
    ),
    (
        GRPO,
        "--rollout_importance_sampling_mode token_truncate"
        " --rollout_importance_sampling_threshold 3",
        {"method.mismatch": "tis", "method.mismatch_cap": 3},
    ),
    (
        GRPO,
        "--vllm_gpu_memory_utilization 0.5 --vllm_tensor_parallel_size 2"
        " --vllm_max_model_len 8192 --vllm_enforce_eager true",
        {
            "rollout.gpu_memory": 0.5,
            "rollout.tensor_parallel": 2,
            "rollout.engine_args": {"max_model_len": 8192, "enforce_eager": True},
        },
    ),
    (
        GRPO,
        "--vllm_mode server --vllm_server_host 10.0.0.1 --vllm_server_port 8001",
        {"rollout.address": ["http://10.0.0.1:8001"]},
    ),
    (
        GRPO,
        "--temperature 0.6 --top_p 0.95 --top_k 20 --repetition_penalty 1.1",
        {"rollout.top_p": 0.95, "rollout.top_k": 20, "rollout.repetition_penalty": 1.1},
    ),
    (GRPO, "--stop_words '</a>' 'x y'", {"rollout.stop": ["</a>", "x y"]}),
    (GRPO, "--top_p 1 --top_k -1 --repetition_penalty 1 --stop_words none", {}),
    (GRPO, "--router_replay_mode R3", {"rollout.routing_replay": True}),
    (GRPO, "--overlong_filter true", {"method.truncated": "mask"}),
    (GRPO, "--enable_thinking false", {"data.chat_template_kwargs": {"enable_thinking": False}}),
]


@pytest.mark.parametrize(("base", "flags", "expected"), MEANINGS)
def test_a_flag_means(base: str, flags: str, expected: dict[str, Any]) -> None:
    found = keys(f"{base} {flags}")
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(("base", "flags", "expected"), MEANINGS)
def test_the_way_back_says_the_same(base: str, flags: str, expected: dict[str, Any]) -> None:
    recipe = recipe_from(from_swift(f"{base} {flags}").content)
    exported = to_swift(recipe.model_dump(mode="json"))
    assert not [note for note in exported.notes if note.kind == "not carried"]
    assert recipe_from(from_swift(exported.text).content) == recipe


def test_several_passes_and_a_moving_reference() -> None:
    """Of `swift`: Megatron-SWIFT has neither."""
    moving = "--num_iterations 2 --sync_ref_model true --ref_model_sync_steps 100 --save_steps 50"
    text = GRPO.replace("megatron", "swift")
    found = keys(f"{text} {moving}")
    names = ("num_iterations", "ref_model_sync_steps", "ref_model_mixup_alpha")
    assert [found[f"method.{name}"] for name in names] == [2, 50, 0.6]
    assert found["checkpoint.every"] == 25
    assert notes(f"{text} {moving} --beta 0", "implied")["--sync_ref_model true"].endswith(
        "reference"
    )
    recipe = recipe_from(from_swift(f"{text} {moving}").content)
    lost = [
        n.what for n in to_swift(recipe.model_dump(mode="json")).notes if n.kind == "not carried"
    ]
    assert {f"method.{name}={found[f'method.{name}']}" for name in names[:2]} <= {*lost}


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


small = st.floats(1e-6, 0.5, allow_nan=False)
count = st.integers(1, 64)
path = st.sampled_from(["a.jsonl", "/data/b c.jsonl", "it's.jsonl", "$HOME/x.jsonl"])
METHODS = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["sft", "dft", "cpt"])}),
    st.fixed_dictionaries(
        {"name": st.just("dpo")}, optional={"beta": small, "label_smoothing": st.floats(0, 0.4),
                                            "rpo_alpha": small},
    ),
    st.fixed_dictionaries({"name": st.sampled_from(["ipo", "hinge"])}, optional={"beta": small}),
    st.fixed_dictionaries(
        {"name": st.just("robust")}, optional={"beta": small, "label_smoothing": st.floats(0, 0.4)}
    ),
    st.fixed_dictionaries(
        {"name": st.just("kto")},
        optional={"beta": small, "desirable_weight": small, "undesirable_weight": small},
    ),
    st.fixed_dictionaries({"name": st.just("reward")}, optional={"center_rewards": small}),
)  # fmt: skip
ADAPTERS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"path": path}),
    maybe(
        type=st.sampled_from(["lora", "rslora"]),
        rank=count,
        alpha=small,
        target=st.sampled_from(
            [["all-linear"], ["all-router"], ["q_proj", "k_proj", "v_proj", "o_proj"],
             ["experts", "mlp.gate"], ["gate_proj", "up_proj", "down_proj"]]
        ),
    ),
)  # fmt: skip
PARALLEL = st.one_of(
    maybe(ep=count, etp=count, cp=count),
    st.fixed_dictionaries({"tp": st.integers(2, 8)}, optional={"sp": st.booleans()}),
    st.fixed_dictionaries(
        {"pp": st.integers(2, 8)},
        optional={"vpp": count, "first_stage_layers": count, "last_stage_layers": count},
    ),
)
OPTIM = maybe(
    lr=small, min_lr=small, warmup=st.integers(0, 99), decay_steps=count,
    schedule=st.sampled_from(["cosine", "linear"]), beta1=small, beta2=small, eps=small,
    weight_decay=small,
    clip_grad=small, offload=small, state_dtype=st.sampled_from(["fp32", "bf16", "fp8"]),
    grad_dtype=st.sampled_from(["fp32", "bf16"]),
) | st.fixed_dictionaries(
    {"schedule": st.just("wsd"), "decay_steps": count},
    optional={
        "wsd_decay": st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"]),
        "warmup": count,
    },
) | maybe(schedule=st.just("constant"), warmup=count)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of everything that the table carries."""
    micro, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    length = draw(st.sampled_from([{"steps": 120}, {"epochs": 3.0}]))
    train = draw(
        maybe(
            recompute=st.sampled_from(["none", "selective", "full"]),
            overlap=st.booleans(),
        )
    )
    method = draw(METHODS)
    held_out = draw(maybe(eval=st.lists(path, max_size=2)))
    train_paths = draw(st.lists(path, min_size=1, max_size=3))
    if method["name"] != "cpt":
        if not held_out.get("eval"):
            held_out |= draw(maybe(eval_share=small))
        numbers = st.lists(st.none() | count, min_size=len(train_paths), max_size=len(train_paths))
        held_out |= draw(maybe(take=numbers.filter(any)))
        held_out |= draw(maybe(system=st.sampled_from(["Be terse.", "a \"b\"\n$c 'd'"])))
    if method["name"] in ("sft", "dft"):
        held_out |= draw(maybe(empty_thoughts=st.booleans()))
    optim = draw(OPTIM)
    if "epochs" in length and "decay_steps" not in optim and draw(st.booleans()):
        optim = {key: value for key, value in optim.items() if key != "warmup"}
        optim["warmup"] = draw(small)
    if held_out.get("eval") or held_out.get("eval_share"):
        train |= draw(maybe(eval_every=count))
        if draw(st.booleans()):
            train["eval_packs"] = micro * accumulation * draw(count)
    data = draw(
        maybe(
            pack=st.booleans() if method["name"] != "cpt" else st.just(True),
            too_long=st.sampled_from(["truncate", "keep_end", "reject"])
            if method["name"] != "cpt"
            else st.just("truncate"),
            shuffle=st.booleans() if method["name"] != "cpt" else st.just(True),
            num_workers=st.integers(0, 8),
        )
    )
    judged: Any = TypeAdapter(MethodConfig).validate_python(method).judged_by
    measured = held_out.get("eval") or held_out.get("eval_share")
    best = draw(st.sampled_from([None, *judged])) if measured else None
    content = {
        "run_dir": draw(st.sampled_from(["runs/x", "/a b/c"])),
        "seed": draw(st.integers(0, 2**31)),
        "model": {"path": "/models/m", "dtype": draw(st.sampled_from(["fp32", "bf16"]))},
        "parallel": draw(PARALLEL),
        "method": method,
        "data": {"train": train_paths, "seq_len": draw(count)}
        | held_out
        | data,
        "optim": optim,
        "train": length
        | train
        | {"micro_batch": micro, "global_batch": micro * accumulation},
        "router": draw(maybe(aux_loss=small, z_loss=small, freeze=st.booleans())),
        "adapter": (adapter := draw(ADAPTERS)),
        "trainable": draw(
            st.sampled_from([None, ["self_attn"], ["experts", "mlp.gate"], ["lm_head"]])
            if adapter is None
            else st.none()
        ),
        "checkpoint": {"best": best, "keep": draw(st.integers(1 if best else 2, 9))}
        | draw(maybe(every=count, save_optimizer=st.booleans(), export_hf=st.booleans())),
        "observe": draw(
            st.sampled_from(
                [{}, {"wandb": {"project": "p"}},
                 {"tensorboard": False, "wandb": {"project": "p", "name": "n"}}]
            )
        ),
        "cluster": draw(maybe(nodes=count, gpus_per_node=count)),
        "megatron": draw(st.sampled_from([{}, {"moe_token_dispatcher_type": "flex"}])),
    }  # fmt: skip
    return recipe_from(content)


ONLINE = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["grpo", "gspo", "dr_grpo"])}),
    st.fixed_dictionaries(
        {"name": st.just("dapo"), "dynamic_sampling": st.booleans(), "soft_length": st.just(0)}
    ),
    st.fixed_dictionaries(
        {"name": st.just("dapo"), "soft_length": st.just(9), "max_length": st.just(99)}
    ),
)


@st.composite
def online_recipes(draw: st.DrawFn) -> Recipe:
    """Recipes with rollouts, of what the table carries."""
    size, prompts, inner = draw(st.integers(2, 8)), draw(st.integers(1, 6)), draw(count)
    inner = inner if size * prompts % inner == 0 else 1
    beta = draw(st.sampled_from([0.0, 0.01]))
    mismatch = draw(
        st.sampled_from(
            [
                {"mismatch": "none"},
                {"mismatch": "tis", "mismatch_cap": 3.0},
                {"mismatch": "mask", "mismatch_floor": 0.0},
            ]
        )
    )
    method: dict[str, Any] = draw(ONLINE) | mismatch
    method |= draw(maybe(truncated=st.sampled_from(["reward", "mask"])))
    if beta:
        method["use_bias_correction_kl"] = False
    answer = draw(count) + 99
    dynamic = method["name"] == "dapo" and method.get("dynamic_sampling", True)
    if method["name"] == "dr_grpo":
        method["length"] = answer
    data = draw(maybe(take=st.just([7]), shuffle=st.booleans(), system=st.just("x"),
                      chat_template_kwargs=st.just({"enable_thinking": False})))  # fmt: skip
    if draw(st.booleans()):
        data |= draw(st.sampled_from([{"eval": ["e.jsonl"]}, {"eval_share": 0.125}]))
    rewards = draw(
        st.lists(
            st.sampled_from(
                ["accuracy", {"name": "format", "weight": 0.5},
                 {"name": "repetition_penalty", "options": {"ngram_size": 4, "max_penalty": -0.5}},
                 {"name": "cosine", "options": {"unit": "tokens", "max_len": 77,
                  "min_value_wrong": -0.75, "max_value_correct": 2.0}}]
            ),
            min_size=1, max_size=3, unique_by=str,
        )
    )  # fmt: skip
    return recipe_from(
        {
            "run_dir": "r",
            "seed": 1,
            "model": {"path": "/m"},
            "method": method
            | {"beta": beta, "clip_low": draw(small), "clip_high": draw(small)}
            | {"inner_steps": min(inner, prompts)},
            "data": {"train": ["a.jsonl"], "seq_len": answer + draw(count)} | data,
            "rollout": {
                "engine": "vllm",
                "group_size": size,
                "prompts_per_step": prompts,
                "max_tokens": answer,
                "temperature": draw(st.sampled_from([0.6, 1.0, 1.3])),
            }
            | draw(
                maybe(
                    gpu_memory=st.just(0.5),
                    tensor_parallel=st.integers(1, 4),
                    routing_replay=st.booleans(),
                    address=st.just(["http://h:1"]),
                    engine_args=st.just({"max_model_len": 9, "block_size": 16}),
                    top_p=st.just(0.9),
                    top_k=st.just(20),
                    repetition_penalty=st.just(1.1),
                    stop=st.just(["</a>", "x y"]),
                )
            ),
            "rewards": rewards,
            "train": draw(st.sampled_from([{"steps": 30}, {"epochs": 2.0}][: 1 + (not dynamic)])),
            "checkpoint": draw(maybe(every=count)),
        }
    )


@settings(max_examples=150, deadline=None)
@given(online_recipes())
def test_round_trip_with_rollouts(recipe: Recipe) -> None:
    exported = to_swift(recipe.model_dump(mode="json"))
    assert not [str(note) for note in exported.notes if note.kind == "not carried"]
    imported = from_swift(exported.text)
    assert recipe_from(imported.content) == recipe
    assert not [str(note) for note in imported.notes if note.kind in UNCARRIED]


@settings(max_examples=300, deadline=None)
@given(recipes())
def test_round_trip(recipe: Recipe) -> None:
    exported = to_swift(recipe.model_dump(mode="json"))
    assert not [str(note) for note in exported.notes if note.kind == "not carried"]
    imported = from_swift(exported.text)
    assert recipe_from(imported.content) == recipe
    assert not [str(note) for note in imported.notes if note.kind in UNCARRIED]


# Flags that are lost: what is said, and by which word.
@pytest.mark.parametrize(
    ("base", "flags", "what", "why"),
    [
        (BASE, "--lora_dropout 0.1", "--lora_dropout 0.1", "no new adapter"),
        (BASE, "--lora_rank 8", "--lora_rank 8", "no new adapter"),
        (BASE.replace("sft", "pt"), "--split_dataset_ratio 0.01", "--split_dataset_ratio 0.01",
         "data.eval"),
        (BASE, "--finetune false", "--finetune false", "run_dir"),
        (BASE, "--made_up 3 4", "--made_up 3 4", "no key"),
        (BASE, "--recompute_modules core_attn moe", "--recompute_modules core_attn moe",
         "core_attn, mlp, layernorm"),
        (BASE, "--moe_aux_loss_coeff 0.1 0.2", "--moe_aux_loss_coeff 0.1 0.2", "one number"),
        (EPOCHS, "--lr_warmup_fraction 1.5", "--lr_warmup_fraction 1.5", "less than 1"),
        (GRPO, "--eval_iters 3", "--eval_iters 3", "rollout.eval_prompts"),
        (BASE, "--val_dataset a.jsonl#9", "--val_dataset a.jsonl#9", "make a file"),
    ],
)  # fmt: skip
def test_what_is_not_carried_is_named(base: str, flags: str, what: str, why: str) -> None:
    found = notes(f"{base} {flags}", "not carried")
    assert what in found, found
    assert why in found[what]


def test_no_flag_is_dropped_in_silence() -> None:
    """Whatever is given is in the recipe or in a note."""
    flags = "--alpha 1 --moe_grouped_gemm true --finetune true --attention_backend flash --x"
    told = notes(f"{BASE} {flags}", "not carried", "changed", "implied")
    assert {"--alpha 1", "--x", "--finetune true"} <= {*told}
    assert told["--moe_grouped_gemm true"] == "experts are grouped always"


def test_a_secret_is_not_repeated() -> None:
    told = str(notes(f"WANDB_API_KEY=abc123 {BASE} --hub_token t0p", "not carried", "implied"))
    assert "WANDB_API_KEY" in told and "--hub_token" in told
    assert "abc123" not in told and "t0p" not in told


def test_steps_count_a_fraction_of_epochs() -> None:
    text = BASE.replace("--train_iters 100", "--num_train_epochs 2") + " --lr_warmup_fraction 0.05"
    content = from_swift(text, steps=240).content
    assert content["optim"]["warmup"] == 12
    assert content["train"]["epochs"] == 2 and "steps" not in content["train"]


def test_what_changes_its_meaning_is_said() -> None:
    assert "records" in notes(BASE, "changed")["global_batch_size"]
    assert "global_batch_size" not in notes(f"{BASE} --packing true", "changed")
    assert "both together" in notes(DPO, "changed")["max_length"]
    assert "mean over tokens" in notes(f"{DPO} --loss_type ipo", "changed")["beta"]
    assert "index" in notes(BASE.replace("sft", "pt"), "changed")["dataset"]


def test_what_a_recipe_cannot_be_is_said() -> None:
    told = notes("megatron sft --model /m --output_dir o --train_iters 5", "check")
    assert "data" in told["recipe"]


SCRIPT = r"""#!/bin/bash
# megatron sft --model wrong
export NNODES=4
MODEL="/models/a b"   # one word
DATA='one.jsonl two.jsonl'
NPROC_PER_NODE=8 \
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type dpo \
    --model "$MODEL" --dataset $DATA 'three#5.jsonl' \
    --lr=${LR:-2e-5} --output_dir out/${NAME:-run} \
    --num-train-epochs 1 2>&1 | tee "log of $(date).txt"
echo done; exit $?
"""


def test_a_script() -> None:
    content = from_swift(SCRIPT).content
    assert content["model"] == {"path": "/models/a b"}
    assert content["data"]["train"] == ["one.jsonl", "two.jsonl", "three#5.jsonl"]
    assert content["optim"]["lr"] == 2e-5
    assert content["run_dir"] == "out/run"
    assert content["train"]["epochs"] == 1
    assert content["cluster"] == {"gpus_per_node": 8, "nodes": 4}


def test_names_of_ms_swift_3() -> None:
    text = BASE.replace("--output_dir", "--save").replace("--train_iters 100", "--max_epochs 2")
    text += " --train_type lora --save_interval 30 --eval_interval 15 --val_dataset e.jsonl"
    text += " --load_safetensors true --num_workers 4"
    found = keys(text)
    assert (found["run_dir"], found["train.epochs"], found["adapter.rank"]) == ("o", 2, 8)
    assert (found["checkpoint.every"], found["train.eval_every"]) == (30, 15)
    assert not notes(text, "not carried")


def test_open_variables_leave_the_world_open() -> None:
    command = read_command(f"NPROC_PER_NODE=4 NNODES=$WORLD {BASE}")
    assert command.open == {"NNODES"}
    content = from_swift(f"NPROC_PER_NODE=4 NNODES=$WORLD {BASE}").content
    assert content["cluster"] == {"gpus_per_node": 4}
    assert keys(f"NPROC_PER_NODE=4 {BASE}")["cluster.nodes"] == 1


def test_swift_without_megatron() -> None:
    text = "swift rlhf --rlhf_type simpo --model /m --dataset d.jsonl --output_dir o"
    found = keys(f"{text} --simpo_gamma 0.5 --target_modules q_proj k_proj v_proj --use_dora true")
    assert (found["method.name"], found["method.gamma"], found["method.beta"]) == ("simpo", 0.5, 2)
    assert (found["adapter.type"], found["train.epochs"]) == ("dora", 3)
    assert found["adapter.dropout"] == 0.05
    assert found["adapter.target"] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(ConfigError, match="--learning_rate -> --lr"):
        from_swift(f"{text} --learning_rate 1e-4")


def test_losses_that_only_swift_has() -> None:
    """Of pairs, several with weights; its Megatron trainer has one without."""
    text = DPO.replace("megatron", "swift") + " --ld_alpha 0.5"
    found = keys(f"{text} --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0")
    assert found["method.loss_type"] == ["sigmoid", "bco_pair", "sft"]
    assert found["method.loss_weights"] == [0.8, 0.2, 1.0]
    assert (found["method.ld_alpha"], found["method.reward_shift"]) == (0.5, "running")
    found = keys(f"{text} --loss_type discopop --discopop_tau 0.1")
    assert (found["method.loss_type"], found["method.discopop_tau"]) == (["discopop"], 0.1)
    told = notes(f"{text} --loss_type ipo sigmoid", "changed")
    assert "log-probs per token" in told["--loss_type ipo sigmoid"]
    assert "reference" in told["ld_alpha"]
    assert "method.ld_alpha" not in keys(f"{text} --ld_alpha 1")
    recipe = recipe_from(from_swift(f"{text} --loss_type bco_pair").content)
    lost = [
        n.what for n in to_swift(recipe.model_dump(mode="json")).notes if n.kind == "not carried"
    ]
    assert lost == ["method.loss_type=['bco_pair']", "method.ld_alpha=0.5"]


PPO = (
    "swift rlhf --rlhf_type ppo --model /m --reward_model /r --dataset d.jsonl --output_dir o"
    " --max_length 512 --train_iters 100"
)


def test_ppo_is_carried() -> None:
    """Of `swift` alone: TRL's, with what it takes without a flag."""
    found = keys(f"{PPO} --response_length 128 --global_batch_size 8 --num_mini_batches 2")
    assert {name: found[f"method.{name}"] for name in (
        "name", "beta", "clip_low", "clip_high", "value_weight", "lam", "num_iterations",
        "inner_steps", "mismatch", "missing_eos_penalty")} == {
        "name": "ppo", "beta": 0.05, "clip_low": 0.2, "clip_high": 0.2, "value_weight": 0.1,
        "lam": 0.95, "num_iterations": 4, "inner_steps": 2, "mismatch": "none",
        "missing_eos_penalty": 0.0}  # fmt: skip
    assert (found["rollout.group_size"], found["rollout.prompts_per_step"]) == (1, 8)
    assert (found["rollout.max_tokens"], found["data.seq_len"]) == (128, 640)
    assert found["rewards"][0]["name"] == "reward_model"
    assert found["rewards"][0]["options"]["path"] == "/r"
    found = keys(f"{PPO} --kl_coef 0.1 --missing_eos_penalty 1 --cliprange 0.3 --gamma 0.9")
    names = ("beta", "missing_eos_penalty", "clip_low", "clip_high", "gamma")
    assert [found[f"method.{name}"] for name in names] == [0.1, 1.0, 0.3, 0.3, 0.9]
    assert "head on the policy" in notes(PPO, "changed")["value model"]


CHORD = GRPO.replace("megatron", "swift") + " --chord_sft_dataset s.jsonl t.jsonl"


def test_chord_is_carried() -> None:
    mu = "--chord_mu_peak 0.5 --chord_mu_valley 0.1 --chord_mu_warmup_steps 3"
    found = keys(f"{CHORD} {mu} --chord_mu_decay_steps 70 --async_generate true")
    assert (found["method.name"], found["method.phi"]) == ("chord", False)
    assert found["data.demonstrations"] == ["s.jsonl", "t.jsonl"]
    schedule = [found[f"method.mu_{name}"] for name in ("peak", "valley", "warmup", "decay")]
    assert schedule == [0.5, 0.1, 3, 70]
    assert (found["method.clip_low"], found["rollout.steps_off"]) == (0.2, 1)
    assert keys(f"{CHORD} --chord_enable_phi_function true")["method.phi"] is True
    batch = "--chord_sft_per_device_train_batch_size 2"
    assert "method.packs" in notes(f"{CHORD} {batch}", "changed")[batch]
    with pytest.raises(ConfigError, match="name=chord"):  # no `megatron` command
        to_swift(recipe_from(from_swift(CHORD).content).model_dump(mode="json"))


# Each with a value that changes what is learned, where it does.
DECIDING_VALUES = {
    GRPO: {
        "num_beams": "2", "structured_outputs_regex": "[0-9]+",
        "response_prefix": "'<think>\\n'", "max_new_tokens": "99", "response_length": "99",
        "advantage_reweight": "rlsd", "sdar_loss_coef": "0.1", "reward_adapters": "/a",
        "reward_model_plugin": "mine",
    },
    DPO: {"sync_ref_model": "true", "sft_alpha": "0.1"},
    PPO: {"whiten_rewards": "true"},
    BASE: {
        "ld_alpha": "0.5", "loss_weights": "1 0.5",
        "neftune_noise_alpha": "5", "label_smoothing_factor": "0.1", "router_aux_loss_coef": "0.1",
        "dsa_indexer_loss_coeff": "0.1", "lisa_activated_layers": "2", "rope_scaling": "yarn",
        "resume_from_checkpoint": "o/checkpoint-3", "target_parameters": "w", "use_galore": "true",
        "apply_wd_to_qk_layernorm": "true", "early_stop_interval": "3", "lorap_lr_ratio": "16",
        "lr_scheduler_kwargs": "'{\"a\": 1}'", "lr_warmup_init": "1e-6", "optim": "adafactor",
        "preserve_thinking": "true", "freeze_parameters_ratio": "0.5", "init_weights": "pissa",
        "mtp_num_layers": "1", "rpo_alpha": "1", "weight_decay_incr_style": "linear",
        "chord_sft_dataset": "s.jsonl",
    },
}  # fmt: skip
VALUES = [(base, flag, value) for base, own in DECIDING_VALUES.items()
          for flag, value in own.items()]  # fmt: skip


@pytest.mark.parametrize(("base", "flag", "value"), VALUES, ids=lambda value: str(value)[:20])
def test_what_decides_is_refused_unless_it_changes_nothing(
    base: str, flag: str, value: str
) -> None:
    plain = from_swift(base).content
    with pytest.raises(ConfigError, match=f"--{flag} .*another thing would be learned"):
        from_swift(f"{base} --{flag} {value}")
    for word in DECIDING[flag][0]:
        given = f"{base} --{flag} '{word}'"
        assert from_swift(given).content == plain, given
        assert notes(given, "not carried") == notes(base, "not carried"), given
    if base == GRPO and flag in SAMPLED:  # without rollouts it says nothing
        assert from_swift(f"{BASE} --{flag} {value}").content == from_swift(BASE).content


def test_every_deciding_flag_is_tried() -> None:
    assert {flag for _, flag, _ in VALUES} == DECIDING.keys()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no training command"),
        (f"{CHORD}#5", "--chord_sft_dataset s.jsonl t.jsonl#5: .*make a file"),
        (f"{CHORD} --loss_type dapo", "--chord_sft_dataset s.jsonl t.jsonl: .*--loss_type grpo"),
        ("megatron export --to_hf true", "tools/convert mcore2hf"),
        ("megatron export --to_mcore true --model m", "tools/convert hf2mcore"),
        ("megatron export --to_hf true --mcore_adapter a", "tools/convert merge"),
        ("megatron export --to_hf true --mcore_adapter a --merge_lora false", "convert adapter"),
        ("swift export --to_hf true --test_convert_precision true", "convert verify"),
        # what decides what is learned, and no recipe says
        (f"{LORA} --target_regex x", r"--target_regex x: .*adapter\.target"),
        (f"{LORA} --target_modules a b", "--target_modules a b: .*no counterpart"),
        (f"{LORA} --mcore_adapter /a", "--mcore_adapter /a: .*PEFT"),
        (f"{LORA} --modules_to_save lm_head", "--modules_to_save"),
        (f"{LORA} --optimizer muon", "--optimizer muon: .*adamw"),
        (f"{BASE} --optimizer sgd", "--optimizer sgd: .*adamw"),
        (f"{BASE} --lr_decay_style inverse-square-root", "inverse-square-root: .*cosine"),
        (f"{BASE} --freeze_parameters a", "--freeze_parameters a: .*Hugging Face"),
        (f"{BASE} --task_type embedding", "--task_type embedding: .*not trained here"),
        (f"{BASE} --task_type seq_cls --num_labels 3", "rlhf_type rm"),
        (f"{BASE} --task_type generative_reranker", "rerankers"),
        (f"{BASE} --mtp_num_layers 1", "multi-token"),
        (f"{BASE} --loss_scale hermes", "--loss_scale hermes: .*no hermes"),
        (f"{BASE} --loss_scale last_round", "no last_round"),
        (f"{BASE} --new_special_tokens a b", "--new_special_tokens a b: "),
        (f"{BASE} --dataset a.jsonl#0 --optimizer sgd", "sgd"),
        (f"{DPO} --loss_type aot", "--loss_type aot: .*sigmoid.* how batches are cut"),
        (f"{DPO} --loss_type sigmoid aot", "--loss_type sigmoid aot: .*how batches are cut"),
        (f"{DPO} --loss_type hinge --ld_alpha 0.5", "--ld_alpha 0.5: .*only dpo"),
        (f"{DPO} --reference_free true", "--reference_free true: .*reference"),
        (f"{DPO} --loss_scale all", "--loss_scale all: .*last turn"),
        (f"{DPO} --ref_adapters /a", "--ref_adapters /a: .*whole model"),
        (f"{DPO} --adapters /a --ref_adapters /b", "--ref_adapters /b: .*the base"),
        (f"{DPO} --mcore_ref_model /b", "--mcore_ref_model /b: .*--ref_model"),
        (f"{GRPO} --ref_model /other", "--ref_model /other: "),
        (f"{DPO} --rlhf_type gkd --teacher_model t", "gkd: distillation"),
        (f"{GRPO} --teacher_model t", "--teacher_model t: .*distillation"),
        (f"{GRPO} --multi_turn_scheduler s", "one turn"),
        (f"{GRPO} --loss_type real", "REAL is not here; a recipe has grpo, .*sapo"),
        (f"{GRPO} --scale_rewards gdpo", "--scale_rewards gdpo: .*added up"),
        (f"{DPO} --delta 2", "--delta 2: of methods with rollouts"),
        (f"{GRPO} --rollout_importance_sampling_mode sequence_mask", "sequence_mask: .*mean"),
        (f"{GRPO} --reward_funcs repetition --repetition_max_penalty 1", "pays for repetition"),
        (f"{GRPO} --reward_funcs mine", "FILE.py:FUNCTION"),
        (
            f"{GRPO} --reward_funcs accuracy soft_overlong --soft_cache_length 3"
            " --reward_weights 1 2",
            "a part of the method here, of weight 1",
        ),
        (f"{GRPO} --reward_weights 1 2", "1 numbers are wanted"),
        (f"{GRPO} --num_generations 5", "no whole number of groups"),
        (f"{GRPO} --generation_batch_size 20", "multiple of global_batch_size 16"),
        (f"{GRPO} --vllm_engine_kwargs [", "JSON mapping"),
        (f"{BASE}; {BASE}", "2 training commands"),
        (f"{BASE} --lr abc", "--lr abc: a number"),
        (f"{BASE} --lr_warmup_fraction 5e400", "5e400: a number"),
        (f"{BASE} --train_iters 1.5", "a whole number"),
        (f"{BASE} --packing maybe", "true or false"),
        (f"{BASE} --system 'open", "not closed"),
        (f"{BASE} --lr $LR", r"\$LR"),
        (f"{BASE} --lr $(cat lr)", r"\$\(cat lr\)"),
        ("megatron sft conf.yaml --lr 1", "conf.yaml"),
        (
            f"{BASE.replace('sft', 'rlhf')} --rlhf_type cpo",
            "--rlhf_type cpo: .*dpo, kto, rm and grpo",
        ),
        (f"{BASE} --truncation_strategy split", "--truncation_strategy split: data.too_long"),
        (f"{BASE} --tuner_type lora_llm", "full training and lora"),
    ],
)
def test_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_swift(text)


def test_export_names_what_ms_swift_cannot_say() -> None:
    content = {
        "run_dir": "r",
        "model": {"path": "/m", "tokenizer": "/t"},
        "method": {"name": "dpo", "kl_budget": 5.0},
        "data": {"train": ["d.jsonl"], "reference": "/r"},
        "train": {"epochs": 1.5},
        "adapter": {"type": "dora", "target": ["layers.3"]},
    }
    exported = to_swift(recipe_from(content).model_dump(mode="json"))
    told = {note.what for note in exported.notes if note.kind == "not carried"}
    assert told == {
        "adapter.target=['layers.3']",
        "adapter.type=dora",
        "data.reference=/r",
        "method.kl_budget=5.0",
        "model.tokenizer=/t",
        "train.epochs=1.5",
    }
    assert "--tuner_type lora" in exported.text and "megatron rlhf" in exported.text


@pytest.mark.parametrize("name", ["orpo", "simpo", "chord_sft"])
def test_methods_that_megatron_swift_has_not(name: str) -> None:
    base = from_swift(BASE).content | {"method": name}
    with pytest.raises(ConfigError, match=name):
        to_swift(recipe_from(base).model_dump(mode="json"))


def test_a_command_is_planned_with_a_name_of_the_hub() -> None:
    """Qwen2.5 is a family here, and its sizes are known by name."""
    text = BASE.replace("--model /m", "--model Qwen/Qwen2.5-7B-Instruct")
    recipe = recipe_from(from_swift(f"{text} --tensor_model_parallel_size 2").content)
    assert "Qwen2ForCausalLM, 7.616 B parameters" in dry_run(recipe, None)


def moetrain(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrain", "swift", *argv],
        capture_output=True, text=True, input=stdin, cwd=ROOT, check=False,
    )  # fmt: skip


def test_command_line(tmp_path: Path) -> None:
    recipe, script = tmp_path / "dpo.yaml", tmp_path / "run.sh"
    done = moetrain("import", f"{DPO} --beta 0.075 --made_up 3", "--out", str(recipe))
    assert (done.returncode, done.stdout) == (0, "")
    assert "moetrain: not carried: --made_up 3" in done.stderr
    assert load_recipe(recipe).method.model_dump()["beta"] == 0.075

    done = moetrain("export", str(recipe), "optim.lr=3e-5")
    assert done.returncode == 0
    assert "megatron rlhf \\\n    --rlhf_type dpo \\\n" in done.stdout
    assert "--lr 3e-05" in done.stdout

    script.write_text(done.stdout)
    for argv, stdin in ((["import", str(script)], ""), (["import", "-"], done.stdout)):
        again = moetrain(*argv, stdin=stdin)
        assert again.returncode == 0
        recipe.write_text(again.stdout)
        assert load_recipe(recipe).optim.lr == 3e-5

    missing = moetrain("import", "nothing.sh")
    assert missing.returncode == 2
    assert missing.stderr == (
        "moetrain: error: nothing.sh: No such file or directory. Give a script's path, or the "
        "command in quotes.\n"
    )
