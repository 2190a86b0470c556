"""The cache folder: built once, published whole, shared by every process and run on the machine."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from moetrain import files
from moetrain.errors import DataError

# A file this young may still be rewritten within one tick of its file system's clock, so that its
# size and time say nothing about its content.
RACY_SECONDS = 2.0


def cache_root(configured: Path | None = None) -> Path:
    """The cache folder: what the recipe says, else $MOETRAIN_CACHE, else ~/.cache/moetrain."""
    if configured is not None:
        return Path(configured).expanduser()
    named = os.environ.get("MOETRAIN_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "moetrain"


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Return `folder`, made by `build(tmp)` when it is not there yet.

    Safe against several processes asking at once: the first builds under a lock, the others wait
    and find it. `build` writes into a fresh folder beside the final one, which is renamed into
    place when it is complete; a build that fails or is killed leaves nothing under the final name.
    DataError when the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                return folder
            with files.publish_folder(folder) as tmp:
                build(tmp)
    except OSError as error:
        raise DataError(
            f"The cache {folder} cannot be written: {error.strerror or error}."
            " Point data.cache or $MOETRAIN_CACHE at a folder with room."
        ) from error
    return folder


def key_of(content: Any) -> str:
    """A short name for JSON-able `content`: equal content, equal name."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def digest_files(paths: Iterable[Path], root: Path) -> list[tuple[str, str]]:
    """(path, digest of the content) of each file.

    Digests are remembered under `root` by size and time.
    """
    memory = root / "digests"
    return [(str(path), remembered(path, memory, _digest)) for path in paths]


def remembered(path: Path, memory: Path, find: Callable[[Path], str]) -> str:
    """What `find` says of a file's content.

    Every rank asks for it, so one reading of a large file is remembered.
    """
    stat = path.stat()
    note = memory / key_of([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    if note.is_file():
        return note.read_text()
    value = find(path)
    if time.time() - stat.st_mtime > RACY_SECONDS:
        with contextlib.suppress(OSError):  # it only saves time; a cache may be read-only
            files.write_text(note, value)
    return value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
