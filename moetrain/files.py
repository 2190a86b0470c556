"""Files and folders that appear whole under their names or not at all, and what is said of a disk
that takes no more. No torch.

What is being written lies beside its place, as `.NAME.tmp-HOST-hex`, and is locked by its writer:
the kernel gives a lock back when its holder dies, however it dies, so that the next writer of the
same name knows what a killed one has left, and removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from stat import S_ISDIR
from typing import IO

from moetrain.errors import MoetrainError

# What a path or a disk does to a write, and nobody's bug.
OF_THE_DISK = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EFBIG: "The file system allows no larger file",
    errno.EROFS: "Mount it writable",
    errno.EACCES: "Mend its permissions",
    errno.EPERM: "Mend its permissions",
    errno.ENOTDIR: "A part of the path is a file",
    errno.EISDIR: "It is a folder",
    errno.ELOOP: "Its links go round in a circle",
    errno.ENAMETOOLONG: "The name is too long",
    errno.EIO: "The disk has failed",
    errno.ESTALE: "The file system was mounted again",
}
PASSING = (errno.EIO, errno.ESTALE)  # another start may not meet it
STALE_SECONDS = 86400.0  # nobody writes for so long without touching a file
SCRATCH_SECONDS = 3600.0  # no process waits for so long between making its folder and locking it
NAMELESS_ROOM = 1 << 22  # bytes
_LONGEST = 120  # bytes of a name that the names of temporaries repeat
_OS_ERROR = re.compile(r"\b(?:os error|[Ee]rrno):? (\d+)|No space left on device")


@contextmanager
def publish(*paths: Path) -> Iterator[list[Path]]:
    """An empty file beside each of `paths`; they take these names once all is written and on disk.

    The last of several is the one by which readers find the others: the old one goes before the
    first of the new ones comes, and the new one comes last. A device or a pipe is written as it is.

    Raises OSError with the name of the file, also for what was raised inside without one; what was
    there before is untouched.
    """
    finals = [path.resolve() if path.is_symlink() else path for path in paths]
    with ExitStack() as stack:
        for path in reversed(finals):  # an error without a name is one of the first
            stack.enter_context(named(path))
        asides = [stack.enter_context(_aside(path)) for path in finals]
        yield asides
        pairs = [(a, path) for a, path in zip(asides, finals, strict=True) if a != path]
        for aside, _ in pairs:
            _sync(aside)
        if len(pairs) > 1:
            pairs[-1][1].unlink(missing_ok=True)
        for aside, path in pairs:
            os.replace(aside, path)
        _sync_folder(finals[-1].parent)


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which takes its name once it is filled. Raises OSError as `publish`
    does; also where `folder` is there already, and not empty.
    """
    with named(folder), _aside(folder, is_folder=True) as aside:
        yield aside
        put_folder(aside, folder)


def put_folder(aside: Path, folder: Path) -> None:
    """Give a filled folder its name, once all of it is on disk. Raises OSError."""
    sync_files(aside)
    os.replace(aside, folder)
    _sync_folder(folder.parent)


def sync_files(folder: Path) -> None:
    """Wait until a folder's files are on disk. Raises OSError."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


@contextmanager
def sibling_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, for writers that put it in its place themselves; removed in
    the end where it still has its name, and by the next writer after a kill. Raises OSError.
    """
    with _aside(folder, is_folder=True) as aside:
        yield aside


@contextmanager
def part_folder(path: Path, error: type[MoetrainError]) -> Iterator[Path]:
    """The folder `.NAME.part` beside `path`, where one process at a time does what a killed one has
    begun. What becomes of it in the end is the caller's to say.

    Raises OSError; `error` where another process is writing it.
    """
    folder = path.with_name(f".{path.name}.part")
    with named(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)  # what a link leads to is not ours
    try:
        if not locked(handle):
            raise error(f"{path} is being written by another process. Wait for its end.")
        yield folder
    finally:
        os.close(handle)


