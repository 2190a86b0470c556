"""Tools that a model calls: a user's functions, Python in the sandbox, a search; and the prompts
that offer them.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from chat_templates import chat_of
from test_environments import RECORD, all_of, opened

from moetrain.config.rollout import RolloutConfig
from moetrain.data.continuation import Continuer
from moetrain.data.messages import FormatError, Message
from moetrain.data.prompts import read_prompt
from moetrain.data.scene import Scene
from moetrain.data.thoughts import opened_by
from moetrain.data.turns import stop_ids
from moetrain.environments import EnvironmentService
from moetrain.environments.calls import TurnReader
from moetrain.environments.search import passages
from moetrain.errors import ConfigError

OWN = '''
import os, time

def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the one
        b: the other
    """
    return a * b

async def slow(text: str = "x") -> str:
    """Say a text.

    Args:
        text: what to say
    """
    return text

def strange(what: str):
    """Do something odd.

    Args:
        what: which
    """
    if what == "hang": time.sleep(600)
    if what == "die": os._exit(3)
    if what == "raise": raise KeyError("no such key")
    return {
        "long": "x" * 10_000_000, "bytes": b"a\\xff", "half": "\\udc80b", "set": {1}, "none": None,
        "itself": (lambda own: own.append(own) or own)([]),
    }[what]

def untyped(a):
    """Says nothing of what it takes."""

