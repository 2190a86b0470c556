"""Which method a command trains with, and the commands that no method here stands for."""

from collections.abc import Mapping
from typing import Any, get_args

from moetrain.config.foreign import SWIFT
from moetrain.config.method import SMOOTHED, PairLoss
from moetrain.errors import ConfigError
from moetrain.interop.swift.codecs import (
    NOT_ONE,
    NUMBER,
    NUMBERS,
    Choice,
    Codec,
    Entry,
    Keys,
    Option,
    Reading,
    Words,
    Writing,
    same,
    shown,
)
from moetrain.interop.swift.policy import GRPO, SEQUENCE

_RL = {"action": "rlhf", "rlhf_type": "grpo"}
_WHOLE = {"loss_type": "grpo", "importance_sampling_level": SEQUENCE}

METHOD = Choice(
    "method.name",
    (
        Option("dft", {"action": "sft", "enable_dft_loss": "true"}),
        Option("sft", {"action": "sft"}),
        Option("cpt", {"action": "pt"}),
        Option("pretrain", {"action": "pt"}),
        Option("ipo", {"action": "rlhf", "rlhf_type": "dpo", "loss_type": "ipo"}),
        Option("hinge", {"action": "rlhf", "rlhf_type": "dpo", "loss_type": "hinge"}),
        Option("robust", {"action": "rlhf", "rlhf_type": "dpo", "loss_type": "robust"}),
        Option("dpo", {"action": "rlhf", "rlhf_type": "dpo"}, {"loss_type": "sigmoid"}),
        Option("kto", {"action": "rlhf", "rlhf_type": "kto"}, {"loss_type": "kto"}),
        Option("reward", {"action": "rlhf", "rlhf_type": "rm"}),
        Option("gspo", _RL | _WHOLE),
        Option(
            "gspo", _RL | _WHOLE | {"importance_sampling_level": "sequence_token"}, read_only=True
        ),
        *(Option(name, _RL | {"loss_type": name}) for name in GRPO if name != "gspo"),
        Option("dapo", _RL | {"loss_type": "bnpo"}, read_only=True),
        Option("ppo", {"action": "rlhf", "rlhf_type": "ppo"}, read_only=True),
        Option("orpo", {"action": "rlhf", "rlhf_type": "orpo"}, read_only=True),
        Option(
            "simpo",
            {"action": "rlhf", "rlhf_type": "simpo"},
            {"loss_type": "simpo", "cpo_alpha": "0"},
            read_only=True,
        ),
    ),
    wanted="--rlhf_type: a recipe has a method for dpo, kto, rm and grpo (orpo, simpo and ppo of "
    "`swift`)",
)

_PLAIN = {"dpo": "sigmoid", "kto": "kto"}
_OF_MEGATRON = (
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
)
_AOT = "a recipe has {} (aot sorts a batch, so that it would depend on how batches are cut)"


def _losses(keys: Keys) -> list[str]:
    """Those of dpo, by name."""
    return (keys.get("method.loss_type") or ["sigmoid"]) if keys["method.name"] == "dpo" else []


def smoothing(keys: Keys) -> float:
    """What ms-swift takes without --label_smoothing."""
    return 1e-3 if "exo_pair" in _losses(keys) else 0.0


def is_smoothed(keys: Keys) -> bool:
    """Whether it bears on anything."""
    return keys["method.name"] == "robust" or bool(SMOOTHED & {*_losses(keys)})


class PairLosses(Entry):
    """--loss_type of dpo, and of kto. `swift` has several with weights, and numbers of them that
    its Megatron trainer does not know; that one has what its bco_pair and discopop read neither.
    """

    def read(self, reading: Reading) -> None:
        method = reading.keys.get("method.name")
        if method == "dpo":
            codecs: dict[str, Codec[Any]] = {"loss_weights": NUMBERS, "ld_alpha": NOT_ONE}
            if "discopop" in reading.given.get("loss_type", ()):
                codecs["discopop_tau"] = NUMBER
            for flag, kind in codecs.items():
                reading.keys[SWIFT[flag]] = reading.parse(flag, kind)
        names = reading.given.get("loss_type", ())
        if method not in _PLAIN or names in ((), (_PLAIN[method],)):
            return
        known = get_args(PairLoss) if method == "dpo" else ("kto", "apo_zero_unpaired")
        if not {*names} <= {*known}:
            reading.lost("loss_type", _AOT.format(", ".join(known)))
            return
        reading.used.add("loss_type")
        reading.keys["method.loss_type"] = list(names) if method == "dpo" else names[0]
        if len(names) > 1 and "ipo" in names:
            why = "with ipo, ms-swift takes log-probs per token for every loss; here ipo alone does"
            reading.note("changed", "loss_type", why)

    def write(self, writing: Writing) -> None:
        key, method = "method.loss_type", writing.keys.get("method.name")
        names = writing.keys.get(key)
        if method not in _PLAIN or names in (None, _PLAIN[method], [_PLAIN[method]]):
            writing.covered.add(key)
        elif method == "kto" or (len(names) == 1 and names[0] in _OF_MEGATRON):
            writing.covered.add(key)
            writing.flags["loss_type"] = (names,) if method == "kto" else tuple(names)
        else:
            writing.lost(key, f"Megatron-SWIFT has one of sigmoid, {', '.join(_OF_MEGATRON)}")


_TASKS = {
    "seq_cls": "classifiers are not trained here; reward models are (rlhf --rlhf_type rm)",
    "embedding": "embeddings are not trained here",
    "generative_reranker": "rerankers are not trained here",
    "reranker": "rerankers are not trained here",
}
_LOSSES = {
    "real": "REAL",
    "fipo": "FIPO",
}
_TEACHERS = ("teacher_model", "teacher_model_server")
_TURNS = ("multi_turn_scheduler", "gym_env", "use_gym_env")


def check_methods(given: Mapping[str, Words]) -> None:
    """Raise ConfigError for a command that trains what nothing here does."""
    task = given.get("task_type")
    for name, why in _TASKS.items():
        if same(task, name) and not same(given.get("rlhf_type"), "rm"):
            raise ConfigError(f"--task_type {name}: {why}")
    if same(given.get("rlhf_type"), "gkd"):
        raise ConfigError(
            "--rlhf_type gkd: distillation is not read from a command; write method: gkd (lmbda 1)"
            " or distill (lmbda 0) with a teacher section by hand: docs/distillation.md"
        )
    if same(given.get("rlhf_type"), "grpo"):
        _check_grpo(given)


def _check_grpo(given: Mapping[str, Words]) -> None:
    for flag in _TEACHERS:
        if flag in given:
            raise ConfigError(
                f"{shown(flag, given[flag])}: GRPO with a teacher's signal is distillation, which "
                f"is not among the methods here"
            )
    for flag in _TURNS:
        if flag in given and not same(given[flag], "false"):
            raise ConfigError(
                f"{shown(flag, given[flag])}: answers have one turn here; there is no environment "
                f"that answers back"
            )
    loss = given.get("loss_type", ("grpo",))
    name = loss[0] if len(loss) == 1 else ""
    if name not in (*GRPO, "bnpo") or name == "gspo":
        raise ConfigError(
            f"{shown('loss_type', loss)}: {_LOSSES.get(name, 'this loss')} is not here; a recipe "
            f"has {', '.join(GRPO)}"
        )
