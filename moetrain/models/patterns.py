"""How a user names parts of a model: patterns over Hugging Face names."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from moetrain.errors import ConfigError, nearest
from moetrain.models.rules import VALUE_HEAD, Rule

type Matcher = Callable[[str], bool]


@cache
def matcher(pattern: str) -> Matcher:
    """What `pattern` means for a dotted name.

    Without wildcards it is a run of whole words of the name: "q_proj", "mlp.gate", "layers.3",
    "experts". With one of *?[ it is a file-name pattern for the name, or for its end after a dot.
    """
    if any(char in pattern for char in "*?["):
        whole, end = (re.compile(fnmatch.translate(p)) for p in (pattern, f"*.{pattern}"))
        return lambda name: bool(whole.match(name) or end.match(name))
    words = f".{pattern}."
    return lambda name: words in f".{name}."


def nothing_matches(key: str, pattern: str, names: Iterable[str]) -> ConfigError:
    """The error for a pattern of the recipe's `key` that matches none of `names`."""
    names = list(names)
    words = {name.rpartition(".")[2] for name in names}
    known = ", ".join(sorted(words)[:12])
    return ConfigError(
        f"{key}: {pattern!r} matches nothing of this model; names end in {known}, "
        f"e.g. {names[0]}.{nearest(pattern, words)}"
    )


def trainable_names(table: Mapping[str, Rule], patterns: Sequence[str]) -> frozenset[str]:
    """The canonical names of the parameters that the recipe's `trainable` patterns select.

    A pattern is held against Hugging Face names, with and without `.weight`. Raises ConfigError for
    a pattern that matches nothing, and for one that takes a part of what Megatron holds as one.
    """
    chosen: set[str] = set()  # Hugging Face names
    names = [key for rule in table.values() for key in rule.hf]
    for pattern in patterns:
        match = matcher(pattern)
        found = [key for key in names if match(key) or match(key.removesuffix(".weight"))]
        if not found:
            raise nothing_matches(
                "trainable", pattern, (name.removesuffix(".weight") for name in names)
            )
        chosen.update(found)
    result: set[str] = set()
    for name, rule in table.items():
        taken = [key for key in rule.hf if key in chosen]
        if taken and len(taken) < len(rule.hf):
            raise ConfigError(
                f"trainable: {', '.join(taken)} cannot be trained without "
                f"{', '.join(key for key in rule.hf if key not in chosen)}, with which it is one "
                f"tensor here; name them all"
            )
        if taken:
            result.add(name)
    return frozenset(result | ({VALUE_HEAD} & table.keys()))
