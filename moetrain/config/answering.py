"""What the commands that answer read of a recipe and of a benchmark; any other key is refused."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from moetrain.config.load import apply_override, recipe_from, sections_below
from moetrain.config.reads import SERVERS
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError

# Of `rollout`: who answers, how long and how, and who grades.
_DRAWN = ("max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
ENGINE = ("engine", *_DRAWN, "reward_workers", "reward_seconds", *SERVERS)
_MODEL = ("seed", "run_dir", "model", "parallel", "adapter", "megatron")  # sections, whole
_CHAT = (
    "cache chat_template chat_template_kwargs system special_tokens_in_text seq_len max_rejected"
).split()


@dataclass(frozen=True)
class CommandKeys:
    """What a command reads, and for keys that it does not what says the same."""

    command: str
    reads: frozenset[str]  # sections, or keys of them
    instead: Mapping[str, str] = field(default_factory=dict[str, str])
    otherwise: str = "it trains nothing"

    def check(self, keys: Iterable[str]) -> None:
        """Raise ConfigError for the first key that would do nothing."""
        for key in keys:
            if key in self.reads or key.partition(".")[0] in self.reads:
                continue
            why = self.instead.get(key, self.otherwise)
            raise ConfigError(f"{self.command} does not read {key}: {why}. Leave it out.")


SAMPLE = CommandKeys(
    "moetrain sample",
    frozenset(
        [
            *_MODEL,
            "rewards",
            "rollout.temperature",
            *(f"rollout.{key}" for key in ENGINE),
            *(f"data.{key}" for key in _CHAT),
        ]
    ),
    {
        "rollout.group_size": "-k N says how many answers a prompt has",
        "rollout.eval_temperature": "rollout.temperature is the temperature",
        "rollout.eval_prompts": "every prompt of PROMPTS is answered",
        "rollout.prompts_per_step": "every prompt of PROMPTS is answered",
        "data.train": "PROMPTS says what is asked",
        "data.eval": "PROMPTS says what is asked",
        "data.take": "every prompt of PROMPTS is answered",
        "data.eval_share": "every prompt of PROMPTS is answered",
    },
)
AGENTS = CommandKeys(
    "moetrain serve --agents",
    frozenset(
        [
            *_MODEL,
            *("rollout.temperature", "rollout.call_format", "rollout.max_turns"),
            "rollout.environment_seconds",
            *(f"rollout.{key}" for key in ENGINE if not key.startswith("reward_")),
            *(f"data.{key}" for key in _CHAT if key != "max_rejected"),
        ]
    ),
    {"rewards": "agents post theirs, and `moetrain grade` computes others"},
)
EVAL = CommandKeys(
    "moetrain eval",
    frozenset([*_MODEL, *(f"data.{key}" for key in _CHAT if key != "max_rejected")]),
    {
        "data.train": "`data` of the benchmark says what is asked",
        "data.eval": "`data` of the benchmark says what is asked",
        "data.take": "`limit` of the benchmark takes the first questions",
        "data.max_rejected": "a question that cannot be asked ends it",
    },
)
SCORE = CommandKeys("moetrain score", frozenset(_MODEL), otherwise="rows are scored as they stand")
REWARD_MODEL = CommandKeys(
    "moetrain serve --reward-model",
    frozenset([*_MODEL, "data.seq_len", "cluster.hang_seconds"]),
    {"data.chat_template": "the reward reward_model has the option chat_template"},
    otherwise="it scores rows of tokens as they come",
)
BENCH = CommandKeys(
    "A benchmark",
    frozenset(["rollout.eval_temperature", *(f"rollout.{key}" for key in ENGINE)]),
    {
        "rollout.temperature": "rollout.eval_temperature is the temperature",
        "rollout.group_size": "`samples` says how many answers a question has",
        "rollout.eval_prompts": "`limit` takes the first questions",
        "rollout.prompts_per_step": "every question is asked",
    },
)


SERVED: dict[str, Any] = {
    "run_dir": "runs/serve",  # takes the stacks of ranks that hang
    "method": "reward",
    "data": {"train": ["-"], "seq_len": 4096},
    "train": {"steps": 1},
}
"""Of a recipe for `moetrain serve --reward-model`; a model of shorter sequences has its own."""


def serving_recipe(model: str, overrides: Sequence[str]) -> Recipe:
    """What the command line says of a reward model that is served, before it is looked at. Raises
    ConfigError.
    """
    REWARD_MODEL.check(keys_given(overrides))
    content: dict[str, Any] = copy.deepcopy(SERVED) | {"model": {"path": model}}
    for override in overrides:
        apply_override(content, override)
    return recipe_from(content, source="command line")


def keys_given(overrides: Sequence[str]) -> list[str]:
    """Dotted keys of a recipe that overrides give; without those that no recipe has, which its
    reader refuses with the key that was meant.
    """
    content: dict[str, Any] = {}
    for override in overrides:
        apply_override(content, override)
    known = sections_below(Recipe)
    keys: list[str] = []
    for name, value in content.items():
        leaves = known.get(name)
        if not leaves or not isinstance(value, Mapping):
            keys += [name] if name in known else []
        else:
            section = cast(Mapping[str, Any], value)
            keys += [f"{name}.{leaf}" for leaf in section if leaf in leaves]
    return keys
