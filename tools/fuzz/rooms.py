"""What is fuzzed of runs that go on: a model's turns and the tools that it calls, batches of
rollouts, a run that is watched, a judge's answers, passages to search, tables of GPUs.
"""

import contextlib
import io
import json
import random
import struct
import threading
import zlib
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import files
import mutate
import seeds

if TYPE_CHECKING:
    from targets import Bench

# Turns

BEGIN, END, SEP = (f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call▁begin", "call▁end", "sep"))
CALL = '{"name": "add", "arguments": {"a": 2, "b": [1, null, {"c": "d"}]}}'
TURNS = {
    "json": f"<think>so</think>I add.\n<tool_call>\n{CALL}\n</tool_call>",
    "xml": "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=text>\n<b>\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>text</arg_key>"
    "\n<arg_value>x</arg_value>\n</tool_call>",
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 2}}; {"name": "say", "parameters":'
    ' {"text": "x"}}',
    "deepseek": f'Adding.{BEGIN}add{SEP}{{"a": 2}}{END}{BEGIN}function{SEP}say\n```json\n'
    f'{{"text": "x"}}\n```{END}',
    "harmony": "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>commentary"
    ' to=functions.add <|constrain|>json<|message|>{"a": 2}<|call|>',
}
MARKS = (
    "<tool_call>", "</tool_call>", "<function=add>", "</function>", "<parameter=a>", "</parameter>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|python_tag|>", "<think>",
    "</think>", BEGIN, END, SEP, "<|message|>", "<|start|>", "<|channel|>final", "<|call|>", CALL,
    "```json\n", '{"name":', '"\\ud800"', "1e999", "NaN", "[" * 90, "[" * 5000, "9" * 5000, '"a" ',
    "<|im_end|>", "\n", ";",
)  # fmt: skip


def make_turn(rng: random.Random) -> tuple[str, str, list[Any]]:
    """(a format, a turn of the model, what a tool returns)."""
    name = rng.choice(tuple(TURNS))
    text = TURNS[name if rng.random() < 0.9 else rng.choice(tuple(TURNS))]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        place = rng.randrange(len(text) + 1)
        if rng.random() < 0.6:
            piece = rng.choice(MARKS) * rng.choice((1, 1, 1, 2, 20, 3000))
            text = text[:place] + piece + text[place + rng.choice((0, 0, 5)) :]
        else:
            text = mutate.change_text(rng, text)
    text = text.encode("utf-8", "replace").decode()[:200_000]  # as a tokenizer makes it
    return name, text, [mutate.nasty(rng) for _ in range(2)]


def _tools(returned: list[Any]) -> dict[str, Any]:
    def add(a: int, b: Any = None, text: str = "") -> Any:
        return returned[0]

    def say(text: str) -> Any:
        raise ValueError(str(returned[1]))

    return {"add": add, "say": say}


def run_turn(bench: "Bench", made: tuple[str, str, list[Any]]) -> str:
    """Read, replied to, kept in a file, gone on with, and shown to rewards."""
    from moetrain.data.continuation import Continuer
    from moetrain.data.messages import FormatError
    from moetrain.data.samples import Sample
    from moetrain.data.trajectories import Branch, Trajectory
    from moetrain.environments.calls import TurnReader
    from moetrain.environments.game import Game
    from moetrain.environments.replies import read_replies
    from moetrain.environments.toolbox import Toolbox
    from moetrain.loops.store import Store

    name, text, returned = made
    said = TurnReader(name, [seeds.TOOL]).read(text)
    toolbox = Toolbox(_tools(returned), lambda: [seeds.TOOL])
    asked: list[Any] = [seeds.USER, said]
    replied = toolbox.reply({}, asked)
    Game().reply({}, asked)
    reply = read_replies(replied, said, 1000)
    messages = (said, *(reply.messages or ()))
    sample = Sample("p", 0, (1, 2), (-0.5, -0.25), text, "stop", 0)
    detail = mutate.text_of(returned[1])
    one = Trajectory("p", 0, (Branch.of(sample),), "stop", messages, reply.counts, detail)
    store = Store(files.fresh(bench, "turns"))
    with store.open(1, [one]):
        pass
    (again,) = store.finished(1).values()
    assert list(again.messages) == list(messages), (again.messages, messages)
    store.write(_batch([one]))
    assert store.read(1) is not None
    chat = bench.encoder("chat", 1).chat
    try:
        ids = chat.ids("It is 4.<|im_end|>")
        Continuer(chat, ids[-1:]).after([seeds.USER], said, text, ids, reply.messages or ())
    except FormatError:
        return "refused"
    return "used" if said.get("tool_calls") else "no calls"


