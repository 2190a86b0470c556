"""What ms-swift 4.6 and a recipe both know: ONE table, read from either side. Which key a flag of
`Same` stands for is in `config/foreign.py`, which error messages read too.

Entries stand in the order in which they are read: an entry may look at the keys of those before it.
The names, defaults and meanings are those of Megatron-SWIFT's documented arguments.
"""

from collections.abc import Callable

from moetrain.config.method import SECTIONS
from moetrain.interop.swift.answers import Demonstrations, Sampled
from moetrain.interop.swift.codecs import (
    JSON,
    NOT,
    NUMBER,
    STEPS,
    TEXT,
    TRUTH,
    WHOLE,
    Choice,
    Entry,
    Keys,
    Option,
    Same,
)
from moetrain.interop.swift.datasets import DataSets, System
from moetrain.interop.swift.entries import (
    MODULES,
    TRAINED,
    EvalPacks,
    Keep,
    Length,
    Nodes,
    RecomputedParts,
    Reports,
    Weights,
)
from moetrain.interop.swift.methods import METHOD, PairLosses, is_smoothed, smoothing
from moetrain.interop.swift.online import (
    Divergence,
    Mismatch,
    OnlineBatch,
    OnlineLength,
    OnlineSteps,
    Servers,
)
from moetrain.interop.swift.optimizer import OPTIMIZER, has_adapter
from moetrain.interop.swift.policy import Advantages, Chosen, Clipping, Level, is_online
from moetrain.interop.swift.ppo import Ppo
from moetrain.interop.swift.reference import Reference
from moetrain.interop.swift.rewards import RewardFunctions
from moetrain.interop.swift.text import Thoughts

# Names that ms-swift 3 had for what 4 calls otherwise.
OLD_NAMES = {
    "adapter_load": "mcore_adapter",
    "eval_interval": "eval_steps",
    "load": "mcore_model",
    "log_interval": "logging_steps",
    "max_epochs": "num_train_epochs",
    "num_workers": "dataloader_num_workers",
    "ref_adapter_load": "mcore_ref_adapter",
    "ref_load": "mcore_ref_model",
    "save": "output_dir",
    "save_interval": "save_steps",
    "train_type": "tuner_type",
}

PAIRS = tuple(name for name, own in SECTIONS.items() if own.learns_from == "pairs")
CORPUS = tuple(name for name, own in SECTIONS.items() if own.learns_from == "corpus")


def method(*names: str) -> Callable[[Keys], bool]:
    """Whether the recipe's method is one of these."""
    return lambda keys: keys.get("method.name") in names


def _has(leaf: str) -> Callable[[Keys], bool]:
    """Whether the recipe's method has this key."""
    owners = {name for name, section in SECTIONS.items() if leaf in section.model_fields}
    return lambda keys: keys.get("method.name") in owners


def _of_records(keys: Keys) -> bool:
    return keys.get("method.name") not in CORPUS


def has_held_out(keys: Keys) -> bool:
    return bool(keys.get("data.eval") or keys.get("data.eval_share"))


def _new_adapter(keys: Keys) -> bool:
    return keys.get("adapter.type") is not None and keys.get("adapter.path") is None


def _beta(keys: Keys) -> float:
    return 0.04 if is_online(keys) else 2.0 if keys["method.name"] == "simpo" else 0.1


def _supervised(keys: Keys) -> bool:
    """Records that are packed once, before the run."""
    return _of_records(keys) and not is_online(keys)


def _run_dir(keys: Keys) -> str | None:
    path = str(keys.get("model.path", "")).rstrip("/")
    return f"megatron_output/{path.rpartition('/')[2]}" if path else None


def _pipelined(keys: Keys) -> bool:
    return keys.get("parallel.pp", 1) > 1


