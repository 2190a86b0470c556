"""What importing transformers asks importlib.metadata for, without a look at every file."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from moetrain.distributions import packages_distributions

STATS = """
import importlib.metadata, os
asked, look = [], os.stat
os.stat = lambda path, *args, **kwargs: (asked.append(path), look(path, *args, **kwargs))[1]
from moetrain import cli
assert cli.main(["recipe", "optim.lr"]) == 0
importlib.metadata.packages_distributions()
print(len(asked))
"""


def by_package(found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {package: sorted(names) for package, names in found.items()}


def test_it_is_what_importlib_says() -> None:
    """Of this environment, of some hundred distributions."""
    wanted = importlib.metadata.packages_distributions()
    assert len(wanted) > 100 and wanted["yaml"] == ["PyYAML"]
    assert by_package(packages_distributions()) == by_package(wanted)


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
    done = subprocess.run([sys.executable, "-c", STATS], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 3000, "of some 33,000 files"


def test_the_mend_is_still_needed() -> None:
    """When Python or transformers does without, moetrain/distributions.py may go."""
    source = Path(sys.prefix).rglob("transformers/utils/import_utils.py")
    assert "= importlib.metadata.packages_distributions()" in next(source).read_text()
    asked = []
    count = importlib.metadata.PackagePath.locate

    def locate(path: importlib.metadata.PackagePath) -> object:
        asked.append(path)
        return count(path)

    importlib.metadata.PackagePath.locate = locate  # type: ignore[method-assign]
    try:
        importlib.metadata.packages_distributions()
    finally:
        importlib.metadata.PackagePath.locate = count  # type: ignore[method-assign]
    assert len(asked) > 10_000
