"""The commands of a page that says so run as they stand, in order, in an empty folder that has the
examples and tools of the repository.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.testing import command

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- runs -->\n```sh\n(.*?)```", re.DOTALL)
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in sorted(ROOT.glob("docs/*.md"))
    if (blocks := BLOCK.findall(path.read_text()))
}


def test_pages_have_commands() -> None:
    assert "docs/checkpoints.md" in PAGES and "docs/pretraining.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    for name in ("examples", "tools", "moetrain"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + "".join(PAGES[page])
    with command.for_scripts(tmp_path / "bin") as moetrain:
        path = (moetrain.parent, Path(sys.executable).parent, os.environ["PATH"])
        env = {"PATH": os.pathsep.join(map(str, path)), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