_MODEL: tuple[Entry, ...] = (
    Weights(),
    Same("output_dir", TEXT, default=_run_dir, along={"add_version": "false"}),
    Same("seed", WHOLE, default=42, alike=("data_seed",)),
    Choice("model.init", (Option(None, {}), Option("load", {}))),
    Choice(
        "model.dtype",
        (
            Option("fp32", {"torch_dtype": "float32", "fp16": "false"}, {"bf16": "false"}),
            Option("bf16", {}, {"torch_dtype": "bfloat16"}),
        ),
    ),
    Same("tensor_model_parallel_size", WHOLE, default=1),
    Same(
        "sequence_parallel",
        TRUTH,
        default=False,
        when=lambda keys: keys.get("parallel.tp", 1) > 1,
    ),
    Same("pipeline_model_parallel_size", WHOLE, default=1),
    Same("virtual_pipeline_model_parallel_size", WHOLE, when=_pipelined),
    Same("decoder_first_pipeline_num_layers", WHOLE),
    Same("decoder_last_pipeline_num_layers", WHOLE),
    Same("expert_model_parallel_size", WHOLE, default=1),
    Same("expert_tensor_parallel_size", WHOLE, default=1),
    Same("context_parallel_size", WHOLE, default=1),
)

_ADAPTER: tuple[Entry, ...] = (
    Same("adapters", TEXT, along={"tuner_type": "lora"}),
    Choice(
        "adapter.type",
        (
            Option(None, {"tuner_type": "full"}, {"use_rslora": "false"}),
            Option("rslora", {"tuner_type": "lora", "use_rslora": "true"}),
            Option("dora", {"tuner_type": "lora", "use_dora": "true"}, read_only=True),
            Option("pissa", {"tuner_type": "lora", "init_weights": "pissa"}, read_only=True),
            Option("olora", {"tuner_type": "lora", "init_weights": "olora"}, read_only=True),
            Option("lora", {"tuner_type": "lora"}, {"use_rslora": "false"}),
        ),
        defaults={"tuner_type": "full", "use_rslora": "false"},
        when=lambda keys: keys.get("adapter.path") is None,
        wanted="--tuner_type: a recipe has full training and lora",
        instead="lora",
    ),
    Same("lora_rank", WHOLE, default=8, when=_new_adapter, always=True),
    Same("lora_alpha", NUMBER, default=32.0, when=_new_adapter, always=True),
    Same(
        "target_modules",
        MODULES,
        default=lambda keys: ["all-linear"],
        when=_new_adapter,
        always=True,
    ),
    Same("lora_dropout", NUMBER, default=0.05, when=_new_adapter),
    Same("lorap_lr_ratio", NUMBER, default=1.0, when=has_adapter),
    Same("trainable_parameters_regex", TRAINED, along={"freeze_parameters_ratio": "1"}),
    Choice(
        "router.freeze",
        (
            Option(True, {"freeze_parameters_regex": r"\.mlp\.router\."}),
            Option(False, {}),
        ),
    ),
    Same(
        "moe_aux_loss_coeff",
        NUMBER,
        default=0.0,
    ),
    Choice(
        "router.balance",
        (
            Option("global", {"moe_router_load_balancing_type": "global_aux_loss"}),
            Option("sequence", {}, {"moe_router_load_balancing_type": "seq_aux_loss"}),
        ),
        when=lambda keys: bool(keys.get("router.aux_loss")),
    ),
    Same("moe_z_loss_coeff", NUMBER, default=0.0),
)

_NUMBERS_OF_METHODS: tuple[Entry, ...] = (
    Same(
        "beta",
        NUMBER,
        default=_beta,
        when=_has("beta"),
        always=True,
    ),
    PairLosses(),
    Same("label_smoothing", NUMBER, default=smoothing, when=is_smoothed),
    Same("rpo_alpha", NUMBER, default=0.0, when=_has("rpo_alpha")),
    Same("desirable_weight", NUMBER, default=1.0, when=method("kto")),
    Same("undesirable_weight", NUMBER, default=1.0, when=method("kto")),
    Same("simpo_gamma", NUMBER, default=1.0, when=method("simpo")),
    Same(
        "center_rewards_coefficient",
        NUMBER,
        default=0.0,
        when=method("reward"),
    ),
)

_DATA: tuple[Entry, ...] = (
    Reference(),
    DataSets(CORPUS),
    System(),
    Thoughts(),
    Same("max_length", WHOLE),
    Same("packing", TRUTH, default=False, when=_supervised),
    Choice(
        "data.too_long",
        (
            Option("truncate", {"truncation_strategy": "right"}),
            Option("keep_end", {"truncation_strategy": "left"}),
            Option("reject", {"truncation_strategy": "delete"}),
        ),
        defaults={"truncation_strategy": "delete"},
        when=_supervised,
    ),
    Choice(
        "data.shuffle",
        (
            Option(False, {"train_dataloader_shuffle": "false"}, {"dataset_shuffle": "false"}),
            Option(True, {}, {"train_dataloader_shuffle": "true", "dataset_shuffle": "true"}),
        ),
        defaults={"train_dataloader_shuffle": "true", "dataset_shuffle": "true"},
    ),
    Same("dataset_num_proc", WHOLE),
)

