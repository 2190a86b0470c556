"""Importing transformers without checking that every installed file exists."""

import subprocess
import sys
from pathlib import Path

STATS = """
import importlib.metadata, os
asked, look = [], os.stat
os.stat = lambda path, *args, **kwargs: (asked.append(path), look(path, *args, **kwargs))[1]
from moetrain import cli
assert cli.main(["recipe", "optim.lr"]) == 0
importlib.metadata.packages_distributions()
print(len(asked))
"""


def alone(code: str) -> str:
    """What code prints in a process of its own: others' commands have put ours in place."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


EQUAL = """
import importlib.metadata
from moetrain.distributions import packages_distributions
ours, theirs = packages_distributions(), importlib.metadata.packages_distributions()
assert {k: sorted(v) for k, v in ours.items()} == {k: sorted(v) for k, v in theirs.items()}
assert len(theirs) > 100 and theirs["yaml"] == ["PyYAML"]
"""


def test_it_is_what_importlib_says() -> None:
    """Of this environment, of some hundred distributions."""
    alone(EQUAL)


def test_lists_of_any_kind(tmp_path: Path) -> None:
    """Declared, listed with commas and scripts, in an egg, and none at all."""
    files = {
        "a-1.dist-info": {"METADATA": "Name: a\n", "top_level.txt": "one\ntwo\n"},
        "b-1.dist-info": {
            "METADATA": "Name: b\n",
            "RECORD": 'three/x.py,,\n"four/a,b.py",,\nfive.py,,\n../bin/b,,\nb-1.dist-info/x,,\n',
        },
        "c-1.egg-info": {"PKG-INFO": "Name: c\n", "SOURCES.txt": "six/__init__.py\n"},
        "d-1.dist-info": {"METADATA": "Name: d\n"},
    }
    for folder, named in files.items():
        (tmp_path / folder).mkdir()
        for name, text in named.items():
            (tmp_path / folder / name).write_text(text)
    for listed in ("three/x.py", "four/a,b.py", "five.py", "six/__init__.py"):
        (tmp_path / listed).parent.mkdir(exist_ok=True)
        (tmp_path / listed).touch()
    code = (
        "import importlib.metadata as m; from moetrain.distributions import packages_distributions;"
        "ours, theirs = packages_distributions(), m.packages_distributions();"
        "assert ours == theirs, (ours, theirs);"
        "print(*sorted(k for k, v in ours.items() if set(v) & set('abcd')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["five", "four", "one", "six", "three", "two"]


def test_a_command_looks_at_no_file() -> None:
    """Every command's process has it, before anything imports transformers."""
    assert int(alone(STATS).splitlines()[-1]) < 3000, "of some 33,000 files"


LOOKS = """
import importlib.metadata as metadata
asked, locate = [], metadata.PackagePath.locate
metadata.PackagePath.locate = lambda path: (asked.append(path), locate(path))[1]
import transformers.utils
print(len(asked))
"""


def test_the_mend_is_still_needed() -> None:
    """When importing transformers looks at few files, moetrain/distributions.py may go."""
    assert int(alone(LOOKS)) > 10_000
