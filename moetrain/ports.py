"""TCP ports to listen at later, which nobody gets from the kernel meanwhile."""

import random
import socket

# Below the ports that Linux gives to who asks for any (ip_local_port_range, from 32768): one of
# those may go to any connection of the machine before a rank, which imports for seconds, listens.
FIRST, NUM = 20000, 12000
TRIES = 100
_draw = random.SystemRandom()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of this host that is free now. Raises OSError where there is none."""
    for _ in range(TRIES):
        port = FIRST + _draw.randrange(NUM)
        if _is_free(host, port):
            return port
    raise OSError(f"none of {TRIES} ports from {FIRST} on is free at {host}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True
