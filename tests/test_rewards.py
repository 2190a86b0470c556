"""Rewards as functions, and the processes that grade: what hangs or dies costs itself alone."""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from moetrain.config.rewards import OPTIONS, Reward, RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards import REWARDS, Grader, find_reward
from moetrain.rewards.columns import NEEDED
from moetrain.rewards.services import SERVICES
from moetrain.rewards.text import script_of, words

ROOT = Path(__file__).parent.parent


def score(name: str, text: str, **columns: Any) -> float | None:
    return find_reward(name)([text], **columns)[0]


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("42", "42", 1),
        (" 42\n", "42", 1),
        ("The answer is 42.", "42", 1),
        ("It is $\\frac{1}{2}$", "0.5", 1),
        ("\\boxed{\\frac{3}{6}}", "\\frac{1}{2}", 1),
        ("so 40 + 2\n#### 42", "first 7, then\n#### 42", 1),
        ("<think>41</think><answer>42</answer>", "42", 1),
        ("43", "42", 0),
        ("", "42", 0),
        ("Paris", "Paris", 1),
        ("Lyon", "Paris", 0),
        ("x" * 5000, "42", 0),
        # fractions and roots
        ("1/2", "0.5", 1),
        ("\\dfrac12", "\\frac{1}{2}", 1),
        ("$2\\frac{1}{3}$", "\\frac{7}{3}", 1),
        ("-\\frac{1}{2}", "-0.5", 1),
        ("1/3", "0.333", 0),
        ("\\sqrt{8}", "2\\sqrt{2}", 1),
        ("1.4142", "\\sqrt{2}", 0),
        # percent, money, units, degrees
        ("50%", "50\\%", 1),
        ("50%", "0.5", 1),
        ("$12", "12", 1),
        ("\\$12", "12", 1),
        ("12 dollars", "12", 1),
        ("\\boxed{12\\text{ cm}^2}", "12", 1),
        ("90^\\circ", "90", 1),
        # how numbers are written
        ("1,234,567", "1234567", 1),
        ("$1{,}234$", "1234", 1),
        ("1e3", "1000", 1),
        ("10^3", "1000", 1),
        ("02", "2", 1),
        ("-3", "\u22123", 1),
        ("\uff11\uff12", "12", 1),
        # intervals, sets, points, expressions
        ("(1, 2]", "(1,2]", 1),
        ("[1,2]", "(1,2)", 0),
        ("$x \\in (1, \\infty)$", "(1,\\infty)", 1),
        ("\\{1,2,3\\}", "\\{3,2,1\\}", 1),
        ("(2,1)", "(1,2)", 0),
        ("(x+1)^2", "x^2+2x+1", 1),
        ("$x = 3$", "3", 1),
        ("3+4i", "$3+4i$", 1),
        # in words
        ("The answer is \\boxed{42}, not 41.", "42", 1),
        ("\\boxed{41} no wait \\boxed{42}", "42", 1),
        ("\\boxed{41}, then 42 follows", "42", 0),
        ("\\boxed{}", "42", 0),
        ("first 41, then 42", "42", 1),
        ("the answer is Paris.", "Paris", 1),
        ("paris", "Paris", 1),
        ("The answer is (B)", "B", 1),
        ("\\text{(B)}", "B", 1),
        ("The answer is C", "B", 0),
        ("答えは42です", "42", 1),
        ("答案是 $\\frac{1}{2}$。", "0.5", 1),
    ],
)
def test_accuracy(text: str, gold: str, right: int) -> None:
    assert score("accuracy", text, answer=[gold]) == right
    assert score("accuracy", text, solution=[gold]) == right


def test_a_record_without_an_answer_has_no_accuracy() -> None:
    assert score("accuracy", "42") is None and score("accuracy", "42", answer=[None]) is None
    assert score("exact", "42") is None
    assert score("exact", "42 ", answer=[42]) == 1 and score("exact", "42.", answer=["42"]) == 0


