"""PPO of `swift`, which is TRL's with a value model of its own; `megatron` has none."""

from typing import Any

from moetrain.interop.swift.codecs import LIST, NUMBER, WHOLE, Codec, Entry, Reading, Writing

# flag -> (key, what ms-swift takes without it)
_NUMBERS: dict[str, tuple[str, Codec[Any], float]] = {
    "kl_coef": ("method.beta", NUMBER, 0.05),
    "cliprange": ("method.clip_low", NUMBER, 0.2),
    "vf_coef": ("method.value_weight", NUMBER, 0.1),
    "cliprange_value": ("method.value_clip", NUMBER, 0.2),
    "gamma": ("method.gamma", NUMBER, 1.0),
    "lam": ("method.lam", NUMBER, 0.95),
    "missing_eos_penalty": ("method.missing_eos_penalty", NUMBER, 0.0),
    "num_ppo_epochs": ("method.num_iterations", WHOLE, 4),
    "num_mini_batches": ("method.inner_steps", WHOLE, 1),
    "temperature": ("rollout.temperature", NUMBER, 0.9),
}


class Ppo(Entry):
    """Its numbers, one answer to each prompt of a batch, and the reward model's folder."""

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        if keys.get("method.name") != "ppo":
            return
        for flag, (key, kind, default) in _NUMBERS.items():
            value = reading.parse(flag, kind)
            keys[key] = default if value is None else value
        keys["method.clip_high"] = keys["method.clip_low"]
        keys["method.mismatch"] = "none"
        keys["rollout.group_size"] = 1
        keys["rollout.prompts_per_step"] = keys["train.global_batch"]
        longest = reading.parse("max_completion_length", WHOLE)
        answer = reading.parse("response_length", WHOLE) or longest or 512
        keys["rollout.max_tokens"] = answer
        if "data.seq_len" in keys:
            keys["data.seq_len"] += answer
        models = reading.parse("reward_model", LIST) or []
        if len(models) > 1:
            reading.lost("reward_model", "a run has one: give others in rewards by hand")
        elif models:
            keys["rewards"] = [{"name": "reward_model", "options": {"path": models[0]}}]

    def write(self, writing: Writing) -> None:
        """No `megatron` command stands for it."""
