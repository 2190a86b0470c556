"""Which records a recipe's rewards can grade, by the columns that these have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moetrain.config.reward_files import wanted_columns
from moetrain.config.rewards import RewardConfig
from moetrain.data.samples import Prompt
from moetrain.errors import DataError
from moetrain.rewards import cases
from moetrain.rewards.base import is_absent

NEEDED: dict[str, tuple[str, ...]] = {  # one of these; rewards that are not here need none
    "accuracy": ("answer", "solution"),
    "exact": ("answer",),
    "cosine": ("answer", "solution"),
    "len_reward": ("answer", "solution"),
    "code": (*cases.COLUMNS, *cases.BESIDE),
}


def gradable(configs: Sequence[RewardConfig], prompts: Iterable[Prompt]) -> bool:
    """Whether some prompt has a column that one of the rewards reads, or one of them reads none."""
    names = {name for config in configs for name in NEEDED.get(config.name, ())}
    return any(c.name not in NEEDED for c in configs) or any(
        not is_absent(prompt.columns.get(name)) for prompt in prompts for name in names
    )


def check_columns(configs: Sequence[RewardConfig], prompts: Iterable[Prompt]) -> str:
    """What to say of prompts that rewards which read a column cannot grade, in a line, or nothing.
    Raises DataError for a source that no reward can grade, and for a function that wants a column
    that no record has.
    """
    prompts = list(prompts)
    there = {name for prompt in prompts for name in prompt.columns}
    for config in configs:
        lacking = [name for name in wanted_columns(config) if name not in there]
        if lacking and prompts:
            raise DataError(
                f"rewards: {config.name} cannot be called without {' and '.join(lacking)}, which no"
                f" record has: they have {', '.join(sorted(there))}. Rename a column, or give the"
                " argument a default."
            )
    readers = [config for config in configs if config.name in NEEDED]
    others = [config.label for config in configs if config.name not in NEEDED]
    if not readers:
        return ""
    wanted = {name for config in readers for name in NEEDED[config.name]}
    lost: dict[str, list[Mapping[str, Any]]] = {}
    nums: dict[str, int] = {}
    for prompt in prompts:
        nums[prompt.source] = nums.get(prompt.source, 0) + 1
        if all(is_absent(prompt.columns.get(name)) for name in wanted):
            lost.setdefault(prompt.source, []).append(prompt.columns)
    for source, columns in lost.items():
        if len(columns) == nums[source] and not others:
            needs = "; ".join(f"{c.name} needs {' or '.join(NEEDED[c.name])}" for c in readers)
            there = sorted({name for own in columns for name in own} - {"prompt"})
            raise DataError(
                f"{source or 'The data'}: no reward can grade its records: {needs}, and they have"
                f" {', '.join(there) or 'no column'}. Rename a column, add a reward, or leave the"
                " source out."
            )
    if not lost:
        return ""
    parts = ", ".join(f"{len(own)} of {nums[source]} in {source}" for source, own in lost.items())
    lack = f"they lack {' or '.join(sorted(wanted))}"
    if not others:
        return f"no reward can grade {parts}: {lack}"
    names = " and ".join(config.label for config in readers)
    return f"{names} cannot grade {parts}: {lack}. For these, {' and '.join(others)} is all"
