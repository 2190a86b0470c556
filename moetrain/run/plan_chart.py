"""What the fullest rank holds over a step, as a picture or as numbers."""

import json
from collections.abc import Sequence
from pathlib import Path

from moetrain import files
from moetrain.layout.memory import GIB
from moetrain.planner.search import Planned, Search
from moetrain.planner.watch import thinned
from moetrain.run.plan_text import in_words

FIRST = ("teacher", "weights", "gradients", "optimizer")  # at the bottom: they stay
POINTS = 240  # of the numbers, at most


def write_chart(search: Search, planned: Planned, out: Path) -> None:
    """Write a PNG: bytes by what they are for, after each allocation of a step, of which
    micro-batches that repeat are left out. A file that is named .json gets the numbers, which a
    run's report draws (observe/report_memory).
    """
    points = search.timeline(planned)
    found = {name: None for point in points for name in point}
    names = [n for n in FIRST if n in found] + [n for n in found if n not in FIRST]
    if out.suffix == ".json":
        files.write_text(out, _numbers(search, planned, points, names))
    else:
        _draw(search, planned, points, names, out)


def _numbers(
    search: Search, planned: Planned, points: Sequence[dict[str, int]], names: Sequence[str]
) -> str:
    while len(points) > POINTS:
        points = thinned(points)
    content = {
        "gpu": search.gpu.name,
        "limit": search.gpu.memory_gib.value,
        "rank": planned.fullest,
        "ranks": search.size,
        "names": names,
        "points": [[round(point.get(n, 0) / GIB, 4) for n in names] for point in points],
    }
    return json.dumps(content) + "\n"


def _draw(
    search: Search,
    planned: Planned,
    points: Sequence[dict[str, int]],
    names: Sequence[str],
    out: Path,
) -> None:
    from matplotlib.figure import Figure  # without pyplot no display is looked for

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
