"""Rewards with processes of their own: a judge behind a real HTTP server, and a reward model."""

import gzip
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moetrain import cli
from moetrain.config.rewards import RewardConfig
from moetrain.data.tokenizer_training import fit
from moetrain.errors import ConfigError
from moetrain.rewards import Grader
from moetrain.rewards.base import Completion
from moetrain.rewards.judge import fill
from moetrain.rewards.reward_model import RewardModel
from moetrain.testing.servers import serving
from moetrain.testing.tiny import save_reward_model

# A judge: the number of letters of an answer is its score, unless the answer asks for a fault


class JudgeServer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    tries: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()
    busy: ClassVar[int] = 0
    busiest: ClassVar[int] = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        answer = prompt.rpartition("Answer: ")[2]
        own = type(self)
        with own.lock:
            own.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            own.tries[answer] += 1
            own.busy += answer[5:].isdigit()
            own.busiest = max(own.busiest, own.busy)
        try:
            self.judge(answer, own.tries[answer])
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with own.lock:
                own.busy -= answer[5:].isdigit()

    def judge(self, answer: str, tries: int) -> None:
        if answer.startswith("slow"):
            time.sleep(1000 if "ever" in answer else 0.2)
        if answer == "trickle":  # a byte now and then, which no timeout of a read sees
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(0.1)
        if answer == "busy" and tries < 3:
            self.answer(429, b"slow down", {"Retry-After": "1"})
        elif (answer == "down" and tries < 2) or answer == "down for ever":
            self.answer(500, b"no")
        elif answer == "forbidden":
            self.answer(403, b"not you")
        elif answer == "garbage":
            self.answer(200, b"<html>")
        elif answer == "deep":
            self.answer(200, b"[" * 100_000)
        elif answer == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(10_000):
                self.wfile.write(bytes(1 << 20))
        elif answer == "bomb":
            self.answer(200, gzip.compress(bytes(64 << 20), 1), {"Content-Encoding": "gzip"})
        elif answer == "brotli":
            self.answer(200, b"x", {"Content-Encoding": "br"})
        elif answer == "packed":
            message = {"content": "Score: 4"}
            body = json.dumps({"choices": [{"message": message}]}).encode()
            self.answer(200, gzip.compress(body), {"Content-Encoding": "gzip"})
        elif answer.startswith("says "):
            message, _, end = answer.removeprefix("says ").partition("|")
            choice = {"message": {"content": message}, "finish_reason": end or "stop"}
            self.answer(200, json.dumps({"choices": [choice]}).encode())
        elif answer == "other json":
            self.answer(200, b'{"choices": []}')
        elif answer == "hang up":
            self.close_connection = True
            self.connection.close()
        else:
            said = {"no number": "I would rather not.", "off": "Score: 11"}.get(
                answer, f"It has Score: 0 at first sight.\nScore: {len(answer)}"
            )
            message = {"role": "assistant", "content": said}
            self.answer(200, json.dumps({"choices": [{"message": message}]}).encode())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(JudgeServer) as root:
        yield f"{root}/v1"


def judge(url: str, **options: Any) -> RewardConfig:
    own = {"url": url, "model": "judge-9b", "prompt": "{prompt} {level} Answer: {completion}"}
    return RewardConfig(name="judge", weight=0.5, options={**own, "seconds": 2.0, **options})


@pytest.fixture(scope="module")
def judged(url: str) -> Iterator[Grader]:
    os.environ["MOETRAIN_JUDGE_KEY"] = "sesame"
    made = Grader([judge(url, concurrency=6, retries=2)], num_workers=2, deadline_s=5)
    del os.environ["MOETRAIN_JUDGE_KEY"]
    yield made
    made.close()


def grade(grader: Grader, *texts: str) -> list[Any]:
    grader.counts.clear()
    JudgeServer.tries.clear()
    JudgeServer.asked.clear()
    prompt = [{"role": "user", "content": "Rate {this}."}]
    columns = {"prompt": [prompt] * len(texts), "level": ["strictly"] * len(texts)}
    return grader.grade(texts, columns)


