"""The `code` reward: programs of answers against their cases; what programs do to themselves costs
their own reward alone, and is counted.
"""

import base64
import json
import pickle
import threading
import zlib
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards import Completion, Grader
from moetrain.rewards.calls import Case
from moetrain.rewards.cases import cases_of, problem_of
from moetrain.rewards.code import Code, block, same_output
from moetrain.rewards.sandbox import Sandbox

SQUARES = [{"input": str(n), "output": str(n * n)} for n in (3, 4, 5, 6)]
RIGHT = "print(int(input()) ** 2)"


def python(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```\n"


def config(**options: Any) -> RewardConfig:
    return RewardConfig(name="code", options={"seconds": 5.0, **options})


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    made = Grader([config(scoring="weighted_sum", tolerance=1e-6)], num_workers=2, deadline_s=5)
    yield made
    made.close()


def rewards(grader: Grader, *texts: str, tests: Any = SQUARES) -> list[float | None]:
    """As they are graded, with `counts` of these alone."""
    grader.counts.clear()
    return [one.reward for one in grader.grade(texts, {"tests": [tests] * len(texts)})]


CPP = """Either language will do.
```cpp
#include <iostream>
int main() { long n; std::cin >> n; std::cout << n * n << std::endl; }
```"""


def test_python_and_cpp_against_their_cases(grader: Grader) -> None:
    half = "n = int(input())\nprint(n * n if n > 4 else 0)"
    found = rewards(grader, python(RIGHT), CPP, python(half), python("print(0)"), "no program")
    assert found == pytest.approx([1.1, 1.1, 0.05, 0, 0])
    assert grader.counts == {"code_missing": 1}


def test_scorings() -> None:
    half = python("n = int(input())\nprint(n * n if n > 4 else 0)")
    for scoring, expected in (("pass_fail", [1.0, 0.0]), ("partial", [1.0, 0.5])):
        grader = Grader([config(scoring=scoring)], num_workers=1, deadline_s=5)
        assert rewards(grader, python(RIGHT), half) == expected
        grader.close()


ENDS = {
    "while True: pass": "code_timeout",
    "import time; time.sleep(1000)": "code_timeout",
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass": "code_timeout",
    "while True: print('x' * 1000)": "code_output",
    "import ctypes; ctypes.string_at(0)": "code_crash",
    "import os, signal; os.kill(0, signal.SIGKILL)": "code_crash",
    "import socket; socket.create_connection(('127.0.0.1', 80))": "code_crash",
    "with open('x', 'wb') as f:\n  while True: f.write(bytes(1 << 20))": "code_crash",
    "x = bytearray(10 << 30)": "code_crash",
    "1 / 0": "code_crash",
    "this is no Python": "code_crash",
}


def test_what_a_program_does_costs_its_own_reward_and_is_counted() -> None:
    grader = Grader([config(seconds=1.0)], num_workers=2, deadline_s=5)
    texts = [python(RIGHT), *map(python, ENDS), python(RIGHT)]
    found = rewards(grader, *texts)
    grader.close()
    # The first and the last have the time of others' endless loops beside them.
    assert found[1:-1] == [0.0] * len(ENDS)
    assert found[0] == found[-1] == 1.0
    wanted = {end: list(ENDS.values()).count(end) for end in ENDS.values()}
    assert grader.counts == wanted


@pytest.mark.parametrize(
    "source",
    [
        "int main() { return ",
        "#include </etc/shadow>\nint main() {}",
        '#include "/dev/zero"\nint main() {}',
        "template<int N> struct A { A<N+1> a; }; A<0> a; int main() {}",
    ],
)
def test_cpp_that_does_not_compile(grader: Grader, source: str) -> None:
    assert rewards(grader, f"```cpp\n{source}\n```", python(RIGHT)) == pytest.approx([0, 1.1])
    assert grader.counts == {"code_compile": 1}


def test_records_without_usable_cases(grader: Grader) -> None:
    grader.counts.clear()
    unreadable = [
        [{"input": "1"}],
        "[{",
        "no JSON",
        3.5,
        [3],
        {"inputs": [1], "outputs": []},
        {"inputs": []},
        [{"input": "1", "output": "1", "type": "telepathy"}],
        [{"input": "1", "output": "1", "type": "function_call"}],
        {"fn_name": "f", "inputs": ["no JSON"], "outputs": [1]},
        ["x = 1"],
        ["this is no Python"],
        {"fn_name": "f", "inputs": [[date(2026, 1, 1)]], "outputs": [1]},
        "[" * 5000,
    ]
    found = grader.grade(
        [python(RIGHT)] * (len(unreadable) + 3), {"tests": [None, [], *unreadable, SQUARES]}
    )
    assert [one.reward for one in found[:-1]] == [None] * (len(unreadable) + 2)
    assert [one.fault for one in found] == [None, None, *["error"] * len(unreadable), None]
    assert found[-1].reward == pytest.approx(1.1)  # those of others are graded
    assert "\n" not in grader.said


ADD = {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [[1, 2]]]}
PAIRS = ["assert pairs(2) == [(0, 'a'), (1, 'a')]", "assert pairs(0) == []"]
CHECK = """
METADATA = {}
def check(candidate):
    assert candidate(n=2) == {1: 'x', 2: 'x'}
    assert candidate(0) == {}
check(f)
"""
WHOLE = "def check(f):\n    for n in range(3):\n        assert f(n) == n * n\n"
PYTEST = "from solution import f\ndef test_f():\n    assert f(3) == 9 and f(-1) == 1"
PACKED = json.dumps([{"input": "[3, 1]\n2", "output": "[2, 6]", "testtype": "functional"}])
LIVE = {
    "metadata": '{"func_name": "times"}',
    "public_test_cases": '[{"input": "[]\\n5", "output": "[]", "testtype": "functional"}]',
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(PACKED))).decode(),
}
ROOTS = {"fn_name": "root", "inputs": [[2.0]], "outputs": [1.4142135]}
IS_ALL = "class All:\n  __eq__ = lambda self, other: True\n  __len__ = lambda self: 1\n"
CALLED: list[tuple[dict[str, Any], str, float]] = [
    # APPS and TACO: a list of arguments, a value or a list with it; what is printed is nothing
    ({"input_output": json.dumps(ADD)}, "def add(a, b):\n  print(5)\n  return a + b", 1.1),
    ({"input_output": ADD}, "class Solution:\n  def add(self, a, b): return a + b", 1.1),
    ({"input_output": ADD}, "def add(a, b): return 3", 0.05),
    ({"input_output": ADD}, "import sys\nprint(3)\nsys.exit(0)", 0),
    ({"input_output": ADD}, f"{IS_ALL}def add(a, b): return All()", 0),
    ({"input_output": ADD}, "if __name__ == '__main__': 1 / 0\ndef add(*a): return sum(a)", 0.05),
    ({"input_output": ADD}, "def other(a, b): return a + b", 0),
    # PRIME: the function's name in each case
    ({"verification_info": {"language": "python", "test_cases": [
        {"type": "function_call", "fn_name": "f", "input": [{"1": "a"}], "output": [{"2": "a"}]}
    ]}}, "def f(d): return {k + 1: v for k, v in d.items()}", 1.1),
    # LiveCodeBench: lines of JSON, private cases packed, names that LeetCode imports
    (LIVE, "class Solution:\n  def times(s, a: List, n): return sorted(n * x for x in a)", 1.1),
    (LIVE, "def times(a, n): return a", 0.05),
    ({"tests": ROOTS}, "def root(x): return x ** 0.5", 1.1),
    ({"tests": ROOTS}, "def root(x): return 10 ** 400", 0),
    ({"tests": ROOTS}, "def root(x): return {(): [x]}", 0),
    ({"tests": ROOTS}, "def root(x):\n  for i in range(10 ** 5): x = [x]\n  return x", 0),
    # MBPP and AceCode: asserts, in which a tuple is no list
    ({"test_list": PAIRS}, "def pairs(n): return [(i, 'a') for i in range(n)]", 1.1),
    ({"test_list": PAIRS}, "def pairs(n): return [[i, 'a'] for i in range(n)]", 0.05),
    ({"test_list": PAIRS}, f"{IS_ALL}def pairs(n): return All()", 0),
    ({"test_cases": ["assert set(f()) == set([1, 2])"]}, "def f(): return [2, 1, 1]", 1.1),
    ({"test_cases": ["assert set(f()) == set([1, 2])"]}, "import os\nos._exit(0)", 0),
    ({"test_list": ["assert math.isclose(f(), one)"], "test_setup_code": "one = 1.0",
      "challenge_test_list": ["assert f() == 1"]}, "def f(): return 1.0", 1.1),
    # HumanEval and LeetCode: check(candidate)
    ({"test": CHECK, "entry_point": "f"}, "def f(n): return {i + 1: 'x' for i in range(n)}", 1.1),
    ({"test": CHECK, "entry_point": "Solution().f"},
     "class Solution:\n  def f(self, n): return {}", 0.05),
    ({"test": WHOLE, "entry_point": "f"}, "def f(n): return n ** 2", 1.1),
    ({"test": WHOLE, "entry_point": "f"}, "def f(n): return n", 0),
    ({"test": PYTEST}, "def f(n): return n ** 2", 1.1),
    ({"test": PYTEST}, "def f(n): return 9", 0),
]  # fmt: skip


def test_cases_that_call_a_function(grader: Grader) -> None:
    names = {name for columns, _, _ in CALLED for name in columns}
    columns = {name: [own.get(name) for own, _, _ in CALLED] for name in names}
    found = grader.grade([python(source) for _, source, _ in CALLED], columns)
    assert [one.reward for one in found] == pytest.approx([value for _, _, value in CALLED])
    # A program in another language has no function that could be called.
    assert grader.grade([CPP], {"tests": [ADD]})[0].reward == 0


def test_what_a_record_says_of_all_its_cases() -> None:
    row = {"official_tests": SQUARES, "time_limit": 2.5, "memory_limit": 256.0}
    found = problem_of(row)
    assert (len(found.cases), found.seconds, found.memory) == (4, 2.5, 256 << 20)
    found = problem_of({"tests": SQUARES, "time_limit": "1.5 seconds", "memory_limit": "64 MB"})
    assert (found.seconds, found.memory, found.mode) == (1.5, 64 << 20, "stdio")
    several = {"input": ["1", "2"], "output": ["1", "4"]}  # DeepMind's
    found = problem_of(
        {"public_tests": several, "private_tests": {"input": [], "output": []},
         "generated_tests": several, "time_limit": {"seconds": 2, "nanos": 500_000_000},
         "memory_limit_bytes": 1 << 20}
    )  # fmt: skip
    assert found.cases == (Case("1", "1"), Case("2", "4")) * 2
    assert (found.seconds, found.memory) == (2.5, 1 << 20)
    for wrong, message in [
        ({"time_limit": "soon"}, "time_limit is 'soon'"),
        ({"memory_limit": "2 spoons"}, "memory_limit is '2 spoons'"),
        ({"input_mode": "post"}, "input_mode is 'post': stdio and file"),
        ({"generated_checker": "def f(:\n  pass"}, r"generated_checker does not compile: .*line 1"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            problem_of({"tests": SQUARES, **wrong})
        assert "\n" not in str(caught.value)


def test_limits_are_the_records_or_the_options() -> None:
    row = {"tests": SQUARES, "time_limit": 9, "memory_limit": 100}
    endless = {**row, "generated_checker": "while True: pass"}
    for limits, seconds, memory in (("record", 9, 100), ("options", 5, 512)):
        service = Code([config(limits=limits, checker_seconds=0.5)])
        trial = service._trial(problem_of(row), "python", RIGHT)
        assert trial is not None
        assert (trial.job.seconds, trial.job.memory) == (seconds, memory << 20)
        answers = [Completion(0, python(RIGHT), row), Completion(1, python(RIGHT), endless)]
        assert [one.values["code"] for _, one in service.grade(answers)] == [1.0, 0.0]


class Trap:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was run",)


def test_packed_cases_run_nothing() -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode()
    with pytest.raises(ValueError, match="may only hold text"):
        cases_of({"public_test_cases": packed})


def test_the_forms_of_cases() -> None:
    pairs = [("1\n2", "3"), ("4", "5")]
    listed = [{"input": ["1", "2"], "output": 3}, {"input": "4", "output": "5"}]
    table = {"inputs": ["1\n2", "4"], "outputs": ["3", "5"]}
    for name, value in [
        ("tests", listed),
        ("test_cases", json.dumps(listed)),
        ("input_output", json.dumps(table)),
        ("verification_info", {"language": "python", "test_cases": listed}),
    ]:
        assert cases_of({"prompt": "x", name: value}) == [Case(*pair) for pair in pairs]
    assert cases_of({"answer": "3"}) == []


def test_the_last_block_in_a_language_that_is_graded() -> None:
    text = "```python\na\n```\n```cpp\nb\n```\n```text\nc\n```\n"
    both = ["python", "cpp"]
    assert block(text, both) == ("cpp", "b\n")
    assert block(text, ["python"]) == ("python", "a\n")
    assert block("```\nd\n```", both) == ("python", "d\n")
    assert block("```\nd\n```", both, "cpp") == ("cpp", "d\n")
    assert block("  ```C++\nd\n  ```", both) == ("cpp", "d\n")
    assert block("```\nd\n```", both, "cpp", True) is None
    assert block("```python\ncut off", both) is None and block("", both) is None


def test_output_is_compared_by_lines_and_words() -> None:
    assert same_output("1 2\n3\n\n", "1  2 \n3")
    assert not same_output("1\n2", "1 2") and not same_output("1", "1\n2")
    assert not same_output("0.3333333", "0.33333330001")
    assert same_output("x 0.3333333", "x 0.33333330001", tolerance=1e-6)
    assert not same_output("nan", "1", tolerance=1e-6) and not same_output("a", "b", 1.0)


@given(st.text())
def test_output_is_the_same_as_itself(text: str) -> None:
    assert same_output(text, text) and same_output(text + "\n", text)


# A Piston server: version 2 of its interface, which runs its programs in our own sandbox


class PistonServer(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict[str, Any]]] = []
    sandbox: Sandbox

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if len(self.asked) % 5 == 4:
            self.send_error(503)
            return
        source, given = body["files"][0]["content"], body["stdin"]
        ran = self.sandbox.run([self.sandbox.python, "-c", source], given.encode())
        run = {"stdout": ran.out.decode(), "code": ran.code, "signal": None}
        if "while True" in source:
            run |= {"code": None, "signal": "SIGKILL", "status": "TO"}
        answer = json.dumps(
            {"language": body["language"], "version": "3.12.0", "run": run}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_piston_server_in_place_of_the_sandbox() -> None:
    PistonServer.sandbox = Sandbox()
    with ThreadingHTTPServer(("127.0.0.1", 0), PistonServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api/v2"
        piston = config(sandbox="piston", url=url, languages=["python"], scoring="partial")
        grader = Grader([piston], num_workers=1, deadline_s=5)
        slow = "n = int(input())\nwhile True: pass"
        found = rewards(grader, python(RIGHT), python("1 / 0"), python(slow), tests=SQUARES[:2])
        grader.close()
        asked = len(PistonServer.asked)
        stops = {"scoring": "pass_fail", "test_batch_size": 2}
        second = Grader([config(**piston.options | stops)], num_workers=1, deadline_s=5)
        batches = rewards(second, python("print(9)"))
        second.close()
        inputs = {body["stdin"] for body in PistonServer.asked[asked:]} - {""}  # the probe
        server.shutdown()
    assert found == [1.0, 0.0, 0.0]
    assert batches == [0.0] and inputs == {"3", "4"}  # none follow a batch with one that failed
    assert grader.counts == {"code_crash": 1, "code_timeout": 1}
    last = PistonServer.asked[-1]
    assert last["language"] == "python" and last["run_timeout"] == 5000
    assert "\n" not in str(refused(sandbox="piston", url=url))  # where nobody listens any more


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Grader([config(**options)], num_workers=1, deadline_s=5)
    return caught.value


def test_no_sandbox_no_run() -> None:
    with pytest.raises(ConfigError, match="generated_tests: /nonexistent/tests is no folder"):
        Code([config(generated_tests="/nonexistent/tests")])
    said = str(refused(python="/nonexistent/python"))
    assert "no safe sandbox" in said and "\n" not in said
