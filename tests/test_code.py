"""The `code` reward: programs of answers against their cases; what programs do to themselves costs
their own reward alone, and is counted.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards import Grader
from moetrain.rewards.code import block, cases_of, same_output
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
    records = [None, [], [{"input": "1"}], {"fn_name": "f", "inputs": [1], "outputs": [1]}]
    found = grader.grade([python(RIGHT)] * 4, {"tests": records})
    assert [one.reward for one in found] == [None] * 4
    assert [one.fault for one in found] == [None, None, "error", "error"]
    assert "only standard input and output" in grader.said


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
        assert cases_of({"prompt": "x", name: value}) == pairs
    assert cases_of({"answer": "3"}) == []


def test_the_last_block_in_a_language_that_is_graded() -> None:
    text = "```python\na\n```\n```cpp\nb\n```\n```text\nc\n```\n"
    both = ["python", "cpp"]
    assert block(text, both) == ("cpp", "b\n")
    assert block(text, ["python"]) == ("python", "a\n")
    assert block("```\nd\n```", both) == ("python", "d\n")
    assert block("```\nd\n```", both, "cpp") == ("cpp", "d\n")
    assert block("  ```C++\nd\n  ```", both) == ("cpp", "d\n")
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
        server.shutdown()
    assert found == [1.0, 0.0, 0.0]
    assert grader.counts == {"code_crash": 1, "code_timeout": 1}
    last = PistonServer.asked[-1]
    assert last["language"] == "python" and last["run_timeout"] == 5000
    assert "\n" not in str(refused(sandbox="piston", url=url))  # where nobody listens any more


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Grader([config(**options)], num_workers=1, deadline_s=5)
    return caught.value


def test_no_sandbox_no_run() -> None:
    said = str(refused(python="/nonexistent/python"))
    assert "no safe sandbox" in said and "\n" not in said