def reserve(handle: int, size: int) -> None:
    """Give an open file its size, and room on the disk where the file system can promise it: a full
    one is then found out before the first byte, and threads write into what is theirs already.

    Raises OSError, ENOSPC among them.
    """
    os.truncate(handle, size)
    # Not os.posix_fallocate: where the file system cannot, glibc writes into every block.
    libc = ctypes.CDLL(None, use_errno=True)
    if size and libc.fallocate(handle, 0, ctypes.c_long(0), ctypes.c_long(size)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(number, os.strerror(number))


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old content or all of the new. Raises OSError."""
    with publish(path) as (aside,), aside.open("w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give OSErrors without a file's name this one, and those that name its temporary. A full disk
    is an OSError, whatever a library makes of it.
    """
    try:
        yield
    except MoetrainError:
        raise
    except Exception as error:  # tokenizers, safetensors and torch have types of their own
        other = error.filename if isinstance(error, OSError) else None
        if other is not None and not str(other).startswith(str(path.parent / _stem(path))):
            raise
        found = as_os_error(error, path)
        if found is None:
            raise
        raise found from error


def as_os_error(error: Exception, path: Path) -> OSError | None:
    """A failed write of `path` as an OSError that names it; None for what is none."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _OS_ERROR.search(str(error))):
        number = int(match[1]) if match[1] else errno.ENOSPC
    if number is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        number = errno.ENOSPC  # numpy's, of a file that could not take all
    if number not in OF_THE_DISK:
        return None
    return OSError(number, os.strerror(number), str(path))


@contextmanager
def scratch(folder: str | None = None) -> Iterator[Path]:
    """A folder that is gone in the end, in `folder` or where temporary files go; a later one takes
    away what a killed process has left. Raises MoetrainError when there is no room.
    """
    place = Path(folder or os.environ.get("TMPDIR") or "/tmp")
    prefix = f"moetrain-{_host()}-"
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name, _held(name):
            place = Path(name).parent
            for other in place.glob(f"{prefix}*"):
                _remove_scratch(other)
            with named(Path(name)):
                yield Path(name)
    except OSError as error:
        # Of tempfile itself, where none of its folders takes a file: an error without a name.
        if error.filename is not None and not str(error.filename).startswith(str(place)):
            raise
        raise MoetrainError(
            f"The temporary folder {place} cannot be written: {error.strerror}. Set TMPDIR to a"
            " folder with room."
        ) from error


def nameless() -> IO[bytes]:
    """A file without a name, to write and read; in memory where temporary files have no room."""
    try:
        if shutil.disk_usage(tempfile.gettempdir()).free >= NAMELESS_ROOM:
            return tempfile.TemporaryFile()
    except OSError:  # tempfile has found no folder that takes a file
        pass
    return os.fdopen(os.memfd_create("moetrain"), "w+b")


def disk_problem(error: OSError) -> str | None:
    """A line on what a path or a disk did to a write; None for errors of another kind."""
    if error.errno == errno.ENOENT and error.filename is None and "temporary" in str(error):
        # Python's tempfile, which some packages ask when they are imported (dill 0.4, with torch).
        return "No folder takes temporary files. Set TMPDIR to a folder with room."
    if error.errno not in OF_THE_DISK:
        return None
    where = "the output" if error.filename is None else error.filename
    return f"{where}: {error.strerror}. {OF_THE_DISK[error.errno]}, or give another place."


def clean(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it."""
    own, host = _stem(path), _host()
    for other in (*path.parent.glob(f"{_escaped(own)}*"), *_of_earlier_versions(path)):
        with contextlib.suppress(OSError):
            if other.name.startswith(f"{own}{host}-") and _is_free(other):
                _remove(other)
            elif _newest(path.parent) - other.stat().st_mtime > STALE_SECONDS:
                _remove(other)


def _of_earlier_versions(path: Path) -> Iterator[Path]:
    """What earlier versions named otherwise, and did not lock."""
    yield from path.parent.glob(f".writing_{_escaped(path.name)}")
    name = re.compile(rf"{re.escape(path.stem)}\.tmp-[0-9a-f]{{8}}{re.escape(path.suffix)}")
    others = path.parent.glob(f"{_escaped(path.stem)}.tmp-*")
    yield from (other for other in others if name.fullmatch(other.name))


@contextmanager
def _held(folder: str) -> Iterator[None]:
    """The lock of a folder, for as long as it is there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        locked(handle)
        yield
    finally:
        os.close(handle)


def _remove_scratch(folder: Path) -> None:
    """Remove a folder of `scratch` whose process is gone; one that is too young may be waiting for
    its lock.
    """
    with contextlib.suppress(OSError):
        stat = folder.lstat()
        is_own = S_ISDIR(stat.st_mode) and stat.st_uid == os.geteuid()
        if is_own and time.time() - stat.st_mtime > SCRATCH_SECONDS and _is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _aside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A locked temporary beside `path`, removed in the end where it still has its name."""
    if not is_folder and _is_direct(path):
        yield path
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file is where a folder is wanted
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
        ) from None
    clean(path)
    while True:
        aside = path.parent / f"{_stem(path)}{_host()}-{uuid.uuid4().hex[:8]}"
        if is_folder:
            aside.mkdir()
        handle = os.open(aside, os.O_RDONLY if is_folder else os.O_RDONLY | os.O_CREAT, 0o666)
        if locked(handle) and aside.exists():
            break
        os.close(handle)  # another writer has taken it for one that was left, just now
    try:
        yield aside
    finally:
        os.close(handle)
        _remove(aside)


def locked(handle: int, *, shared: bool = False) -> bool:
    """Take an open file's lock, `shared` with others that only look; False where another has it.
    True where there are no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_direct(path: Path) -> bool:
    """What is written as it is: renaming a file over /dev/null would take it from everyone."""
    return (
        path.is_relative_to("/dev")
        or path.is_relative_to("/proc")
        or (path.exists() and not path.is_file() and not path.is_dir())
    )


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return f".{name}.tmp-"


def _host() -> str:
    return re.sub(r"\W+", "_", platform.node())[:60]


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_free(path: Path) -> bool:
    """Whether nobody of this node holds its lock. Raises OSError where there are no locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _newest(folder: Path) -> float:
    """Now, by the clock that has dated the files of `folder`, as far as it is known."""
    return max((entry.stat().st_mtime for entry in os.scandir(folder)), default=0.0)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    """Wait until a file is on disk: quotas of network file systems speak only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        _sync(folder)
