"""Whether a program that an answer contains does what its cases ask: input against output, calls
against values, or by the word of a checker.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

from moetrain.config.reward_code import CodeOptions
from moetrain.config.rewards import RewardConfig
from moetrain.errors import ConfigError
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape
from moetrain.rewards.calls import CALLER, Ask, Case, is_right
from moetrain.rewards.cases import Problem, problem_of
from moetrain.rewards.programs import LANGUAGES, Broken, Job, Program, open_runner
from moetrain.rewards.sandbox import MB

_OPENS = re.compile(r"[ \t]*```([^`]*)")
_BLANK = " \t\r"
CHECKER_MEMORY = 512 * MB
LEAST_MEMORY = 16 * MB  # without which an interpreter does not start
_END_OF_LINE = re.compile(r"\r$", re.MULTILINE)


class Code:
    """Programs of answers against their cases (cases.py). Of an answer, the last block ```python or
    ```cpp is run; a program in a thought is none. None without cases, `no_code` without a block,
    `no_compile` for one that does not compile.
    """

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label = config.label
        self.options = CodeOptions.model_validate(config.options)
        folder = self.options.generated_tests
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise ConfigError(
                f"rewards: code: generated_tests: {folder} is no folder. Give the one that has"
                " test_cases_0001.parquet, ..."
            )
        self.runner = open_runner(self.options)

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        for completion in completions:
            try:
                yield completion.number, self._answer(completion)
            except (Broken, ValueError) as error:
                detail = f"{self.label}: {error}"
                yield completion.number, Grade({self.label: None}, "error", detail=detail)

    def _answer(self, completion: Completion) -> Grade:
        problem = problem_of(completion.columns, self.options.generated_tests)
        if not problem.cases:
            return Grade({self.label: None})
        language = completion.columns.get("language")
        names = self._languages(problem, language)
        program = block(completion.said, names, language, self.options.language == "record")
        if program is None:
            return self._graded(self.options.no_code, "missing")
        trial = self._trial(problem, *program)
        if trial is None:
            return self._graded(self.options.no_compile, "compile")
        passed, trouble = self._passed(trial)
        return self._graded(SCORING[self.options.scoring](passed, len(problem.cases)), trouble)

    def _graded(self, value: float, trouble: str | None) -> Grade:
        return Grade({self.label: value}, notes=(f"code_{trouble}",) if trouble else ())

    def _languages(self, problem: Problem, asked: Any) -> list[str]:
        """Those that a program may be in."""
        languages: list[str] = list(self.options.languages)
        if self.options.language == "record" and asked:
            languages = [name for name in languages if name == asked]
        if problem.calls:
            languages = [name for name in languages if name == "python"]
        if not languages:
            raise ValueError(
                f"its language is {asked!r}{' and it calls a function' if problem.calls else ''}:"
                f" languages are {', '.join(self.options.languages)}, and functions are called in"
                " Python alone"
            )
        return languages

    def _trial(self, problem: Problem, language: str, source: str) -> "Trial | None":
        """None where the program does not compile."""
        options = self.options
        own = problem if options.limits == "record" else replace(problem, seconds=None, memory=None)
        program = self.runner.program(language, source)
        if program is None:
            return None
        caller = self.runner.program("python", CALLER) if problem.calls else None
        checker = self.runner.program("python", problem.checker) if problem.checker else None
        memory = max(own.memory or options.memory_mb * MB, LEAST_MEMORY)
        width = options.test_batch_size if options.test_batch_size > 0 else len(problem.cases)
        width = min(width, len(problem.cases))
        at_once = min(width, os.cpu_count() or 1)
        job = Job(
            own.seconds or options.seconds,
            memory,
            reads="output.txt" if problem.mode == "file" else "",
            processes=options.processes * at_once,  # of one user, whom the kernel counts as one
        )
        return Trial(problem, source, program, caller, checker, job, options, width, at_once)

    def _passed(self, trial: "Trial") -> tuple[int, str | None]:
        """(cases that pass, what went wrong first); no further than the scoring needs."""
        passed, trouble = 0, None
        end = time.monotonic() + self.options.budget_seconds
        with ThreadPoolExecutor(trial.at_once) if trial.at_once > 1 else nullcontext() as pool:
            run = map if pool is None else pool.map
            for some in batched(trial.problem.cases, trial.width):
                results: list[tuple[bool, str | None]] = list(run(partial(trial.judge, end), some))
                passed += sum(is_passed for is_passed, _ in results)
                trouble = trouble or next((own for _, own in results if own), None)
                has_failed = not all(is_passed for is_passed, _ in results)
                if time.monotonic() >= end or (has_failed and self.options.scoring == "pass_fail"):
                    break
        return passed, trouble


@dataclass(frozen=True)
class Trial:
    """A program and all that its cases need."""

    problem: Problem
    source: str
    program: Program
    caller: Program | None
    checker: Program | None
    job: Job
    options: CodeOptions
    width: int  # cases after which it is seen whether one has failed
    at_once: int

    def judge(self, end: float, case: Case) -> tuple[bool, str | None]:
        """(whether it passes, what went wrong), by a time."""
        left = end - time.monotonic()
        if left <= 0:
            return False, "timeout"
        job = replace(self.job, seconds=min(self.job.seconds, left))
        if isinstance(case.given, Ask):
            assert self.caller is not None
            files = {"solution.py": self.source}
            what = json.dumps(case.given.what)
            outcome = self.caller(replace(job, stdin=what, files=files, reads=""))
            if outcome.end == "exit":
                right = is_right(case.given, outcome.out, case.wanted, self.options.tolerance)
                return right, None
        else:
            given = _END_OF_LINE.sub("", case.given)
            files = {"input.txt": given} if job.reads else {}
            outcome = self.program(replace(job, stdin=given, files=files))
            if outcome.end == "exit":
                return self._is_right(given, outcome.out, case.wanted), None
        return False, outcome.end

    def _is_right(self, given: str, out: str, wanted: str) -> bool:
        if self.checker is None:
            own, right = (out, wanted) if self.options.compare == "lines" else _words(out, wanted)
            return same_output(own, right, self.options.tolerance)
        files = {
            "input.txt": given,
            "correct_output.txt": _filled(wanted),
            "output.txt": _filled(out),
        }
        outcome = self.checker(
            Job(self.options.checker_seconds, CHECKER_MEMORY, files=files, arguments=tuple(files))
        )
        return outcome.end == "exit" and "".join(outcome.out.split()) in ("1", "100")


_EITHER = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE | re.ASCII)


def _words(*texts: str) -> Iterator[str]:
    """In a line, with yes and no in capitals."""
    return (_EITHER.sub(lambda f: f[0].upper(), " ".join(text.split())) for text in texts)


def _filled(text: str) -> str:
    """Without the ends of lines of another system, and without empty lines: as checkers of
    open-r1's see an output.
    """
    lines = [line for line in _END_OF_LINE.sub("", text).split("\n") if line]
    return "".join(f"{line}\n" for line in lines)


def _pass_fail(passed: int, num: int) -> float:
    return float(passed == num)


def _partial(passed: int, num: int) -> float:
    return passed / num


def _weighted_sum(passed: int, num: int) -> float:
    return _pass_fail(passed, num) + 0.1 * _partial(passed, num)


SCORING = {"pass_fail": _pass_fail, "partial": _partial, "weighted_sum": _weighted_sum}


def block(
    text: str, languages: Sequence[str], default: Any = None, is_labelled: bool = False
) -> tuple[str, str] | None:
    """(language, program): the last fenced block in one of `languages`; one without a label is in
    `default`, or in the first of them, or is none (`is_labelled`).
    """
    first = default if default in languages else languages[0]
    for label, source in reversed(fenced(text)):
        word = label.strip().lower()
        for language in languages:
            if word in LANGUAGES[language].labels or (
                not word and language == first and not is_labelled
            ):
                return language, source
    return None


def fenced(text: str) -> list[tuple[str, str]]:
    """(label, what stands within) of every closed block, in one pass over the lines."""
    blocks: list[tuple[str, str]] = []
    label, within = None, list[str]()
    for line in text.split("\n"):
        if label is None:
            if opened := _OPENS.fullmatch(line):
                label, within = opened[1], []
        elif line.strip(_BLANK) == "```":
            blocks.append((label, "".join(within)))
            label = None
        else:
            within.append(f"{line}\n")
    return blocks


def same_output(out: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Line by line and word by word, however they are spaced."""
    printed, other = (
        [line.split() for line in text.rstrip().split("\n")] for text in (out, wanted)
    )
    return len(printed) == len(other) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(printed, other, strict=True)
    )


def _same_word(printed: str, wanted: str, tolerance: float) -> bool:
    if printed == wanted:
        return True
    if not tolerance:
        return False
    try:
        a, b = float(printed), float(wanted)
    except ValueError:
        return False
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def _shape(options: Mapping[str, Any], recipe: Shape) -> Shape:
    own = CodeOptions.model_validate(options)
    seconds = own.compile_seconds + own.budget_seconds + own.seconds + own.checker_seconds
    workers = own.concurrency or recipe.num_workers
    return replace(recipe, num_workers=workers, seconds=seconds + 10.0)


CODE = RewardKind(Code, _shape)
