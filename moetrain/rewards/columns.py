"""Which records a recipe's rewards can grade, by the columns that these have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moetrain.config.rewards import RewardConfig
from moetrain.data.samples import Prompt
from moetrain.errors import DataError
from moetrain.rewards import code

NEEDED: dict[str, tuple[str, ...]] = {  # one of these; rewards that are not here need none
    "accuracy": ("answer", "solution"),
    "exact": ("answer",),
    "code": code.COLUMNS,
}


def check_columns(configs: Sequence[RewardConfig], prompts: Iterable[Prompt]) -> str:
    """What to say of prompts without a reward, in a line, or nothing. Raises DataError for a source
    that has no other.
    """
    if not configs or any(config.name not in NEEDED for config in configs):
        return ""
    wanted = {name for config in configs for name in NEEDED[config.name]}
    lost: dict[str, list[Mapping[str, Any]]] = {}
    nums: dict[str, int] = {}
    for prompt in prompts:
        nums[prompt.source] = nums.get(prompt.source, 0) + 1
        if all(prompt.columns.get(name) in (None, "", []) for name in wanted):
            lost.setdefault(prompt.source, []).append(prompt.columns)
    for source, columns in lost.items():
        if len(columns) == nums[source]:
            needs = "; ".join(f"{c.name} needs {' or '.join(NEEDED[c.name])}" for c in configs)
            there = sorted({name for own in columns for name in own} - {"prompt"})
            raise DataError(
                f"{source or 'The data'}: no reward can grade its records: {needs}, and they have"
                f" {', '.join(there) or 'no column'}. Rename a column, add a reward, or leave the"
                " source out."
            )
    parts = [f"{len(own)} of {nums[source]} in {source}" for source, own in lost.items()]
    return (
        f"no reward can grade {', '.join(parts)}: they lack {' or '.join(sorted(wanted))}"
        * bool(parts)
    )
