"""What the fullest rank holds over a step, as a picture."""

from pathlib import Path

from moetrain import files
from moetrain.layout.memory import GIB
from moetrain.planner.search import Planned, Search
from moetrain.run.plan_text import in_words

FIRST = ("weights", "gradients", "optimizer")  # at the bottom: they stay


def write_chart(search: Search, planned: Planned, out: Path) -> None:
    """Write a PNG: bytes by what they are for, after each allocation of a step. Traced whole."""
    from matplotlib.figure import Figure  # without pyplot no display is looked for

    points = search.timeline(planned)
    names = {name: None for point in points for name in point}
    names = [n for n in FIRST if n in names] + [n for n in names if n not in FIRST]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    layers = [[point.get(name, 0) / GIB for point in points] for name in names]
    share = [i / max(1, len(points) - 1) for i in range(len(points))]
    axes.stackplot(share, layers, labels=names, linewidth=0)
    limit = search.gpu.memory_gib.value
    axes.axhline(limit, color="black", linewidth=1, linestyle="--", label=search.gpu.name)
    axes.set(
        title=f"rank {planned.fullest} of {search.size}: {in_words(planned)}",
        xlabel="a step, by allocations",
        ylabel="GiB of tensors",
        xlim=(0, 1),
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    with files.publish(out) as (part,):
        figure.savefig(part, dpi=130, format="png")
