"""Cases that call a function of a program: what caller.py is asked, and whether it is right.

A value leaves the program as data and is compared outside of it, so that no program can see what is
wanted, or say for itself that it is right.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.rewards.values import read, same_value

CALLER = Path(__file__).with_name("caller.py").read_text()


@dataclass(frozen=True)
class Ask:
    """What caller.py does with a program."""

    what: Mapping[str, Any]
    is_strict: bool = False  # a tuple is not a list


@dataclass(frozen=True)
class Case:
    """Something that a program is asked, and what is right."""

    given: str | Ask  # standard input, or a call
    wanted: Any  # standard output, or a value


def call(function: str, given: Any, wanted: Any) -> Case:
    """A call as APPS, TACO and PRIME have them (a list of arguments, a value), or LiveCodeBench (a
    line of JSON for each argument, the value as JSON).
    """
    if isinstance(given, str):
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
        wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
    arguments = [_with_numbers(one) for one in (given if isinstance(given, list) else [given])]
    json.dumps(arguments)  # TypeError for what is no data, such as a date
    return Case(Ask({"name": function.rpartition(".")[2], "arguments": arguments}), wanted)


def _with_numbers(value: Any) -> Any:
    """JSON has no numbers as keys: a mapping whose keys are all whole numbers has lost them, as
    APPS has it. caller.py is handed pairs.
    """
    if not isinstance(value, Mapping):
        return value
    is_whole = all(key.removeprefix("-").isdecimal() for key in value)
    return {"pairs": [[int(key) if is_whole else key, one] for key, one in value.items()]}


def is_right(ask: Ask, out: str, wanted: Any, tolerance: float) -> bool:
    """Whether what caller.py printed is the value that is wanted."""
    # APPS has some values in a list of their own.
    is_alone = not ask.is_strict and isinstance(wanted, list) and len(wanted) == 1
    try:
        value = read(json.loads(out))
        return any(
            same_value(value, one, tolerance, ask.is_strict)
            for one in (wanted, *(wanted if is_alone else ()))
        )
    except (ValueError, TypeError, RecursionError, OverflowError):  # of what a program made up
        return False
