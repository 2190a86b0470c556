"""GRPO and its kin. There steps, batches and saves count optimizer steps and answers; a recipe
counts batches of rollouts and prompts.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from moetrain.errors import ConfigError
from moetrain.interop.swift.codecs import (
    LIST,
    NUMBER,
    TEXT,
    TRUTH,
    WHOLE,
    Codec,
    Entry,
    Note,
    Reading,
    Writing,
    same,
)
from moetrain.interop.swift.policy import is_online, steps_of_batch

# Keys that count steps: batches of rollouts here, of several optimizer steps each.
_STEPS = ("train.steps", "train.eval_every", "checkpoint.every")


class OnlineBatch(Entry):
    """How many answers are sampled, and in how many steps they are learned from."""

    def read(self, reading: Reading) -> None:
        if not is_online(reading.keys):
            return
        keys = reading.keys
        batch = keys["train.global_batch"]  # answers of an optimizer step
        size = reading.parse("num_generations", WHOLE) or 8
        inner = reading.parse("steps_per_generation", WHOLE)
        whole = reading.parse("generation_batch_size", WHOLE)
        if whole is not None and inner is not None and whole != batch * inner:
            raise ConfigError(
                f"--generation_batch_size {whole}: must be global_batch_size * "
                f"steps_per_generation, {batch * inner}"
            )
        if inner is None:
            inner = 1 if whole is None else whole // batch
        if whole is not None and (inner < 1 or whole % batch):
            raise ConfigError(
                f"--generation_batch_size {whole}: must be a multiple of global_batch_size {batch}"
            )
        if inner < 1 or size < 1 or (batch * inner) % size:
            raise ConfigError(
                f"--num_generations {size}: global_batch_size {batch} * steps_per_generation "
                f"{inner} answers are no whole number of groups"
            )
        keys["rollout.group_size"] = size
        keys["rollout.prompts_per_step"] = batch * inner // size
        keys["method.inner_steps"] = inner

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        keys, flags = writing.keys, writing.flags
        size, prompts = keys.get("rollout.group_size", 8), keys.get("rollout.prompts_per_step", 8)
        inner = keys.get("method.inner_steps", 1)
        writing.covered |= {"rollout.group_size", "rollout.prompts_per_step", "method.inner_steps"}
        flags["num_generations"] = WHOLE.show(size)
        flags["steps_per_generation"] = WHOLE.show(inner)
        if size * prompts % inner:
            writing.lost("method.inner_steps", "must divide the answers of a batch of rollouts")
        else:
            flags["global_batch_size"] = WHOLE.show(size * prompts // inner)


class OnlineSteps(Entry):
    """Step counts of a run with rollouts, after those of all runs."""

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        inner = steps_of_batch(keys)
        if not is_online(keys) or inner == 1:
            return
        for key in _STEPS:
            if keys.get(key) is not None:
                keys[key], rest = max(keys[key] // inner, 1), keys[key] % inner
                if rest:
                    why = f"a step has {inner} optimizer steps, which do not divide the number"
                    reading.notes.append(Note("changed", key, why))

    def write(self, writing: Writing) -> None:
        inner = steps_of_batch(writing.keys)
        if not is_online(writing.keys) or inner == 1:
            return
        for flag in ("train_iters", "eval_steps", "save_steps"):
            words = writing.flags.get(flag)
            if words is not None:
                writing.flags[flag] = (str(int(words[0]) * inner),)


class OnlineLength(Entry):
    """ms-swift's max_length is of the prompt; data.seq_len has room for the answer too."""

    def read(self, reading: Reading) -> None:
        if not is_online(reading.keys):
            return
        keys = reading.keys
        answer = keys.get("rollout.max_tokens", 512)
        if keys["method.name"] == "dr_grpo":
            keys["method.length"] = answer
        if "data.seq_len" in keys:
            keys["data.seq_len"] += answer
            what = f"--max_length {keys['data.seq_len'] - answer}"
            why = (
                f"is the prompt's; data.seq_len={keys['data.seq_len']} has room for the answer too"
            )
            reading.notes.append(Note("changed", what, why))
        if same(reading.given.get("truncation_strategy"), "delete"):
            reading.note("implied", "truncation_strategy", "a prompt that is too long is rejected")
        else:
            why = "a prompt that is too long is rejected here; ms-swift cuts it on the left"
            reading.note("changed", "truncation_strategy", why)

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        answer = writing.keys.get("rollout.max_tokens", 512)
        room = writing.keys.get("data.seq_len", 4096) - answer
        writing.covered |= {"data.seq_len", "method.length"}
        if writing.keys.get("method.length", answer) != answer:
            writing.lost("method.length", "ms-swift divides by --max_completion_length")
        writing.flags["max_length"] = WHOLE.show(max(room, 1))