def test_format() -> None:
    assert score("format", "<think>a\nb</think>\n<answer>c</answer>") == 1
    for text in ("<answer>c</answer>", "<think>a</think>", "<think>a</think><answer>c", "a"):
        assert score("format", text) == 0
    assert score("format", "<think><think>a</think><answer>c</answer>") == 0
    assert score("format", "Answer: 5", pattern=r"Answer: \d+") == 1


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("</answer>a<answer></think><think>", 1),  # order is for `format`
        ("<think>\na\n</think>\nb", 0.5),
        ("<think>a", 0.25),
        ("<think><think>a</think><answer>b</answer>", 0.75),
        ("<Think>a</Think>< answer>", 0),
        ("", 0),
    ],
)
def test_tags_are_counted(text: str, share: float) -> None:
    assert score("tag_count", text) == share


def test_tags_of_ones_own_and_those_that_the_prompt_has_begun() -> None:
    assert score("tag_count", "a</think>", opened=["<think>\n"]) == 0.5
    assert score("tag_count", "<think>a</think>", opened=["<think>\n"]) == 0.25
    options = RewardConfig(name="tag_count", options={"tags": ["plan"]}).options
    assert score("tag_count", "<plan>a</plan>", **options) == 1
    assert score("tag_count", "<think>a</think>", **options) == 0


def test_tags_with_newlines_are_open_r1s() -> None:
    for text, share in [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<think>a</think>\n<answer>b</answer>", 0),
    ]:
        assert score("tag_count", text, newlines=True) == share
    assert score("tag_count", "a\n</plan>", newlines=True, tags=["plan"]) == 0.5


def test_code_format_has_the_records_language() -> None:
    text = "<think>\na\n</think>\n<answer>\n```cpp\nb\n```\n</answer>"
    assert score("code_format", text) == 0 and score("code_format", text, code_language="cpp") == 1
    assert score("code_format", text, language=["cpp"]) == 1
    assert score("code_format", text, language=["python"], code_language="cpp") == 0
    assert score("code_format", text[8:], opened=["<think>\n"], language=["cpp"]) == 1


def test_steps_are_counted() -> None:
    assert score("reasoning_steps", "1. a\n- b") == pytest.approx(2 / 3)
    assert score("reasoning_steps", "1. a\n- b", steps=2) == 1
    assert score("reasoning_steps", "a\n1. b\nfirst, step 2:") == 0


def test_repetition_in_three_languages() -> None:
    assert score("repetition", "one two three four five") == 0
    assert score("repetition", "la la la la la la", n=2) == pytest.approx(-0.8)
    assert words("今日は良い天気") == list("今日は良い天気")
    looped = score("repetition", "今日は良い天気です。" * 6)
    assert looped is not None and looped < -0.7
    assert score("repetition", "这是一个句子，没有重复的词语。") == 0  # noqa: RUF001
    assert score("repetition", "") == 0
    # Full-width and half-width forms are the same words, and punctuation is none.
    assert words("ﾃｽﾄ　テスト") == [*"テスト", *"テスト"]
    assert words("我喜欢猫，也喜欢狗！") == list("我喜欢猫也喜欢狗")  # noqa: RUF001
    again = score("repetition", "我喜欢猫。" * 5)
    assert again is not None and again < -0.6


def test_language_is_the_prompts_script() -> None:
    assert score("language", "これは日本語です", prompt=["東京はどこですか"]) == 1
    assert score("language", "This is English", prompt=["東京はどこですか"]) == 0
    assert score("language", "это ответ", prompt=[[{"role": "user", "content": "вопрос"}]]) == 1
    assert score("language", "42", prompt=["how many?"]) is None
    assert score("language", "Das ist Deutsch", prompt=["東京"], script="LATIN") == 1
    assert score("language", "这是中文", prompt=["question"], script="CJK") == 1
    assert script_of("这是中文") == "CJK" and script_of("日本のこと") == "JAPANESE"


def test_language_of_the_thought_is_a_share_as_deepseek_r1_has_it() -> None:
    options = {"score": "share", "of": "thought", "prompt": ["東京はどこですか"]}
    assert score("language", "<think>東京 is 首都</think>English", **options) == 0.8
    assert score("language", "東京 is 首都</think>English", opened=["<think>\n"], **options) == 0.8
    assert score("language", "<think>東京 never ends", **options) == 0.5
    assert score("language", "no thought", **options) is None
    assert score("language", "<think>1 + 1</think>日本", **options) is None
    assert score("language", "<think>这是</think>x", of="thought", script="LATIN") == 0
    whole = {"score": "share", "prompt": ["Where?"]}
    assert score("language", "<think>It is 日本</think>", **whole) == 0.5


