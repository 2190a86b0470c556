"""An optimizer that is partly on the host (`optim.offload`): what a trace, which has all of it on
the device, holds less, and what the way there and back takes a step.

megatron-core 0.19.2 copies the gradients of these parameters to the host in the dtype that they are
summed in, steps them there with torch's fused AdamW, and copies the weights back in theirs, one
after the other. Imports no torch.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from moetrain.config.recipe import Recipe
from moetrain.planner.gpu import Gpu

if TYPE_CHECKING:
    from moetrain.planner.watch import Cost, Op, Profile

STATE = 12  # bytes of a parameter: an fp32 copy and two moments
PINNED = 4  # and its gradient, which has a place of its own on the host
STEP = 28  # that torch's fused AdamW reads and writes: all of these, and all but the gradient
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def may_offload(recipe: Recipe, gpu: Gpu) -> bool:
    """Whether a plan may put the optimizer on the host: the run takes it there, what it costs is
    known, and the recipe itself does not say.
    """
    optim = recipe.optim
    plain = optim.name == "adamw" and optim.state_dtype == "fp32" and not optim.offload
    return plain and recipe.model.dtype != "fp32" and _host(gpu) is not None


def offloaded(recipe: Recipe) -> Recipe:
    """The recipe with all of its optimizer on the host."""
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"offload": 1.0})})


def seconds(recipe: Recipe, gpu: Gpu, on_host: float) -> float:
    """That a step waits for so many parameters on the host; 0 where nothing is known of it."""
    numbers = _host(gpu)
    if numbers is None:
        return 0.0
    way, memory = numbers
    moved = _WIDTH[recipe.optim.grad_dtype] + _WIDTH[recipe.model.dtype]
    return on_host * (moved / way + STEP / memory) / 1e9


def host_bytes(on_host: float) -> float:
    """On the host, of a GPU."""
    return on_host * (STATE + PINNED)


def has_room(gpu: Gpu, on_host: float) -> bool:
    """Whether the host takes it."""
    return gpu.host_gib is None or host_bytes(on_host) <= gpu.host_gib.value * 2**30


def without(profile: "Profile", share: float, state: int, num_params: int) -> "Profile":
    """A profile of all on the device, with a share of the optimizer on the host.

    Args:
        state: bytes of main weights and moments.
        num_params: that they are of.
    """
    if not share:
        return profile
    less = round(share * state)

    def lighter(held: dict[str, int]) -> dict[str, int]:
        return held | {"optimizer": max(0, held.get("optimizer", 0) - less)}

    # While the engine is built its optimizer is not there yet; on the device it never will be.
    most = {moment: held for moment, held in profile.most.items() if moment.phase != "build"}
    return replace(
        profile,
        reserved=max(0, profile.reserved - less),
        on_host=round(share * num_params),
        most={moment: lighter(held) for moment, held in most.items()},
        timeline=[lighter(held) for held in profile.timeline],
        ops={op: _smaller(op, cost, 1 - share) for op, cost in profile.ops.items()},
    )


def _smaller(op: "Op", cost: "Cost", share: float) -> "Cost":
    if op.part != "optimizer" or "fused_adam" not in op.name:
        return cost
    return replace(cost, num_bytes=round(cost.num_bytes * share))


def _host(gpu: Gpu) -> tuple[float, float] | None:
    """GB/s of a GPU to the host and of its part of the host's memory."""
    if gpu.host_gbps is None or gpu.host_memory_gbps is None:
        return None
    return gpu.host_gbps.value, gpu.host_memory_gbps.value
