"""What GRPO and its kin make of rewards and ratios: advantages, clips, masks, several passes."""

from collections.abc import Mapping
from typing import Any

from moetrain.config.foreign import SWIFT
from moetrain.config.method import SECTIONS
from moetrain.interop.swift.codecs import (
    MAYBE,
    NUMBER,
    TRUTH,
    WHOLE,
    Entry,
    Keys,
    Note,
    Reading,
    Words,
    Writing,
    same,
)

GRPO = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo")
SEQUENCE = "sequence"
LEAVE_ONE_OUT, REINFORCE = "rloo", "reinforce_plus_plus"


def is_online(keys: Keys) -> bool:
    """Whether the recipe's method is one of these."""
    return keys.get("method.name") in (*GRPO, "chord")


def steps_of_batch(keys: Keys) -> int:
    """Optimizer steps in which a batch of rollouts is learned from."""
    return keys.get("method.inner_steps", 1) * keys.get("method.num_iterations", 1)


def defaults(given: Mapping[str, Words]) -> dict[str, Words]:
    """What `swift` without Megatron takes for flags that are not given, by the estimator."""
    if not same(given.get("rlhf_type"), "grpo"):
        return {}
    estimator = given.get("advantage_estimator")
    if same(estimator, LEAVE_ONE_OUT):
        return {"scale_rewards": ("none",), "kl_in_reward": ("true",)}
    if same(estimator, REINFORCE):
        return {"scale_rewards": ("batch",), "kl_in_reward": ("true",)}
    return {}


class Advantages(Entry):
    """Baseline, scale, and where the KL stands. There reinforce_plus_plus takes the group's mean
    off, and its deviation is that of answers: grpo's, but where it is the batch's.
    """

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        if not is_online(keys):
            return
        estimator = (reading.take("advantage_estimator") or ("grpo",))[0]
        scale = (reading.take("scale_rewards") or ("group",))[0]
        if estimator not in ("grpo", LEAVE_ONE_OUT, REINFORCE):
            reading.lost("advantage_estimator", "a recipe has grpo, rloo and reinforce_plus_plus")
        if scale not in ("group", "batch", "none"):
            reading.lost("scale_rewards", "rewards are added up, then scaled: group, batch, none")
            return
        if estimator == REINFORCE:
            estimator = "reinforce_plus_plus_baseline" if scale == "batch" else "grpo"
        known = SECTIONS[keys["method.name"]].model_fields
        for name, value in (("advantage_estimator", estimator), ("scale_rewards", scale)):
            if value != known[name].default:
                keys[f"method.{name}"] = value
        if estimator == "reinforce_plus_plus_baseline":
            why = "mean and deviation here are of the batch's tokens, there of its answers"
            reading.note("changed", "advantage_estimator", why)
        if reading.parse("kl_in_reward", TRUTH) and keys.get("method.beta"):
            keys["method.kl_in_reward"] = True
            if estimator == "reinforce_plus_plus_baseline":
                why = "a token's advantage has the KL of what follows it, there of all"
                reading.note("changed", "kl_in_reward", why)

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        keys = writing.keys
        names = ("advantage_estimator", "scale_rewards", "kl_in_reward")
        writing.covered |= {f"method.{name}" for name in names}
        estimator = keys.get("method.advantage_estimator", "grpo")
        if estimator == "reinforce_plus_plus":
            writing.lost("method.advantage_estimator", "ms-swift's has the group's mean taken off")
        else:
            writing.flags["advantage_estimator"] = (estimator.removesuffix("_baseline"),)
        default = SECTIONS[keys["method.name"]].model_fields["scale_rewards"].default
        writing.flags["scale_rewards"] = (keys.get("method.scale_rewards", default),)
        if keys.get("method.kl_in_reward"):
            writing.flags["kl_in_reward"] = ("true",)


