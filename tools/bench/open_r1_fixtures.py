# pyright: basic
# ruff: noqa: E402
"""Rewards as open-r1 computes them, recorded for tests/test_open_r1.py.

Needs nothing of moetrain, but checkouts of huggingface/open-r1 and of guipenedo/piston, whose
package `codeforces` open-r1 has its Codeforces programs run by:
    python3.12 -m venv ENV && ENV/bin/pip install math-verify==0.5.2 async-lru aiofiles aiohttp \
        pandas pyarrow datasets==3.6.0 python-dotenv 'transformers<5'
    ENV/bin/python tools/bench/open_r1_fixtures.py OPEN_R1 PISTON > tests/fixtures/open_r1.json

open-r1's own functions are called. Its packages' __init__ files, which import a trainer, are not
run. In place of a Piston server there is one here that runs the package's own scripts, and in place
of E2B, `exec`: the programs are those below.
"""

import ast
import asyncio
import importlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

OPEN_R1, PISTON = (Path(word).resolve() for word in sys.argv[1:3])
COMMAND = "ENV/bin/python tools/bench/open_r1_fixtures.py OPEN_R1 PISTON"
sys.path.insert(0, str(OPEN_R1 / "src"))
for name in ("open_r1", "open_r1.utils"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(OPEN_R1 / "src" / name.replace(".", "/"))]
utils: Any = sys.modules["open_r1.utils"]
utils.is_e2b_available = utils.is_morph_available = lambda: False
theirs: Any = importlib.import_module("open_r1.rewards")

# Mathematics: ten questions with five answers each

TASKS = [
    ("What is 7 times 8?", "$56$", "56", "54"),
    ("Solve 2x = 5.", "$\\frac{5}{2}$", "\\frac{5}{2}", "\\frac{2}{5}"),
    ("Expand (x+1)^2.", "$x^2+2x+1$", "(x+1)^2", "x^2+1"),
    ("What is 2 to the tenth?", "$1024$", "2^{10}", "1000"),
    ("The diagonal of a unit square?", "$\\sqrt{2}$", "\\sqrt{2}", "2\\sqrt{2}"),
    ("Where is x greater than 5?", "$(5, \\infty)$", "(5,\\infty)", "(-\\infty, 5)"),
    ("The sum of 1 to 100?", "$5050$", "5050", "5051"),
    ("A third of 1?", "$\\frac{1}{3}$", "\\frac{2}{6}", "0.3"),
    ("sin of pi over 6?", "$\\frac{1}{2}$", "0.5", "\\frac{\\sqrt{3}}{2}"),
    ("Roots of x^2 = 4?", "$\\{-2, 2\\}$", "\\{2, -2\\}", "\\{2\\}"),
]


def answers(place: int, right: str, wrong: str) -> list[str]:
    """Five, some right, of different forms and lengths; which are right differs by question."""
    a, b, c, d = [(right, wrong)[(place >> k) & 1] for k in range(4)]
    said = [
        f"<think>\nStep 1: read. Step 2: compute.\n</think>\n<answer>\n$\\boxed{{{a}}}$\n</answer>",
        f"First, we look. Next, we compute.\n- so it is\n- done\nFinally, $\\boxed{{{b}}}$.",
        f"1. try and try and try and try again\n2. and again\n* therefore\n$\\boxed{{{c}}}$",
        f"<think>so</think><answer>The answer is $\\boxed{{{d}}}$</answer>" + " so it is" * place,
        "<think>\n" + "I do not know, " * (place + 2) + "sorry.",
    ]
    fences = {0: "```python\nprint(1)\n```", 3: "```cpp\nint main() {}\n```"}
    if place in fences:
        said[0] = said[0].replace("</answer>", f"{fences[place]}\n</answer>")
    return said


