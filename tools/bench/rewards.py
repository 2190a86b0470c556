#!/usr/bin/env python3
"""Grades a second by the Grader with 1 and 2 workers against math-verify alone in one process, and
programs a second in the sandbox. Prints a table; the sides take turns, so that load on the machine
falls on all.
"""

import argparse
import random
import time
from collections.abc import Callable

from moetrain.config.rewards import RewardConfig
from moetrain.rewards import Grader
from moetrain.rewards.sandbox import Limits, Sandbox

WORKERS = (1, 2)


def problems(num: int) -> tuple[list[str], list[str]]:
    """(answers with their reasoning, gold answers): numbers, fractions and roots, half of them
    right.
    """
    rng = random.Random(0)
    texts: list[str] = []
    golds: list[str] = []
    for i in range(num):
        a, b = rng.randint(2, 400), rng.randint(2, 60)
        gold = (f"{a * b}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}")[i % 3]
        said = gold if rng.random() < 0.5 else gold.replace(str(b), str(b + 1))
        texts.append(f"We compute step by step with {a} and {b}. So it is $\\boxed{{{said}}}$.")
        golds.append(f"${gold}$")
    return texts, golds


def alone(texts: list[str], golds: list[str]) -> None:
    """math-verify as its documentation has it."""
    from math_verify import parse, verify

    for text, gold in zip(texts, golds, strict=True):
        verify(parse(gold), parse(text))


def rate(num: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return num / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=600)
    parser.add_argument("--programs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts, golds = problems(args.answers)
    sides: dict[str, tuple[int, Callable[[], object]]] = {}
    alone(texts[:3], golds[:3])  # imports
    sides["math-verify alone, grades/s"] = len(texts), lambda: alone(texts, golds)
    accuracy = RewardConfig(name="accuracy")
    graders = [Grader([accuracy], num, 30.0) for num in WORKERS]
    for num, grader in zip(WORKERS, graders, strict=True):
        sides[f"Grader with {num}, grades/s"] = (
            len(texts),
            lambda grader=grader: grader.grade(texts, {"answer": golds}),
        )
    for kind in ("bubblewrap", "namespaces"):
        sandbox = Sandbox(kind)
        command = [sandbox.python, "-c", "print(int(input()) ** 2)"]

        def run(sandbox: Sandbox = sandbox, command: list[str] = command) -> None:
            for _ in range(args.programs):
                ran = sandbox.run(command, b"12", limits=Limits(30.0))
                assert ran.out == b"144\n", ran

        sides[f"{kind}, Python programs/s one after the other"] = args.programs, run
    code = RewardConfig(name="code", options={"seconds": 30.0, "languages": ["python"]})
    tests = [{"input": "12", "output": "144"}]
    answer = "```python\nprint(int(input()) ** 2)\n```"
    for num in WORKERS:
        graders.append(Grader([code], num, 30.0))
        sides[f"`code` with {num}, programs/s"] = (
            args.programs,
            lambda grader=graders[-1]: grader.grade(
                [answer] * args.programs, {"tests": [tests] * args.programs}
            ),
        )
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            found[name].append(rate(*side))
    for name, rates in found.items():
        middle = sorted(rates)[len(rates) // 2]
        print(f"| {name} | {middle:.0f} | {min(rates):.0f} to {max(rates):.0f} |")
    for grader in graders:
        grader.close()


if __name__ == "__main__":
    main()
