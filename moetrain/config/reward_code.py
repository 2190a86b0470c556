"""Options of the reward `code`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.section import Section

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


def web_address(value: str) -> str:
    """Raises ValueError when it is none."""
    if not re.match(r"https?://[^/\s]+", value):
        raise ValueError(f"{value!r} is not an address such as http://127.0.0.1:8000/v1")
    return value


class CodeOptions(Section):
    """Of `code`."""

    scoring: Literal["pass_fail", "partial", "weighted_sum"] = Field(
        default="pass_fail",
        description="all cases or nothing; the share that passes; the first and 0.1 of the second",
    )
    no_code: float = Field(
        default=0.0, description="an answer without a program (open-r1's cf_code: -1.0)"
    )
    no_compile: float = Field(
        default=0.0, description="a program that does not compile (open-r1's cf_code: -0.1)"
    )
    languages: list[Literal["python", "cpp"]] = Field(
        default=["python", "cpp"],
        min_length=1,
        description="that are graded; a block without a label is in the first",
    )
    language: Literal["any", "record"] = Field(
        default="any",
        description="of a program: any of `languages`; or the one alone that the record's column"
        " language names, with its label (open-r1)",
    )
    compare: Literal["lines", "words"] = Field(
        default="lines",
        description="an output: line by line and word by word; or word by word, with yes and no in"
        " any case (open-r1's cf_code)",
    )
    generated_tests: str | None = Field(
        default=None,
        description="a folder with test_cases_0001.parquet, ..., of open-r1/codeforces"
        " (CF_TESTS_FOLDER there): further cases beside official_tests",
    )
    test_batch_size: int = Field(
        default=1,
        ge=-1,
        description="cases that run at once; with pass_fail none follow a batch with one that"
        " failed. -1: all",
    )
    limits: Literal["record", "options"] = Field(
        default="record",
        description="of a case: the record's time_limit and memory_limit, and these options where"
        " it has none; or these options for all",
    )
    sandbox: Literal["auto", "bubblewrap", "namespaces", "piston"] = Field(
        default="auto",
        description="auto: bubblewrap where it works, else namespaces, else the run is refused",
    )
    url: str | None = Field(
        default=None, description="of a Piston server, e.g. http://127.0.0.1:2000/api/v2"
    )
    seconds: Seconds = Field(default=4.0, description="for one case, by the clock and of CPU")
    budget_seconds: Seconds = Field(
        default=30.0, description="for all cases of an answer; what is left then has failed"
    )
    compile_seconds: Seconds = Field(default=20.0, description="for a C++ compiler")
    checker_seconds: Seconds = Field(
        default=10.0, description="for a record's generated_checker and one output"
    )
    memory_mb: Count = Field(default=512, description="address space of a process")
    file_mb: Count = Field(default=16, description="of a file, of the output, and of all files")
    processes: Count = Field(default=4, description="processes and threads at a time")
    tolerance: float = Field(
        default=0.0, ge=0, description="relative or absolute, between numbers of the output"
    )
    python: str | None = Field(
        default=None,
        description="the interpreter to run; default: this one, without its environment's packages",
    )
    read: list[str] = Field(
        default=[], description="further folders that programs may read (never write)"
    )
    concurrency: Count | None = Field(
        default=None, description="answers at a time; default: rollout.reward_workers"
    )

    @model_validator(mode="after")
    def _with_its_server(self) -> "CodeOptions":
        if (self.sandbox == "piston") != (self.url is not None):
            raise ValueError("sandbox: piston and url go together")
        return self

    @field_validator("test_batch_size")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("is 0: give 1 or more, or -1 for all cases at once")
        return value

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return value if value is None else web_address(value)
