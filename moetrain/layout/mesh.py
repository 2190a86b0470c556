"""Arithmetic of a layout: how many ranks each axis takes, which rank stands where, which layers a
stage holds.
"""

from dataclasses import dataclass
from math import lcm

from moetrain.config.recipe import ParallelConfig
from moetrain.errors import LayoutError, plural
from moetrain.models import Model
from moetrain.models.parts.base import Split


@dataclass(frozen=True)
class MeshPlan:
    """Sizes of the axes. tp*cp*dp*pp and etp*ep*edp*pp are both the world."""

    world_size: int
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    cp: int
    dp: int
    edp: int


def plan_mesh(parallel: ParallelConfig, world_size: int) -> MeshPlan:
    """Data-parallel sizes for `world_size` ranks. Raises LayoutError with the nearest world that
    fits.
    """
    p = parallel
    dense, expert = p.tp * p.cp * p.pp, p.etp * p.ep * p.pp
    unit = lcm(dense, expert)
    if world_size % unit:
        down, up = world_size // unit * unit, (world_size // unit + 1) * unit
        fits = f"{down} or {up}" if down else str(up)
        raise LayoutError(
            f"{plural(world_size, 'rank')} {'does' if world_size == 1 else 'do'} not divide into"
            f" tp={p.tp} cp={p.cp} pp={p.pp} (dense, "
            f"{dense}) and etp={p.etp} "
            f"ep={p.ep} pp={p.pp} (experts, {expert}). Use {fits} ranks, or a smaller layout."
        )
    return MeshPlan(
        world_size,
        p.tp,
        p.pp,
        p.vpp or 1,
        p.ep,
        p.etp,
        p.cp,
        world_size // dense,
        world_size // expert,
    )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def check_layout(model: Model, parallel: ParallelConfig, num_tokens: int) -> None:
    """Raise LayoutError when the layout does not divide the model, or `num_tokens` of a
    micro-batch.
    """
    p = parallel
    for part in model.parts:
        for split in part.splits():
            _check_split(split, getattr(p, split.axis))
    if model.moe is None and (p.ep > 1 or p.etp > 1):
        raise LayoutError(
            f"parallel.ep={p.ep} etp={p.etp}: this model has no experts. Leave both out."
        )
    if model.moe is not None and p.tp > 1 and not p.sp:
        raise LayoutError(
            "Experts with parallel.tp > 1 need sequence parallelism. Leave parallel.sp out or "
            "set it."
        )
    unit = p.tp * (2 * p.cp if p.cp > 1 else 1)
    if num_tokens % unit:
        raise LayoutError(
            f"data.seq_len * train.micro_batch = {num_tokens} is not a multiple of {unit} "
            f"(tp={p.tp}, cp={p.cp}). "
            f"Use {-(-num_tokens // unit) * unit}."
        )
    stage_layers(model.num_layers, p.pp, p.vpp or 1, p.first_stage_layers, p.last_stage_layers)


def _check_split(split: Split, size: int) -> None:
    given = f"parallel.{split.axis}={size}"
    if split.either_way and max(split.size, size) % min(split.size, size):
        raise LayoutError(
            f"{given} and {split.size} {split.what}: neither divides the other. Change "
            f"{split.axis}."
        )
    if not split.either_way and split.size % size:
        raise LayoutError(
            f"{given} does not divide {split.size} {split.what}. Allowed: {_divisors(split.size)}"
        )


def stage_layers(
    num_layers: int, pp: int, vpp: int, first: int | None = None, last: int | None = None
) -> list[list[range]]:
    """[pp rank][virtual stage] -> the global layers it holds. Layers that do not divide go to the
    earlier chunks.

    `first` and `last` fix the number of layers of the first and last pipeline rank (without
    interleaving). Raises LayoutError when a stage would be empty.
    """
    num_chunks = pp * vpp
    if (first is not None or last is not None) and (vpp > 1 or pp == 1):
        raise LayoutError(
            "parallel.first_stage_layers and last_stage_layers need pp > 1 and no vpp"
        )
    middle = num_chunks - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    if left < middle or (middle == 0 and left):
        raise LayoutError(
            f"{num_layers} layers do not fill {num_chunks} pipeline chunks (pp={pp}, vpp={vpp}, "
            f"first={first}, "
            f"last={last}). Use fewer stages, or fewer layers on the first and last."
        )
    share, extra = divmod(left, middle) if middle else (0, 0)
    sizes = [share + (i < extra) for i in range(middle)]
    sizes = ([first] if first is not None else []) + sizes + ([last] if last is not None else [])
    starts = [sum(sizes[:i]) for i in range(num_chunks)]
    chunks = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [[chunks[v * pp + r] for v in range(vpp)] for r in range(pp)]


def rank_table(plan: MeshPlan) -> list[dict[str, int]]:
    """One row a rank, in Megatron's order tp-cp-ep-dp-pp: the coordinates of dense and of expert
    layers.
    """
    rows: list[dict[str, int]] = []
    stage_size = plan.world_size // plan.pp
    for rank in range(plan.world_size):
        pp, inside = divmod(rank, stage_size)
        rows.append(
            {
                "rank": rank,
                "tp": inside % plan.tp,
                "cp": inside // plan.tp % plan.cp,
                "dp": inside // (plan.tp * plan.cp),
                "pp": pp,
                "etp": inside % plan.etp,
                "ep": inside // plan.etp % plan.ep,
                "edp": inside // (plan.etp * plan.ep),
            }
        )
    return rows
