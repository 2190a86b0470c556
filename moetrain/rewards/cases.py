"""What a record says of a program: cases, limits, and who decides whether an output is right."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from moetrain.rewards.asserts import assert_cases, check_cases
from moetrain.rewards.calls import Ask, Case, call
from moetrain.rewards.packed import unpacked

# Where a record keeps its cases, the first that is there.
COLUMNS = ("tests", "test_cases", "input_output", "official_tests", "verification_info",
           "public_tests", "public_test_cases", "test_list", "test")  # fmt: skip
# Further cases, of which all count. open-r1's `generated_tests` is a number: see `generated`.
BESIDE = ("private_tests", "private_test_cases", "challenge_test_list", "generated_tests")
_KINDS = {"stdin_stdout": False, "stdin": False, "function_call": True, "functional": True}
_UNREADABLE = (TypeError, LookupError, AttributeError, RecursionError, OverflowError, SyntaxError)


@dataclass(frozen=True)
class Problem:
    """A record's cases, and what holds for all of them."""

    cases: tuple[Case, ...]
    checker: str | None = None  # Python that prints 1 (or 100) where an output is right
    seconds: float | None = None  # for a case; None: the record does not say
    memory: int | None = None  # bytes
    mode: Literal["stdio", "file"] = "stdio"  # file: input.txt and output.txt

    @property
    def calls(self) -> bool:
        """Whether there are cases that call a function."""
        return any(isinstance(case.given, Ask) for case in self.cases)


def problem_of(columns: Mapping[str, Any], folder: str | None = None) -> Problem:
    """Raises ValueError when something of it cannot be read. `folder` has open-r1's generated tests
    (`generated_tests/*.parquet` of open-r1/codeforces).
    """
    cases = cases_of(columns)
    if folder is not None and "official_tests" in columns:
        cases += generated(folder, str(columns.get("id")))
    if not cases:
        return Problem(())
    mode = columns.get("input_mode") or "stdio"
    if mode not in ("stdio", "file"):
        raise ValueError(f"input_mode is {mode!r}: stdio and file are graded")
    size = columns.get("memory_limit_bytes")
    return Problem(
        tuple(cases),
        _compiled(columns.get("generated_checker")),
        _amount(columns, "time_limit", _SECONDS),
        int(size) if size else _bytes(_amount(columns, "memory_limit", _MEGABYTES)),
        mode,
    )


def cases_of(columns: Mapping[str, Any]) -> list[Case]:
    """Raises ValueError when there are some that cannot be read."""
    name = next((name for name in COLUMNS if _has_cases(columns, name)), None)
    names = [] if name is None else [name]
    names += [name for name in BESIDE if _has_cases(columns, name)]
    cases: list[Case] = []
    for name in names:
        try:
            cases += _cases(unpacked(columns[name], name), name, columns)
        except _UNREADABLE as error:
            raise ValueError(f"{name} has another form than cases have ({error})") from None
    if names and not cases:
        raise ValueError(
            f"{names[0]} has no cases: give [{{input, output}}, ...] or inputs and outputs"
        )
    return cases


def _has_cases(columns: Mapping[str, Any], name: str) -> bool:
    value = columns.get(name)
    if name == "test":  # a name that other columns have, too
        return isinstance(value, str) and "assert" in value
    return bool(value) and not isinstance(value, int)


def _cases(value: Any, name: str, columns: Mapping[str, Any]) -> list[Case]:
    if name == "test":
        return check_cases(value, str(columns.get("entry_point") or ""), _setup(columns))
    if isinstance(value, Mapping):
        if "test_cases" in value:
            inner = unpacked(value["test_cases"], name)
            return _cases(inner, f"{name}.test_cases", {**columns, **value})
        pairs = list(zip(*_lists(value), strict=True))
        function = value.get("fn_name") or ""
        return [_case(given, wanted, function) for given, wanted in pairs]
    return list(_listed(value, name, columns))


