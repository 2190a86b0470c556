"""What a link between two GPUs or two nodes should give, and where that is read.

All figures in GB/s (10^9 bytes), one direction. Sources: NVIDIA's data sheets of the A100, H100,
H200 and B200 (NVLink totals of both directions: 600, 900, 900, 1800, by 12 or 18 links); the
InfiniBand Trade Association's roadmap (HDR 200, NDR 400, XDR 800 Gbit/s for four lanes; the kernel
reports the rate itself); PCI-SIG (gen 4 and 5: 16 and 32 GT/s a lane, 128b/130b). What is measured
is the bus bandwidth of NVIDIA's nccl-tests (doc/PERFORMANCE.md).
"""

import re
from dataclasses import dataclass
from pathlib import Path

# GB/s of one NVLink, by a word of the GPU's name.
NVLINK = {"A100": 25.0, "A800": 25.0, "H100": 25.0, "H800": 25.0, "H200": 25.0, "H20": 25.0}
NVLINK |= {"GH200": 25.0, "B200": 50.0, "B300": 50.0, "GB200": 50.0}
# GT/s of a PCIe lane -> GB/s of a lane.
PCIE = {"8.0": 0.985, "16.0": 1.969, "32.0": 3.938, "64.0": 7.563}

# Shares of a link's figure. nccl-tests' published runs reach 0.75 and more with large messages; a
# link that is degraded, or bypassed for a slower one, gives half or much less.
WARN_BELOW = 0.6
FAIL_BELOW = 0.3


@dataclass(frozen=True)
class Link:
    """A way between two ranks; `gb_s` is what one rank can send, None when it is not known."""

    name: str
    gb_s: float | None


def nvlink_of(topology: str, gpu: str) -> Link | None:
    """The link between the first two GPUs in `nvidia-smi topo -m`, None when that shows no two."""
    row = next(
        (line for line in topology.splitlines() if re.match(r"\W*(\[4m)?GPU0\s+X\s", line)), ""
    )
    cells = row.split()
    if len(cells) < 3:
        return None
    kind = cells[2]
    if match := re.fullmatch(r"NV(\d+)", kind):
        each = next((gb_s for word, gb_s in NVLINK.items() if word in gpu), None)
        lanes = int(match[1])
        return Link(f"{lanes} NVLinks", None if each is None else each * lanes)
    return Link(f"PCIe ({kind})", None)


def pcie_of(folder: Path) -> Link | None:
    """The slot of a device by its folder in /sys/bus/pci/devices. Its best figures: an idle GPU
    runs its slot slower than it can.
    """
    try:
        speed = (folder / "max_link_speed").read_text().split()[0]
        lanes = int((folder / "max_link_width").read_text())
    except (OSError, IndexError, ValueError):
        return None
    if speed not in PCIE:
        return None
    return Link(f"PCIe {speed} GT/s x{lanes}", PCIE[speed] * lanes)


def nics_of_node(sys: Path = Path("/sys/class")) -> Link | None:
    """All of a node's active InfiniBand (or RoCE) ports together, else its fastest Ethernet."""
    rates: list[float] = []
    for port in sorted(sys.glob("infiniband/*/ports/*")):
        state, rate = _first_word(port / "state", 1), _first_word(port / "rate", 0)
        if state == "ACTIVE" and rate is not None:
            rates.append(float(rate))
    if rates:
        return Link(f"{len(rates)} InfiniBand ports of {max(rates):.0f} Gbit/s", sum(rates) / 8)
    speeds = [
        float(speed)
        for device in sys.glob("net/*/speed")
        if (device.parent / "device").exists()
        and (speed := _first_word(device, 0)) is not None
        and float(speed) > 0
    ]
    return (
        Link(f"Ethernet of {max(speeds) / 1000:g} Gbit/s", max(speeds) / 8000) if speeds else None
    )


def _first_word(path: Path, number: int) -> str | None:
    """A word of a file such as "4: ACTIVE" or "400 Gb/sec (4X NDR)"."""
    try:
        words = path.read_text().split()
    except OSError:  # a port that is down refuses to be read
        return None
    return words[number] if len(words) > number else None


def between_nodes(node_gb_s: float, per_node: int, world_size: int) -> tuple[float, float]:
    """Bus bandwidth in GB/s (all-reduce, all-to-all) that a node's ports allow, where `world_size`
    ranks stand `per_node` to a node.

    An all-reduce runs over all ports of a node at once and crosses each once for its data. In an
    all-to-all each rank has its own share of the ports, and what goes to its own node needs none.
    """
    share = node_gb_s / per_node
    return node_gb_s, share * (world_size - 1) / (world_size - per_node)


def judge(measured: float, link: float) -> float:
    """The share of the link that was reached."""
    return measured / link
