"""A reward model under the engine, served: transformers' scores at every layout, and what one
server takes, refuses and ends with.
"""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from data_helpers import tokenizer_folder

from moetrain import cli
from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.loops import reward_server
from moetrain.loops.agent_api import Refused
from moetrain.loops.reward_model import KEY, Desk, reward_recipe
from moetrain.loops.reward_server import RewardServer
from moetrain.rewards.base import Completion
from moetrain.rewards.reward_model import RewardModel
from moetrain.rewards.reward_servers import RewardServers
from moetrain.testing import command, scored
from moetrain.testing.command import Started
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import save_reward_model

TOKEN = "a token of the tests"
ASKED = [{"role": "user", "content": "how long is it?"}]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2 ep2": (2, ["parallel.ep=2"]),
    "cp2": (2, ["parallel.cp=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reward") / "hf"
    save_reward_model("qwen3_moe", made, vocab_size=512)
    shutil.copytree(tokenizer_folder(), made, dirs_exist_ok=True)
    return made


def reward(folder: Path, **options: Any) -> RewardConfig:
    return RewardConfig(name="reward_model", options={"path": str(folder), **options})


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_transformers_at_every_layout(
    workers: Workers, folder: Path, layout: str
) -> None:
    """Of rows in packs that are full, of one alone, and of fewer than there are replicas."""
    rng = random.Random(3)
    lengths = ([5, 1, 64, 2, 17, 33, 8, 1, 60], [7], [64, 64, 64])
    batches = [[[rng.randrange(512) for _ in range(n)] for n in one] for one in lengths]
    size, overrides = LAYOUTS[layout]
    more = [*overrides, "data.seq_len=64"]
    found = workers.run(size, scored.scored, str(folder), more, batches)
    assert all(other == [[], [], []] for other in found[1:])
    own = RewardModel([reward(folder)])
    for rows, scores in zip(batches, found[0], strict=True):
        assert scores == pytest.approx(own.scores(rows), abs=1e-4)
    assert len({round(score, 3) for score in found[0][0]}) > 5


# The command


class Serving:
    """A server that runs."""

    def __init__(self, folder: Path, *words: str):
        env = {**os.environ, KEY: TOKEN, "OMP_NUM_THREADS": "1"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: Started = command.start(
            *("serve", folder, "--reward-model", "--port", str(self.port)), *words, env=env
        )
        end = time.monotonic() + 120
        while self.ask("GET", "/health")[0] != 200:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def ask(
        self, how: str, page: str, body: Any = None, token: str = TOKEN
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(how, page, raw, {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError:
            return 0, {}
        finally:
            connection.close()

    def ranks(self) -> list[int]:
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in file.read_text().split()]


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Serving]:
    one = Serving(folder, "--nproc", "2", "parallel.ep=2", "data.seq_len=64")
    yield one
    one.process.kill()


def test_a_reward_by_address_is_the_one_by_path(
    serving: Serving, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at a time, some of them longer than is read."""
    monkeypatch.setenv("REWARD_MODEL_API_KEY", TOKEN)
    texts = ["short", "", "a longer answer " * 9, "what is it worth?", "7"] * 8
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    items = [Completion(i, text, {"prompt": ASKED}) for i, text in enumerate(texts)]
    wanted = dict(RewardModel([reward(folder, max_tokens=64)]).grade(items))
    address = f"http://127.0.0.1:{serving.port}"
    servers = RewardServers([reward(folder, max_tokens=64, address=address)])
    found = dict(servers.grade(items))
    servers.close()
    assert len({one.values["reward_model"] for one in wanted.values()}) > 30
    for number, one in wanted.items():
        assert found[number].values["reward_model"] == pytest.approx(
            one.values["reward_model"], abs=1e-4
        )


def test_what_it_does_not_take(serving: Serving) -> None:
    """And goes on."""
    long, many = [[7] * 65], [[7]] * (reward_server.MOST_ROWS + 1)
    big = b" " * (reward_server.MOST_BYTES + 1)
    for page, body, status, says in (
        ("/classify", {"input": long}, 400, "65 tokens, and 64 are the most"),
        ("/classify", {"input": many}, 413, "1025 rows"),
        ("/classify", {"input": [[512]]}, 400, "token 512 is not in the vocabulary of 512"),
        ("/classify", {"input": [[-1]]}, 400, "token -1"),
        ("/classify", {"input": [[True]]}, 400, "rows of token ids"),
        ("/classify", {"input": [[]]}, 400, "none of them empty"),
        ("/classify", {"input": "text"}, 400, "rows of token ids"),
        ("/classify", {"input": []}, 400, "rows of token ids"),
        ("/classify", {"input": [[7]], "model": "gpt"}, 404, "gpt is not here"),
        ("/classify", {"input": [[7]], "truncate_prompt_tokens": 3}, 400, "is not known here"),
        ("/classify", [1], 400, "no object"),
        ("/classify", b"{", 400, "JSON"),
        ("/classify", b"\xff", 400, "the body is"),
        ("/classify", big, 413, "16 MiB"),
        ("/tokenize", {"prompt": "x" * 10_001}, 400, "at most 10000 characters"),
        ("/pooling", {"input": [[7]]}, 404, "there is no /pooling"),
    ):
        found, answer = serving.ask("POST", page, body)
        if found == 0:  # told and closed while it was still being sent
            assert body is big
            continue
        assert (found, True) == (status, says in answer["error"]["message"]), answer
    for page in ("/v1/models", "/classify", "/nothing"):
        assert serving.ask("GET", page, token="other")[0] == 401
    assert serving.ask("POST", "/classify", {"input": [[7]]}, token="other")[0] in (0, 401)
    status, answer = serving.ask("POST", "/classify", {"input": [7, 8]})
    (one,) = answer["data"]
    raw = serving.ask("POST", "/classify", {"input": [[7, 8]], "use_activation": False})[1]
    assert status == 200 and one["probs"][0] == pytest.approx(
        1 / (1 + pow(2.718281828459045, -raw["data"][0]["probs"][0]))
    )


def test_sigterm_ends_it(serving: Serving) -> None:
    serving.process.terminate()
    out, err = serving.process.communicate(60)
    assert serving.process.returncode == 0 and "Traceback" not in err
    assert f"ready at http://127.0.0.1:{serving.port}" in out and TOKEN not in out
    assert serving.ask("GET", "/health")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGKILL, 137, "rank 1 was ended by SIGKILL"),
        (signal.SIGSTOP, 75, "ranks 0, 1 have not moved for"),
    ],
)
def test_a_rank_that_is_gone_or_hangs_ends_it(
    folder: Path, tmp_path: Path, number: int, code: int, says: str
) -> None:
    own = ("cluster.hang_seconds=3", f"run_dir={tmp_path}", "parallel.pp=2")
    one = Serving(folder, "--nproc", "2", *own)
    os.kill(one.ranks()[1], number)
    _, err = one.process.communicate(60)
    assert one.process.returncode == code and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--agents"], "not allowed with"),
        (["--out", "x"], "--out is for serve MODEL --agents"),
        (["rollout.max_tokens=3"], "does not read rollout.max_tokens"),
        (["parallel.tp=x"], "parallel.tp"),
        ([], "set REWARD_MODEL_API_KEY here and where the trainer runs"),
    ],
)
def test_command_lines_that_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    try:
        code: Any = cli.main(["serve", str(folder), "--reward-model", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and re.search(says, capsys.readouterr().err)
    assert cli.main(["serve", "x", "--nproc", "2", "--port", "1"]) == 2


def test_a_model_without_a_score_head_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="has no score head: it is no reward model") as refused:
        reward_recipe(tiny("qwen3_moe")[0])
    assert "\n" not in str(refused.value)


# The endpoint and the desk


class Lengths:
    """The length of a row is its score."""

    longest, vocab = 64, 512

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [len(text)]

    def ask(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return [float(len(row)) for row in rows]


def test_requests_that_trickle_and_connections_without_end_do_not_block_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_server, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(reward_server, "MOST_CONNECTIONS", 20)
    server = RewardServer(Lengths(), "127.0.0.1", 0, TOKEN)
    host, port = "127.0.0.1", int(server.address.rpartition(":")[2])
    held = [socket.create_connection((host, port)) for _ in range(30)]
    try:
        while server._server.num_open < 20:
            time.sleep(0.01)
        time.sleep(0.1)
        assert server._server.num_open == 20  # the others are closed at once
        for one in held[:20]:
            one.sendall(b"POST /classify HTTP/1.1\r\n")
        began = time.monotonic()
        left = set(held)
        while left and time.monotonic() < began + 10:
            for one in list(left):
                try:
                    one.sendall(b"X")  # a header without end
                    one.settimeout(0.01)
                    if one.recv(1) == b"":
                        left.discard(one)
                except TimeoutError:
                    pass
                except OSError:
                    left.discard(one)
        assert not left and time.monotonic() < began + 8
        body = {"input": [[1, 2, 3]], "use_activation": False}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(f"{server.address}/classify", json=body, headers=headers).json()
        assert answer["data"][0]["probs"] == [3.0]
    finally:
        for one in held:
            one.close()
        server.close()


def test_the_desk_hands_out_what_came_first_and_lets_nobody_wait_for_ever() -> None:
    """Up to as many tokens as are wanted, of several requests; a row alone may have more."""
    desk = Desk(None, 64, 512)
    found: dict[int, Any] = {}

    def ask(number: int, *lengths: int) -> None:
        try:
            found[number] = desk.ask([[number] * n for n in lengths])
        except Refused as refused:
            found[number] = refused.status

    threads: list[threading.Thread] = []
    with desk:
        assert desk.take(9) == []
        for number, lengths in ((1, (5, 3)), (2, (4, 12)), (3, (2,))):
            threads.append(threading.Thread(target=ask, args=(number, *lengths)))
            threads[-1].start()
            while len(desk) < len(threads):
                time.sleep(0.001)
        for wanted in ([[1] * 5, [1] * 3], [[2] * 4], [[2] * 12]):
            rows = desk.take(9)
            assert rows == wanted
            desk.give([float(len(row)) for row in rows])
        assert desk.take(9) == [[3, 3]]  # and the ranks are lost
    for thread in threads:
        thread.join(10)
    assert found == {1: [5.0, 3.0], 2: [4.0, 12.0], 3: 503}
    ask(4, 1)
    assert found[4] == 503
