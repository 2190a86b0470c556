"""Seconds of an operation: what it computes against what it moves, at the shares of the peaks that
a `Gpu`'s curves give operations of its kind and size. Imports no torch.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from moetrain.planner.gpu import Gpu, pick

if TYPE_CHECKING:
    from moetrain.planner.watch import Cost, Op

# They only make or name memory. `empty_like` in a norm stands for a kernel: see NORM.
FREE = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided _unsafe_view scalar_tensor"
    " _local_scalar_dense lift_fresh detach".split()
)
# A trace stands CUDA's fused norm in for by an allocation of its result.
NORM = "empty_like"
_KINDS = {
    "in_place": "add_ sub_ mul_ copy_ zero_ fill_ clamp_ neg_ new_zeros zeros zeros_like",
    "convert": "_to_copy",
    "function": "exp exp_ log silu silu_backward sigmoid sigmoid_backward _softmax"
    " _softmax_backward_data _log_softmax logsumexp pow rsqrt cos sin tanh gelu gelu_backward"
    " div div_ reciprocal remainder",
    "reduce": "sum mean amax amin max min linalg_vector_norm norm all any cumsum logsumexp",
    "gather": "index index_put index_put_ index_select index_add index_add_ gather scatter scatter_"
    " scatter_add scatter_add_ embedding embedding_dense_backward masked_fill where slice_backward"
    " select_backward nonzero masked_select",
    "sort": "sort topk argsort",
}
KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
# Of what they read whole by their shapes they touch as much as they give.
_LOOKUPS = frozenset("embedding index index_select gather".split())
_SIZES = {"float32": 4, "int64": 8, "float64": 8, "int32": 4, "bool": 1, "uint8": 1}
_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}


@dataclass(frozen=True)
class Fusion:
    """Operations of a trace with our own kernels that are one with Transformer Engine's.

    share: of their traffic that is left.
    """

    name: str
    parts: frozenset[str]
    names: frozenset[str]
    dims: int  # of the first tensor
    share: float
    why: str


def _fusion(name: str, parts: str, names: str, dims: int, share: float, why: str) -> Fusion:
    return Fusion(name, frozenset(parts.split()), frozenset(names.split()), dims, share, why)


FUSIONS = (
    _fusion(
        *("rope", "attention backward", "mul add cat neg clone", 4, 1 / 5),
        why="halves are negated, joined, multiplied twice and added: five passes over queries and"
        " keys, and one in apply_rope_fusion",
    ),
    _fusion(
        *("swiglu", "experts backward", "silu mul _to_copy silu_backward sum cat", 2, 1 / 4),
        why="gate, up and the router's weight in one pass each way, in the dtype of the weights;"
        " ours converts to fp32 and back",
    ),
    _fusion(
        *("permutation", "dispatch backward", "new_zeros index_add scatter_add_ gather", 2, 1 / 2),
        why="moe_permute_fusion writes rows in place; ours fills with zeros and adds",
    ),
    _fusion(
        *("sort of chunks", "dispatch backward", "cat", 2, 1 / 2),
        why="rows go straight to their expert's place",
    ),
    _fusion(
        *("gradient accumulation", "backward", "add_", 2, 0),
        why="the matrix product adds to the fp32 gradient itself (gradient_accumulation_fusion)",
    ),
    _fusion(*("gradient accumulation", "backward", "add_", 3, 0), why="the same of experts"),
)


def fusion_of(op: "Op") -> Fusion | None:
    """The kernel of Transformer Engine that takes this operation in."""
    dims = len(op.shapes[0]) if op.shapes else 0
    for fusion in FUSIONS:
        if op.name in fusion.names and op.part in fusion.parts and dims == fusion.dims:
            return fusion
    return None


@dataclass(frozen=True)
class Work:
    """Seconds of all operations of a kind, and how many launches they are."""

    seconds: float = 0.0
    launches: int = 0


def work_of(op: "Op", cost: "Cost", gpu: Gpu, *, fused: bool = False, load: float = 1.0) -> Work:
    """What operations of a kind take on `gpu`.

    fused: with Transformer Engine's kernels (FUSIONS).
    load: how many times the mean an expert-parallel rank's tokens are.
    """
    is_norm = op.name == NORM and (op.part == "norms" or op.part == "backward")
    if op.name in FREE and not is_norm:
        return Work()
    times, scale = cost.times, 1.0
    if op.part == "experts" or op.name == "_grouped_mm":
        scale = load
    if fused and (fusion := fusion_of(op)) is not None:
        if not fusion.share:
            return Work()
        scale *= fusion.share
        times = max(1, round(times * fusion.share))
    if _is_attention(op):
        scale /= 2  # torch counts the whole square, and the mask leaves half of it
    compute = scale * cost.flops / times / (gpu.peak(_dtype(op)) * _share(op, cost, gpu))
    moved = _bytes(op, cost, is_norm=is_norm) * scale / times
    memory = moved / (_bandwidth(op, moved, gpu) * 1e9) if moved else 0.0
    one = max(compute, memory, gpu.kernel_us.value / 1e6)
    if op.name == "_grouped_mm" and gpu.expert_us is not None:
        one += op.shapes[2][0] * gpu.expert_us.value / 1e6
    return Work(times * one, times)


def _dtype(op: "Op") -> str:
    return _NAMES.get(op.dtype, op.dtype)


def _is_attention(op: "Op") -> bool:
    return "attn" in op.name or "attention" in op.name


def _share(op: "Op", cost: "Cost", gpu: Gpu) -> float:
    """Of the peak."""
    if not cost.flops:
        return 1.0
    dtype = _dtype(op)
    if _is_attention(op):
        is_back = op.name.endswith("backward")
        keys = max(op.shapes[1][-3:-1] if len(op.shapes[1]) > 3 else op.shapes[1][:1])
        return pick(gpu.attention_backward if is_back else gpu.attention, dtype).at(keys)
    if op.name == "_grouped_mm":
        experts = op.shapes[2][0]
        rows = max(op.shapes[0])  # tokens, whichever side they are on
        return pick(gpu.grouped, dtype).at(max(1, rows / experts))
    sides = [side for shape in op.shapes for side in shape[-2:]]
    return pick(gpu.gemm, dtype).at(max(1, min(sides)))


def _bytes(op: "Op", cost: "Cost", *, is_norm: bool) -> float:
    """Read and written by all of them."""
    width = _SIZES.get(op.dtype, 2)
    result = prod(op.shapes[-1]) * width if op.shapes else 0
    if is_norm:
        # Backward reads the input and the gradient and writes one.
        return cost.times * result * (3 if op.part == "backward" else 2)
    if op.name in _LOOKUPS:
        return cost.times * 2 * result
    return cost.num_bytes


def _bandwidth(op: "Op", num_bytes: float, gpu: Gpu) -> float:
    """GB/s."""
    if "fused_adam" in op.name:
        curve = gpu.optimizer
    else:
        curve = gpu.memory.get(KIND.get(op.name, "stream")) or gpu.memory["stream"]
    return gpu.memory_gbps.value * curve.at(max(1, num_bytes))
