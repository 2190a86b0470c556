"""This node: its GPUs, its memory, its ports."""

import csv
import ipaddress
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moetrain.cluster.doctor.base import (
    GIB,
    Finding,
    Subject,
    fail,
    node_name,
    skip,
    warn,
    worst,
)
from moetrain.config.data import DataConfig
from moetrain.data.pieces import total_bytes
from moetrain.data.sources import find_sources
from moetrain.data.workers import worth
from moetrain.errors import DataError, plural
from moetrain.layout.activations import activation_bytes
from moetrain.layout.memory import static_bytes
from moetrain.layout.mesh import plan_mesh
from moetrain.planner.gpu import gpu_gib

# Of one rank on the host, in GiB: what Python, torch and Megatron take (1 on a CPU), and CUDA's
# context with NCCL's buffers beside them.
RANK_GIB = {"cpu": 1.0, "cuda": 4.0}
WORKER_GIB = 0.5  # of a process of data.num_workers
SHM_GIB = 1.0  # of /dev/shm that NCCL and vLLM want of a node
OPEN_FILES = 1024  # and 4 a rank of the job: gloo and NCCL keep sockets between all of them
# Slurm sets these where it gave GPUs to the job.
GIVEN = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
QUERY = "name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi; memory in GiB."""

    name: str
    total: float
    used: float
    errors: int  # uncorrected, since the driver was loaded


def read_gpus(text: str) -> list[Gpu]:
    """What `nvidia-smi --query-gpu=QUERY --format=csv,noheader,nounits` printed."""
    gpus_here: list[Gpu] = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[1].replace(".", "").isdigit():
            errors = int(row[3]) if row[3].isdigit() else 0  # "[N/A]" without ECC
            gpus_here.append(Gpu(row[0], float(row[1]) / 1024, float(row[2]) / 1024, errors))
    return gpus_here


def _nvidia_smi() -> str | None:
    """Its table; None where there is no driver; "" where it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpus(subject: Subject) -> Finding:
    """Whether the GPUs of this node are there, free, sound, and large enough for the recipe."""
    planned = _planned_bytes(subject)
    table = _nvidia_smi()
    if table is None and not given_gpus(os.environ):
        if subject.plan is None:
            return skip("none here: gloo on the CPU")
        need, _, name = planned
        message = f"none here; the recipe takes {need:.2f} GiB of each {name} before activations"
        return skip(message) if need <= gpu_gib(name) else fail(message, SMALLER)
    present = read_gpus(table or "")
    if not present:
        return fail(
            "the job was given GPUs, and nvidia-smi does not show them",
            "start the image with --nv; on the node itself the driver is not loaded: report it",
        )
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return fail(
            f"{len(present)} GPUs here, of which torch (CUDA {torch.version.cuda}) sees none",
            "start the image with --nv; else the driver is older than this CUDA needs: update it"
            " or take an image of an older one",
        )
    return worst(
        [*compare(present, count, subject), *too_small(planned, present)],
        f"{count} x {present[0].name}, {min(gpu.total for gpu in present):.1f} GiB",
    )


SMALLER = "use more ranks, more parallel.ep or pp, optim.offload, or an adapter"


def given_gpus(environ: Mapping[str, str]) -> bool:
    """Whether Slurm, or this machine's devices, say that there should be GPUs."""
    return any(environ.get(name) not in (None, "", "0") for name in GIVEN) or any(
        Path("/dev").glob("nvidia[0-9]*")
    )


def compare(found: list[Gpu], visible: int, subject: Subject) -> list[Finding]:
    """What nvidia-smi's table and the ranks of this node do not agree on."""
    findings: list[Finding] = []
    ranks = subject.ranks
    if ranks is not None and len(ranks.node_ranks) > visible:
        findings.append(
            fail(
                f"{len(ranks.node_ranks)} ranks on a node with {visible} GPUs",
                "start as many ranks a node as it has GPUs (--gpus-per-node, --ntasks-per-node)",
            )
        )
    busy = [gpu for gpu in found if gpu.used > 2 + 0.1 * gpu.total]
    if busy:
        findings.append(
            warn(
                f"{len(busy)} of {len(found)} GPUs hold {max(gpu.used for gpu in busy):.1f} GiB"
                " already",
                "another process runs there: nvidia-smi names it",
            )
        )
    broken = sum(gpu.errors > 0 for gpu in found)
    if broken:
        findings.append(
            fail(
                f"{broken} GPUs have uncorrected memory errors",
                "have the node drained, and leave it out with sbatch --exclude",
            )
        )
    if subject.plan is not None:
        name = subject.recipe.cluster.gpu_name
        smallest = min(gpu.total for gpu in found)
        if smallest < 0.97 * gpu_gib(name):
            findings.append(
                warn(
                    f"a GPU of {smallest:.1f} GiB where cluster.gpu={name} has {gpu_gib(name)}",
                    "set cluster.gpu to what is here, and look at the dry run again",
                )
            )
    return findings


def _planned_bytes(subject: Subject) -> tuple[float, float, str]:
    """GiB of the fullest stage before activations and with them, at most, and the GPU that the
    recipe names.
    """
    if subject.plan is None:
        return 0.0, 0.0, ""
    plan = subject.plan
    mesh = plan_mesh(plan.recipe.parallel, plan.num_ranks)
    static = [s.total for s in static_bytes(plan.model, mesh, plan.recipe, plan.learns)]
    more = activation_bytes(plan.model, mesh, plan.recipe)
    most = max(map(sum, zip(static, more, strict=True)))
    return max(static) / GIB, most / GIB, plan.recipe.cluster.gpu_name


