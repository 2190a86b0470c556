"""Files that a command names by paths of its own."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.errors import ConfigError, one_line


@dataclass
class Near:
    """Where a command's relative paths are looked for: the current folder, then the script's and
    those above it.
    """

    script: Path | None = None
    found: list[Path] = field(default_factory=list[Path])  # the files that were read

    def locate(self, flag: str, name: str) -> Path:
        """Raises ConfigError where there is no such file."""
        folders = [Path()]
        if self.script is not None:
            folders += self.script.absolute().parents
        for folder in folders:
            if os.path.isfile(folder / name):  # which takes a name of any kind
                return folder / name
        raise ConfigError(
            f"{flag} {one_line(name)}: no such file, neither here nor beside the script. Run it "
            f"where the file is"
        )

    def read(self, flag: str, name: str) -> str:
        """The text of a file. Raises ConfigError."""
        path = self.locate(flag, name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{flag} {path}: {error}") from None
        self.found.append(path)
        return text