# Batches of rollouts


def _batch(made: Any) -> Any:
    from moetrain.data.groups import GradedAnswer, Group
    from moetrain.data.samples import Prompt
    from moetrain.loops.store import Batch

    prompt = Prompt("p", (1, 2, 3), {"prompt": [seeds.USER], "answer": "4"})
    graded = (GradedAnswer(one, 1.0, {"exact": 1.0}, {"said": "4"}) for one in made)
    own = {"temperature": 1.0, "sampling": {"top_p": 1.0}, "counts": {"dropped/batches": 0}}
    return Batch(1, (Group(prompt, tuple(graded)),), 4, {"sample": 1.0}, **own)


@cache
def _rollouts() -> files.Files:
    """A batch's two files, and one of a batch that is being made."""
    import tempfile

    import numpy as np

    from moetrain.data.samples import Kept, Sample
    from moetrain.data.trajectories import Branch, Trajectory
    from moetrain.loops.store import Store

    routes = np.zeros((4, 1, 2), np.int16)
    kept = Kept.of([[1, 2], [2]])
    sample = Sample("p", 0, (5, 6), (-0.5, -0.25), "hi", "stop", 2, routes, kept, (2, 3))
    plain = Trajectory.of(sample)
    first = Branch.of(sample).with_reply([7, 8], "so?")
    first = replace(first, routes=np.zeros((6, 1, 2), np.uint8))
    turned = Branch.of(sample, np.array([1, 2, 9], np.int32))
    messages = ({"role": "assistant", "content": "hi"}, {"role": "user", "content": "so?"})
    many = Trajectory("p", 1, (first, turned), "turns", messages, {"tools/calls": 1})
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name))
        store.write(_batch([plain, many]))
        with store.open(2, [plain, many]):
            pass
        return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}


ROWS, NUMBERS, OPEN = "00000001.jsonl", "00000001.safetensors", "00000002.partial.jsonl"


def make_rollouts(rng: random.Random) -> files.Files:
    found = dict(_rollouts())
    for name in dict.fromkeys(
        rng.choices((ROWS, OPEN, NUMBERS), (4, 2, 2), k=rng.choice((1, 1, 2)))
    ):
        if name == NUMBERS:
            found[name] = _numbers(rng, found[name])
        else:
            lines = [files.changed(rng, json.loads(line), 2) for line in found[name].splitlines()]
            raw = b"".join(files.dumped(line) + b"\n" for line in lines)
            found[name] = files.other_bytes(rng, raw, 0.1)
    if rng.random() < 0.8:  # whoever changed the numbers says so
        head, _, rest = found[ROWS].partition(b"\n")
        with contextlib.suppress(ValueError, TypeError):
            said = json.loads(head) | {"crc": zlib.crc32(found[NUMBERS])}
            found[ROWS] = json.dumps(said).encode() + b"\n" + rest
    return found


