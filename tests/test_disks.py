"""A full disk, a read-only one and a kill, in every command that writes: one line, nothing half
written, what was there before as it was (`disk_cases.py`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_cases import CASES, OTHERS

from moetrain import cli

# In CI: a disk with room for half of it, or none for a page; a kill where a command is quick.
# `make prove` takes all cases through all states.
STATES = ["half", "read-only"]
KILLED = ["pairs", "data index", "tokenizer train", "convert hf2mcore", "convert merge", "report"]
LEFT = re.compile(r"\.tmp-|\.writing_|\.part(?!ial)|\.old_|\.probe")
Found = dict[str, dict[str, dict[str, Any]]]


def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """A command, or each of its actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own, inner in action.choices.items():
                yield from leaves(inner, f"{name} {own}")
            return
        if action.dest == "action" and action.choices:
            yield from (f"{name} {choice}" for choice in action.choices)
            return
    yield name


def test_no_command_is_forgotten() -> None:
    """Of the command line's own table: a new command is written down as one that writes, or as one
    that does not, and why.
    """
    every: set[str] = set()
    for name, command in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.arguments(parser)
        every |= set(leaves(parser, name))
    known = {name.partition(",")[0] for name in CASES} | OTHERS.keys()
    assert every == known


def namespaces() -> list[str] | None:
    """What starts a program where it may mount disks; None where nothing does."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        probe = [*words, "sh", "-c", "mount -t tmpfs none /mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return words
    return None


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Case -> state of the disk -> how the command ended."""
    words = namespaces()
    if words is None:
        pytest.skip("nothing may be mounted here: full and read-only disks stay unproven")
    work = tmp_path_factory.mktemp("disks")
    states = [*STATES, "--killed", *KILLED]
    if seed := os.environ.get("MOETRAIN_DISKS"):  # of `make prove`
        states = ["full", *STATES, "killed", "--seed", seed]
    done = subprocess.run(
        [
            *words,
            *(sys.executable, "-W", "ignore", str(Path(__file__).with_name("disk_cases.py"))),
            *(str(work), "--states", *states),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line["case"]: line["runs"] for line in lines}


def new(run: dict[str, Any]) -> set[str]:
    return run["after"].keys() - run["before"].keys()


@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_takes_no_more(found: Found, name: str) -> None:
    case, runs = CASES[name], found[name]
    assert case.long or runs["good"]["code"] == 0, runs["good"]["said"]
    bad = [state for state in ("full", "half", "read-only") if state in runs]
    assert "read-only" in bad and len(bad) >= 2
    for state in bad:
        run, told = runs[state], f"{name}, {state}: {runs[state]}"
        if case.temporary and state != "half" and run["code"] == 0:
            continue  # they have gone elsewhere
        said = [line for line in run["said"].splitlines() if not line.startswith("moetrain: c")]
        assert run["code"] == 2 and len(said) == 1, told
        assert said[0].startswith("moetrain: error: "), told
        assert any(w in said[0].lower() for w in ("space", "disk", "read-only", "full")), told
        assert run["before"].items() <= run["after"].items(), told
        assert case.grows or not new(run), told


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].long])
def test_the_same_command_goes_on(found: Found, name: str) -> None:
    """Once there is room, or after a kill -9: it ends well, and nothing half written is left."""
    for state in (state for state in found[name] if state.startswith("after")):
        run = found[name][state]
        told = f"{name}, {state}: {run}"
        was_whole = run["before"].keys() == found[name]["good"]["after"].keys()
        if CASES[name].once and state == "after killed" and was_whole:
            assert run["code"] == 2 and "exists" in run["said"], told  # killed as it ended
            continue
        assert run["code"] == 0, told
        assert not [path for path in run["after"] if LEFT.search(path)], told
