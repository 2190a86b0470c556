"""What a GPU can do: peaks from its data sheet, and what share of them operations reach. Every
number has its source. Imports no torch.
"""

from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from moetrain.config.load import explain, read_content
from moetrain.config.section import Section
from moetrain.errors import ConfigError, nearest

FOLDER = Path(__file__).parent / "gpus"
MIB = 2**20
# Kinds of operations that go over memory, by what bounds them on a CPU; a GPU has one curve.
KINDS = ("stream", "in_place", "convert", "function", "reduce", "gather", "sort")


class Number(Section):
    """A number and where it is from."""

    value: float = Field(ge=0)
    source: str = Field(min_length=1)


class Curve(Section):
    """A number that depends on another: straight between points on logarithmic scales, flat
    outside of them.
    """

    points: tuple[tuple[float, float], ...] = Field(min_length=1)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if any(a[0] >= b[0] for a, b in pairwise(self.points)) or any(
            min(point) <= 0 for point in self.points
        ):
            raise ValueError("points are [x, y] above 0, and x rises from point to point")
        return self

    def at(self, x: float) -> float:
        """The number at `x`."""
        points = self.points
        place = bisect_right(points, x, key=lambda point: point[0])
        if place in (0, len(points)):
            return points[max(0, place - 1)][1]
        (a, low), (b, high) = points[place - 1 : place + 1]
        part = log(x / a) / log(b / a)
        return exp(log(low) + part * log(high / low))


class Gpu(Section):
    """A GPU, or a core of a CPU. Rates are one way and of one GPU."""

    name: str
    asynchronous: bool = Field(
        default=True, description="the host goes on while it computes, so launches hide behind it"
    )
    memory_gib: Number = Field(description="as the driver reports it")
    gpus_per_node: Number
    tflops: dict[str, Number] = Field(description="dense peak by dtype, bf16 and fp32 among them")
    memory_gbps: Number
    nvlink_gbps: Number = Field(description="between GPUs of a node")
    network_gbps: Number = Field(description="between nodes")
    nvlink_share: dict[str, Number] = Field(
        min_length=1,
        description="of nvlink_gbps that collectives reach, by their names; the first for others",
    )
    network_share: dict[str, Number] = Field(min_length=1)
    dispatch_exposed: Number = Field(
        description="share of DeepEP's and HybridEP's traffic that is waited for"
    )
    collective_us: Number = Field(description="that a collective within a node takes at least")
    network_us: Number = Field(description="that one between nodes takes at least")
    launch_us: Number = Field(description="that the host takes for an operation")
    kernel_us: Number = Field(description="that the device takes at least for an operation")
    expert_us: Number | None = Field(
        default=None, description="that a grouped product takes for each expert beside its FLOPs"
    )
    skew: Curve | None = Field(
        default=None,
        description="share of the work between two collectives that ranks then wait for the last"
        " of them, by that work's seconds",
    )
    gemm: dict[str, Curve] = Field(
        min_length=1, description="share of the peak by smallest dimension"
    )
    grouped: dict[str, Curve] = Field(
        min_length=1, description="share of the peak by rows an expert"
    )
    attention: dict[str, Curve] = Field(
        min_length=1, description="share of the peak by keys, forward"
    )
    attention_backward: dict[str, Curve] = Field(min_length=1)
    memory: dict[str, Curve] = Field(
        min_length=1,
        description=f"share of memory_gbps by bytes, for {', '.join(KINDS)}; `stream` for others",
    )
    optimizer: Curve = Field(description="share of memory_gbps of a fused optimizer, by bytes")
    context_mib: Number = Field(description="of the driver and its kernels")
    group_mib: Number = Field(description="NCCL's buffers for a group")
    host_gbps: Number | None = Field(default=None, description="to the host and back, pinned")
    host_memory_gbps: Number | None = Field(
        default=None, description="of the host's memory that a GPU's process reaches beside others"
    )
    host_gib: Number | None = Field(default=None, description="memory of the host for a GPU")
    workspace_mib: Number = Field(description="of matrix products")

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        lacks = [name for name in ("bf16", "fp32") if name not in self.tflops]
        if lacks:
            raise ValueError(f"tflops lacks {' and '.join(lacks)}")
        return self

    def peak(self, dtype: str) -> float:
        """FLOP/s of a dtype; of the next wider where it has no units for it."""
        known = self.tflops
        name = dtype if dtype in known else "bf16" if dtype in ("fp16", "bf16") else "fp32"
        return known[name].value * 1e12

    def fixed_bytes(self, num_groups: int) -> int:
        """What a process holds on the device beside tensors, with so many groups in use."""
        mib = self.context_mib.value + self.workspace_mib.value + num_groups * self.group_mib.value
        return round(mib * MIB)


def pick[T](known: Mapping[str, T], name: str) -> T:
    """What is known of a dtype or a collective, or the first."""
    return known[name] if name in known else next(iter(known.values()))


@cache
def known_gpus() -> dict[str, Path]:
    """Name -> file of the GPUs that are known."""
    return {name: path for path in sorted(FOLDER.glob("*.yaml")) for name in _names(path)}


def _names(path: Path) -> list[str]:
    return [str(read_content(path, (), "a GPU")["name"])]


def gpu_gib(name: str) -> float:
    """Memory of the GPU that cluster.gpu names. Raises ConfigError listing the known ones."""
    return find_gpu(name, "cluster.gpu").memory_gib.value


def find_gpu(name: str, key: str = "GPU") -> Gpu:
    """A GPU by its name or the file that describes it. Raises ConfigError with the known ones."""
    known = known_gpus()
    if name in known:
        return _read(known[name])
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name).expanduser())
    raise ConfigError(
        f"{key} {name} is not known.{nearest(name, known)} Known: {', '.join(known)}; or give the"
        " path of a .yaml that `moetrain bench gpu --out FILE` wrote."
    )


@cache
def _read(path: Path) -> Gpu:
    try:
        return Gpu.model_validate(_content(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Gpu)}") from None


def _content(path: Path) -> dict[str, Any]:
    """A file's content, over that of the GPU that it is `like`."""
    content = read_content(path, (), "a GPU")
    base = content.pop("like", None)
    if base is None:
        return content
    known = known_gpus()
    if not isinstance(base, str) or base not in known or known[base] == path:
        raise ConfigError(f"{path}: like: {base} is no other known GPU. Known: {', '.join(known)}")
    return _content(known[base]) | content
