"""A filter on system calls for programs under test, made by libseccomp.

Namespaces take most away; this takes what they leave: sockets that no network namespace holds
(AF_VSOCK reaches the host of a virtual machine), memory that no limit of a process counts (System V
segments, memfds), namespaces inside namespaces, and doors to the kernel that a program of a
competition never opens.
"""

import ctypes
import errno
import os

from moetrain.errors import ConfigError

REFUSED = (
    # AF_UNIX pairs (socketpair) are left: they lead nowhere.
    *("socket", "socketcall", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("memfd_create", "memfd_secret", "shmget", "shmat", "msgget", "semget", "mq_open", "ipc"),
    *("unshare", "setns", "mount", "umount2", "mount_setattr", "move_mount", "open_tree"),
    *("fsopen", "fsmount", "fsconfig", "fspick", "pivot_root", "chroot"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    *("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "syslog"),
    *("name_to_handle_at", "open_by_handle_at", "fanotify_init", "quotactl", "acct"),
)
NAMESPACES = (0x20000, *(1 << bit for bit in range(25, 31)))  # the CLONE_NEW* flags
_ALLOW, _ERRNO, _MASKED_EQUAL = 0x7FFF0000, 0x00050000, 7


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def program() -> bytes:
    """The filter as the kernel reads it, an array of struct sock_filter. Other architectures' calls
    end the program. ConfigError without libseccomp.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise ConfigError(
            "The sandbox for code needs libseccomp.so.2: install libseccomp2 (Debian, Ubuntu) or"
            " libseccomp (Red Hat), or set sandbox: piston."
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_ALLOW))

    def refuse(name: str, error: int, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        array = (_Comparison * len(comparisons))(*comparisons)
        action = ctypes.c_uint32(_ERRNO | error)
        if number != -1:  # else it is unknown to this version, or on this machine
            code = library.seccomp_rule_add_array(context, action, number, len(comparisons), array)
            assert code == 0, (name, code)

    for name in REFUSED:
        refuse(name, errno.EPERM)
    for flag in NAMESPACES:
        refuse("clone", errno.EPERM, _Comparison(0, _MASKED_EQUAL, flag, flag))
    # Its flags lie in memory, where a filter cannot look: the C library falls back to clone.
    refuse("clone3", errno.ENOSYS)
    file = os.memfd_create("filter")
    try:
        code = library.seccomp_export_bpf(context, file)
        assert code == 0, code
        return os.pread(file, 1 << 20, 0)
    finally:
        os.close(file)
        library.seccomp_release(context)