def test_a_judges_number_is_the_reward(judged: Grader) -> None:
    found = grade(judged, "four", "seven..", "ten letter")
    assert [one.reward for one in found] == pytest.approx([0.2, 0.35, 0.5])
    assert found[0].parts == {"judge": pytest.approx(0.4)}
    asked = JudgeServer.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["key"] == "Bearer sesame"
    assert asked["model"] == "judge-9b" and asked["temperature"] == 0
    assert asked["messages"][0]["content"].startswith("Rate {this}. strictly Answer: ")


def test_a_judge_that_is_busy_or_down_for_a_while_is_asked_again(judged: Grader) -> None:
    started = time.monotonic()
    assert [one.reward for one in grade(judged, "busy", "down")] == pytest.approx([0.2, 0.2])
    assert JudgeServer.tries == {"busy": 3, "down": 2}
    assert time.monotonic() - started >= 2  # as the server asked
    assert judged.counts == {}


def test_a_judge_that_fails_costs_that_answer_alone(judged: Grader) -> None:
    texts = ["four", "slow for ever", "trickle", "down for ever", "forbidden", "garbage"]
    texts += ["other json", "hang up", "no number", "off", "five."]
    found = grade(judged, *texts)
    assert [one.fault for one in found[1:-1]] == ["timeout"] * 2 + ["error"] * 7
    assert [one.reward for one in found[1:-1]] == [None] * 9
    assert found[0].reward == 0.2 and found[-1].reward == 0.25
    assert judged.counts["timeout"] == 2 and judged.counts["error"] == 7
    assert judged.counts["judge_unanswered"] == 7 and judged.counts["judge_unreadable"] == 2
    # What cannot pass is not tried again.
    assert JudgeServer.tries["forbidden"] == 1 and JudgeServer.tries["down for ever"] == 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("endless", "longer than 16 MiB"),
        ("bomb", "longer than 16 MiB"),  # 64 MiB, in 300 kB
        ("deep", "not JSON"),
        ("brotli", "'br', which was not asked for"),
    ],
)
def test_an_answer_of_any_size_costs_that_answer_alone(
    judged: Grader, answer: str, says: str
) -> None:
    found = grade(judged, answer, "packed", "four")
    assert [one.parts["judge"] for one in found] == [None, 0.4, 0.4]
    assert says in judged.said
    assert JudgeServer.tries[answer] == (3 if answer == "deep" else 1)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("Score: 3", 0.3),
        ("Score: -3", None),  # off the scale, and not 3
        ("Score: \u22123", None),
        ("**Score**: **7.5**/10", 0.75),
        ("Score - 7", 0.7),
        ("Score: .5", 0.05),
        ("Score: 1|length", None),  # of a 10?
        ("Score: 1 and so on|length", 0.1),
    ],
)
def test_what_number_was_meant(judged: Grader, words: str, value: float | None) -> None:
    assert grade(judged, f"says {words}")[0].parts["judge"] == value


def test_requests_go_out_together_but_not_all_at_once(judged: Grader) -> None:
    JudgeServer.busiest = 0
    found = grade(judged, *[f"slow {i}" for i in range(18)])
    assert all(one.reward for one in found)
    assert 3 <= JudgeServer.busiest <= 6


