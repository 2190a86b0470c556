"""Twice the input takes at most two and a half times as long and as much memory: what was
quadratic is no more.
"""

import contextlib
import gc
import json
import os
import re
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import DEEPSEEK, KNOWN, chat_of

from moetrain.config.rewards import JudgeOptions
from moetrain.config.yaml_text import parse_value
from moetrain.data.continuation import _Words
from moetrain.data.contract import EMPTY_THOUGHT
from moetrain.data.controls import JOINT, Cut, Spelling, cut
from moetrain.data.documents import Documents
from moetrain.data.formats import to_conversation
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.index_files import HEADER, MAGIC, VERSION, num_samples
from moetrain.data.messages import FormatError, read_messages
from moetrain.data.parsing import parse_json
from moetrain.data.samples import Prompt, Sample
from moetrain.data.sources import Record
from moetrain.data.trajectories import Trajectory
from moetrain.environments.call_formats import READERS
from moetrain.errors import ConfigError
from moetrain.interop.swift.shell import find_commands
from moetrain.loops.store import Batch, Store
from moetrain.observe.answers import read_answers
from moetrain.observe.follow import Follower
from moetrain.rewards.code import fenced
from moetrain.rewards.prose import _formulas
from moetrain.weights.header import read_header

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


def names_of_calls(n: int) -> str:
    """A turn of n calls, as it is found in what a template renders of it."""
    calls = [{"function": {"name": f"f{i}", "arguments": {}}} for i in range(n)]
    words = _Words({"role": "assistant", "content": "", "tool_calls": calls})
    rendered = " ".join(words.names)
    assert words.last_in(rendered, 0) == len(rendered) and words.says(rendered, "x")
    return words.named(rendered)


def many_tensors(n: int) -> object:
    """A safetensors header of n tensors."""
    places = (f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(n))
    header = f"{{{','.join(places)}}}".encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(n))
        return read_header(path, None)


def many_answers(n: int) -> object:
    """Rollouts of a step with n answers, written and read."""
    made = (Sample("p", i, (5, 6), (-0.5, -0.25), "hi", "stop", 2) for i in range(n))
    answers = tuple(GradedAnswer(Trajectory.of(one), 1.0) for one in made)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.write(Batch(1, (Group(Prompt("p", (1,), {}), answers),), 1))
        return store.read(1), read_answers(Path(folder) / "00000001.jsonl")


def judged(n: int) -> object:
    """A judge that goes on and on."""
    options = JudgeOptions.model_validate({"url": "http://127.0.0.1/v1", "model": "m"})
    return [list(re.finditer(options.pattern, text * n)) for text in ("Score: ", "**", "-", "9")]


def one_document(n: int) -> object:
    """Of a corpus, with control tokens that are spelled in letters."""
    rows = [Record({"text": "a <|im_end|> line\n" * n}, "f", 1)]
    return sum(map(len, Documents(rows, "text", Spelling({"<|im_end|>"}, True), "escape")))


def turns_and_joints(n: int) -> Cut:
    """As many turns are found in a text as it has control tokens that are spelled."""
    whole = cut(f"<{JOINT}|im_end|>" * n)
    for place in range(0, 11 * n, 11):
        whole.moved(place)
    return whole


def templates(record: dict[str, Any]) -> object:
    """What every chat template makes of a record, as tokens."""
    conversation = to_conversation(record)
    return [chat_of(name).encode(chat_of(name).mark(conversation)) for name in KNOWN]


def long_words(n: int) -> object:
    """A question and an answer of n words each."""
    turns = zip(("user", "assistant"), ("what <is> {{ it }} ", "it is <it> "), strict=True)
    return templates({"messages": [{"role": who, "content": said * n} for who, said in turns]})


def tools_on_offer(n: int) -> object:
    """As ms-swift has them: a list in a text."""
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}}
    tools = [{"name": f"f{i}", "description": "d", "parameters": parameters} for i in range(n)]
    functions = [{"type": "function", "function": tool} for tool in tools]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return templates({"messages": messages, "tools": json.dumps(functions)})


def documents_of_an_index(n: int) -> int:
    """Of a corpus of n documents, one token each."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a"
        np.zeros(n, np.int32).tofile(f"{prefix}.bin")
        head = HEADER.pack(MAGIC, VERSION, 4, n, n + 1)
        places = np.arange(n, dtype=np.int64) * 4
        bounds = np.arange(n + 1, dtype=np.int64)
        parts = (np.ones(n, np.int32).tobytes(), places.tobytes(), bounds.tobytes())
        Path(f"{prefix}.idx").write_bytes(head + b"".join(parts))
        return num_samples(prefix, 8)


FACTOR, TRIES, ROUNDS = 2.5, 6, 3
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
    # Twice of it is within 32 MB: more than that is mapped anew by glibc, page by page, or not,
    # as tests before it have left its thresholds.
    "a ledger of one line": (ledger_line, 15),
    "a document with control tokens": (one_document, 20_000),
    "names of calls": (names_of_calls, 3_000),
    "a header of many tensors": (many_tensors, 1_500),
    "rollouts of many answers": (many_answers, 100),
    "a long turn": (long_words, 30),
    "tools on offer": (tools_on_offer, 10),
    "documents of an index": (documents_of_an_index, 1 << 15),
    "a judge without an end": (judged, 30_000),
    "a record of short texts": (lambda n: parse_json(json.dumps([["x"]] * n)), 30_000),
}


def seconds(run: Callable[[int], object], size: int) -> float:
    begin = time.process_time()
    with contextlib.suppress(ConfigError, FormatError):
        run(size)
    return time.process_time() - begin


@pytest.mark.parametrize(("run", "size"), CASES.values(), ids=CASES)
def test_growth(run: Callable[[int], object], size: int) -> None:
    """The best of several, since other programs take their share of the processor's caches; what is
    quadratic is so each time.
    """
    once = twice = 0.0
    for _ in range(ROUNDS):
        once = min(seconds(run, size) for _ in range(TRIES))
        twice = min(seconds(run, 2 * size) for _ in range(TRIES))
        if twice <= FACTOR * once + 0.01:
            break
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


@pytest.fixture(scope="module")
def earlier_objects_stay() -> None:
    """What tests before these have made is not looked through again: a second each time."""
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("earlier_objects_stay")
@pytest.mark.parametrize(("run", "size"), CASES.values(), ids=CASES)
def test_growth_of_memory(run: Callable[[int], object], size: int) -> None:
    once = peak(run, size // 4)
    twice = peak(run, size // 2)
    assert twice <= FACTOR * once + 100_000, (once, twice)
