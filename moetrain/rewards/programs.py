"""Programs in Python and C++, ready to run: in the sandbox, or on a Piston server."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import httpx

from moetrain.config.reward_code import CodeOptions
from moetrain.errors import ConfigError
from moetrain.rewards.remote import Remote, RemoteError
from moetrain.rewards.sandbox import MB, File, Limits, Sandbox


@dataclass(frozen=True)
class Language:
    """How programs of one language are made and run."""

    labels: tuple[str, ...]  # of a fenced block
    file: str
    piston: str  # Piston's name
    compile: tuple[str, ...] = ()  # the program comes out on standard output
    run: tuple[str, ...] = ()  # after the interpreter, if it has one


_COMPILE = "g++ -DONLINE_JUDGE -O2 -std=c++17 -pipe"
LANGUAGES = {
    "python": Language(("python", "py", "python3"), "main.py", "python", run=("main.py",)),
    "cpp": Language(
        ("cpp", "c++", "cc", "cxx"),
        "main.cpp",
        "c++",
        compile=("/bin/sh", "-c", f"{_COMPILE} main.cpp -o main >&2 && cat main"),
        run=("./main",),
    ),
}
COMPILER = Limits(0.0, memory=2048 * MB, file=64 * MB, processes=16)
# A program's standard output in a file of its own, as some problems want it. The sandbox has but
# one way out, so it goes there when the program has ended well.
_TO_FILE = '"$@" >/dev/null 2>&1 </dev/null && cat '


class Broken(Exception):
    """A program could not be run, and that is not its fault."""


@dataclass(frozen=True)
class Outcome:
    """What a program did with one input; "exit" alone is a program that ended well."""

    end: Literal["exit", "timeout", "output", "crash"]
    out: str = ""


@dataclass(frozen=True)
class Job:
    """One run of a program, and what it may take."""

    seconds: float
    memory: int  # bytes
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict[str, str])  # beside it
    arguments: tuple[str, ...] = ()
    reads: str = ""  # the file that has its output; "": standard output
    processes: int = 4


Program = Callable[[Job], Outcome]
"""Run it. Raises Broken."""


class Runner(Protocol):
    """Somewhere to run programs."""

    def program(self, language: str, source: str) -> Program | None:
        """None where it does not compile. Raises Broken."""
        ...


def open_runner(options: CodeOptions) -> Runner:
    """Where the recipe wants programs to run. ConfigError where that cannot be, or is not safe."""
    return Piston(options) if options.url is not None else Local(options)


class Local:
    """This machine's sandbox."""

    def __init__(self, options: CodeOptions):
        if "cpp" in options.languages and shutil.which("g++", path="/usr/bin:/bin") is None:
            raise ConfigError(
                "rewards: code: there is no g++ in /usr/bin. Install it, or set languages:"
                " [python]."
            )
        self.sandbox = Sandbox(options.sandbox, options.read, options.python)
        self.options = options

    def program(self, language: str, source: str) -> Program | None:
        how = LANGUAGES[language]
        file: File = (source.encode(errors="replace"), 0o644)
        command = [self.sandbox.python, *how.run]
        files = {how.file: file}
        if how.compile:
            limits = Limits(
                self.options.compile_seconds, COMPILER.memory, COMPILER.file, COMPILER.processes
            )
            made = self.sandbox.run(how.compile, files=files, limits=limits)
            if made.end == "broken":
                raise Broken(f"the sandbox: {made.said}")
            if made.end != "exit" or made.code != 0:
                return None
            command, files = list(how.run), {"main": (made.out, 0o755)}

        def run(job: Job) -> Outcome:
            own = {name: (text.encode(errors="replace"), 0o644) for name, text in job.files.items()}
            whole = [*command, *job.arguments]
            if job.reads:
                whole = ["/bin/sh", "-c", _TO_FILE + job.reads, "sh", *whole]
            limits = Limits(
                job.seconds, job.memory, self.options.file_mb * MB, job.processes + bool(job.reads)
            )
            data = job.stdin.encode(errors="replace")
            ran = self.sandbox.run(whole, data, {**own, **files}, limits)
            if ran.end == "broken":
                raise Broken(f"the sandbox: {ran.said}")
            if ran.end == "exit":
                out = ran.out.decode(errors="replace")
                return Outcome("crash" if ran.code else "exit", out)
            return Outcome(ran.end)

        return run


class Piston:
    """A Piston server, version 2 of its interface; it compiles anew for every input."""

    def __init__(self, options: CodeOptions):
        assert options.url is not None
        self.options = options
        self.remote = Remote(
            options.url,
            None,
            options.compile_seconds + options.seconds + 10.0,
            retries=3,
        )
        try:
            job = Job(options.seconds, options.memory_mb * MB)
            self._post("python", LANGUAGES["python"], "print(1)", job)
        except Broken as error:
            raise ConfigError(f"rewards: code: {error}. Look at its url.") from None

    def program(self, language: str, source: str) -> Program | None:
        how = LANGUAGES[language]
        compiled: list[bool] = []

        def run(job: Job) -> Outcome:
            if job.reads:
                raise ValueError("input_mode is 'file', which a Piston server does not do")
            message = self._post(language, how, source, job)
            compiled.append(not message.get("compile") or message["compile"].get("code") == 0)
            if not compiled[-1]:
                return Outcome("crash")
            return _outcome(message["run"])

        if how.compile:
            run(Job(self.options.seconds, self.options.memory_mb * MB))
            if not compiled[-1]:
                return None
        return run

    def _post(self, language: str, how: Language, source: str, job: Job) -> dict[str, Any]:
        more = [{"name": name, "content": text} for name, text in job.files.items()]
        body = {
            "language": how.piston,
            "version": "*",
            "files": [{"name": how.file, "content": source}, *more],
            "stdin": job.stdin,
            "args": list(job.arguments),
            "run_timeout": int(job.seconds * 1000),
            "compile_timeout": int(self.options.compile_seconds * 1000),
            "run_memory_limit": job.memory,
        }

        async def ask() -> Any:
            async with httpx.AsyncClient(timeout=None) as client:
                return await self.remote.post(client, "execute", body)

        try:
            message = asyncio.run(ask())
        except RemoteError as error:
            raise Broken(str(error)) from None
        if not isinstance(message, dict) or not isinstance(message.get("run"), dict):
            raise Broken(f"{self.remote.url} answers {str(message)[:200]} in place of a run")
        return message


def _outcome(run: dict[str, Any]) -> Outcome:
    if run.get("status") == "TO" or (run.get("signal") == "SIGKILL" and not run.get("status")):
        return Outcome("timeout")
    if run.get("status") in ("OL", "EL"):
        return Outcome("output")
    return Outcome("exit" if run.get("code") == 0 else "crash", str(run.get("stdout") or ""))
