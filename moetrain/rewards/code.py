"""Whether a program that an answer contains does what its cases ask: input against output."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetrain.config.rewards import CodeOptions, RewardConfig
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape
from moetrain.rewards.programs import LANGUAGES, Broken, Outcome, Program, open_runner

# Where a record keeps its cases, the first that is there.
COLUMNS = ("tests", "test_cases", "input_output", "official_tests", "verification_info")
_OPENS = re.compile(r"[ \t]*```([^`]*)")
_BLANK = " \t\r"
Case = tuple[str, str]  # input, expected output


class Code:
    """Programs of answers against their cases.

    A record has the cases in `tests` (or another of COLUMNS): [{input, output}, ...], {inputs,
    outputs}, or either as JSON. Of an answer, the last block ```python or ```cpp is run. None
    without cases, 0 without a block. A program in a thought is none.
    """

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label = config.label
        self.options = CodeOptions.model_validate(config.options)
        self.runner = open_runner(self.options)

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        for completion in completions:
            try:
                yield completion.number, self._answer(completion)
            except (Broken, ValueError) as error:
                detail = f"{self.label}: {error}"
                yield completion.number, Grade({self.label: None}, "error", detail=detail)

    def _answer(self, completion: Completion) -> Grade:
        cases = cases_of(completion.columns)
        if not cases:
            return Grade({self.label: None})
        found = block(completion.said, self.options.languages, completion.columns.get("language"))
        if found is None:
            return self._scored(0, cases, "missing")
        program = self.runner.program(*found)
        if program is None:
            return self._scored(0, cases, "compile")
        passed, trouble = self._passed(program, cases)
        return self._scored(passed, cases, trouble)

    def _passed(self, program: Program, cases: Sequence[Case]) -> tuple[int, str | None]:
        """(cases that pass, what went wrong first); no further than the scoring needs."""
        passed, trouble = 0, None
        end = time.monotonic() + self.options.budget_seconds
        for given, wanted in cases:
            outcome = program(given) if time.monotonic() < end else Outcome("timeout")
            if outcome.end == "exit" and same_output(outcome.out, wanted, self.options.tolerance):
                passed += 1
                continue
            trouble = trouble or (None if outcome.end == "exit" else outcome.end)
            if self.options.scoring == "pass_fail" or time.monotonic() >= end:
                break
        return passed, trouble

    def _scored(self, passed: int, cases: Sequence[Case], trouble: str | None) -> Grade:
        value = SCORING[self.options.scoring](passed, len(cases))
        return Grade({self.label: value}, notes=(f"code_{trouble}",) if trouble else ())


def _pass_fail(passed: int, num: int) -> float:
    return float(passed == num)


def _partial(passed: int, num: int) -> float:
    return passed / num


def _weighted_sum(passed: int, num: int) -> float:
    return _pass_fail(passed, num) + 0.1 * _partial(passed, num)


SCORING = {"pass_fail": _pass_fail, "partial": _partial, "weighted_sum": _weighted_sum}


def cases_of(columns: Mapping[str, Any]) -> list[Case]:
    """Raises ValueError when there are some that cannot be read."""
    name = next((name for name in COLUMNS if columns.get(name)), None)
    if name is None:
        return []
    try:
        return _cases(columns[name], name)
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} has another form than cases have ({error})") from None


def _cases(value: Any, name: str) -> list[Case]:
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, Mapping):
        if value.get("fn_name"):
            raise ValueError(f"{name} calls a function; only standard input and output are graded")
        if "test_cases" in value:
            return _cases(value["test_cases"], f"{name}.test_cases")
        pairs = (
            list(zip(value["inputs"], value["outputs"], strict=True)) if "inputs" in value else []
        )
    else:
        pairs = [(case["input"], case["output"]) for case in value if _is_plain(case, name)]
    if not pairs:
        raise ValueError(
            f"{name} has no cases: give [{{input, output}}, ...] or inputs and outputs"
        )
    return [(_lines(given), _lines(wanted)) for given, wanted in pairs]


def _is_plain(case: Any, name: str) -> bool:
    if not isinstance(case, Mapping) or not {"input", "output"} <= case.keys():
        raise ValueError(f"{name} has a case without input and output")
    if case.get("type", "stdin_stdout") != "stdin_stdout":
        raise ValueError(f"{name} has a case of type {case['type']}; only stdin_stdout is graded")
    return True


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def block(text: str, languages: Sequence[str], default: Any = None) -> tuple[str, str] | None:
    """(language, program): the last fenced block in one of `languages`; one without a label is in
    `default`, or in the first of them.
    """
    first = default if default in languages else languages[0]
    for label, source in reversed(fenced(text)):
        word = label.strip().lower()
        for language in languages:
            if word in LANGUAGES[language].labels or (not word and language == first):
                return language, source
    return None


def fenced(text: str) -> list[tuple[str, str]]:
    """(label, what stands within) of every closed block, in one pass over the lines."""
    found: list[tuple[str, str]] = []
    label, within = None, list[str]()
    for line in text.split("\n"):
        if label is None:
            if opened := _OPENS.fullmatch(line):
                label, within = opened[1], []
        elif line.strip(_BLANK) == "```":
            found.append((label, "".join(within)))
            label = None
        else:
            within.append(f"{line}\n")
    return found


def same_output(out: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Line by line and word by word, however they are spaced."""
    own, other = ([line.split() for line in text.rstrip().split("\n")] for text in (out, wanted))
    return len(own) == len(other) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(own, other, strict=True)
    )


def _same_word(own: str, wanted: str, tolerance: float) -> bool:
    if own == wanted:
        return True
    if not tolerance:
        return False
    try:
        a, b = float(own), float(wanted)
    except ValueError:
        return False
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def _shape(options: Mapping[str, Any], recipe: Shape) -> Shape:
    own = CodeOptions.model_validate(options)
    seconds = own.compile_seconds + own.budget_seconds + own.seconds
    workers = own.concurrency or recipe.num_workers
    return replace(recipe, num_workers=workers, seconds=seconds + 10.0)


CODE = RewardKind(Code, _shape)
