"""Files that appear whole, what killed writers leave, and what is said of a disk. No torch."""

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from moetrain import cli, files
from moetrain.commands.common import Arguments
from moetrain.errors import DataError, MoetrainError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_room_is_promised_or_refused(tmp_path: Path) -> None:
    """Before the first byte; a larger file that was there becomes as small as it shall be."""
    with (tmp_path / "file").open("w+b") as file:
        for size in (1 << 20, 1 << 16, 0):
            files.reserve(file.fileno(), size)
            found = os.fstat(file.fileno())
            assert found.st_size == size and found.st_blocks * 512 >= size
        with pytest.raises(OSError, match=r"File too large|No space left"):
            files.reserve(file.fileno(), 1 << 60)


def paused(enter: Callable[[], AbstractContextManager[Path]]) -> tuple[int, Path]:
    """A process that stands still within a block until it is killed, and what the block gave it."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with enter() as place:
                os.write(writable, os.fsencode(place))
                while True:
                    signal.pause()
        finally:
            os._exit(1)  # it must not go on as a second pytest
    os.close(writable)
    place = os.read(readable, 4096)
    os.close(readable)
    return pid, Path(os.fsdecode(place))


@contextmanager
def half_written(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    if is_folder:
        with files.sibling_folder(path) as aside:
            (aside / "half").write_text("x")
            yield aside
    else:
        with files.publish(path) as (aside,), aside.open("w") as file:
            file.write("half")
            file.flush()
            yield aside


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_writer_leaves_goes_with_the_next_start(
    tmp_path: Path, is_folder: bool
) -> None:
    path = tmp_path / "corpus [1].idx"
    if not is_folder:
        path.write_text("old")
    pid, _ = paused(lambda: half_written(path, is_folder=is_folder))
    files.clean(path)
    assert len(names(tmp_path)) == 2 - is_folder, "a writer that lives keeps what it writes"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert is_folder or path.read_text() == "old"
    if is_folder:
        with files.publish_folder(path) as aside:
            (aside / "whole").write_text("x")
        assert names(path) == ["whole"]
    else:
        files.write_text(path, "new")
        assert path.read_text() == "new"
    assert names(tmp_path) == [path.name]


def test_another_hosts_leftover_goes_when_nobody_has_touched_it_for_a_day(tmp_path: Path) -> None:
    """And what earlier versions left, which had other names and no locks."""
    fresh, stale = (tmp_path / f".a.tmp-elsewhere-{n}" for n in (1, 2))
    young, old = (tmp_path / f"a.tmp-0123abc{n}" for n in (1, 2))
    folder, own = tmp_path / ".writing_a", tmp_path / "a.tmp-mine"
    aged = ((fresh, 0.9), (stale, 1.1), (young, 0.9), (old, 1.1), (folder, 1.1), (own, 9.0))
    for path, age in aged:
        path.mkdir() if path == folder else path.write_text("x")
        when = tmp_path.stat().st_mtime - age * files.STALE_SECONDS
        os.utime(path, (when, when))
    (tmp_path / "now").write_text("")
    files.write_text(tmp_path / "a", "x")
    assert names(tmp_path) == [fresh.name, "a", young.name, own.name, "now"]


def test_what_a_killed_process_leaves_in_the_temporary_folder(tmp_path: Path) -> None:
    """A conversion keeps a whole model there. What lives stays, however old, and what is young."""

    @contextmanager
    def half_converted() -> Iterator[Path]:
        with files.scratch(str(tmp_path)) as place:
            (place / "half").write_text("x")
            yield place

    (dead, left), (alive, kept) = paused(half_converted), paused(half_converted)
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    try:
        with files.scratch(str(tmp_path)):
            assert left.exists(), "it is as young as one that waits for its lock"
        when = tmp_path.stat().st_mtime - 2 * files.SCRATCH_SECONDS
        for place in (left, kept):
            os.utime(place, (when, when))
        with files.scratch(str(tmp_path)) as place:
            assert set(names(tmp_path)) == {kept.name, place.name}
        assert names(tmp_path) == [kept.name]
    finally:
        os.kill(alive, signal.SIGKILL)
        os.waitpid(alive, 0)


def test_several_files_appear_together_the_last_one_last(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.bin", "a.idx")]
    for path in paths:
        path.write_text("old")
    with pytest.raises(OSError, match=r"a\.bin"):
        with files.publish(*paths) as asides:
            asides[1].write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert names(tmp_path) == ["a.bin", "a.idx"]
    with files.publish(*paths) as asides:
        for aside in asides:
            aside.write_text("new")
    assert [path.read_text() for path in paths] == ["new", "new"]


def test_links_permissions_and_long_names_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    files.write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "mine", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o640
    name = tmp_path / ("ä" * 127)
    files.write_text(name, "x")
    assert name.read_text() == "x"


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    files.write_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="/dev/full") as caught:
        files.write_text(Path("/dev/full"), "x")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("4096 requested and 0 written"),  # numpy's
        Exception("No space left on device (os error 28)"),  # tokenizers'
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_has_a_file_whoever_says_it(raised: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, files.named(tmp_path / "x"):
        raise raised
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    assert "Make room" in (files.disk_problem(caught.value) or "")


@pytest.mark.parametrize(
    "raised", [DataError("[Errno 28] is told already"), KeyError("x"), FileNotFoundError("x")]
)
def test_what_is_no_disk_is_raised_as_it_is(raised: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(raised)) as caught, files.named(tmp_path / "x"):
        raise raised
    assert caught.value is raised


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EDQUOT, 2), (errno.EIO, 1)]
)
def test_the_command_line_says_it_in_one_line(
    number: int,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what no command foresaw. A disk that may be mended by itself lets a job start again."""

    def fail(args: Arguments) -> int:
        raise OSError(number, os.strerror(number), "/x/y")

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", lambda parser: None, fail))
    assert cli.main(["fail"]) == code
    said = capsys.readouterr().err
    assert said.startswith("moetrain: error: /x/y: ") and said.count("\n") == 1


@pytest.mark.parametrize(("out", "err"), [(True, False), (True, True), (False, True)])
def test_what_is_printed_into_a_full_disk(out: bool, err: bool, tmp_path: Path) -> None:

    words = ["swift", "import", "megatron sft --model x --dataset y"]
    with open("/dev/full", "w") as full, (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            [sys.executable, "-m", "moetrain", *words],
            stdout=full if out else subprocess.DEVNULL,
            stderr=full if err else said,
            check=False,
        )
    lines = (tmp_path / "said").read_text().splitlines()
    assert done.returncode == 2
    if not err:
        assert lines[-1].startswith("moetrain: error: the output: No space left"), lines
        assert not any("Traceback" in line or "Exception ignored" in line for line in lines)


def test_no_folder_takes_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "file")])
    with pytest.raises(MoetrainError, match="Set TMPDIR"), files.scratch():
        pass


def test_a_package_that_finds_no_temporary_folder() -> None:
    """As dill 0.4.1 does when torch imports it; a missing file of another kind is not told so."""
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert "Set TMPDIR" in (files.disk_problem(error) or "")
    assert (
        files.disk_problem(FileNotFoundError(errno.ENOENT, "No such file", "/x/temporary")) is None
    )


def test_what_ranks_say_lies_in_memory_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "NAMELESS_ROOM", 1 << 62)
    with files.nameless() as file:
        assert "memfd" in os.readlink(f"/proc/self/fd/{file.fileno()}")
        file.write(b"said")
        file.seek(0)
        assert file.read() == b"said"
