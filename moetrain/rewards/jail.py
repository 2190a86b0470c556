"""Runs one program where it can reach nothing, on a machine without bubblewrap: as `python -I -S -c
SOURCE JOB`, the standard library alone.

The process goes into namespaces of its own (mounts, process ids, network, ipc, host name; for
anyone but root users, too). Its child is init there: it mounts a small file system, starts the
program in it without privileges and behind a filter, and takes everything with it when it ends. The
end is told to the file `status`, in bubblewrap's words.
"""

import ctypes
import json
import os
import signal
import struct
import sys
from typing import Any

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE, MNT_DETACH = 1 << 12, 1 << 14, 1 << 19, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PIVOT_ROOT = 41 if os.uname().machine == "aarch64" else 155
HOST = "/.host"

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:  # it ended before that was set
        return
    try:
        uid, gid = os.geteuid(), os.getegid()
        flags = os.CLONE_NEWNS | os.CLONE_NEWUTS | os.CLONE_NEWIPC
        flags |= os.CLONE_NEWPID | os.CLONE_NEWNET
        os.unshare(flags if job["uid"] else flags | os.CLONE_NEWUSER)
        if not job["uid"]:
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"1000 {uid} 1")
            write("/proc/self/gid_map", f"1000 {gid} 1")
        pid = os.fork()
        if pid == 0:
            init(job)
        tell(job, {"child-pid": pid})
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tell(job, {"exit-code": code if code >= 0 else 128 - code})
    except OSError as error:
        tell(job, {"error": str(error)})


def init(job: dict[str, Any]) -> None:
    """Does not return; its exit code is the program's."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)  # the program cannot look into this process
        file_system(job["read"], job["links"], job["home"], job["space"])
        for fd, name, mode in job["files"]:
            copy(fd, name, mode)
        pid = os.fork()
        if pid == 0:
            become(job)
        found = status = 0
        while found != pid:  # orphans of the program are init's
            found, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    except BaseException as error:  # told at a process boundary
        tell(job, {"error": str(error) or repr(error)})
    finally:
        os._exit(1)


def file_system(read: list[str], links: list[list[str]], home: str, space: int) -> None:
    """A small one in memory, with what may be read bound into it; the host's goes away."""
    mount(None, "/", None, MS_REC | MS_SLAVE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir(f"/tmp{HOST}")
    check(_libc.syscall(PIVOT_ROOT, b"/tmp", f"/tmp{HOST}".encode()), "pivot_root")
    os.chdir("/")
    os.mkdir("/tmp")
    options = f"size={space},nr_inodes=4096,mode=1777"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.mkdir(home)
    os.chmod(home, 0o1777)
    for path in read:
        bind(HOST + path, path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for name in ("null", "zero", "full", "random", "urandom"):
        bind(f"{HOST}/dev/{name}", f"/dev/{name}", ATTR_NOSUID)
    for path, target in [*links, ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0")]:
        os.symlink(target, path)
    os.mkdir("/proc")
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        set_attributes("/proc", ATTR_RDONLY, 0)  # no oom_score_adj of its own
    except OSError:  # a container that hides parts of its own: programs do without
        pass
    check(_libc.umount2(HOST.encode(), MNT_DETACH), "umount")
    os.rmdir(HOST)
    set_attributes("/", ATTR_RDONLY, 0)


def become(job: dict[str, Any]) -> None:
    """Turn into the program; does not return."""
    try:
        prctl(PR_SET_PDEATHSIG, 0)
        os.setsid()
        if job["uid"]:
            os.setgroups([])
            os.setgid(job["uid"])
            os.setuid(job["uid"])
        for name in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and so would it
            signal.signal(name, signal.SIG_DFL)
        os.chdir(job["home"])
        rules = os.pread(job["filter"], 1 << 20, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        buffer = ctypes.create_string_buffer(rules, len(rules))
        fprog = struct.pack("=H6xQ", len(rules) // 8, ctypes.addressof(buffer))
        prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(fprog))
        os.closerange(3, 1 << 16)
        os.execve(job["command"][0], job["command"], job["environment"])
    except BaseException as error:  # told at a process boundary
        os.write(2, f"{job['command'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


def check(code: int, what: str) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int, third: object = 0) -> None:
    check(_libc.prctl(option, value, third, 0, 0), f"prctl {option}")


def mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    words = [word and word.encode() for word in (source, target, kind, options)]
    check(_libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def bind(source: str, target: str, attributes: int) -> None:
    """With everything mounted below it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, None, MS_BIND | MS_REC)
    set_attributes(target, attributes, AT_RECURSIVE)


def set_attributes(target: str, attributes: int, flags: int) -> None:
    """Linux has it since 5.12."""
    wanted = struct.pack("=4Q", attributes, 0, 0, 0)
    path = target.encode()
    code = _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, flags, wanted, ctypes.c_size_t(32))
    check(code, f"mount_setattr {target}")


def copy(fd: int, path: str, mode: int) -> None:
    with open(path, "wb") as file:
        done = 0
        while block := os.pread(fd, 1 << 20, done):
            file.write(block)
            done += len(block)
    os.chmod(path, mode)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def tell(job: dict[str, Any], what: dict[str, Any]) -> None:
    os.write(job["status"], json.dumps(what).encode() + b"\n")


main()