def test_lengths() -> None:
    assert score("length", "x" * 200) == 1 and score("length", "") == 0
    assert score("length", "x" * 50, target=100) == 0.5
    short, long = (score("cosine_length", "x" * n, right=[1.0]) for n in (10, 900))
    assert short is not None and long is not None and short > long >= 0.5
    ends = {"max_length": 10, "right_short": 2.0, "right_long": -1.0}
    assert score("cosine_length", "", **ends) == 2
    assert score("cosine_length", "x" * 10, **ends) == pytest.approx(-1)
    wrong, longer = (score("cosine_length", "x" * n, right=[0.0]) for n in (10, 900))
    assert wrong is not None and longer is not None and wrong < longer <= -0.5


def test_lengths_of_right_and_of_wrong_answers() -> None:
    assert score("cosine", "42", answer=["42"], max_len=2) == 0.5
    assert score("cosine", "42" + " " * 9, answer=["42"], max_len=2) == 0.5  # and no other way
    ids = {"answer": ["42"], "max_len": 4, "unit": "tokens", "completion_ids": [(5, 6)]}
    assert score("cosine", "42" + " " * 9, **ids) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="completion_ids"):
        score("cosine", "42", answer=["42"], unit="tokens")
    assert score("cosine", "42") is None and score("len_reward", "42") is None


def test_every_reward_stands_in_all_tables() -> None:
    """A name in one table alone would be unknown, or taken for a file; a default that stands in the
    options is not the one that a test of the function sees.
    """
    assert {*REWARDS, *SERVICES} == {*OPTIONS} >= {*NEEDED}
    for name, function in REWARDS.items():
        takes = inspect.signature(function).parameters
        for key, field in OPTIONS[name].model_fields.items():
            assert key in takes, f"{name} does not take the option {key}"
            own = takes[key].default
            assert (list(own) if isinstance(own, tuple) else own) == field.default, (name, key)


def test_every_reward_takes_any_text() -> None:
    texts = ["", " ", "\x00", "𝒳", "a" * 3000, "\\frac{", "<think>", "1/0", "{" * 200]  # noqa: RUF001
    for name, function in REWARDS.items():
        found = function(texts, answer=["1"] * len(texts), prompt=["?"] * len(texts))
        assert len(found) == len(texts), name


# The grader, with rewards that misbehave

