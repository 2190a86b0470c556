"""Twice the input takes at most two and a half times as long: what was quadratic is no more."""

import contextlib
import time
from collections.abc import Callable

import pytest

from moetrain.config.yaml_text import parse_value
from moetrain.data.contract import EMPTY_THOUGHT
from moetrain.errors import ConfigError
from moetrain.interop.swift.shell import find_commands
from moetrain.rewards.code import fenced
from moetrain.rewards.prose import _formulas

FACTOR, TRIES = 2.5, 6
# What is done with n of something, and an n that takes some hundredths of a second.
CASES: dict[str, tuple[Callable[[int], object], int]] = {
    "a long number in YAML": (lambda n: parse_value("1_" * n + "x", ""), 30_000),
    "blocks that open anew": (lambda n: fenced("```python\nx\n" * n), 60_000),
    "a block with labels in it": (lambda n: fenced("```python" + "\n```x\n" * n), 60_000),
    "formulas without an end": (lambda n: _formulas("\\( \\[ " * n), 30_000),
    "blanks where a thought may be": (lambda n: EMPTY_THOUGHT.match("\n" * n), 1_000_000),
    "brackets of a script": (lambda n: find_commands("A=" + "$(" * n), 40_000),
    "an array that grows": (lambda n: find_commands("A+=(x)\n" * n), 4_000),
}


def seconds(run: Callable[[int], object], size: int) -> float:
    begin = time.process_time()
    with contextlib.suppress(ConfigError):
        run(size)
    return time.process_time() - begin


@pytest.mark.parametrize(("run", "size"), CASES.values(), ids=CASES)
def test_growth(run: Callable[[int], object], size: int) -> None:
    """The best of several, since other programs take their share of the processor."""
    once = min(seconds(run, size) for _ in range(TRIES))
    twice = min(seconds(run, 2 * size) for _ in range(TRIES))
    assert twice <= FACTOR * once + 0.01, (once, twice)
    assert twice < 5
