"""The part of the table that is about the optimizer."""

from moetrain.interop.swift.codecs import (
    NUMBER,
    TEXT,
    TRUTH,
    WHOLE,
    Choice,
    Entry,
    Keys,
    Option,
    Same,
)
from moetrain.interop.swift.entries import Offload
from moetrain.interop.swift.schedule import Schedule


def has_adapter(keys: Keys) -> bool:
    return keys.get("adapter.type") is not None or keys.get("adapter.path") is not None


def _muon(keys: Keys) -> bool:
    return keys.get("optim.name") == "muon"


OPTIMIZER: tuple[Entry, ...] = (
    Same(
        "lr",
        NUMBER,
        default=lambda keys: 1e-4 if has_adapter(keys) else 1e-5,
        always=True,
    ),
    Same("min_lr", NUMBER, default=0.0),
    Schedule(),
    Same("weight_decay", NUMBER, default=0.1),
    Same("adam_beta1", NUMBER, default=0.9),
    Same("adam_beta2", NUMBER, default=0.95),
    Same("adam_eps", NUMBER, default=1e-8),
    Same("clip_grad", NUMBER, default=1.0),
    Choice(
        "optim.name",
        (
            Option("muon", {"optimizer": "muon"}),
            Option("muon", {"optimizer": "dist_muon"}, read_only=True),
            Option("adamw", {}, {"optimizer": "adam"}),
        ),
        defaults={"optimizer": "adam"},
        when=lambda keys: not has_adapter(keys),
    ),
    Same("muon_momentum", NUMBER, default=0.9, when=_muon),
    Same("muon_use_nesterov", TRUTH, default=False, when=_muon),
    Same("muon_num_ns_steps", WHOLE, default=5, when=_muon),
    Same("muon_scale_mode", TEXT, default="spectral", when=_muon),
    Same("muon_extra_scale_factor", NUMBER, default=1.0, when=_muon),
    Offload(),
    Choice(
        "optim.state_dtype",
        (
            Option(
                "bf16",
                {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
                {"use_precision_aware_optimizer": "true"},
            ),
            Option(
                "fp8",
                {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8"},
                {"use_precision_aware_optimizer": "true"},
            ),
            Option("fp32", {}, {"exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"}),
        ),
        defaults={"exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"},
    ),
    Same("main_grads_dtype", TEXT, default="fp32"),
)
