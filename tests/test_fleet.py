"""Servers behind the rollout protocol, without vLLM: a small HTTP server speaks its protocol, and
misbehaves. tests/system has the real one.
"""

import json
import os
import stat
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moetrain.config.load import load_recipe
from moetrain.config.rollout import RolloutConfig
from moetrain.data import assets
from moetrain.data.samples import Prompt, Sample
from moetrain.errors import RolloutError
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.client import Client, QueueFull, ServerLost
from moetrain.rollout.dealing import Deal
from moetrain.rollout.fleet import Fleet
from moetrain.rollout.process import Launch, ServerProcess, interpreter, token_of
from moetrain.rollout.remote.moetrain_weights import Folders, unseen
from moetrain.rollout.serve import serve
from moetrain.rollout.servers import Given
from moetrain.rollout.transfer import buckets, described

RECIPE = Path(__file__).parents[1] / "examples" / "grpo_tiny.yaml"
TOKEN = "a-token"
PUSH = {"export_s", "load_s", "bytes", "whole_bytes"}


class Small(ThreadingHTTPServer):
    """Answers every request with one token, its number; `faults` are used up one a call."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version: int | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.loaded: list[str] = []  # by the last push
        self.pid = 1
        self.faults: list[str] = []
        self.room = 1000
        self.slow: set[int] = set()  # requests that go on until they are stopped
        self.is_deaf = False  # to being stopped
        self.stopped = threading.Event()
        self.goes_on = threading.Event()  # while it is not set, nothing is answered
        self.goes_on.set()
        self.push_seconds = 0.0
        self.asked: dict[int, dict[str, Any]] = {}
        self.drawn: Counter[int] = Counter()
        self.calls: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Small

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: dict[str, Any]) -> None:
        small = self.server
        small.calls.append(self.path)
        small.goes_on.wait(30)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say(401, {"error": "the token is missing or wrong"})
        if self.path == "/health":
            return self._say(200, {"version": small.version, "pid": small.pid})
        if self.path == "/push":
            if "refuses" in small.faults:
                small.faults.remove("refuses")
                return self._say(422, {"error": "a push that cannot be"})
            time.sleep(small.push_seconds)
            held = Folders(link["folder"] for link in body["links"])
            small.loaded = held.to_load(unseen(body, small.version))
            small.weights = {
                name: held.read(name) if name in small.loaded else small.weights[name]
                for name in held.names()
            }
            small.version = body["version"]
            return self._say(200, {})
        if self.path == "/reload":
            small.pid, small.version = small.pid + 1, body["version"]
            held = Folders([body["folder"]])
            small.weights = {name: held.read(name) for name in held.names()}
            return self._say(200, {})
        if self.path == "/stop":
            if small.is_deaf:
                return None
            small.stopped.set()
            return self._say(200, {})
        if self.path == "/probe":
            greedy = {"tokens": [1], "logprobs": [-1.0], "finish": "length"}
            scored = [[-0.5] * (len(own) - 1) for own in body["sequences"]]
            return self._say(200, {"scored": scored, "answers": [greedy] * len(scored)})
        if self.path == "/odd":
            self.send_response(int(body["status"]))
            self.end_headers()
            self.wfile.write(body["says"].encode() * int(body.get("times", 1)))
            return None
        return self._generate(body)

    def _generate(self, body: dict[str, Any]) -> None:
        small = self.server
        if body["version"] != small.version:
            return self._say(409, {"error": "other weights"})
        if len(body["requests"]) > small.room:
            return self._say(429, {"error": "full", "room": small.room})
        fault = small.faults.pop(0) if small.faults else ""
        self.send_response(200)
        self.end_headers()
        for count, request in enumerate(body["requests"]):
            small.asked[request["number"]] = request
            if request["number"] in small.slow:
                continue
            if fault and count == len(body["requests"]) // 2:
                if fault == "hangs":
                    time.sleep(3)
                if fault == "babbles":
                    self.wfile.write(b'{"number": "one"}')
                return
            small.drawn[request["number"]] += 1
            answer = {"tokens": [request["number"]], "logprobs": [-1.0], "finish": "stop"}
            self.wfile.write(json.dumps(answer | {"number": request["number"]}).encode() + b"\n\n")
        late = [r["number"] for r in body["requests"] if r["number"] in small.slow]
        if late and not small.stopped.wait(5):
            return
        for number in late:
            tokens = [7] * (number % 3)
            answer = {"tokens": tokens, "logprobs": [-2.0] * len(tokens), "finish": "abort"}
            self.wfile.write(json.dumps(answer | {"number": number}).encode() + b"\n")

    def _say(self, status: int, content: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assets.resolve("builtin:stdlib-tokenizer", assets.cache_root(None))


def fleet_of(smalls: list[Small], tmp_path: Path, tokenizer: Path) -> Fleet:
    servers = [Given(Client(s.address, TOKEN, 1.0), 5.0) for s in smalls]
    for server in servers:
        server.begin()
    fleet = Fleet(servers, tmp_path / "weights", {}, tokenizer, 5.0, None)
    fleet.push([("w", torch.ones(2))], 7)
    return fleet


def requests(num_prompts: int, each: int = 4) -> list[Request]:
    sampling = Sampling(8)
    prompts = [Prompt(str(i), (1, 2, 3), {}) for i in range(num_prompts)]
    return [Request(p, index, index, sampling) for p in prompts for index in range(each)]


def drawn(fleet: Fleet, num_prompts: int) -> list[Sample]:
    found: list[Sample] = []
    fleet.generate(requests(num_prompts), found.append)
    return found


def test_two_servers_share_the_prompts(tmp_path: Path, tokenizer: Path) -> None:
    smalls = [Small(), Small()]
    found = drawn(fleet_of(smalls, tmp_path, tokenizer), 6)
    keys = {(sample.prompt_id, sample.index): sample.tokens for sample in found}
    assert keys == {(str(i // 4), i % 4): (i,) for i in range(24)}
    assert all(sample.version == 7 for sample in found)
    groups = [{number // 4 for number in small.drawn} for small in smalls]
    assert not groups[0] & groups[1]  # a prompt's answers stay together
    assert {len(own) for own in groups} == {3} or {len(own) for own in groups} == {0, 6}


def test_what_is_late_comes_as_far_as_it_is(tmp_path: Path, tokenizer: Path) -> None:
    """On every server, once there is enough; what has no token yet does not come, and a server that
    is lost then costs what it was drawing.
    """
    smalls = [Small(), Small(), Small()]
    fleet = fleet_of(smalls, tmp_path, tokenizer)
    for small in smalls:
        small.slow = {number for number in range(24) if number % 2}
    smalls[2].is_deaf = True
    found: list[Sample] = []
    fleet.generate(requests(6), found.append, enough=lambda: len(found) >= 12)
    ended = [one for one in found if one.finish == "stop"]
    late = [one for one in found if one.finish == "open"]
    assert len(ended) == 12 and fleet.counts == {"server/dead": 1, "server/timeout": 1}
    assert {one.tokens for one in late} <= {(7,), (7, 7)} and 4 <= len(late) <= 8
    assert all(one.routes is None and one.version == 7 for one in late)

    begun, small = late[0], smalls[0]
    small.asked.clear()
    prompt = Prompt(begun.prompt_id, (1, 2, 3), {})
    again: list[Sample] = []
    fleet.generate([Request(prompt, begun.index, 5, Sampling(8), begun)], again.append)
    (request,) = small.asked.values()
    assert request["tokens"] == [1, 2, 3, *begun.tokens]
    assert request["max_tokens"] == 8 - len(begun.tokens)
    (one,) = again
    assert one.tokens == (*begun.tokens, 0) and one.logprobs == (*begun.logprobs, -1.0)
    fleet.generate(requests(6), again.append, enough=lambda: True)
    assert len(again) == 1


@pytest.mark.parametrize(
    ("fault", "counted"), [("dies", "dead"), ("babbles", "dead"), ("hangs", "timeout")]
)
def test_a_lost_server_loses_nothing(
    tmp_path: Path, tokenizer: Path, fault: str, counted: str
) -> None:
    """What it had answered is not drawn again; the rest is, after a fresh start."""
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    small.faults = [fault]
    found = drawn(fleet, 5)
    assert sorted(sample.tokens[0] for sample in found) == list(range(20))
    assert set(small.drawn.values()) == {1}
    assert fleet.counts == {f"server/{counted}": 1, "server/restarts": 1}
    assert small.pid == 2


def test_the_others_take_over(tmp_path: Path, tokenizer: Path) -> None:
    smalls = [Small(), Small()]
    fleet = fleet_of(smalls, tmp_path, tokenizer)
    smalls[0].faults = ["hangs"]
    assert len(drawn(fleet, 6)) == 24
    assert smalls[0].drawn + smalls[1].drawn == Counter(range(24))


def test_a_server_that_is_lost_again_and_again_ends_it(tmp_path: Path, tokenizer: Path) -> None:
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    small.faults = ["dies"] * 4
    with pytest.raises(RolloutError, match=r"lost 4 times in one batch.*start again"):
        drawn(fleet, 40)


def test_a_full_queue_takes_what_it_has_room_for(tmp_path: Path, tokenizer: Path) -> None:
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    small.room = 7
    assert len(drawn(fleet, 5)) == 20
    assert set(small.drawn.values()) == {1}
    assert fleet.counts["server/queue_full"] == 2
    threading.Timer(0.7, lambda: setattr(small, "room", 100)).start()
    small.room = 0
    assert len(drawn(fleet, 1)) == 4


def test_lost_while_its_queue_is_full(tmp_path: Path, tokenizer: Path) -> None:
    """Each answer is drawn once all the same."""
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    small.room, small.faults = 7, ["dies", "", "hangs"]
    assert sorted(s.tokens[0] for s in drawn(fleet, 5)) == list(range(20))
    assert set(small.drawn.values()) == {1}
    assert fleet.counts["server/dead"] == fleet.counts["server/timeout"] == 1
    assert fleet.counts["server/restarts"] == 2


def test_other_weights_are_put_right(tmp_path: Path, tokenizer: Path) -> None:
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    small.version = 3  # as one that somebody else has pushed to
    assert len(drawn(fleet, 2)) == 8
    assert fleet.counts == {"server/refused": 1, "server/restarts": 1} and small.version == 7


def test_a_push_reload_and_probe(tmp_path: Path, tokenizer: Path) -> None:
    smalls = [Small(), Small()]
    fleet = fleet_of(smalls, tmp_path, tokenizer)
    assert fleet.push([("w", torch.ones(2))], 8).keys() == PUSH
    assert [small.version for small in smalls] == [8, 8] and smalls[0].pid == 1
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["00000008"]
    fleet.reload()
    fleet.push([("w", torch.ones(2))], 8)
    assert [small.pid for small in smalls] == [2, 2]
    probe = fleet.probe([(1, 2, 3)])
    assert probe.sequences == ((1, 2, 3), (1, 2, 3), (1, 2, 3, 1), (1, 2, 3, 1))
    fleet.close()
    assert not (tmp_path / "weights").exists()


def test_a_push_takes_long_only_where_the_server_lives(tmp_path: Path, tokenizer: Path) -> None:
    """A server that hung since it drew is not waited for as long as a push may take."""
    small = Small()
    fleet = fleet_of([small], tmp_path, tokenizer)
    (server,) = fleet.servers
    server.client.timeout, fleet.start_timeout = 0.1, 60.0
    small.push_seconds = 0.5
    fleet.push([("w", torch.ones(2))], 8)
    assert small.version == 8 and small.calls.count("/health") > 3
    assert not fleet.counts
    small.goes_on.clear()
    threading.Timer(1.0, small.goes_on.set).start()  # as one that is started again
    started = time.monotonic()
    fleet.push([("w", torch.ones(2))], 9)
    assert time.monotonic() - started < 10 and small.version == 9
    assert fleet.counts == {"server/timeout": 1, "server/restarts": 1}
    fleet.close()


def test_a_push_of_what_moved(tmp_path: Path, tokenizer: Path) -> None:
    """To a server that has the last push, to one that began anew, to one that another trainer has
    pushed to, and to one that refuses it and is started again: all have the trainer's weights.
    """
    layer = "model.layers.0."
    names = ("q_proj", "k_proj", "experts.0.up_proj", "experts.1.up_proj")
    weights = {layer + name: torch.randn(4, 8) for name in names} | {"lm_head": torch.randn(8, 4)}
    smalls = [Small() for _ in range(4)]
    fleet = fleet_of(smalls, tmp_path, tokenizer)
    assert fleet.push(weights.items(), 8)["whole_bytes"] == 5 * 128
    for version in (9, 10):
        assert fleet.held == version - 1
        weights[layer + "q_proj"][version - 8] += 1
        weights["lm_head"] += 1
        smalls[1].version = None
        smalls[1].weights = {}
        smalls[2].version, smalls[2].weights["lm_head"] = 5, torch.zeros(8, 4)
        smalls[3].faults = ["refuses"] * (version == 10)
        moved = [(name, weights[name]) for name in (layer + "q_proj", "lm_head")]
        said = fleet.push(moved, version, since=version - 1)
        assert (said["bytes"], said["whole_bytes"]) == (8 + 4 + 32 + 128, 5 * 128)
        for small in smalls:
            assert small.version == version and small.weights.keys() == weights.keys()
            assert all(torch.equal(small.weights[name], weights[name]) for name in weights)
        if version == 9:
            assert set(smalls[0].loaded) == {layer + "q_proj", layer + "k_proj", "lm_head"}
            assert set(smalls[1].loaded) == set(smalls[2].loaded) == weights.keys()
    assert [small.pid for small in smalls] == [1, 1, 1, 2]
    assert fleet.counts == {"server/refused": 1, "server/restarts": 1}
    smalls[0].version = None  # lost after a push
    assert len(drawn(fleet, 2)) == 8
    assert all(torch.equal(smalls[0].weights[name], weights[name]) for name in weights)
    fleet.reload()
    assert fleet.held is None, "the next push is of everything"


def test_the_token(tmp_path: Path) -> None:
    small = Small()
    small.version = 0
    for path in ("/generate", "/push", "/reload", "/probe"):
        with pytest.raises(RolloutError, match=r"the token.*MOETRAIN_ROLLOUT_TOKEN"):
            Client(small.address, "wrong", 1.0).post(path, {})
    assert small.version == 0 and small.pid == 1
    file = tmp_path / "new" / "token"
    made = token_of(file, make=True)
    assert len(made) == 64 and token_of(file, make=False) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(RolloutError, match="can be read by others: chmod 600"):
        token_of(file, make=True)
    with pytest.raises(RolloutError, match="cannot be read or made"):
        token_of(tmp_path / "none", make=False)


@pytest.mark.parametrize(
    ("status", "says"),
    [(200, "[]"), (200, "<html>"), (200, "[" * 100_000), (429, "<html>"), (429, "7"), (502, "[]")],
)
def test_another_server_at_the_address(status: int, says: str) -> None:
    """Such as a proxy: what it says is told, and is no traceback."""
    client = Client(Small().address, TOKEN, 5.0)
    with pytest.raises(ServerLost):
        client.post("/odd", {"status": status, "says": says})
    with pytest.raises(ServerLost):
        list(client.stream("/odd", {"status": status, "says": says}))


def test_an_answer_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.rollout.client.MOST_BYTES", 1 << 20)
    client = Client(Small().address, TOKEN, 5.0)
    endless = {"status": 200, "says": " " * 1000, "times": 2000}
    for call in (client.post, lambda *words: list(client.stream(*words))):
        with pytest.raises(ServerLost, match="more than 1 MiB"):
            call("/odd", endless)


def test_no_token_for_given_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(RolloutError, match="set MOETRAIN_ROLLOUT_TOKEN"):
        token_of(None, make=False)
    assert token_of(None, make=True) != token_of(None, make=True)


@pytest.mark.parametrize(
    "address", ["localhost:80", "https://a:1", "http://a", "http://a:no", "http://a:99999"]
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(RolloutError, match="is not http://HOST:PORT"):
        Client(address, TOKEN, 1.0)


def test_nobody_there(tmp_path: Path) -> None:
    small = Small()
    small.shutdown()
    small.server_close()
    with pytest.raises(ServerLost, match="Refused"):
        Client(small.address, TOKEN, 1.0).get("/health")
    with pytest.raises(RolloutError, match="Start it with `moetrain serve`"):
        Given(Client(small.address, TOKEN, 1.0), 1.0).begin()
    with pytest.raises(RolloutError, match=r"rollout.python=/none is no program.*make vllm-cpu"):
        interpreter(Path("/none"))


def test_full_is_no_fault_of_the_server() -> None:
    small = Small()
    small.version, small.room = 1, 0
    body = {"version": 1, "requests": [{"number": 0}]}
    with pytest.raises(QueueFull):
        list(Client(small.address, TOKEN, 1.0).stream("/generate", body))


def test_a_deal_gives_back_what_has_no_answer() -> None:
    deal = Deal(requests(4), 2)
    first = deal.take()
    assert first == list(range(8))
    for number in (0, 5):
        assert deal.finish(number) and not deal.finish(number)
    deal.give_back(first)
    again = deal.take()
    assert again == [1, 2, 3, 4, 6, 7]
    rest = deal.take()
    assert rest == list(range(8, 16))
    for number in (*again, *rest):
        deal.finish(number)
    assert deal.over and deal.take() == []


def test_buckets_keep_the_order() -> None:
    weights = [(str(i), torch.zeros(size)) for i, size in enumerate((3, 3, 9, 1, 2))]
    cut = list(buckets(weights, 24))
    assert [[name for name, _ in own] for own in cut] == [["0", "1"], ["2"], ["3", "4"]]
    assert described(cut[1]) == {"names": ["2"], "dtype_names": ["float32"], "shapes": [[9]]}


@pytest.mark.parametrize(
    "given",
    [
        {"push": "ipc", "address": ["http://a:1"]},
        {"push": "ipc", "tensor_parallel": 2},
        {"push": "ipc", "num_servers": 2},
        {"engine": "vlm"},
        {"timeout": 0},
    ],
    ids=str,
)
def test_recipes_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RolloutConfig.model_validate(given)


def test_weights_that_cannot_be_written(tmp_path: Path, tokenizer: Path) -> None:
    fleet = Fleet([], tmp_path / "file", {}, tokenizer, 5.0, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(RolloutError, match=r"cannot be written.*Make room"):
        fleet.push([("w", torch.ones(2))], 1)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rollout.address=[http://a:1]"], "a server has rollout.host"),
        (["rollout.push=nccl"], "needs GPUs. Take file"),
        (["rollout.token_file=/proc/none"], "cannot be"),
        ([], "set MOETRAIN_ROLLOUT_TOKEN or rollout.token_file"),
    ],
    ids=str,
)
def test_servers_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    if torch.cuda.is_available() and "nccl" in message:
        pytest.skip("there are GPUs here")
    monkeypatch.delenv("MOETRAIN_ROLLOUT_TOKEN", raising=False)
    recipe = load_recipe(RECIPE, [f"run_dir={tmp_path / 'run'}", *more])
    with pytest.raises(RolloutError, match=message):
        serve(recipe, {}, 1)
    assert not (tmp_path / "run").exists()


def test_an_interpreter_that_cannot_be_run(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/nonexistent/python\n")
    program.chmod(0o755)
    launch = Launch(interpreter(program), tmp_path / "server", {"host": "127.0.0.1"}, TOKEN, {})
    with pytest.raises(RolloutError, match=f"^{program} cannot be started: No such file"):
        ServerProcess(launch, tmp_path, None)