OTHER = 3
'''


def turn(*calls: tuple[str, dict[str, Any]], malformed: tuple[str, ...] = ()) -> list[Message]:
    made = [
        {"type": "function", "id": f"call{i:05d}", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(calls)
    ]
    message: Message = {"role": "assistant", "content": "", "tool_calls": made}
    return [{"role": "user", "content": "go"}, message | {"malformed": list(malformed)}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_functions_are_called_and_what_goes_wrong_is_told(file: Path) -> None:
    names = [f"{file}:{name}" for name in ("multiply", "slow", "strange")]
    with opened(
        environment="tools", tools=names, environment_seconds=2.0, reply_chars=100
    ) as service:
        schemas = {tool["function"]["name"]: tool["function"] for tool in service.tools}
        assert list(schemas) == ["multiply", "slow", "strange"]
        assert schemas["multiply"]["parameters"]["properties"]["a"] == {
            "type": "integer", "description": "the one",
        }  # fmt: skip
        service.ask(
            "mixed", RECORD,
            turn(
                ("multiply", {"a": 17, "b": "23"}), ("slow", {"text": "so"}), ("slow", {}),
                ("multiply", {"a": 1}), ("multiply", {"a": "x", "b": 1}), ("mutiply", {}),
                malformed=("a tool call is not JSON: here",),
            ),
        )  # fmt: skip
        odd = "hang die raise long bytes half set none itself".split()
        for what in odd:
            service.ask(what, RECORD, turn(("strange", {"what": what})))
        service.ask("done", RECORD, [{"role": "assistant", "content": "391"}])
        found = all_of(service, len(odd) + 2)
    mixed = found["mixed"]
    assert mixed.messages and mixed.counts == {"tools/calls": 7, "tools/errors": 4}
    told = [message["content"] for message in mixed.messages]
    assert told[:3] == ["391", "so", "x"]
    assert [message.get("tool_call_id") for message in mixed.messages[:2]] == [
        "call00000", "call00001",
    ]  # fmt: skip
    assert told[3].startswith("Error: the arguments of multiply: b: Missing required")
    assert told[4].startswith("Error: the arguments of multiply: a: Input should be a valid integ")
    assert told[5] == (
        "Error: there is no tool 'mutiply'; there are multiply, slow, strange. Did you mean"
        " 'multiply'?"
    )
    assert told[6] == "Error: a tool call is not JSON: here"
    assert all("is_error" not in message for message in mixed.messages)
    assert (found["hang"].fault, found["die"].fault) == ("timeout", "crash")
    texts = {
        what: found[what].messages[0]["content"]  # type: ignore[index]
        for what in odd
        if not found[what].fault
    }
    assert texts.pop("long").endswith("[cut here, of 10,000,000 characters]")
    assert texts == {
        "raise": "Error: KeyError: 'no such key'", "bytes": "a\ufffd", "half": "?b",
        "set": "{1}", "none": "null", "itself": "[[...]]",
    }  # fmt: skip
    assert found["done"].messages is None and not found["done"].fault


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["untyped"], "untyped does not say what it takes .*a docstring with a line on each"),
        (["OTHER"], "OTHER of .* is int, not a function"),
        (["multiply", "multiply"], "two tools multiply"),
        (["multply"], "has no function multply. Did you mean 'multiply'"),
    ],
    ids=str,
)
def test_functions_that_cannot_be_tools(file: Path, names: list[str], message: str) -> None:
    own = RolloutConfig(environment="tools", tools=[f"{file}:{name}" for name in names])
    with pytest.raises(ConfigError, match=message):
        EnvironmentService(own)


def test_python_runs_in_the_sandbox() -> None:
    programs = {
        "sum": "x = 17 * 23\nx", "print": "print('a')\nprint('b')", "raise": "1 / 0",
        "syntax": "def", "exit": "import sys\nsys.exit(3)", "hang": "while True: pass",
        "disk": "open('/etc/passwd', 'w')",
        "net": "import socket\nsocket.create_connection(('127.0.0.1', 80))",
        "long": "print('x' * 20000)", "bytes": "import sys\nsys.stdout.buffer.write(b'a\\xff')",
    }  # fmt: skip
    with opened(
        environment="python", environment_options={"seconds": 4.0}, reply_chars=600
    ) as service:
        (tool,) = service.tools
        assert tool["function"]["name"] == "python"
        for name, code in programs.items():
            service.ask(name, RECORD, turn(("python", {"code": code})))
        service.ask("number", RECORD, turn(("python", {"code": 3})))
        found = all_of(service, len(programs) + 1)
    said = {name: reply.messages[0]["content"] for name, reply in found.items() if reply.messages}
    assert len(said) == len(found)
    assert said["sum"] == "391\n" and said["print"] == "a\nb\n"
    for name, part in {
        "raise": "ZeroDivisionError", "syntax": "SyntaxError", "exit": "code 3",
        "hang": "ran for over 4 s", "disk": "Error", "net": "Error",
        "number": "valid string",
    }.items():  # fmt: skip
        assert said[name].startswith("Error: ") and part in said[name], said[name]
        assert found[name].counts == {"tools/calls": 1, "tools/errors": 1}
    assert "of 20,001 characters" in said["long"] and "a\ufffd" in said["bytes"]


def test_search_finds_passages(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rivers.txt").write_text("The Rhine flows north.\n\n" + "The Po. " * 200)
    (tmp_path / "hills.jsonl").write_text(
        '{"title": "Zugspitze", "text": "The highest mountain of Germany."}\n{"text": "A hill."}\n'
    )
    assert len(list(passages(tmp_path))) == 4
    with opened(
        environment="search", environment_options={"folder": str(tmp_path), "results": 2}
    ) as service:
        for query in ("highest mountain", "rhine", "quark"):
            service.ask(query, RECORD, turn(("search", {"query": query})))
        found = all_of(service, 3)
    said = {q: reply.messages[0]["content"] for q, reply in found.items() if reply.messages}
    assert said["highest mountain"].startswith("[1] Zugspitze\nThe highest mountain of Germany.")
    assert said["rhine"].startswith("[1] rivers.txt\nThe Rhine flows north.")
    assert said["quark"] == "Nothing has these words."


def test_search_needs_a_folder_of_texts(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    for options, message in [
        ({}, r"needs rollout\.environment_options\.folder"),
        ({"folder": str(tmp_path)}, "has no text in .txt, .md, .jsonl files"),
        ({"folder": str(tmp_path / "no")}, "is no folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            EnvironmentService(RolloutConfig(environment="search", environment_options=options))


TOOLS: tuple[Any, ...] = tuple(
    {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": {
        "type": "object", "properties": {}}}}
    for name in ("add", "sub")
)  # fmt: skip


def test_prompts_offer_the_environments_tools() -> None:
    chat = chat_of("qwen3")
    scene = Scene(TOOLS, None, True)

    def text(record: dict[str, Any], scene: Scene | None) -> str:
        prompt, _ = read_prompt(record, chat)
        prompt = prompt if scene is None else scene.begin(prompt, chat)
        return str(chat.tokenizer.decode(list(prompt.tokens)))

    record: dict[str, Any] = {"prompt": "2 + 2?"}
    both = text(record, scene)
    assert "add it" in both and "sub it" in both and "add it" not in text(record, None)
    chosen = text(record | {"tools": [{"name": "sub", "description": "another"}]}, scene)
    assert "sub it" in chosen and "add it" not in chosen and "another" not in chosen
    with pytest.raises(FormatError, match="tools has mul, and the environment add, sub"):
        text(record | {"tools": [{"name": "mul"}]}, scene)
    with pytest.raises(FormatError, match="templated already"):
        text({"prompt": "a", "completion": "b", "templated": True}, scene)
    assert "mul" in text(record | {"tools": [{"name": "mul"}]}, None)


def test_an_environment_speaks_before_the_model() -> None:
    with opened(environment="game") as service:
        chat = chat_of("qwen3")
        prompt = service.scene.begin(read_prompt({"prompt": "Play."}, chat)[0], chat)
        assert [m["content"] for m in prompt.columns["prompt"]] == [
            "Play.", "Guess my number. It is between 1 and 100.",
        ]  # fmt: skip


def test_a_trajectory_from_text_to_text(file: Path) -> None:
    """As a loop drives it: what the model says is read, answered, and goes on by tokens."""
    chat = chat_of("qwen3")
    vocab = chat.tokenizer.get_vocab()
    with opened(environment="tools", tools=[f"{file}:multiply"]) as service:
        prompt = service.scene.begin(read_prompt({"prompt": "17 * 23?"}, chat)[0], chat)
        kwargs = service.scene.kwargs_of(prompt.columns)
        continuer = Continuer(chat, stop_ids(chat, {}), **kwargs)
        reader = TurnReader.of(chat.template, service.tools)
        messages, tokens, learned = list(prompt.columns["prompt"]), list(prompt.tokens), 0
        for text in (
            "<think>\nA tool.\n</think>\n\n<tool_call>\n"
            '{"name": "multiply", "arguments": {"a": 17, "b": 23}}\n</tool_call>',
            "<think>\nSo.\n</think>\n\n391",
        ):
            sampled = [*chat.ids(text), vocab["<|im_end|>"]]
            said = reader.read(text, opened_by(str(chat.tokenizer.decode(tokens))))
            service.ask("t", prompt.columns, [*messages, said])
            ((_, reply),) = service.answers(20.0)
            tokens += sampled
            learned += len(sampled)
            if reply.messages is None:
                break
            found = continuer.after(messages, said, text, sampled, reply.messages)
            assert not found.rewrites and found.tokens
            messages += found.messages
            tokens += found.tokens
    assert reply.messages is None and said["content"] == "391"
    whole = str(chat.tokenizer.decode(tokens))
    rendered = chat.template.text_of(chat.spoken([*messages, said]), **kwargs)
    assert whole + "\n" == rendered and learned < len(tokens)


def test_a_service_leaves_no_process(tmp_path: Path) -> None:
    seconds = f"9999{os.getpid()}"
    (tmp_path / "own.py").write_text(
        "import subprocess, time\nclass Own:\n    tools = []\n"
        "    def reset(self, record):\n        return []\n"
        "    def reply(self, record, messages):\n"
        f"        subprocess.Popen(['sleep', '{seconds}'], start_new_session=True)\n"
        "        time.sleep(600)\n"
    )
    mark = f"sleep\0{seconds}".encode()
    with opened(environment=f"{tmp_path}/own.py:Own", environment_workers=1) as service:
        service.ask("hang", RECORD, turn())
        end = time.monotonic() + 20
        while not _runs(mark) and time.monotonic() < end:
            assert service.answers(0.1) == []
        assert _runs(mark)
    end = time.monotonic() + 20
    while _runs(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _runs(mark)


def _runs(mark: bytes) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes():
                return True
        except OSError:
            pass
    return False
