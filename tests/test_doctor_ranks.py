"""`moetrain doctor` as one of several ranks: real gloo processes, on nodes by name."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetrain.cluster import doctor
from moetrain.cluster.doctor import machine, traffic, versions
from moetrain.cluster.doctor.base import Finding, Level, Ranks, Subject
from moetrain.ports import free_port
from moetrain.testing import command
from moetrain.testing.gloo import Workers

ROOT = Path(__file__).parent.parent
TINY = "examples/sft_tiny.yaml"
pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def _start(
    node: str, rank: int, port: int, *words: str, before: str = "", fresh: bool = False
) -> Any:
    """Rank `rank` of 2 as srun starts it on a node; `before` runs in a shell in its place first."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURMD_NODENAME": node}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not before:
        return command.start("doctor", *words, env=env, cwd=ROOT, fresh=fresh)
    inside = [*command.MOETRAIN, "doctor", *words]
    inside = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *inside]
    pipe = subprocess.PIPE
    return subprocess.Popen(inside, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def _lines(text: str) -> dict[str, str]:
    assert "the check itself broke" not in text
    return {line[6:21].strip(): line for line in text.splitlines() if line[5:6] == " "}


def test_two_nodes(tmp_path: Path) -> None:
    """One line a check from the first rank alone, under a minute, and nothing left behind."""
    port, started = free_port(), time.monotonic()
    words = [TINY, f"run_dir={tmp_path}/run"]
    ranks = [_start(f"n{rank}", rank, port, *words) for rank in (0, 1)]
    (out, err), (quiet, _) = [rank.communicate(timeout=120) for rank in ranks]
    assert time.monotonic() - started < 60
    assert [rank.returncode for rank in ranks] == [0, 0], out + err
    assert quiet == ""
    lines = _lines(out)
    assert list(lines) == [check.name for check in doctor.CHECKS]
    assert "all-reduce" in lines["link of nodes"]
    assert "2 ranks on 2 nodes (not judged" in lines["link of nodes"]
    assert lines["link in a node"].startswith("skip")
    assert lines["clocks"].startswith("ok")
    assert "seen by 2 nodes" in lines["shared folder"]
    assert "2 ranks on 2 nodes met" in lines["ports"]
    assert not list(tmp_path.iterdir())


def test_local_ranks_and_the_worst_of_them() -> None:
    """`--nproc 2` on one node; the recipe does not divide, so that the exit code is 2."""
    words = ["doctor", TINY, "--nproc", "2", "parallel.ep=3"]
    done = command.run(*words, cwd=ROOT, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = _lines(done.stdout)
    assert "2 ranks do not divide" in lines["layout"]
    assert lines["layout"].startswith("FAIL")
    assert "all-to-all" in lines["link in a node"]
    assert lines["link of nodes"].startswith("skip")


def test_a_folder_and_versions_of_one_node_alone(tmp_path: Path) -> None:
    """Node n1 has a file system of its own where run_dir is, and another transformers."""
    folder, info = tmp_path / "own", tmp_path / "site" / "transformers-5.17.0.dist-info"
    folder.mkdir()
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    before = f"mount -t tmpfs none {folder}"
    if subprocess.run(["unshare", "-m", "sh", "-c", before], capture_output=True).returncode:
        pytest.skip("mounting takes root: a folder that is not shared stays unproven here")
    port = free_port()
    # The other one is: a rank that waits for it would give up.
    first = _start("n0", 0, port, TINY, f"run_dir={folder}/run", fresh=True)
    before += f"; export PYTHONPATH={tmp_path}/site:$PYTHONPATH"
    second = _start("n1", 1, port, TINY, f"run_dir={folder}/run", before=before)
    out, err = first.communicate(timeout=120)
    second.communicate(timeout=120)
    lines = _lines(out)
    assert first.returncode == 2, out + err
    assert lines["shared folder"].startswith("FAIL")
    assert f"{folder} of n0 is not seen on n1 -> put run_dir on" in lines["shared folder"]
    ours = versions.installed("transformers")
    assert f"transformers is {ours} on n0 and 5.17.0 on n1" in lines["versions"]
    assert not list(folder.iterdir())


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEETING_SECONDS", 3.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    ranks, reason = doctor.meet(0, 2)
    assert ranks is None
    assert reason.startswith("rank 0 of 2 did not meet the others at 127.0.0.1:")
    lonely = Subject(None, meeting=reason)
    assert machine.ports(lonely).level is Level.FAIL
    assert "NCCL_SOCKET_IFNAME" in machine.ports(lonely).remedy
    assert traffic.across_nodes(lonely).level is Level.SKIP


def _with_nodes(nodes: list[str], ask: Callable[[Ranks], Finding]) -> Finding:
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = nodes[rank]
    ranks, reason = doctor.meet(rank, len(nodes))
    assert ranks is not None, reason
    return ask(ranks)


def _clocks(nodes: list[str], ahead: list[float]) -> Finding:
    """What rank 0 is told where rank r's clock is `ahead[r]` seconds off."""

    def ask(ranks: Ranks) -> Finding:
        traffic._STARTED += ahead[ranks.rank]  # it has always been so: it does not jump
        return traffic.clocks(Subject(None, ranks), lambda: time.time() + ahead[ranks.rank])

    return _with_nodes(nodes, ask)


@pytest.mark.parametrize(
    ("ahead", "level", "said"),
    [
        ([0.0, 0.0], Level.OK, "from the first rank's"),
        ([0.0, 7.5], Level.WARN, "n1's clock is 7.5 s ahead of that of n0"),
        ([90.0, 0.0], Level.FAIL, "n1's clock is 90.0 s behind that of n0"),
    ],
)
def test_clocks_that_differ(ahead: list[float], level: Level, said: str, workers: Workers) -> None:
    found, _ = workers.run(2, _clocks, ["n0", "n1"], ahead)
    assert found.level is level, found
    assert said in found.text


def test_a_clock_that_jumps() -> None:
    found = traffic.clocks(Subject(None), lambda: time.time() + 30)
    assert found.level is Level.WARN
    assert "moved by 30.0 s" in found.text


def _bandwidths(nodes: list[str]) -> tuple[Finding, Finding]:
    found: list[Finding] = []

    def ask(ranks: Ranks) -> Finding:
        subject = Subject(None, ranks)
        found.extend([traffic.in_node(subject), traffic.across_nodes(subject)])
        return found[0]

    _with_nodes(nodes, ask)
    return found[0], found[1]


def test_four_ranks_on_two_nodes(workers: Workers) -> None:
    for inside, between in workers.run(4, _bandwidths, ["n0", "n0", "n1", "n1"]):
        assert inside.level is between.level is Level.OK
        assert "the slowest" in inside.text
        assert "4 ranks on 2 nodes" in between.text


def test_the_worst_line_says_whose_it_is() -> None:
    good, bad = Finding(Level.OK, "good"), Finding(Level.FAIL, "bad", "mend it")
    found = doctor.merged([{"a": good, "b": good}, {"a": bad}], ["n0", "n1"])
    assert found == {"a": Finding(Level.FAIL, "n1: bad", "mend it"), "b": good}
