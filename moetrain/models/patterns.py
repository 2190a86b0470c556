"""How a user names parts of a model: patterns over Hugging Face names."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from moetrain.errors import ConfigError, nearest
from moetrain.models.rules import VALUE_HEAD, Rule

type Matcher = Callable[[str], bool]

_EXPERT = re.compile(r"(?<=[a-zA-Z])\d+$")  # the number of an expert, which is one of a stack


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
    """The canonical names of the parameters that the recipe's `trainable` patterns select."""
    names = {name: rule.hf for name, rule in table.items()}
    return selected("trainable", names, patterns) | ({VALUE_HEAD} & table.keys())


def selected(
    key: str, names: Mapping[str, Sequence[str]], patterns: Sequence[str]
) -> frozenset[str]:
    """Which of `names` (canonical name -> its Hugging Face tensors) the patterns of the recipe's
    `key` select.

    A pattern is held against Hugging Face names, with and without `.weight`. Raises ConfigError for
    a pattern that matches nothing, and for one that takes a part of what Megatron holds as one.
    """
    chosen: set[str] = set()  # Hugging Face names
    every = [one for several in names.values() for one in several]
    for pattern in patterns:
        match = matcher(pattern)
        matches = [one for one in every if match(one) or match(one.removesuffix(".weight"))]
        if not matches:
            raise nothing_matches(key, pattern, (one.removesuffix(".weight") for one in every))
        chosen.update(matches)
    held: dict[str, list[str]] = {}  # one tensor here -> canonical names
    for name in names:
        held.setdefault(_EXPERT.sub("", name), []).append(name)
    result: set[str] = set()
    for together in held.values():
        parts = [one for name in together for one in names[name]]
        taken = [one for one in parts if one in chosen]
        if taken and len(taken) < len(parts):
            left = [one for one in parts if one not in chosen]
            raise ConfigError(
                f"{key}: {_few(taken)} cannot be taken without {_few(left)}, with which it is one"
                f" tensor here; name them all"
            )
        if taken:
            result.update(together)
    return frozenset(result)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
