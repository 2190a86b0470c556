"""Run in a sandbox before it is used: prints "shut", or the first door that is open. The standard
library alone.
"""

import os
import socket
import sys


def opens(what, action):
    """Ends the program where `action` works."""
    try:
        action()
    except (OSError, ValueError, AttributeError):  # of older interpreters
        return
    print(f"it lets programs {what}", end="")
    sys.exit(1)


pid, ours = sys.argv[1:]
for family in range(1, 46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        opens(f"open sockets (family {family})", lambda f=family, k=kind: socket.socket(f, k))
opens("see processes of others", lambda: os.kill(int(pid), 0))
for place in (ours, "/etc/passwd", "/proc/kmsg", "/dev/kmsg"):
    opens(f"read {place}", lambda p=place: open(p))
for place in ("/", "/usr", "/dev", "/dev/shm", "/proc/sys/kernel"):
    opens(f"write to {place}", lambda p=place: open(f"{p}/door", "w"))
opens("choose when they are killed", lambda: open("/proc/self/oom_score_adj", "w"))
opens("become root", lambda: os.setuid(0))
opens("make namespaces", lambda: os.unshare(os.CLONE_NEWUSER))
opens("keep memory out of sight", lambda: os.memfd_create("door"))
if os.getuid() == 0:
    print("it runs programs as root", end="")
    sys.exit(1)
shown = os.listdir("/proc") if os.path.isdir("/proc") else []
if [name for name in shown if name.isdigit() and int(name) > 100]:
    print("it shows the host's processes", end="")
    sys.exit(1)
print("shut", end="")
