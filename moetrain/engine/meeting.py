"""Where ranks meet. torch's store obeys anyone who reaches it, without a password: so it
listens where the ranks are, and nowhere else.
"""

import datetime
import ipaddress
import os
import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

LOOPBACK = "127.0.0.1"
WAITING = 2048  # ranks that may knock at once; the kernel has a lower limit of its own


def on_one_node(world: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether all ranks are processes of this machine, as far as their launcher says."""
    local = int(env.get("LOCAL_WORLD_SIZE", "1"))
    return world == local or env.get("MASTER_ADDR") in (LOOPBACK, "localhost")


def join(
    backend: str,
    rank: int,
    world: int,
    timeout: datetime.timedelta,
    device: torch.device | None = None,
    *,
    far: bool = False,
) -> None:
    """Join the process group as `rank` of `world`.

    On one node everything listens on the loopback interface; on several the store listens at
    MASTER_ADDR alone where that is an address of this node's, and gloo and NCCL at the interface
    that they find or are told (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME). torchrun brings a store of
    its own, which listens everywhere.

    Args:
        far: NCCL is to reach another machine also where all ranks are on this one.
    """
    if on_one_node(world):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if not far:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # no prefix
    dist.init_process_group(
        backend,
        store=_store(rank, world, timeout),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device,
    )


def _store(rank: int, world: int, timeout: datetime.timedelta) -> Store | None:
    """None: torch makes the one that the environment names."""
    if world == 1:
        return HashStore()  # of this process
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host = LOOPBACK if on_one_node(world) else os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    listener = _listener(host, port) if rank == 0 else None
    return TCPStore(
        host,
        port,
        world,
        rank == 0,
        timeout,
        multi_tenant=True,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _listener(host: str, port: int) -> socket.socket | None:
    """A socket at the address of `host` alone; None where others know this node by another one than
    it knows itself (its own name is a loopback address, or an address of a router): the store then
    listens at all.
    """
    for family, kind, proto, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if host != LOOPBACK and ipaddress.ip_address(place[0]).is_loopback:
            continue
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(WAITING)
            return listener
        except OSError:
            listener.close()
            if host == LOOPBACK:
                raise
    return None