def too_small(planned: tuple[float, float, str], found: list[Gpu]) -> list[Finding]:
    """Whether the fullest stage fits, before activations and with them."""
    smallest = min(gpu.total for gpu in found)
    if planned[1] <= smallest:
        return []
    if planned[0] <= smallest:
        return [
            warn(
                f"the recipe may take {planned[1]:.1f} GiB with activations and a GPU here has"
                f" {smallest:.1f}",
                "if it does not fit, set train.recompute=full, a smaller data.seq_len, or"
                " parallel.cp",
            )
        ]
    return [
        fail(
            f"the recipe takes {planned[0]:.1f} GiB before activations and a GPU here has"
            f" {smallest:.1f}",
            SMALLER,
        )
    ]


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """GiB that this process may still take: the machine's, or what its cgroup allows."""
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    limits = [machine / 2**20]
    cgroup = next(
        (p for p in (proc / "self/cgroup").read_text().splitlines() if p[:3] == "0::"), ""
    )
    folder = cgroups / cgroup[3:].lstrip("/")
    for level in [folder, *folder.parents]:
        if not level.is_relative_to(cgroups):
            break
        try:
            limit = (level / "memory.max").read_text().strip()
            used = int((level / "memory.current").read_text())
        except OSError:
            continue
        if limit != "max":
            limits.append((int(limit) - used) / GIB)
    return min(limits)


def memory(subject: Subject) -> Finding:
    """Host memory for the ranks of this node, their loaders and what they keep there."""
    available = available_memory()
    shm = shutil.disk_usage("/dev/shm")
    findings: list[Finding] = []
    if shm.free < SHM_GIB * GIB:
        findings.append(
            warn(
                f"/dev/shm has {shm.free / GIB:.2f} GiB free",
                "start the image with a larger one; NCCL and vLLM pass data through it",
            )
        )
    if subject.plan is None:
        return worst(findings, f"{available:.1f} GiB available")
    need = needed_memory(subject)
    message = f"{available:.1f} GiB available, {need:.1f} GiB wanted by a node's ranks and loaders"
    remedy = (
        "ask for the node's memory (sbatch --mem=0), set data.num_workers or optim.offload lower,"
        " or start fewer ranks a node"
    )
    if need > available:
        findings.append(fail(message, remedy))
    elif need > 0.8 * available:
        findings.append(warn(message, remedy))
    return worst(findings, message)


def needed_memory(subject: Subject) -> float:
    """GiB of the ranks of one node: themselves, their tokenizing processes, and the host's copies
    of a checkpoint that is being written, of an offloaded optimizer and of an RL reference.
    """
    assert subject.plan is not None
    plan, recipe = subject.plan, subject.recipe
    ranks = len(subject.ranks.node_ranks) if subject.ranks else plan.ranks_of_a_node
    mesh = plan_mesh(recipe.parallel, plan.num_ranks)
    stages = static_bytes(plan.model, mesh, recipe, plan.learns)
    whole = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"offload": 0.0})})
    worst_stage = max(static_bytes(plan.model, mesh, whole, plan.learns), key=lambda s: s.total)
    offloaded = worst_stage.optimizer - max(stage.optimizer for stage in stages)
    saved = worst_stage.optimizer * recipe.checkpoint.save_optimizer
    saved += worst_stage.weights if recipe.adapter is None else 0
    keeps_reference = recipe.method.samples and vars(recipe.method).get("beta", 0.0) > 0
    reference = worst_stage.weights if keeps_reference else 0
    device = "cuda" if given_gpus(os.environ) else "cpu"
    each = RANK_GIB[device] + (offloaded + saved + reference) / GIB
    return ranks * each + tokenizing(recipe.data) * WORKER_GIB


def tokenizing(data: DataConfig) -> int:
    """Processes that tokenize the records of a run."""
    if data.num_workers is not None:
        return data.num_workers
    try:
        return worth(total_bytes(find_sources(data.train)))
    except (DataError, OSError):  # which is not about memory
        return 0


def ports(subject: Subject) -> Finding:
    """Whether the ranks met, and what could keep them from it."""
    findings: list[Finding] = []
    ranks = subject.ranks
    num_ranks = ranks.world_size if ranks else subject.plan.num_ranks if subject.plan else 1
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES + 4 * num_ranks
    if limit < wanted:
        findings.append(
            warn(f"{limit} open files allowed, {wanted} wanted", f"say ulimit -n {2 * wanted}")
        )
    if subject.meeting:
        return fail(subject.meeting, MEETING)
    if ranks is not None:
        nodes = len(ranks.leaders)
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return worst(
            findings, f"{plural(ranks.world_size, 'rank')} on {plural(nodes, 'node')} met at {at}"
        )
    findings += _own_address(subject)
    port = int(os.environ.get("MASTER_PORT", 0))
    try:
        with socket.socket() as listener:
            listener.bind(("", port))
            listener.listen(1)
            port = listener.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError as error:
        findings.append(
            fail(
                f"port {port} cannot be listened at: {error.strerror}",
                "unset MASTER_PORT, or choose a free one below 32768",
            )
        )
    return worst(findings, f"port {port} can be listened at; {limit} open files allowed")


MEETING = (
    "see that each node resolves MASTER_ADDR and reaches that port (no firewall between compute"
    " nodes), and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the nodes' own network"
)


def _own_address(subject: Subject) -> list[Finding]:
    """A host whose own name is a loopback address cannot be met by others."""
    many = subject.plan is not None and subject.plan.num_nodes > 1
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return [warn(f"{node_name()} does not resolve its own name", MEETING)] if many else []
    if many and ipaddress.ip_address(address).is_loopback:
        return [warn(f"{node_name()} takes itself for {address}", MEETING)]
    return []
