"""The command line: one table of commands. Nothing heavy is imported before a command is chosen."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from moetrain import distributions, garbage
from moetrain.commands import (
    bench,
    convert,
    data,
    doctor,
    eval,
    grade,
    init,
    launch,
    pairs,
    plan,
    quickstart,
    recipe,
    report,
    requeue,
    sample,
    score,
    serve,
    show,
    sweep,
    swift,
    tokenizer,
    train,
    watch,
)
from moetrain.commands.common import Command, parse
from moetrain.errors import MoetrainError

LONGEST_ERROR = 4000  # characters

COMMANDS: dict[str, Command] = {
    "init": init.COMMAND,
    "train": train.COMMAND,
    "recipe": recipe.COMMAND,
    "score": score.COMMAND,
    "sample": sample.COMMAND,
    "pairs": pairs.COMMAND,
    "eval": eval.COMMAND,
    "grade": grade.COMMAND,
    "serve": serve.COMMAND,
    "tokenizer": tokenizer.COMMAND,
    "data": data.COMMAND,
    "convert": convert.COMMAND,
    "sweep": sweep.COMMAND,
    "launch": launch.COMMAND,
    "plan": plan.COMMAND,
    "requeue": requeue.COMMAND,
    "report": report.COMMAND,
    "show": show.COMMAND,
    "watch": watch.COMMAND,
    "swift": swift.COMMAND,
    "doctor": doctor.COMMAND,
    "bench": bench.COMMAND,
    "quickstart": quickstart.COMMAND,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr and exit code
    2, and so is a disk that takes no more.
    """
    garbage.expect_imports()
    distributions.skip_file_checks()
    args = parse(sys.argv[1:] if argv is None else argv, COMMANDS)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return code
    except MoetrainError as error:
        line = " ".join(str(error).splitlines())
        if len(line) > LONGEST_ERROR:  # a name in a file may be of any length
            line = f"{line[: LONGEST_ERROR // 2]} ... {line[-LONGEST_ERROR // 2 :]}"
        _say(f"moetrain: error: {line}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("moetrain: interrupted.")
        return 130
    except BrokenPipeError:
        _drop(sys.stdout)
        return 141
    except OSError as error:
        from moetrain import files

        if (line := files.disk_problem(error)) is None:
            raise
        _say(f"moetrain: error: {line}")
        return 1 if error.errno in files.PASSING else MoetrainError.exit_code


def _say(line: str) -> None:
    """On stderr, after what is on its way to stdout; either may be a file on a full disk."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, line + "\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Python would try once more to write what is left, at its end, and fail then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