def _numbers(rng: random.Random, raw: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", raw)
    if rng.random() < 0.5:
        place = rng.randrange(8 + size, len(raw))
        number = rng.choice((b"\0", b"\1", b"\x7f", b"\xff")) * rng.choice((1, 4, 8))
        return (raw[:place] + number + raw[place + len(number) :])[: len(raw)]
    header = files.dumped(files.changed(rng, json.loads(raw[8 : 8 + size]), 2))
    return struct.pack("<Q", len(header)) + header + raw[8 + size :]


def run_rollouts(bench: "Bench", made: files.Files) -> str:
    """As a run goes on with them, `rollout.replay` learns from them, and `show` shows them."""
    import torch

    from moetrain.data.groups import pack_groups
    from moetrain.errors import MoetrainError
    from moetrain.loops.outline import outline_of
    from moetrain.loops.replayed import check_drawn
    from moetrain.loops.store import Store
    from moetrain.observe.answers import Summary, describe_reward, picked, read_answers

    folder = files.fresh(bench, "rollouts")
    files.laid(folder, made)
    store = Store(folder)
    with contextlib.suppress(MoetrainError):
        done = store.finished(2)
        with store.open(2, done.values()):
            pass
    with contextlib.suppress(MoetrainError):
        answers = read_answers(folder / ROWS)
        Summary.of(answers).describe()
        [describe_reward(one) for _, one in picked(answers, 2, 2)]
    check_drawn(store, 1, {"temperature": 1.0, "top_p": 1.0})
    batch = store.read(1)
    assert batch is not None
    given = outline_of(batch)
    assert isinstance(given.cursor, int) and given.oldest >= 0
    assert (
        sum([*given.seconds.values(), *batch.counts.values(), *batch.metrics.values()]) is not None
    )
    values = {"advantage": torch.zeros(len(batch.answers))}
    for experts in (0, 300):
        pack_groups(batch.groups, values, seq_len=64, min_packs=1, beyond=True, num_experts=experts)
    store.write(batch)
    assert store.read(1) is not None
    return "used"


# A run that is watched

LEASE = {"host": "node1", "pid": 5, "count": 7, "job": None}


def make_watched(rng: random.Random) -> files.Files:
    found = files.make_report(rng)
    rows = found.get("a/ledger.jsonl", b"") or b'{"step": 1, "loss": 1.0}\n'
    faults = {"faults/timeout": 1, "faults/\\u00e9": 10**30, "seconds/sample": 1.0, "warning": "w"}
    more = files.lines(rng, [{"step": 12, "loss": 0.1, "seconds": 1.0} | faults], 2)
    found["a/ledger.jsonl"] = rows + more + rng.choice((b"", b'{"step": 13'))
    found["a/.lease"] = files.other_bytes(rng, files.dumped(files.changed(rng, LEASE)), 0.1)
    found["a/rollouts/00000012.jsonl"] = make_rollouts(rng)[ROWS]
    return found


def run_watched(bench: "Bench", made: files.Files) -> str:
    """As `moetrain watch` shows it, in a terminal with colours and in a narrow one of ASCII."""
    from rich.console import Console

    from moetrain.observe.watch import Watch, frame

    folder = files.fresh(bench, "watched")
    files.laid(folder, made)
    run = Watch(folder / "a")
    for width, height, encoding in ((120, 40, "utf-8"), (40, 6, "ascii"), (80, None, "latin-1")):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        console = Console(file=out, force_terminal=True, width=width, height=height)
        run.look()
        console.print(frame(run, console, height))
        out.flush()
    return "used" if run.ledger.said.num_rows else "refused"


# A judge's answers

WORDS = ("Score: 8", "So.\n\nScore: **-3**/10", "It is 5 of 10. Score: \u22125", "Score: 1e400")
ANSWER = {"choices": [{"message": {"content": "Score: 8"}, "finish_reason": "stop"}], "id": "x"}


def make_judged(rng: random.Random) -> tuple[bytes, str]:
    answer = json.loads(json.dumps(ANSWER))
    words = rng.choice(WORDS)
    for _ in range(rng.choice((0, 1, 2))):
        words = mutate.change_text(rng, words)
    answer["choices"][0]["message"]["content"] = words * rng.choice((1, 1, 1, 2, 5000))
    return files.other_bytes(rng, files.dumped(files.changed(rng, answer, 2)), 0.1), words


class Judged:
    """A judge, and the server that answers it what it is told to."""

    def __init__(self) -> None:
        from moetrain.config.rewards import RewardConfig
        from moetrain.rewards.judge import Judge

        self.given = files.dumped(ANSWER)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.given)))
                self.end_headers()
                self.wfile.write(outer.given)

            def log_message(self, *args: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "retries": 0}
        config = {"name": "judge", "options": told | {"prompt": "{completion} {answer}"}}
        self.judge = Judge([RewardConfig.model_validate(config)])


