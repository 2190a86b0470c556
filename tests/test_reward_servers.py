"""A reward model behind servers: what is asked of them, what is wrong with them, and what it costs
where they fail.
"""

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moetrain.config.rewards import RewardConfig
from moetrain.data import tokenizer as tokenizers
from moetrain.data.tokenizer_training import fit
from moetrain.errors import ConfigError
from moetrain.rewards import Grader
from moetrain.rewards.base import Completion
from moetrain.rewards.conversations import tokens_of
from moetrain.rewards.reward_servers import RewardServers
from moetrain.testing.servers import serving

LONGEST = 40
KEY = "a key of the tests"
ASKED = [{"role": "user", "content": "how long is it?"}]


class Servers(BaseHTTPRequestHandler):
    """As many as there are first words in a path, each with its own fault; a row's score is the
    mean of its tokens, less 150.
    """

    protocol_version = "HTTP/1.1"
    tokenizer: ClassVar[Any] = None
    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    lock: ClassVar[threading.Lock] = threading.Lock()
    busy: ClassVar[int] = 0
    busiest: ClassVar[int] = 0

    def do_GET(self) -> None:
        _, kind, *page = self.path.split("/")
        if kind == "keyed" and self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.say(401, {"error": "Unauthorized"})
        if kind == "no-list":
            return self.say(200, {"data": "none"})
        assert page == ["v1", "models"]
        return self.say(200, {"data": [{"id": "rm", "max_model_len": LONGEST}]})

    def do_POST(self) -> None:
        _, kind, page = self.path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if page == "tokenize":
            text = body["prompt"].upper() if kind == "upper" else body["prompt"]
            tokens = self.tokenizer.encode(text, add_special_tokens=body["add_special_tokens"])
            return self.say(200, {"tokens": tokens, "count": len(tokens)})
        if kind == "causal":
            return self.say(404, {"detail": "Not Found"})
        with self.lock:
            Servers.busy += 1
            Servers.busiest = max(Servers.busiest, Servers.busy)
            self.asked.append((kind, body))
        try:
            return self.classify(kind, body)
        finally:
            with self.lock:
                Servers.busy -= 1

    def classify(self, kind: str, body: dict[str, Any]) -> None:
        rows, raw = body["input"], not body["use_activation"]
        is_probe = len(rows) > 1
        if kind == "dies" and not is_probe:
            return self.say(500, {"error": "EngineCore encountered an issue."})
        if kind == "hangs" and not is_probe:
            time.sleep(1.5)
        if kind == "odd" and not is_probe:
            return self.say(200, {"data": [{"index": 0, "probs": None}]})
        if kind == "slow":
            time.sleep(0.05)
        scores = [sum(row) / len(row) - 150.0 + (kind == "other") * 9.0 for row in rows]
        if kind == "nan" and not is_probe:
            scores = [math.nan for _ in rows]
        if kind == "squashed" or not raw:
            scores = [1 / (1 + math.exp(-score)) for score in scores]
        wide = [0.5] if kind == "wide" else []
        data = [{"index": i, "probs": [one, *wide]} for i, one in enumerate(scores)]
        return self.say(200, {"data": data[::-1]})

    def say(self, status: int, content: Any) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        try:
            self.wfile.write(raw)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was too late

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer alone: the weights are the servers' business."""
    made = tmp_path_factory.mktemp("tokenizer")
    fit(["how long is it, and what is it worth? as long as it is wide"] * 3, 300).save_pretrained(
        str(made)
    )
    return made


@pytest.fixture(scope="module")
def root(folder: Path) -> Iterator[str]:
    Servers.tokenizer = tokenizers.load(folder)
    with serving(Servers) as where:
        yield where


def config(folder: Path, root: str, *kinds: str, **options: Any) -> RewardConfig:
    own = {"path": str(folder), "address": [f"{root}/{kind}" for kind in kinds]}
    own |= {"max_tokens": LONGEST, "seconds": 20.0}
    return RewardConfig(name="reward_model", weight=2.0, options=own | options)


