"""Run commands and draw what a terminal of 100 columns shows of them, as an SVG:

tools/record.py docs/images/first-run.svg 'moetrain --version' 'moetrain train …'
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 100
# rich names a font of another server; the reader's own does.
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main(out: Path, commands: list[str]) -> None:
    """Run `commands` in a shell, one after the other, and write the SVG `out`."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"COLUMNS": str(COLUMNS), "PATH": path}
    for command in commands:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        done = subprocess.run(
            command,
            shell=True,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        console.print(Text.from_ansi(done.stdout.replace(str(Path.home()), "~")))
        if done.returncode:
            sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}")
    svg = FONTS.sub("", console.export_svg(title="moetrain", theme=MONOKAI))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(svg)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
