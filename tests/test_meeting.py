"""Where the ranks of a run listen: at the loopback interface on one node, at the job's address on
several.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.cluster.launch import run_local
from moetrain.ports import free_port
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

pytestmark = pytest.mark.gloo
# A rank: its own listening sockets, once all have met and made a group more.
RANK = """
import datetime, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from moetrain.engine import meeting

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
meeting.join("gloo", rank, world, datetime.timedelta(seconds=60))
one = torch.ones(1)
dist.all_reduce(one, group=dist.new_group(list(range(world))))
assert one.item() == world
own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
found = []
for name in ("tcp", "tcp6"):
    for line in Path("/proc/self/net", name).read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            found.append([name, *words[1].split(":")])
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""
LOOPBACK = "0100007F"  # as the kernel writes 127.0.0.1


def listens(folder: Path) -> set[tuple[str, str]]:
    files = sorted(folder.glob("*.json"))
    return {(name, address) for file in files for name, address, _ in json.loads(file.read_text())}


def outside() -> str:
    """The address of this machine that others would reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation's; nothing is sent
        except OSError:
            pytest.skip("no network but the loopback: where several nodes listen stays unproven")
        return probe.getsockname()[0]


@pytest.mark.parametrize("num", [1, 2])
def test_one_node_is_reached_by_nobody(num: int, tmp_path: Path) -> None:
    """Also where the host's own name is an address of its network, which gloo would take."""
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    if os.geteuid() == 0:
        hosts = tmp_path / "hosts"
        hosts.write_text(f"{outside()} {socket.gethostname()}\n127.0.0.1 localhost\n")
        mount = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, "sh", *command]
    assert run_local(command, num) == 0
    assert listens(tmp_path) == {("tcp", LOOPBACK)}


@pytest.mark.parametrize("known", [True, False])
def test_several_nodes_meet_at_the_jobs_address(known: bool, tmp_path: Path) -> None:
    """The store listens at MASTER_ADDR alone; everywhere only where the first node takes its own
    name for a loopback address, which the others do not reach.
    """
    address = outside() if known else "127.0.0.2"
    port = free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "GLOO_"))}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address}
    env |= {"MASTER_PORT": str(port)}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    found = json.loads((tmp_path / "0.json").read_text())
    (store,) = ((name, at) for name, at, own in found if own == f"{port:04X}")
    own = "".join(f"{int(part):02X}" for part in reversed(address.split(".")))
    assert store == (("tcp", own) if known else ("tcp6", "0" * 32))


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2})])
def test_ranks_share_one_group(workers: Workers, world: int, parallel: dict[str, int]) -> None:
    """Not one for each of Megatron's axes; the world's own group stays apart from all."""
    for num_groups, num_sets in workers.run(world, ranks.num_groups, parallel):
        assert num_groups == num_sets + 1


def minutes_of_a_group(given: str) -> float:
    """How long a tensor-parallel collective may take, where the environment has `given`."""
    from moetrain.config.recipe import ParallelConfig
    from moetrain.engine.world import open_world

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOETRAIN_TIMEOUT_MINUTES", given)
        group: Any = open_world(ParallelConfig(), 0).tp_group
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60


@pytest.mark.parametrize(("given", "wanted"), [("45.5", 46), ("2", 30)])
def test_every_group_waits_as_long_as_it_is_told(workers: Workers, given: str, wanted: int) -> None:
    """Longer than Megatron's own half an hour, where the launcher's watchdog does."""
    assert workers.run(1, minutes_of_a_group, given) == [wanted]