class Level(Entry):
    """Whether a token has a ratio, or an answer; gspo says so by its name."""

    KEY = "method.importance_sampling_level"

    def read(self, reading: Reading) -> None:
        words = reading.take("importance_sampling_level") if is_online(reading.keys) else None
        if words is None or same(words, "token"):
            return
        if reading.keys["method.name"] != "gspo":
            reading.keys[self.KEY] = SEQUENCE
        if same(words, "sequence_token"):
            why = "is sequence's where the tokens of an answer have one advantage, as here"
            reading.note("implied", "importance_sampling_level", why)
        elif not same(words, SEQUENCE):
            reading.lost("importance_sampling_level", "a recipe has token and sequence")

    def write(self, writing: Writing) -> None:
        if not is_online(writing.keys):
            return
        writing.covered.add(self.KEY)
        default = SEQUENCE if writing.keys["method.name"] == "gspo" else "token"
        level = writing.keys.get(self.KEY, default)
        if level in ("token", SEQUENCE):
            writing.flags["importance_sampling_level"] = (level,)
        else:
            writing.lost(self.KEY, "ms-swift has token and sequence")


class Clipping(Entry):
    """`epsilon` is both bounds where `epsilon_high` is not given; of cispo that is where weights
    are cut, 1 + clip_high here, and sapo has a gate instead.
    """

    def read(self, reading: Reading) -> None:
        name = reading.keys.get("method.name")
        if not is_online(reading.keys) or name == "sapo":
            return
        low = reading.parse("epsilon", NUMBER)
        low = 0.2 if low is None else low
        high = reading.parse("epsilon_high", NUMBER)
        high = low if high is None else high
        if name == "cispo":
            reading.keys["method.clip_high"] = round(high - 1, 12)
            return
        reading.keys["method.clip_low"], reading.keys["method.clip_high"] = low, high
        reading.keys["method.delta"] = reading.parse("delta", MAYBE)

    def write(self, writing: Writing) -> None:
        keys, name = writing.keys, writing.keys.get("method.name")
        if not is_online(keys) or name == "sapo":
            return
        writing.covered |= {"method.clip_low", "method.clip_high", "method.delta"}
        if name == "cispo":
            writing.flags["epsilon_high"] = NUMBER.show(1 + keys.get("method.clip_high", 4.0))
            if keys.get("method.clip_low", 1.0) != 1:
                writing.lost("method.clip_low", "ms-swift's weights have no lower bound")
            return
        for key, flag in (("clip_low", "epsilon"), ("clip_high", "epsilon_high")):
            writing.flags[flag] = NUMBER.show(keys[f"method.{key}"])
        if keys.get("method.delta") is not None:
            writing.flags["delta"] = NUMBER.show(keys["method.delta"])


class Chosen(Entry):
    """Which answers and tokens are learned from, how soon sapo's gate closes, and what
    Megatron-SWIFT has not: several passes, and a reference that moves.
    """

    KINDS: Mapping[str, Any] = {
        "off_policy_sequence_mask_delta": MAYBE,
        "top_entropy_quantile": NUMBER,
        "tau_pos": NUMBER,
        "tau_neg": NUMBER,
        "num_iterations": WHOLE,
    }

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        if not is_online(keys):
            return
        known = SECTIONS[keys["method.name"]].model_fields
        for flag, kind in self.KINDS.items():
            value = reading.parse(flag, kind) if SWIFT[flag][7:] in known else None
            if value is not None:
                keys[SWIFT[flag]] = value
        if reading.parse("sync_ref_model", TRUTH):
            every = reading.parse("ref_model_sync_steps", WHOLE) or 512
            share = reading.parse("ref_model_mixup_alpha", NUMBER)
            if not keys.get("method.beta"):
                reading.note("implied", "sync_ref_model", "without --beta there is no reference")
                return
            keys["method.ref_model_mixup_alpha"] = 0.6 if share is None else share
            steps = steps_of_batch(keys)
            keys["method.ref_model_sync_steps"] = max(every // steps, 1)
            if every % steps:
                why = f"a step has {steps} optimizer steps, which do not divide the number"
                reading.notes.append(Note("changed", "method.ref_model_sync_steps", why))

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        if not is_online(keys):
            return
        for flag, kind in self.KINDS.items():
            key = SWIFT[flag]
            writing.covered.add(key)
            if keys.get(key) is None:
                continue
            if flag == "num_iterations":
                if keys[key] > 1:
                    writing.lost(key, "Megatron-SWIFT has one pass over a batch of answers")
            else:
                writing.flags[flag] = kind.show(keys[key])
