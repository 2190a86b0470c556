# pyright: reportPrivateImportUsage=false
"""Losses of methods that learn from rollouts, and their gradients, as TRL computes them, recorded
for tests/test_online_trl.py.

Runs with the TRL of .venv, and needs nothing of moetrain:
    .venv/bin/python tools/bench/trl_online_fixtures.py > tests/fixtures/trl_online.json

TRL's own trainers make the batch (advantages, weights for the sampler) and its loss; they have what
these two methods read, answers that are given, and a model that says given log-probs. All cases
have one batch: a new case changes none of the others.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
import trl
from torch import Tensor

COMMAND = ".venv/bin/python tools/bench/trl_online_fixtures.py > tests/fixtures/trl_online.json"
LENGTHS = (3, 7, 1, 5, 12, 2)  # tokens of six answers to two prompts
GROUP = 3
WIDTH = max(LENGTHS)
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


def near(rng: torch.Generator, values: Tensor, by: float) -> Tensor:
    moved = values + (2 * torch.rand(values.shape, generator=rng) - 1) * by
    return moved.clamp(max=-1e-3) * MASK


def batch() -> dict[str, Tensor]:
    """What policy, sampler and reference say of the answers, [answers, t], and their rewards."""
    rng = torch.Generator().manual_seed(11)
    old = -(torch.rand(len(LENGTHS), WIDTH, generator=rng) * 2.9 + 0.1) * MASK
    return {
        "old_logp": old,
        "logp": near(rng, old, 0.5),
        "rollout_logp": near(rng, old, 0.4),
        "ref_logp": near(rng, old, 0.7),
        "entropy": torch.rand(len(LENGTHS), WIDTH, generator=rng) * 3 * MASK,
        "reward": torch.randn(len(LENGTHS), generator=rng),
    }


def bare(kind: Any, given: dict[str, Tensor], said: list[Tensor], **settings: Any) -> Any:
    """A trainer with what it reads, whose answers and log-probs are given."""
    trainer = kind.__new__(kind)
    answers = [list(range(1, n + 1)) for n in LENGTHS]
    sampled = [row[:n].tolist() for row, n in zip(given["rollout_logp"], LENGTHS, strict=True)]
    prompts, texts = [[1, 2]] * len(LENGTHS), ["a"] * len(LENGTHS)
    generated = (prompts, answers, texts)
    if kind is trl.GRPOTrainer:
        generated = (prompts, answers, None, texts, sampled, {}, None, None)
    calls = iter(said)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    arguments = {
        "delta": None, "use_bias_correction_kl": True, "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05, "steps_per_generation": 1, "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": len(LENGTHS), "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": None, "report_to": [], "entropy_target": 0.0,
    }  # fmt: skip
    arguments |= {name: settings.pop(name) for name in arguments.keys() & settings.keys()}
    own: dict[str, Any] = {
        "model": model, "ref_model": model, "args": SimpleNamespace(**arguments),
        "accelerator": accelerate.Accelerator(cpu=True), "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)}, "_logs": defaultdict(list),
        "_pending_extra_logs": defaultdict(list), "_pending_metrics": defaultdict(list),
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None,
        "environment_factories": None, "environments": None, "mask_truncated_completions": False,
        "_environment_pools": None, "tools": None, "num_generations": GROUP, "num_iterations": 1,
        "reward_func_names": ["r"], "reward_weights": torch.ones(1), "log_multimodal": False,
        "multi_objective_aggregation": "sum_then_normalize", "beta": 0.0,
        "use_vllm": True, "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 2.0,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0, "_entropy_bonus_enabled": settings.get("entropy_coef", 0) > 0,
        "use_adaptive_entropy": False, "entropy_coef": 0.0, "scale_rewards": "group",
        "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "max_completion_length": 16, "current_gradient_accumulation_steps": 1,
        "chat_template_kwargs": {}, "normalize_advantages": False, "reward_clip_range": None,
        "_generate": lambda prompts: generated,
        "_calculate_rewards": lambda *given_: given["reward"][:, None],
        "_get_per_token_logps_and_entropies": lambda *a, **k: (next(calls), given["entropy"], None),
    }  # fmt: skip
    own["_logs"]["rewards"] = defaultdict(list)
    own["_logs"]["extra"] = defaultdict(list)
    for name, value in {**own, **settings}.items():
        object.__setattr__(trainer, name, value)
    return trainer


def case(given: dict[str, Tensor], method: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """TRL's loss with `settings`, which are `method` in a recipe."""
    kind = trl.RLOOTrainer if method["name"] == "rloo" else trl.GRPOTrainer
    own = {name: value.clone() for name, value in given.items()}
    logp, entropy = own["logp"].requires_grad_(), own["entropy"].requires_grad_()
    said = [own["old_logp"], own["ref_logp"], logp] if settings.get("beta") else []
    trainer = bare(kind, own, said or [own["old_logp"], logp], **settings)
    inputs = trainer._generate_and_score_completions([{"prompt": "p"}] * len(LENGTHS))
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert logp.grad is not None
    return {
        "method": method,
        "advantages": inputs["advantages"].tolist(),
        "loss": loss.item(),
        "of_logp": rows(logp.grad),
        "of_entropy": None if entropy.grad is None else rows(entropy.grad),
    }


