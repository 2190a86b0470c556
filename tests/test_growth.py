"""Twice the input takes at most two and a half times as long and as much memory: what was
quadratic is no more.
"""

import contextlib
import gc
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_templates import DEEPSEEK

from moetrain.config.yaml_text import parse_value
from moetrain.data.contract import EMPTY_THOUGHT
from moetrain.data.controls import JOINT, Cut, cut
from moetrain.data.messages import FormatError, read_messages
from moetrain.data.parsing import parse_json
from moetrain.environments.call_formats import READERS
from moetrain.errors import ConfigError
from moetrain.interop.swift.shell import find_commands
from moetrain.observe.follow import Follower
from moetrain.rewards.code import fenced
from moetrain.rewards.prose import _formulas

BEGIN, END, SEP = DEEPSEEK[6], DEEPSEEK[7], DEEPSEEK[12]
# What a model may write without an end: a format, a piece.
CALLS = {
    "json": '<tool_call>{"name": "f"}</tool_call>',
    "xml": "<function=f><parameter=a>",
    "glm": "<tool_call>f<arg_key>a</arg_key><arg_value></arg_value>x",
    "deepseek": BEGIN + "f" + SEP + "{}" + END,
    "harmony": "<|channel|>commentary to=f<|message|>{}<|call|>",
    "llama": '{"name":"f","parameters":{}};',
}


def ledger_line(n: int) -> bool:
    """Of so many MB, without an end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.touch()
        os.truncate(path, n << 20)
        return Follower(path).poll()


def turns_and_joints(n: int) -> Cut:
    """As many turns are found in a text as it has control tokens that are spelled."""
    whole = cut(f"<{JOINT}|im_end|>" * n)
    for place in range(0, 11 * n, 11):
        whole.moved(place)
    return whole


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
    "control tokens in a text": (turns_and_joints, 5_000),
    "calls that are turns": (
        lambda n: read_messages([{"role": "tool_call", "content": '{"name": "f"}'}] * n, "x"),
        500,
    ),
    **{
        f"calls in {kind}": (lambda n, read=READERS[kind], text=text: read(text * n, {}), 1_500)
        for kind, text in CALLS.items()
    },
    "calls without an end": (lambda n: READERS["json"]("<tool_call>" * n, {}), 50_000),
    "keys in a call": (
        lambda n: READERS["glm"]("<tool_call>f<arg_key>" + "</arg_key><arg_value>" * n, {}),
        20_000,
    ),
    "a ledger of one line": (ledger_line, 30),
    "a record of short texts": (lambda n: parse_json(json.dumps([["x"]] * n)), 30_000),
}


def seconds(run: Callable[[int], object], size: int) -> float:
    begin = time.process_time()
    with contextlib.suppress(ConfigError, FormatError):
        run(size)
    return time.process_time() - begin


@pytest.mark.parametrize(("run", "size"), CASES.values(), ids=CASES)
def test_growth(run: Callable[[int], object], size: int) -> None:
    """The best of several, since other programs take their share of the processor."""
    once = min(seconds(run, size) for _ in range(TRIES))
    twice = min(seconds(run, 2 * size) for _ in range(TRIES))
    assert twice <= FACTOR * once + 0.01, (once, twice)
    assert twice < 5


def peak(run: Callable[[int], object], size: int) -> int:
    """The most bytes that Python holds at a time."""
    gc.collect()
    tracemalloc.start()
    try:
        with contextlib.suppress(ConfigError, FormatError):
            run(size)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("run", "size"), CASES.values(), ids=CASES)
def test_growth_of_memory(run: Callable[[int], object], size: int) -> None:
    once = peak(run, size // 4)
    twice = peak(run, size // 2)
    assert twice <= FACTOR * once + 100_000, (once, twice)