def run_judged(bench: "Bench", made: tuple[bytes, str]) -> str:
    """What the judge's server answers, and the number in it."""
    from moetrain.rewards.base import Completion

    bench.judged.given, words = made
    text = words.encode("utf-8", "replace").decode()
    ((_, found),) = bench.judged.judge.grade([Completion(0, text, {"answer": [text]})])
    if found.fault:
        assert found.detail
        return "refused"
    value = found.values["judge"]
    assert value is not None and 0 <= value <= 1, found
    return "used"


# Passages to search


def make_passages(rng: random.Random) -> tuple[files.Files, str]:
    rows = files.lines(rng, [{"title": "A", "text": "The sum is four."}, {"content": ["x"]}], 2)
    text = "A sum.\n\n" * rng.choice((0, 3, 400))
    for _ in range(rng.choice((0, 1, 2))):
        text = mutate.change_text(rng, text)
    raw = files.other_bytes(rng, text.encode("utf-8", "surrogatepass"))
    return {"a.jsonl": rows, "b.txt": raw}, mutate.change_text(rng, "the sum")


def run_passages(bench: "Bench", made: tuple[files.Files, str]) -> str:
    """As the environment reads a folder, and a model asks for some."""
    from moetrain.environments.replies import text_of_value
    from moetrain.environments.search import Search

    folder = files.fresh(bench, "passages")
    files.laid(folder, made[0])
    search = Search(str(folder))
    text_of_value(search._search(made[1].encode("utf-8", "replace").decode())).encode()
    return "used"


# Tables of GPUs


def make_gpu(rng: random.Random) -> bytes:
    folder = seeds.ROOT / "moetrain" / "planner" / "gpus"
    text = (folder / rng.choice(("h100.yaml", "h200.yaml", "cpu.yaml"))).read_text()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        if rng.random() < 0.5:
            lines = text.splitlines()
            mutate.change_words(rng, lines, ["like: h100", "like: [1]", "name: 5", "gemm: {}"])
            text = "\n".join(lines)
        else:
            text = mutate.change_text(rng, text)
    return files.other_bytes(rng, text.encode("utf-8", "surrogatepass"), 0.05)


def run_gpu(bench: "Bench", made: bytes) -> str:
    """As `moetrain plan --gpu FILE` reads it and reckons with it."""
    from moetrain.planner.gpu import KINDS, _read, find_gpu, pick

    path = bench.folder / "gpu.yaml"
    path.write_bytes(made)
    _read.cache_clear()
    gpu = find_gpu(str(path))
    for dtype in ("bf16", "fp32", "fp8"):
        for curves in (gpu.gemm, gpu.grouped, gpu.attention, gpu.attention_backward):
            assert gpu.peak(dtype) >= 0 and pick(curves, dtype).at(100) > 0
    assert all(pick(gpu.memory, kind).at(1e6) > 0 for kind in KINDS)
    assert gpu.fixed_bytes(3) >= 0 and pick(gpu.nvlink_share, "x").value >= 0
    assert gpu.optimizer.at(1.0) > 0
    return "used"


# name -> (weight, make, run)
ROOMS: dict[str, tuple[int, Any, Any]] = {
    "turns": (5, make_turn, run_turn),
    "rollouts": (5, make_rollouts, run_rollouts),
    "watched": (3, make_watched, run_watched),
    "judged": (3, make_judged, run_judged),
    "passages": (2, make_passages, run_passages),
    "gpus": (3, make_gpu, run_gpu),
}