def test_a_judges_process_that_dies_is_replaced(judged: Grader) -> None:
    """While it has many answers in hand; none is lost."""
    (worker,) = judged._pools[0]._workers
    children = Path(f"/proc/{worker._process.pid}/task/{worker._process.pid}/children")
    (pid,) = map(int, children.read_text().split())
    threading.Timer(0.3, os.kill, (pid, 9)).start()
    found = grade(judged, *[f"slow {i}" for i in range(18)])
    assert all(one.reward for one in found)
    assert judged._pools[0]._workers != [worker] and judged.counts == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "http://127.0.0.1:9/v1"}, "connection.*environment variable MOETRAIN_JUDGE_KEY"),
        ({"prompt": "Answer: {completion}", "model": "m", "seconds": 0.001}, "no answer in 0.001"),
    ],
)
def test_a_judge_that_cannot_be_reached(url: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Grader([judge(**{"url": url, "retries": 0, **wrong})], num_workers=1, deadline_s=5)
    assert "\n" not in str(caught.value)


def test_only_names_in_braces_are_filled_in() -> None:
    item = Completion(0, "a {x}", {"x": 3, "prompt": "p"})
    assert fill('{"k": {x}} {prompt} {completion} {other}', item) == '{"k": 3} p a {x} {other}'


# A reward model, as `method: reward` exports one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = fit(["how long is it, and what is it worth? as long as it is wide"] * 3, 300)
    tokenizer.save_pretrained(str(folder))
    save_reward_model("qwen3_moe", folder, vocab_size=320)
    return folder


def config(model: Path, **options: Any) -> RewardConfig:
    return RewardConfig(name="reward_model", options={"path": str(model), **options})


TEXTS = ["short", "", "a much longer answer " * 12, "what is it worth? as long as it is wide"] * 3
ASKED = [{"role": "user", "content": "how long is it?"}]


def test_a_reward_models_scores_are_those_of_transformers(model: Path) -> None:
    """One conversation at a time there, batches with padding here."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    grader = Grader([config(model, batch_size=5)], num_workers=2, deadline_s=5)
    found = grader.grade(TEXTS, {"prompt": [ASKED] * len(TEXTS)})
    grader.close()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(model)
    wanted: list[float] = []
    for text in TEXTS:
        messages = [*ASKED, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        newline = len(tokenizer("\n", add_special_tokens=False).input_ids)
        plain.config.pad_token_id = 0
        with torch.no_grad():
            wanted.append(float(plain(torch.tensor([ids[:-newline]])).logits))
    assert len({round(score, 4) for score in wanted}) > 3
    assert [one.reward for one in found] == pytest.approx(wanted, abs=1e-5)


def test_padding_is_never_an_answers_last_token(model: Path) -> None:
    own = RewardModel([config(model)])
    rows = [[5, 6, 0], [7, 1], [8, 9, 10, 2], [3]]
    together = own.scores(rows)
    assert together == pytest.approx([own.scores([row])[0] for row in rows], abs=1e-5)
    assert len({round(score, 5) for score in together}) == 4


def test_a_long_conversation_loses_its_beginning(model: Path) -> None:
    own = RewardModel([config(model, max_tokens=20)])
    item = Completion(0, "a much longer answer " * 12, {"prompt": ASKED})
    whole = RewardModel([config(model)]).tokens(item)
    assert own.tokens(item) == whole[-20:] and len(whole) > 20


def test_what_is_no_reward_model(model: Path, tmp_path: Path, tiny: Any) -> None:
    folder = tmp_path / "causal"
    shutil.copytree(tiny("qwen3_moe")[0], folder)
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    with pytest.raises(ConfigError, match="has no config"):
        Grader([config(tmp_path)], num_workers=1, deadline_s=5)
    refused(folder, "has 2 labels, and a reward model has one")
    changed = json.loads((folder / "config.json").read_text())
    changed |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(changed))
    refused(folder, r"lacks score.weight: it is not a reward model")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RewardModel([config(folder)])
    assert "\n" not in str(caught.value)


def test_a_benchmark_is_judged(url: str, tmp_path: Path) -> None:
    """The mean of the judge's numbers, which here are the answers' lengths."""
    rows = [{"input": f"Say {i}.", "output": str(i), "eval_aspect": "short"} for i in range(3)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "judged.jsonl"
    bench = Path(__file__).parents[1] / "examples" / "evals" / "elyza_tasks_100.yaml"
    options = {"url": url, "prompt": "'Answer: {completion}'", "low": 0, "high": 1000}
    words = [f"scorer.options.{name}={value}" for name, value in options.items()]
    words += [f"data={tmp_path / 'tasks.jsonl'}", "scale=[0,1000]", "rollout.max_tokens=8"]
    command = ["eval", "builtin:qwen3-moe-tiny", str(bench), "--out", str(out), *words]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    lengths = [len(answer["text"]) for row in rows for answer in row["answers"]]
    score = json.loads(out.with_suffix(".json").read_text())
    assert len(lengths) == 3
    (found,) = score["scores"].values()
    assert found["score"] == pytest.approx(sum(lengths) / 3)