def rows(values: Tensor) -> list[list[float]]:
    """Of the answers' tokens."""
    return [row[:n].tolist() for row, n in zip(values, LENGTHS, strict=True)]


def cases(given: dict[str, Tensor]) -> list[dict[str, Any]]:
    def grpo(settings: dict[str, Any], **own: Any) -> dict[str, Any]:
        named = {"name": "grpo"} | settings
        return case(given, named, **{"loss_type": named["name"]} | own)

    none = {"vllm_importance_sampling_correction": False, "num_iterations": 2}

    def sampler(mode: str, cap: float, floor: float | None = None) -> dict[str, Any]:
        name = "vllm_importance_sampling_"
        return {f"{name}mode": mode, f"{name}clip_max": cap, f"{name}clip_min": floor}

    return [
        grpo({}),
        grpo({"scale_rewards": "batch"}, scale_rewards="batch"),
        grpo({"scale_rewards": "none"}, scale_rewards="none"),
        grpo({"clip_low": 0.1, "clip_high": 0.15, "delta": 1.3}, epsilon_low=0.1,
             epsilon_high=0.15, delta=1.3),
        grpo({"mismatch": "sequence_mask", "mismatch_cap": 1.4, "mismatch_floor": 0.7},
             **sampler("sequence_mask", 1.4, 0.7)),
        grpo({"mismatch": "sequence_mask", "mismatch_cap": 1.4, "mismatch_floor": 0},
             **sampler("sequence_mask", 1.4)),
        grpo({"mismatch": "sequence", "mismatch_cap": 1.2, "mismatch_floor": 0.8},
             **sampler("sequence_truncate", 1.2, 0.8)),
        grpo({"mismatch": "mask", "mismatch_cap": 1.2, "mismatch_floor": 0.9},
             **sampler("token_mask", 1.2, 0.9)),
        grpo({"mismatch": "tis", "mismatch_cap": 1.2, "mismatch_floor": 0.9},
             **sampler("token_truncate", 1.2, 0.9)),
        grpo({"off_policy_mask_threshold": 0.02}, off_policy_mask_threshold=0.02),
        grpo({"top_entropy_quantile": 0.37}, top_entropy_quantile=0.37),
        grpo({"entropy_coef": 0.3}, entropy_coef=0.3),
        grpo({"name": "dapo", "entropy_coef": 0.3, "top_entropy_quantile": 0.63, "clip_high": 0.2},
             entropy_coef=0.3, top_entropy_quantile=0.63),
        grpo({"beta": 0.2, "mismatch": "none"}, beta=0.2, **none),
        grpo({"beta": 0.2, "use_bias_correction_kl": False, "top_entropy_quantile": 0.37},
             beta=0.2, use_bias_correction_kl=False, top_entropy_quantile=0.37),
        grpo({"importance_sampling_level": "sequence"}, importance_sampling_level="sequence"),
        grpo({"name": "dr_grpo", "length": 16, "scale_rewards": "none"}, scale_rewards="none"),
        grpo({"name": "dapo"}, epsilon_high=0.28),
        case(given, {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, loss_type="grpo",
             importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
        grpo({"name": "cispo"}, epsilon_high=5.0),
        grpo({"name": "cispo", "clip_high": 0.1}, epsilon_high=1.1),
        grpo({"name": "cispo", "clip_high": -0.05, "importance_sampling_level": "sequence"},
             epsilon_high=0.95, importance_sampling_level="sequence"),
        grpo({"name": "sapo"}),
        grpo({"name": "sapo", "tau_pos": 0.7, "tau_neg": 2.0}, sapo_temperature_pos=0.7,
             sapo_temperature_neg=2.0),
        case(given, {"name": "rloo", "mismatch": "none", "beta": 0.0}),
        case(given, {"name": "rloo", "mismatch": "none"}, beta=0.05),
        case(given, {"name": "rloo", "mismatch": "none", "beta": 0.3, "clip_low": 0.6,
                     "clip_high": 0.7}, beta=0.3, epsilon_low=0.6, epsilon_high=0.7),
    ]  # fmt: skip


def main() -> None:
    torch.set_default_dtype(torch.float64)
    given = batch()
    content: dict[str, Any] = {"trl": trl.__version__, "command": COMMAND, "group": GROUP}
    content["batch"] = {
        name: value.tolist() if value.ndim == 1 else rows(value) for name, value in given.items()
    }
    content["cases"] = cases(given)
    json.dump(content, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