_TRAINING: tuple[Entry, ...] = (
    Length(),
    Same("global_batch_size", WHOLE, default=16, always=True),
    Same("micro_batch_size", WHOLE, default=1),
    Choice(
        "train.recompute",
        (
            Option(
                "full",
                {"recompute_granularity": "full"},
                {"recompute_method": "uniform", "recompute_num_layers": "1"},
            ),
            Option(
                "selective",
                {"recompute_granularity": "selective"},
                {"recompute_modules": "core_attn"},
            ),
            Option("none", {"recompute_granularity": "none"}),
        ),
        defaults={"recompute_granularity": "selective", "recompute_modules": "core_attn"},
    ),
    Choice(  # ms-swift 3 had it
        "train.deterministic",
        (Option(True, {"deterministic_mode": "true"}, read_only=True), Option(False, {})),
    ),
    Same("overlap_grad_reduce", TRUTH, alike=("overlap_param_gather",)),
    *OPTIMIZER,
)

_REST: tuple[Entry, ...] = (
    Same("save_steps", STEPS, default=500),
    Same(
        "eval_steps",
        STEPS,
        default=lambda keys: keys.get("checkpoint.every") if has_held_out(keys) else None,
    ),
    EvalPacks(),
    Keep(),
    Same("no_save_optim", NOT, default=True),
    Choice(
        "checkpoint.export_hf",
        (
            Option(True, {"save_safetensors": "true", "merge_lora": "true"}),
            Option(False, {"merge_lora": "false"}, {"save_safetensors": "true"}, read_only=True),
            Option(False, {"save_safetensors": "false"}),
        ),
        defaults={"save_safetensors": "true", "merge_lora": "true"},
        when=has_adapter,
    ),
    Same(
        "save_safetensors",
        TRUTH,
        default=True,
        when=lambda keys: not has_adapter(keys),
    ),
    Reports(),
    Nodes(),
    Same("megatron_extra_kwargs", JSON),
    RecomputedParts(),
)

_ONLINE: tuple[Entry, ...] = (
    OnlineBatch(),
    Same(
        "max_completion_length",
        WHOLE,
        default=512,
        when=is_online,
        always=True,
    ),
    Same("temperature", NUMBER, default=0.9, when=is_online, always=True),
    Level(),
    Clipping(),
    Advantages(),
    Chosen(),
    Divergence(),
    Mismatch(),
    Same("dynamic_sample", TRUTH, default=False, when=is_online),
    # With 3 there, three batches count: the third resampled one is graded, and not looked at.
    Same(
        "max_resample_times",
        WHOLE,
        default=3,
        when=lambda keys: keys.get("method.dynamic_sampling") is True,
    ),
    Choice(
        "method.truncated",
        (
            Option("mask", {"overlong_filter": "true"}),
            Option("reward", {}, {"overlong_filter": "false"}),
        ),
        when=is_online,
    ),
    Choice(
        "rollout.routing_replay",
        (
            Option(True, {"router_replay_mode": "R3"}),
            Option(False, {}, {"router_replay_mode": "disabled"}),
        ),
        when=is_online,
    ),
    Same(
        "vllm_gpu_memory_utilization",
        NUMBER,
        default=0.9,
        when=is_online,
    ),
    Same(
        "vllm_tensor_parallel_size",
        WHOLE,
        default=1,
        when=is_online,
    ),
    Servers(),
    RewardFunctions(),
    Ppo(),
    OnlineLength(),
    OnlineSteps(),
)

TABLE: tuple[Entry, ...] = (
    METHOD,
    Demonstrations(),
    Sampled(),
    *_MODEL,
    *_ADAPTER,
    *_NUMBERS_OF_METHODS,
    *_DATA,
    *_TRAINING,
    *_REST,
    *_ONLINE,
)
