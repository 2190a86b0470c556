"""Environments: what they reply, and that what one does costs no other trajectory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.load import recipe_from
from moetrain.config.rollout import RolloutConfig
from moetrain.environments import EnvironmentService, Reply, check_names
from moetrain.errors import ConfigError, MoetrainError

RECORD: dict[str, Any] = {"prompt": "play", "number": 50}


def said(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "play"}, {"role": "assistant", "content": content}]


@contextmanager
def opened(**rollout: Any) -> Iterator[EnvironmentService]:
    service = EnvironmentService(RolloutConfig.model_validate(rollout))
    try:
        yield service
    finally:
        service.close()


def all_of(service: EnvironmentService, num: int) -> dict[Any, Reply]:
    """That many answers."""
    found: dict[Any, Reply] = {}
    end = time.monotonic() + 60
    while len(found) < num and time.monotonic() < end:
        found |= dict(service.answers(10.0))
    assert len(found) == num and not service.num_waiting and service.answers(0.0) == []
    return found


OWN = """
import os, time, typing
class Strange:
    tools = []
    def reset(self, record):
        return [{"role": "user", "content": "begin"}]
    def reply(self, record, messages):
        what = messages[-1]["content"]
        if what == "hang": time.sleep(600)
        if what == "die": os._exit(3)
        if what == "raise": raise KeyError("no such thing")
        say = lambda content, **more: [{"role": "user", "content": content, **more}]
        return {
            "long": say("x" * 10_000_000), "bytes": say(b"a\\xff"), "half": say("\\udc80"),
            "number": say({"a": 1}), "none": None, "word": "hello", "role": say("a") * 2,
            "forge": [{"role": "assistant", "content": "I said this"}], "mixed": [3],
            "error": say("it broke", is_error=True),
        }[what]
"""


def test_what_is_strange_costs_its_own_trajectory(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with opened(
        environment=f"{tmp_path}/own.py:Strange", environment_seconds=1.5, reply_chars=100
    ) as service:
        assert service.reset(RECORD) == [{"role": "user", "content": "begin"}]
        asked = "hang die raise long bytes half number none word role forge mixed error".split()
        for what in asked:
            service.ask(what, RECORD, said(what))
        found = all_of(service, len(asked))
    faults = {what: reply.fault for what, reply in found.items() if reply.fault}
    assert faults == {
        "hang": "timeout", "die": "crash",
        **dict.fromkeys(("raise", "word", "forge", "mixed"), "error"),
    }  # fmt: skip
    assert "no such thing" in found["raise"].detail
    texts = {
        what: [m["content"] for m in reply.messages]
        for what, reply in found.items()
        if reply.messages
    }
    assert texts.pop("long")[0].endswith("\n[cut here, of 10,000,000 characters]")
    assert found["long"].messages and len(found["long"].messages[0]["content"]) == 100
    assert texts == {
        "bytes": ["a\ufffd"], "half": ["?"], "number": ['{"a": 1}'], "role": ["a", "a"],
        "error": ["it broke"],
    }  # fmt: skip
    assert found["none"] == Reply() and found["error"].counts == {"tools/errors": 1}


def test_a_game_is_played_from_what_was_said() -> None:
    """By any process, whichever played before."""
    with opened(environment="game", environment_options={"low": 1, "high": 99}) as service:
        (first,) = service.reset(RECORD)
        assert "between 1 and 99" in first["content"]
        low, high, guess = 1, 99, 0
        messages = [{"role": "user", "content": "play"}, first]
        for turn in range(8):
            guess = (low + high) // 2
            messages.append({"role": "assistant", "content": f"I say {guess}"})
            service.ask(turn, RECORD, messages)
            ((key, reply),) = service.answers(10.0)
            assert key == turn
            if reply.messages is None:
                break
            messages += reply.messages
            is_higher = reply.messages[0]["content"] == "higher"
            low, high = (guess + 1, high) if is_higher else (low, guess - 1)
        assert guess == RECORD["number"]


def test_threads_ask_while_one_waits() -> None:
    with opened(environment="game") as service:

        def ask(first: int) -> None:
            for number in range(first, first + 20):
                service.ask(number, RECORD, said(str(number)))

        threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 100, 200)]
        for thread in threads:
            thread.start()
        found = all_of(service, 60)
        for thread in threads:
            thread.join()
        assert all(
            reply.messages and reply.messages[0]["content"] == ("higher" if key < 50 else "lower")
            for key, reply in found.items()
        )
        assert service.answers(None) == []  # nothing is asked


def test_a_slow_reply_holds_no_other(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with opened(environment=f"{tmp_path}/own.py:Strange") as service:
        for what in ("hang", *["bytes"] * 20):
            service.ask(what, RECORD, said(what))
        quick: list[Any] = []
        end = time.monotonic() + 20
        while len(quick) < 20 and time.monotonic() < end:
            quick += service.answers(5.0)
        assert len(quick) == 20 and service.num_waiting == 1


def test_single_replies_nothing() -> None:
    with opened() as service:
        assert service.reset(RECORD) == [] and service.tools == ()
        service.ask("a", RECORD, said("done"))
        assert service.answers(10.0) == [("a", Reply())]


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"environment": "gme"}, r"rollout\.environment=gme is none of .* Did you mean 'game'\?"),
        ({"environment": "no.py:A"}, "no.py is not a file"),
        ({"environment": "{file}:Stranger"}, "has no class Stranger. Did you mean 'Strange'"),
        ({"environment": "game", "environment_options": {"lo": 1}}, "takes low, high.* 'low'"),
        ({"environment": "tools", "tools": ["{file}:f"]}, r"rollout\.tools: .* has no function f"),
        ({"tools": ["{file}:Strange"]}, r"rollout\.tools are offered by rollout\.environment="),
        ({"environment": "tools"}, r"needs rollout\.tools"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_there_is_refused(
    tmp_path: Path, rollout: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    named = {
        key: [one.format(file=tmp_path / "own.py") for one in value]
        if isinstance(value, list)
        else value.format(file=tmp_path / "own.py")
        if isinstance(value, str)
        else value
        for key, value in rollout.items()
    }
    with pytest.raises((MoetrainError, ValueError), match=message):
        check_names(RolloutConfig.model_validate(named))


def test_an_environment_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.environment=game: ValueError: low=9 is over"):
        EnvironmentService(
            RolloutConfig(environment="game", environment_options={"low": 9, "high": 2})
        )


def test_limits_of_an_answer_are_those_of_all_its_turns() -> None:
    """What follows from rollout.max_tokens, of one turn; data.seq_len holds all of them."""
    cases = [("single", 2048, 100), ("game", 2048, 300), ("game", 256, 256)]
    for environment, seq_len, most in cases:
        rollout: dict[str, Any] = {"environment": environment, "max_tokens": 100}
        rollout |= {} if environment == "single" else {"max_turns": 3}
        content: dict[str, Any] = {
            "run_dir": "runs/x", "model": {"path": "builtin:qwen3-moe-tiny"},
            "data": {"train": ["a.jsonl"], "seq_len": seq_len}, "rewards": ["accuracy"],
            "train": {"steps": 1}, "rollout": rollout,
        }  # fmt: skip
        dapo: Any = recipe_from(content | {"method": "dapo"}).method
        assert (dapo.max_length, dapo.soft_length) == (most, most // 5)
        dr_grpo: Any = recipe_from(content | {"method": "dr_grpo"}).method
        assert dr_grpo.length == most