class Divergence(Entry):
    """The KL to the reference: Schulman's k3 on both sides, there never weighed by the ratio."""

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        in_the_loss = keys.get("method.beta") and not keys.get("method.kl_in_reward")
        if is_online(keys) and in_the_loss:
            keys["method.use_bias_correction_kl"] = False

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        if not is_online(keys):
            return
        writing.covered |= {"method.use_bias_correction_kl", "method.kl_estimator"}
        if not keys.get("method.beta") or keys.get("method.kl_in_reward"):
            return
        if keys.get("method.kl_estimator", "k3") != "k3":
            writing.lost("method.kl_estimator", "ms-swift has k3")
        if keys.get("method.use_bias_correction_kl", True):
            writing.lost("method.use_bias_correction_kl", "ms-swift's KL has no ratio")


class Mismatch(Entry):
    """Weights for what sampler and trainer disagree on; ms-swift has none by default."""

    MODES = {"token_truncate": "tis", "token_mask": "mask"}  # noqa: RUF012

    def read(self, reading: Reading) -> None:
        if not is_online(reading.keys):
            return
        mode = reading.parse("rollout_importance_sampling_mode", TEXT)
        cap = reading.parse("rollout_importance_sampling_threshold", NUMBER)
        if mode is None:
            reading.keys["method.mismatch"] = "none"
        elif mode not in self.MODES:
            why = "method.mismatch=sequence multiplies a sequence's ratios, there is their mean"
            reading.lost("rollout_importance_sampling_mode", why)
        else:
            reading.keys["method.mismatch"] = self.MODES[mode]
            reading.keys["method.mismatch_cap"] = 2.0 if cap is None else cap
            if mode == "token_mask":
                reading.keys["method.mismatch_floor"] = 0.0

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        writing.covered |= {"method.mismatch", "method.mismatch_cap", "method.mismatch_floor"}
        mode = writing.keys.get("method.mismatch", "tis")
        back = {here: there for there, here in self.MODES.items()}
        if mode in back:
            writing.flags["rollout_importance_sampling_mode"] = (back[mode],)
            cap = writing.keys.get("method.mismatch_cap", 2.0)
            writing.flags["rollout_importance_sampling_threshold"] = NUMBER.show(cap)
            floor = writing.keys.get("method.mismatch_floor")
            if floor or (floor is None and mode == "mask"):
                writing.lost("method.mismatch_floor", "ms-swift has an upper bound alone")
        elif mode != "none":
            writing.lost("method.mismatch", "ms-swift takes the mean of a sequence's ratios")


@dataclass(frozen=True)
class _Engine:
    flag: str
    kind: Codec[Any]


_ENGINE_ARGS = {
    "max_model_len": _Engine("vllm_max_model_len", WHOLE),
    "enforce_eager": _Engine("vllm_enforce_eager", TRUTH),
    "max_num_seqs": _Engine("vllm_max_num_seqs", WHOLE),
    "disable_cascade_attn": _Engine("vllm_disable_cascade_attn", TRUTH),
}


class Servers(Entry):
    """Who samples: vLLM, in processes of its own."""

    def read(self, reading: Reading) -> None:
        if not is_online(reading.keys):
            return
        keys = reading.keys
        args: dict[str, Any] = {}
        for name, key in _ENGINE_ARGS.items():
            value = reading.parse(key.flag, key.kind)
            if value is not None and value is not False:
                args[name] = value
        more = reading.parse("vllm_engine_kwargs", TEXT)
        if more:
            try:
                args |= cast(dict[str, Any], json.loads(more))
            except (ValueError, TypeError):
                raise ConfigError(
                    f"--vllm_engine_kwargs {more[:80]}: a JSON mapping is wanted"
                ) from None
        if args:
            keys["rollout.engine_args"] = args
        keys["rollout.engine"] = "vllm"
        self._read_place(reading)

    def _read_place(self, reading: Reading) -> None:
        mode = reading.parse("vllm_mode", TEXT)
        hosts = reading.parse("vllm_server_host", LIST) or []
        ports = reading.parse("vllm_server_port", LIST) or ["8000"]
        urls = reading.parse("vllm_server_base_url", LIST)
        if mode == "server":
            urls = urls or [f"http://{h}:{p}" for h, p in zip(hosts, ports, strict=False)]
            if urls:
                reading.keys["rollout.address"] = urls
            why = "those are servers of `swift rollout`: start them with `moetrain serve RECIPE`"
            reading.notes.append(Note("changed", "--vllm_mode server", why))
        else:
            why = "servers are processes of their own: docs/rollout.md says where they run"
            reading.notes.append(Note("changed", "--vllm_mode colocate", why))

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        writing.covered |= {"rollout.engine", "rollout.engine_args", "rollout.address"}
        if writing.keys.get("rollout.engine", "vllm") != "vllm":
            writing.lost("rollout.engine", "ms-swift samples with vLLM")
        args = dict(writing.keys.get("rollout.engine_args") or {})
        for name, key in _ENGINE_ARGS.items():
            if name in args:
                writing.flags[key.flag] = key.kind.show(args.pop(name))
        if args:
            writing.flags["vllm_engine_kwargs"] = (json.dumps(args),)
        address = writing.keys.get("rollout.address")
        writing.flags["vllm_mode"] = ("server" if address else "colocate",)
        if address:
            writing.flags["vllm_server_base_url"] = tuple(address)