def _lists(value: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """{inputs, outputs}, or DeepMind's {input, output}, which are lists there, too."""
    if "inputs" in value:
        return value["inputs"], value["outputs"]
    given, wanted = value.get("input", []), value.get("output", [])
    return (given, wanted) if isinstance(given, list) else ([given], [wanted])


def _listed(value: Any, name: str, columns: Mapping[str, Any]) -> Iterator[Case]:
    for case in value:
        if isinstance(case, str):
            yield from assert_cases(case, _setup(columns))
            continue
        if not isinstance(case, Mapping) or not {"input", "output"} <= case.keys():
            raise ValueError(f"{name} has a case without input and output")
        kind = case.get("type") or case.get("testtype") or "stdin_stdout"
        if kind not in _KINDS:
            raise ValueError(f"{name} has a case of type {kind}; there are {', '.join(_KINDS)}")
        function = case.get("fn_name") or _function(columns) if _KINDS[kind] else ""
        if _KINDS[kind] and not function:
            raise ValueError(f"{name} has a case of type {kind} without fn_name")
        yield _case(case["input"], case["output"], function)


def _case(given: Any, wanted: Any, function: str) -> Case:
    return call(function, given, wanted) if function else Case(_lines(given), _lines(wanted))


def _function(columns: Mapping[str, Any]) -> str:
    """The function's name: `fn_name`, or LiveCodeBench's `metadata`."""
    about = unpacked(columns.get("metadata") or {}, "metadata")
    return str(columns.get("fn_name") or about.get("func_name") or "")


def _setup(columns: Mapping[str, Any]) -> str:
    """What MBPP and the like want to be run before an assert."""
    parts = [columns.get(name) for name in ("test_imports", "test_setup_code")]
    return "\n".join("\n".join(p) if isinstance(p, list) else str(p) for p in parts if p)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


# Limits and the checker

_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "ms": 1e-3, "millisecond": 1e-3}
_MEGABYTES = {"": 1.0, "mb": 1.0, "mib": 1.0, "megabyte": 1.0, "kb": 1 / 1024, "kib": 1 / 1024,
              "kilobyte": 1 / 1024, "gb": 1024.0, "gib": 1024.0, "gigabyte": 1024.0,
              "byte": 1 / (1 << 20)}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*?)s?\s*")


def _amount(columns: Mapping[str, Any], name: str, units: Mapping[str, float]) -> float | None:
    """A number, text such as "2.0 seconds", or {seconds, nanos}."""
    value = columns.get(name)
    if value in (None, ""):
        return None
    if isinstance(value, Mapping):
        value = float(value.get("seconds") or 0) + float(value.get("nanos") or 0) / 1e9
    match = _AMOUNT.fullmatch(str(value))
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise ValueError(f"{name} is {columns[name]!r}, which is no limit")
    return float(match[1]) * unit


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else int(megabytes * (1 << 20))


@lru_cache(maxsize=64)
def _compiled(checker: str | None) -> str | None:
    """As it is; ValueError where it is no Python."""
    if not checker or not checker.strip():
        return None
    try:
        compile(checker, "generated_checker", "exec", ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"generated_checker does not compile: {error}") from None
    return checker


# Generated tests

_CONTEST = re.compile(r"(\d+)/.*")


@lru_cache(maxsize=16)
def generated(folder: str, problem: str) -> list[Case]:
    """Of a problem such as "852/A"; none where its contest has no file."""
    contest = _CONTEST.fullmatch(problem)
    if contest is None:
        raise ValueError(f"id is {problem!r}: generated tests are found by one such as '852/A'")
    path = Path(folder).expanduser() / f"test_cases_{int(contest[1]):04d}.parquet"
    if not path.is_file():
        return []
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        names = ["input", "output"]
        rows = read_table(path, columns=names, filters=[("problem_id", "==", problem)]).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return [Case(_lines(row["input"]), _lines(row["output"])) for row in rows]
