"""Programs that attack the sandbox, and what came of each: `python -m tests.sandbox_attacks KIND`
prints JSON. A process of its own, since it has to run as root and as another user.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from moetrain.rewards.sandbox import MB, Limits, Sandbox

SECRET = "the expected output 73914"
MARK = f"left-behind-by-an-attack-of-{sys.argv[-1]}"
LIMITS = Limits(20.0, memory=256 * MB, file=4 * MB, processes=4)
ENDLESS = {"fork bomb", "endless loop", "sleep", "deaf sleep", "stopping itself",
           "huge numbers of files", "deep folders"}  # fmt: skip

# {port}, {folder}, {name} and {pid} are the host's.
ATTACKS = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "udp": "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))",
    "unix": "import socket; socket.socket(socket.AF_UNIX).connect('{folder}/door')",
    "abstract": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')",
    "vsock": "import socket; socket.socket(socket.AF_VSOCK).connect((2, 22))",
    "io_uring": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print('opened' if libc.syscall(425, 8, bytes(120)) >= 0 else ctypes.get_errno())
""",
    "environment": """
import os
print(dict(os.environ))
for pid in os.listdir('/proc'):
    for name in ('environ', 'cmdline', 'maps'):
        try: print(open(f'/proc/{{pid}}/{{name}}').read())
        except OSError: pass
""",
    "files of the host": "print(open('{folder}/secret').read())",
    "symbolic link": """
import os
for way in ('{folder}/secret', '/proc/1/root{folder}/secret', '/proc/self/root{folder}/secret',
            '/proc/1/cwd{folder}/secret', '../../../..{folder}/secret', '/.host{folder}/secret'):
    os.symlink(way, 'link')
    try: print(open('link').read())
    except OSError as error: print(error)
    os.unlink('link')
""",
    "all files that it can find": """
import os
for root, folders, names in os.walk('/'):
    folders[:] = [f for f in folders if f not in ('usr', 'lib', 'proc', 'dev', '.pyenv')]
    for name in names:
        try: print(open(os.path.join(root, name), 'rb').read(1000))
        except OSError: pass
""",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "write outside": """
import os
for place in ('{folder}', '/usr', '/etc', '/dev', '/dev/shm', '/', '/proc/1', '/bin', '/lib'):
    try: open(f'{{place}}/written', 'w').write('x'); print('wrote', place)
    except OSError: pass
""",
    "10 GB": """
import signal
with open('big', 'wb') as file:
    for _ in range(10_000): file.write(bytes(1 << 20))
""",
    "many files of 1 MB": """
total = 0
try:
    for number in range(10_000):
        with open(str(number), 'wb', buffering=0) as file: total += file.write(bytes(1 << 20))
except OSError: pass
print(total >> 20)
""",
    "huge numbers of files": """
number = 0
try:
    while True:
        open(str(number), 'w').close(); number += 1
except OSError: print('full', number)
""",
    "memory": "held = [bytearray(50 << 20) for _ in range(200)]; print('held')",
    "shared memory": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
segments = [libc.shmget(0, 16 << 20, 0o1600) for _ in range(100)]
print('held' if max(segments) >= 0 else 'refused')
""",
    "memory files": "import os; [os.memfd_create('x') for _ in range(50)]; print('held')",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "counting forks": """
import os, time
number = 0
try:
    for _ in range(1000):
        if os.fork() == 0: time.sleep(100)
        number += 1
except OSError: pass
print(number)
""",
    "threads": """
import threading, time
number = 0
try:
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start(); number += 1
except RuntimeError: pass
print(number)
""",
    "endless output": "while True: print('x' * 1000)",
    "endless errors": "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "deaf sleep": """
import signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: time.sleep(1)
""",
    "stopping itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "killing others": """
import os, signal
for pid in ({pid}, os.getppid(), 1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
print('on')
os.kill(-1, signal.SIGKILL)
""",
    "daemon": f"""
import os, subprocess, sys
if os.fork() == 0:
    os.setsid()
    for _ in range(2):
        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {MARK!r}],
                         start_new_session=True)
    os._exit(0)
