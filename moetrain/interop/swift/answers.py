"""Answers to learn from: what samples them, and demonstrations beside them."""

from typing import Any

from moetrain.interop.swift.codecs import (
    LIST,
    NUMBER,
    TRUTH,
    WHOLE,
    Codec,
    Entry,
    Reading,
    Writing,
)
from moetrain.interop.swift.datasets import split_sample
from moetrain.interop.swift.decides import DRAWN, SAMPLED
from moetrain.interop.swift.policy import is_online

WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_DATA = "chord_sft_dataset"
_BATCH = "chord_sft_per_device_train_batch_size"
_MU: dict[str, tuple[str, Codec[Any]]] = {
    "chord_mu_peak": ("method.mu_peak", NUMBER),
    "chord_mu_valley": ("method.mu_valley", NUMBER),
    "chord_mu_warmup_steps": ("method.mu_warmup", WHOLE),
    "chord_mu_decay_steps": ("method.mu_decay", WHOLE),
}


class Demonstrations(Entry):
    """CHORD: GRPO of `swift` with worked answers beside its own. `megatron` has none of it."""

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        if not reading.given.get(_DATA) or keys.get("method.name") != "grpo":
            return
        paths = reading.parse(_DATA, LIST) or []
        if any(split_sample(path)[1] is not None for path in paths):
            reading.lost(
                _DATA, "#N takes a sample, which data.demonstrations does not: make a file"
            )
        keys["method.name"] = "chord"
        keys["data.demonstrations"] = paths
        for flag, (key, kind) in _MU.items():
            value = reading.parse(flag, kind)
            if value is not None:
                keys[key] = value
        keys["method.phi"] = bool(reading.parse("chord_enable_phi_function", TRUTH))
        if _BATCH in reading.given:
            why = "counts a process's records; method.packs packs of all ranks an optimizer step"
            reading.note("changed", _BATCH, why)

    def write(self, writing: Writing) -> None:
        """METHOD has no `megatron` command for it."""


class Sampled(Entry):
    """How answers are drawn: ahead of the step in hand by one batch, from what part of the
    distribution, until what text; or where nothing draws any.
    """

    def read(self, reading: Reading) -> None:
        if is_online(reading.keys):
            if reading.parse("async_generate", TRUTH):
                reading.keys["rollout.steps_off"] = 1
            self._read_drawn(reading)
            return
        flags, why = {*SAMPLED, *DRAWN} & reading.given.keys(), "counts where answers are sampled"
        if reading.keys.get("method.name") == "ppo":
            flags.discard("response_length")
            why = "ppo draws from the whole distribution there"
        for flag in flags:
            reading.note("implied", flag, why)

    @staticmethod
    def _read_drawn(reading: Reading) -> None:
        for flag in ("top_p", "min_p", "repetition_penalty", "top_k"):
            whole = flag == "top_k"
            value = reading.parse(flag, WHOLE) if whole else reading.parse(flag, NUMBER)
            value = max(value, 0) if whole and value is not None else value
            if value is not None and value != WHOLE_DISTRIBUTION[flag]:
                reading.keys[f"rollout.{flag}"] = value
                reading.note(
                    "changed", flag, "what is learned is renormalised over the same tokens"
                )
        stop = reading.parse("stop_words", LIST)
        if stop and [word.lower() for word in stop] not in (["none"], ["[]"]):
            reading.keys["rollout.stop"] = stop
            reading.note(
                "changed", "stop_words", "the text has the one that ended it; not so there"
            )

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        if writing.keys.get("rollout.steps_off") == 1:
            writing.covered.add("rollout.steps_off")
            writing.flags["async_generate"] = TRUTH.show(True)
        for flag, plain in WHOLE_DISTRIBUTION.items():
            value = writing.keys.get(key := f"rollout.{flag}", plain)
            writing.covered.add(key)
            if flag == "min_p" and value != plain:
                writing.lost(key, "ms-swift's commands have no --min_p")
            elif value != plain:
                writing.flags[flag] = (WHOLE if flag == "top_k" else NUMBER).show(value)
        writing.covered.add("rollout.stop")
        if stop := writing.keys.get("rollout.stop"):
            writing.flags["stop_words"] = tuple(stop)