OWN = """
import ctypes, os, socket, subprocess, sys, tempfile, time

def act(completions, **columns):
    return [do(text) for text in completions]

def do(text):
    if text == "hang":
        while True:
            pass
    if text == "hang in C":
        time.sleep(1000)
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "raise":
        raise ValueError("no")
    if text == "fork":
        for _ in range(3):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "left behind"])
        while True:
            pass
    if text in ("daemon", "daemon, then crash"):
        if os.fork() == 0:
            os.setsid()
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)", "left behind"],
                start_new_session=True,
            )
            os._exit(0)
        os.wait()
        if "crash" in text:
            os._exit(1)
    if text == "print":
        end = time.time() + 0.3
        while time.time() < end:
            print("x" * 10000)
            print("y" * 10000, file=sys.stderr)
    if text == "print for ever":
        while True:
            print("x" * 10000, flush=True)
    if text == "10 GB":
        with tempfile.TemporaryFile() as file:
            file.seek(10 << 30)  # a hole: this test takes no disk where there is no limit
            file.write(b"x")
    if text == "socket":
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.accept()
    if text == "not a number":
        return float("nan")
    if text == "none":
        return None
    return float(len(text))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("own") / "rewards.py"
    path.write_text(OWN)
    return f"{path}:act"


@pytest.fixture(scope="module")
def warm(own: str) -> Iterator[Grader]:
    made = Grader([RewardConfig(name=own)], num_workers=2, deadline_s=1.5)
    yield made
    made.close()


@pytest.fixture
def grader(warm: Grader) -> Grader:
    warm.counts.clear()
    return warm


def processes_left() -> list[str]:
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "left behind" in words:
                found.append(entry.name)
    return found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hang", "timeout"),
        ("hang in C", "timeout"),
        ("exit", "crash"),
        ("segfault", "crash"),
        ("raise", "error"),
        ("fork", "timeout"),
        ("daemon, then crash", "crash"),
        ("print for ever", "timeout"),
        ("10 GB", "error"),
        ("socket", "timeout"),
        ("not a number", "error"),
    ],
)
def test_a_fault_costs_its_own_sample_alone(
    grader: Grader, text: str, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    found = grader.grade(["a", "bb", text, "ccc", "dddd"], {})
    assert [one.reward for one in found] == [1, 2, None, 3, 4]
    assert found[2].fault == fault and grader.counts == {fault: 1}
    assert time.monotonic() - started < 30
    assert [one.reward for one in grader.grade(["a", "bb"], {})] == [1, 2]  # and goes on
    assert processes_left() == []
    assert capfd.readouterr() == ("", "")


def test_mathematics_that_never_ends_costs_its_own_answer_alone() -> None:
    """A tower of powers that math-verify works at for ever, in code that hears no signal. What
    compares the answers to a prompt still compares with it.
    """
    configs = [RewardConfig(name=name) for name in ("accuracy", "len_reward")]
    grader = Grader(configs, num_workers=1, deadline_s=3)
    columns = {"answer": ["2"] * 4, "prompt": ["1+1?"] * 3 + ["4-2?"]}
    found = grader.grade(["2", "9^9^9^9", "2   ", "2"], columns)
    grader.close()
    assert [one.reward for one in found] == [1.5, None, 1.0, 1.0] and grader.counts == {
        "timeout": 1
    }


def test_what_a_reward_prints_is_not_seen(
    grader: Grader, capfd: pytest.CaptureFixture[str]
) -> None:
    assert grader.grade(["print"], {})[0].reward == 5
    assert capfd.readouterr() == ("", "")


def test_none_leaves_a_sample_out(own: str) -> None:
    configs = TypeAdapter(list[Reward]).validate_python(
        ["exact", {"name": own, "weight": 0.5}, {"name": "length", "options": {"target": 4}}]
    )
    grader = Grader(configs, num_workers=1, deadline_s=5)
    found = grader.grade(["none", "four"], {"answer": [None, "four"]})
    grader.close()
    # What applies is summed; where nothing applies there is no reward.
    assert found[0].parts == {"exact": None, "act": None, "length": 1.0}
    assert found[0].reward == 1.0 and found[1].reward == pytest.approx(1 + 0.5 * 4 + 1)
    alone = Grader([RewardConfig(name=own)], num_workers=1, deadline_s=5)
    assert alone.grade(["none"], {})[0].reward is None
    alone.close()


def test_order_and_columns_are_kept(own: str) -> None:
    grader = Grader([RewardConfig(name="exact")], num_workers=3, deadline_s=5)
    texts = [str(i) for i in range(40)]
    golds = [str(i if i % 3 else -1) for i in range(40)]
    found = grader.grade(texts, {"answer": golds})
    grader.close()
    assert [one.reward for one in found] == [float(i % 3 > 0) for i in range(40)]


def test_workers_end_with_the_grader_and_take_daemons_along(own: str) -> None:
    grader = Grader([RewardConfig(name=own)], num_workers=2, deadline_s=5)
    assert grader.grade(["a", "daemon"], {})[1].reward == 6
    assert len(processes_left()) == 1
    pids = [worker._process.pid for pool in grader._pools for worker in pool._workers]
    grader.close()
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert processes_left() == []


def test_workers_end_with_a_trainer_that_is_killed(own: str) -> None:
    script = (
        "import os, signal\n"
        "from moetrain.config.rewards import RewardConfig\n"
        "from moetrain.rewards import Grader\n"
        "if __name__ == '__main__':\n"
        f"    grader = Grader([RewardConfig(name={own!r})], 1, 600)\n"
        "    grader.grade(['daemon'], {})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 20
    while processes_left():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(:", "cannot be run: SyntaxError"),
        (
            "import nothing_like_it\ndef emoji(completions): ...",
            "cannot be run: ModuleNotFoundError",
        ),
        ("def emojy(c): ...", "has no function emoji. Did you mean 'emojy'?"),
    ],
)
def test_an_own_file_that_does_not_work(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Grader([RewardConfig(name=f"{path}:emoji")], 1, 1.0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os; os._exit(1)\ndef emoji(completions): ...", "ended as it was loaded"),
        ("raise SystemExit\ndef emoji(completions): ...", "ended as it was"),
    ],
)
def test_an_own_file_that_ends_its_process(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Grader([RewardConfig(name=f"{tmp_path}/own.py:emoji")], 1, 1.0)