def test_rows_go_out_as_ids_and_raw_scores_come_back(folder: Path, root: str) -> None:
    """Through both servers, each answer once; a long conversation loses its first tokens."""
    texts = ["short", "", "a much longer answer " * 12, "what is it worth?"] * 4
    one = config(folder, root, "fine/v1", "slow", concurrency=3)
    own = RewardServers([one])
    items = [Completion(i, text, {"prompt": ASKED}) for i, text in enumerate(texts)]
    rows = [tokens_of(item, own.chat, LONGEST) for item in items]
    assert max(map(len, rows)) == LONGEST > min(map(len, rows)) > 0
    own.close()
    Servers.asked.clear()
    Servers.busiest = 0
    grader = Grader([one], num_workers=2, deadline_s=5)
    found = grader.grade(texts, {"prompt": [ASKED] * len(texts)})
    grader.close()
    wanted = [2 * (sum(row) / len(row) - 150.0) for row in rows]
    assert [verdict.reward for verdict in found] == pytest.approx(wanted)
    asked = [(kind, body) for kind, body in Servers.asked if len(body["input"]) == 1]
    assert sorted(body["input"][0] for _, body in asked) == sorted(rows)
    assert all(body["model"] == "rm" and body["use_activation"] is False for _, body in asked)
    assert Counter(kind for kind, _ in asked) == {"fine": 8, "slow": 8} and not grader.counts
    assert 2 <= Servers.busiest <= 6


def test_a_server_that_fails_costs_no_answer_where_another_is_there(
    folder: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODEL_API_KEY", KEY)
    Servers.asked.clear()
    own = RewardServers([config(folder, root, "dies", "keyed", concurrency=1)])
    own._remotes[0].retries = 0
    items = [Completion(i, "short", {"prompt": ASKED}) for i in range(30)]
    found = dict(own.grade(items))
    own.close()
    assert sorted(found) == list(range(30)) and all(one.fault is None for one in found.values())
    assert len({one.values["reward_model"] for one in found.values()}) == 1
    asked = Counter(kind for kind, body in Servers.asked if len(body["input"]) == 1)
    assert 1 <= asked["dies"] <= 3 < asked["keyed"]  # it is asked last from then on


@pytest.mark.parametrize(
    ("kind", "fault", "says"),
    [
        ("dies", "error", "500.*EngineCore"),
        ("hangs", "timeout", "no answer in 0.5 s"),
        ("odd", "error", "no answer of /classify"),
        ("nan", "error", "the score is nan"),
    ],
)
def test_an_answer_that_no_server_scores_is_ungraded(
    folder: Path, root: str, kind: str, fault: str, says: str
) -> None:
    """And never worth 0."""
    own = RewardServers([config(folder, root, kind)])
    own._remotes[0].retries, own._remotes[0].seconds = 1, 0.5 if kind == "hangs" else 20.0
    ((number, one),) = own.grade([Completion(7, "short", {"prompt": ASKED})])
    own.close()
    assert number == 7 and one.values == {"reward_model": None} and one.fault == fault
    assert one.notes == (() if kind == "nan" else ("reward_model_unanswered",))
    assert re.search(says, one.detail) and "\n" not in one.detail


@pytest.mark.parametrize(
    ("kinds", "options", "says"),
    [
        (["causal"], {}, "404.*--runner pooling, or moetrain serve MODEL --reward-model"),
        (["keyed"], {}, "401.*variable REWARD_MODEL_API_KEY, which is not set"),
        (["no-list"], {}, "no list of models"),
        (["fine"], {"model": "other"}, "model=other: .* serves rm. Give one of them"),
        (["fine"], {"max_tokens": 41}, "Set max_tokens to 40, or start it with --max-model-len 41"),
        (["upper"], {}, "into other tokens than .* Set path to the folder"),
        (["wide"], {}, "a model with 2 labels, and a reward model has one"),
        (["squashed"], {}, "between 0 and 1, whether asked to or not"),
        (["fine", "other"], {}, "they serve different models"),
    ],
)
def test_what_cannot_be_the_reward_is_said_before_the_first_step(
    folder: Path, root: str, kinds: list[str], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        RewardServers([config(folder, root, *kinds, **options)])
    assert "\n" not in str(caught.value)


def test_nobody_there_is_said_in_a_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9.*vllm serve") as caught:
        RewardServers([config(folder, "http://127.0.0.1:9", "")])
    assert "\n" not in str(caught.value)