os.wait()
print('gone', flush=True)
""",
    "ptrace": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), libc.ptrace(16, {pid}, 0, 0))
""",
    "becoming init": """
import os
try:
    memory = os.open('/proc/1/mem', os.O_RDWR)
    for line in open('/proc/1/maps'):
        if ' rw' in line:
            low, high = (int(x, 16) for x in line.split()[0].split('-'))
            try: os.pwrite(memory, bytes(high - low), low)
            except OSError: pass
except OSError: pass
print('on')
""",
    "namespaces": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print([libc.unshare(1 << bit) for bit in (17, 26, 27, 28, 29, 30)])
print(libc.syscall(56, (1 << 28) | 17, 0, 0, 0, 0), libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))
print(os.getuid() > 0, open('/proc/self/status').read().split('CapEff:')[1].split()[0])
""",
    "becoming root": """
import os
for call in (os.setuid, os.setgid, os.seteuid):
    try: call(0); print('root')
    except OSError: print('refused')
""",
    "choosing who is killed when memory ends": """
for pid in ('self', '1'):
    for name in ('oom_score_adj', 'oom_adj', 'task/1/oom_score_adj'):
        try: open(f'/proc/{{pid}}/{{name}}', 'w').write('0'); print(pid, name)
        except OSError: pass
""",
    "deep folders": """
import os
try:
    for _ in range(1_000_000): os.mkdir('d'); os.chdir('d')
except OSError: print('full')
""",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "own kill": "import os; os.kill(os.getpid(), 9)",
    "sum": "print(sum(map(int, open(0))))",
    "standard input by name": "print(open('/dev/stdin').read())",
}


def marked(first: str = "", last: str = "") -> int:
    """Processes of this machine with the mark in their command, and with these arguments."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                _, *words = (entry / "cmdline").read_text().split("\0")
            except (OSError, ValueError):
                continue
            found += (
                any(MARK in word for word in words)
                and first in ("", words[0])
                and last in ("", words[-2])
            )
    return found


def main(kind: str) -> None:
    sandbox = Sandbox(kind)
    victim = subprocess.Popen(["sleep", "600"])
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "secret").write_text(SECRET)
        name = f"moetrain-{os.getpid()}"
        doors = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        doors.append(socket.socket(socket.AF_UNIX))
        doors[1].bind(f"{folder}/door")
        doors[2].bind(f"\0{name}")
        for door in doors[1:]:
            os.chmod(f"{folder}/door", 0o777)
            door.listen()
        host = {"port": doors[0].getsockname()[1], "folder": folder, "name": name}
        found = {}
        for attack, source in ATTACKS.items():
            text = source.format(**host, pid=victim.pid).encode()
            limits = replace(LIMITS, seconds=0.8) if attack in ENDLESS else LIMITS
            words = [sandbox.python, "main.py", MARK]
            started = time.monotonic()
            ran = sandbox.run(words, b"1\n2\n", {"main.py": (text, 0o644)}, limits)
            out = ran.out[:200_000].decode(errors="replace")
            found[attack] = {
                "end": ran.end,
                "code": ran.code,
                "out": out,
                "size": len(ran.out),
                "said": ran.said,
                "seconds": time.monotonic() - started,
            }
        for _ in range(20):  # the kernel ends what was left, in its own time
            if not marked():
                break
            time.sleep(0.1)
        heard = []
        for door in doors:
            door.setblocking(False)
            try:
                heard.append(str(door.accept()))
            except BlockingIOError:
                pass
        after = {
            "uid": sandbox.uid,
            "left": marked(),
            "heard": heard,
            "victim": victim.poll(),
            "written": sorted(p.name for p in Path(folder).iterdir()),
        }
    victim.kill()
    print(json.dumps({"attacks": found, "host": after}))


if __name__ == "__main__":
    main(sys.argv[1])
