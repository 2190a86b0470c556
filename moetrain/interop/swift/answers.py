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
from moetrain.interop.swift.decides import SAMPLED
from moetrain.interop.swift.online import is_online

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
    """How answers are drawn: ahead of the step in hand by one batch, or where nothing draws any."""

    def read(self, reading: Reading) -> None:
        if is_online(reading.keys):
            if reading.parse("async_generate", TRUTH):
                reading.keys["rollout.steps_off"] = 1
            return
        for flag in SAMPLED.keys() & reading.given.keys():
            reading.note("implied", flag, "counts where answers are sampled")

    def write(self, writing: Writing) -> None:
        if is_online(writing.keys) and writing.keys.get("rollout.steps_off") == 1:
            writing.covered.add("rollout.steps_off")
            writing.flags["async_generate"] = TRUTH.show(True)