def in_messages(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


COSINE = {"min_value_wrong": 0.0, "max_value_wrong": -0.5, "min_value_correct": 0.5,
          "max_value_correct": 1.0, "max_len": 300}  # fmt: skip


def values(texts: list[str], solution: str) -> list[dict[str, float | None]]:
    """What each reward says of the answers to one question."""
    said, golds = in_messages(texts), [solution] * len(texts)
    calls = {
        "accuracy": theirs.accuracy_reward,
        "format": theirs.format_reward,
        "tag_count": theirs.tag_count_reward,
        "reasoning_steps": theirs.reasoning_steps_reward,
        "length": theirs.len_reward,
        "cosine": theirs.get_cosine_scaled_reward(),
        "cosine_of_script": theirs.get_cosine_scaled_reward(**COSINE),
        "repetition_penalty": theirs.get_repetition_penalty_reward(3, -1.0),
        "repetition_of_pairs": theirs.get_repetition_penalty_reward(2, -0.5),
        "code_format": theirs.get_code_format_reward("python"),
    }
    found = {name: call(said, solution=golds) for name, call in calls.items()}
    return [{name: own[i] for name, own in found.items()} for i in range(len(texts))]


def mathematics() -> list[dict]:
    rows = []
    for place, (prompt, solution, right, wrong) in enumerate(TASKS):
        texts = answers(place, right, wrong)
        found = zip(texts, values(texts, solution), strict=True)
        rows += [
            {"prompt": prompt, "solution": solution, "completion": text, "values": own}
            for text, own in found
        ]
    return rows


DIFFERENT = [
    # (reward, gold, answer): where moetrain differs, and docs/rewards.md says so
    ("cosine", "$56$", "$\\boxed{56}$" + " " * 2000),
    ("cosine", "\\frac{5}{", "$\\boxed{56}$"),
    ("length", "\\frac{5}{", "$\\boxed{56}$"),
    ("accuracy", "Paris", "The answer is Paris."),
    ("accuracy", "$56$", "The answer is 56."),
    ("accuracy", "$50$", "$\\boxed{56}$ or $\\boxed{50}$"),
    ("format", "$56$", "<think>\na\n</think>\n<answer>\nb\n</answer>\nand more"),
]


def differences() -> list[dict]:
    return [
        {"reward": name, "solution": gold, "completion": text, "value": own[name]}
        for name, gold, text in DIFFERENT
        for own in [values([text, "x"], gold)[0]]
    ]


# Unreadable golds leave a sample out

GOLDS = ["\\frac{5}{", "\\boxed{", "\\boxed{}", "\\sqrt{", "...", "\\begin{cases} x \\\\", "\\"]


def unreadable() -> list[dict]:
    text = "<answer>\n$\\boxed{5}$\n</answer>"
    found = theirs.accuracy_reward(in_messages([text] * len(GOLDS)), GOLDS)
    return [
        {"solution": gold, "completion": text, "value": value}
        for gold, value in zip(GOLDS, found, strict=True)
    ]


# Programs

from open_r1_programs import CASES, CODE, PROBLEMS, SUBMISSIONS


class Server(BaseHTTPRequestHandler):
    """Piston's `execute`, by the scripts of the package `codeforces`."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scripts = PISTON / "packages" / "codeforces" / "1.0.0"
        language = asked["language"].removeprefix("cf_")
        main = asked["files"][0]["name"]
        with tempfile.TemporaryDirectory() as folder:
            for file in asked["files"]:
                (Path(folder) / file["name"]).write_text(file["content"])
            answer = {"language": language, "version": "1.0.0"}
            for stage in ("compile", "run"):
                ran = subprocess.run(
                    ["bash", scripts / stage, main],
                    cwd=folder,
                    env=dict(os.environ, PISTON_LANGUAGE=language),
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                answer[stage] = {"stdout": ran.stdout, "stderr": ran.stderr, "signal": None,
                                 "code": ran.returncode}  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def codeforces(tests: Path) -> list[dict]:
    import pandas

    for problem in PROBLEMS.values():
        if own := problem["more"]:
            rows = [{"problem_id": problem["id"], "test_case_i": i} | t for i, t in enumerate(own)]
            name = f"test_cases_{int(problem['id'].split('/')[0]):04d}.parquet"
            pandas.DataFrame(rows).to_parquet(tests / name)
    os.environ["CF_TESTS_FOLDER"] = str(tests)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["PISTON_ENDPOINTS"] = f"http://127.0.0.1:{server.server_port}/api/v2"
    asyncio.set_event_loop(asyncio.new_event_loop())
    records = [
        {k: v for k, v in PROBLEMS[one[0]].items() if k != "more"} | {"language": one[1]}
        for one in SUBMISSIONS
    ]
    columns = {name: [record[name] for record in records] for name in records[0]}
    said = in_messages([one[2] for one in SUBMISSIONS])
    found = {
        mode: theirs.cf_code_reward(said, test_batch_size=2, scoring_mode=mode, **columns)
        for mode in ("weighted_sum", "pass_fail", "partial")
    }
    server.shutdown()
    return [
        {"problem": one[0], "language": one[1], "completion": one[2]}
        | {"values": {mode: own[i] for mode, own in found.items()}}
        for i, one in enumerate(SUBMISSIONS)
    ]


class Here:
    """A provider that runs a script and takes the value of its last line, as a notebook does."""

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]:
        return [self._run(textwrap.dedent(script)) for script in scripts]

    def _run(self, script: str) -> float:
        tree, names = ast.parse(script), {}
        last: Any = tree.body.pop()
        exec(compile(tree, "script", "exec"), names)
        return float(eval(compile(ast.Expression(last.value), "script", "eval"), names))


def plain_code() -> list[dict]:
    theirs.get_provider = lambda **options: Here()
    info = [{"language": "python", "test_cases": CASES[name]} for name, _ in CODE]
    said = in_messages([text for _, text in CODE])
    share = theirs.code_reward(said, verification_info=info)
    binary = theirs.binary_code_reward(said, verification_info=info)
    return [
        {"cases": name, "completion": text, "code": a, "binary_code": b}
        for (name, text), a, b in zip(CODE, share, binary, strict=True)
    ]


def main() -> None:
    packages = ("math-verify", "latex2sympy2_extended")
    head = subprocess.run(
        ["git", "-C", OPEN_R1, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "command": COMMAND,
            "open_r1": head.stdout.strip(),
            "versions": {name: version(name) for name in packages},
            "cosine_of_script": COSINE,
            "mathematics": mathematics(),
            "differences": differences(),
            "unreadable": unreadable(),
            "problems": PROBLEMS,
            "codeforces": codeforces(Path(folder)),
            "cases": CASES,
            "code": plain_code(),
        }
    print(json.dumps(found, indent=1), file=sys.__stdout__)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # for what open-r1 prints
    main()
