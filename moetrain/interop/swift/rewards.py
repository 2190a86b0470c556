"""Reward functions: ms-swift's names, weights and options, and the recipe's."""

from typing import Any, cast

from moetrain.errors import ConfigError
from moetrain.interop.swift.codecs import LIST, NUMBER, WHOLE, Entry, Reading, Writing
from moetrain.interop.swift.policy import is_online

_SAME = ("accuracy", "format")
_OVERLONG = "soft_overlong"
_COSINE = {  # (option, ms-swift's default) by ms-swift's flag; both count tokens
    "cosine_min_len_value_wrong": ("min_value_wrong", -0.5),
    "cosine_max_len_value_wrong": ("max_value_wrong", 0.0),
    "cosine_max_len_value_correct": ("min_value_correct", 0.5),
    "cosine_min_len_value_correct": ("max_value_correct", 1.0),
}
_WHY = {
    "react_format": "give it as FILE.py:FUNCTION (docs/rewards.md)",
    "toolbench": "give it as FILE.py:FUNCTION (docs/rewards.md)",
}
_NEITHER = "is not ms-swift's: write a plugin for it"
_NOT_THERE = {
    "repetition": "has words of another kind than ms-swift's; repetition_penalty has its own",
    "cosine": "counts characters, and ms-swift tokens: set unit: tokens",
}
_PLUGIN = "is a class of an ms-swift plugin: write it as FILE.py:FUNCTION (docs/rewards.md)"


class RewardFunctions(Entry):
    """accuracy, format, cosine and repetition; soft_overlong is a part of the method here."""

    def read(self, reading: Reading) -> None:
        if not is_online(reading.keys):
            return
        names = reading.parse("reward_funcs", LIST) or []
        weights = [float(word) for word in self._weights(reading, len(names))]
        rewards: list[Any] = []
        unknown: list[str] = []
        for name, weight in zip(names, weights, strict=True):
            options: dict[str, Any] = {}
            if name == _OVERLONG:
                if weight != 1:
                    unknown.append(f"{name} is a part of the method here, of weight 1")
                else:
                    self._overlong(reading)
                continue
            reward = name
            if name == "repetition":
                reward, options = "repetition_penalty", self._repetition(reading)
            elif name == "cosine":
                options = self._cosine(reading)
            elif name not in _SAME:
                unknown.append(f"{name} {_WHY.get(name, _PLUGIN)}")
                continue
            plain = not options and weight == 1
            whole = {"name": reward, "weight": weight, "options": options}
            rewards.append(name if plain else {key: v for key, v in whole.items() if v != {}})
        if reading.keys["method.name"] == "dapo" and _OVERLONG not in names:
            reading.keys["method.soft_length"] = 0  # no penalty, where the recipe has one by itself
        if unknown:
            reading.lost("reward_funcs", "; ".join(unknown))
        if rewards:
            reading.keys["rewards"] = rewards

    @staticmethod
    def _weights(reading: Reading, num: int) -> list[str]:
        given = reading.parse("reward_weights", LIST)
        if given is None:
            return ["1"] * num
        try:
            numbers = [float(word) for word in given]
        except ValueError:
            numbers = []
        if len(numbers) != num:
            raise ConfigError(f"--reward_weights {' '.join(given)}: {num} numbers are wanted there")
        return given

    @staticmethod
    def _repetition(reading: Reading) -> dict[str, Any]:
        penalty = reading.parse("repetition_max_penalty", NUMBER)
        penalty = -1.0 if penalty is None else penalty
        if penalty > 0:
            raise ConfigError(
                f"--repetition_max_penalty {penalty:g} pays for repetition: give 0 or less"
            )
        return {
            "ngram_size": reading.parse("repetition_n_grams", WHOLE) or 3,
            "max_penalty": penalty,
        }

    @staticmethod
    def _cosine(reading: Reading) -> dict[str, Any]:
        most = reading.parse("cosine_max_len", WHOLE)
        options: dict[str, Any] = {
            "unit": "tokens",
            "max_len": most or reading.keys.get("rollout.max_tokens", 512),
        }
        for flag, (option, usual) in _COSINE.items():
            value = reading.parse(flag, NUMBER)
            options[option] = usual if value is None else value
        return options

    @staticmethod
    def _overlong(reading: Reading) -> None:
        keys = reading.keys
        soft = reading.parse("soft_cache_length", WHOLE)
        longest = reading.parse("soft_max_length", WHOLE)
        if soft is None:
            raise ConfigError("--reward_funcs soft_overlong: --soft_cache_length is wanted with it")
        keys["method.max_length"] = longest or keys.get("rollout.max_tokens", 512)
        keys["method.soft_length"] = soft

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        if not is_online(keys):
            return
        writing.covered |= {"rewards", "method.max_length", "method.soft_length"}
        names: list[str] = []
        weights: list[float] = []
        for reward in cast(list[dict[str, Any]], keys.get("rewards") or []):
            name, options = reward["name"], cast(dict[str, Any], reward.get("options") or {})
            if name == "repetition_penalty":
                writing.flags["repetition_n_grams"] = WHOLE.show(options.get("ngram_size", 3))
                most = options.get("max_penalty", -1.0)
                writing.flags["repetition_max_penalty"] = NUMBER.show(most)
                name = "repetition"
            elif name == "cosine" and options.get("unit") == "tokens":
                writing.flags["cosine_max_len"] = WHOLE.show(options["max_len"])
                writing.flags |= {
                    f: NUMBER.show(options[option]) for f, (option, _) in _COSINE.items()
                }
            elif name not in _SAME or any(options.values()):
                writing.lost("rewards", f"{name} {_NOT_THERE.get(name, _NEITHER)}")
                continue
            names.append(name)
            weights.append(float(reward.get("weight", 1.0)))
        soft = keys.get("method.soft_length")
        if soft and keys.get("method.max_length"):
            names.append(_OVERLONG)
            weights.append(1.0)
            writing.flags["soft_cache_length"] = WHOLE.show(soft)
            writing.flags["soft_max_length"] = WHOLE.show(keys["method.max_length"])
        if names:
            writing.flags["reward_funcs"] = tuple(names)
        if any(weight != 1 for weight in weights):
            writing.flags["reward_weights"] = tuple(NUMBER.show(w)[0] for w in weights)
