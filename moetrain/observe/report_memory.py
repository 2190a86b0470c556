"""The page's section of memory: what the fullest rank was predicted to hold over a step when the
run began, beside what the ledger has measured. Drawn without a script.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

from moetrain.observe.answers import harmless
from moetrain.observe.ledger import is_number
from moetrain.observe.runs import Run

MARK = "<!-- MEMORY -->"
FILE = "predicted_memory.json"  # of a run's folder: what `moetrain plan --chart` writes as .json
RUNS, POINTS, NAMES, BYTES = 8, 240, 24, 1 << 20  # charts on a page; a file has no more
FAR = 3.0  # times what is held: a GPU with more would leave the picture empty, and has no line
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 260, 46, 22
COLORS = (
    "#4269d0 #efb118 #6cc5b0 #ff725c #9c6b4e #97bbf5 #3ca951 #ff8ab7 #a463f2 #9498a0 #2f6b7c"
).split()
_STYLE = """<style>
.memory svg { display: block; width: 100%; max-width: 900px; height: auto; margin-top: 8px; }
.memory text { font-size: 12px; fill: var(--muted); } .memory figure { margin-top: 18px; }
.memory ul { list-style: none; margin: 6px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; }
.memory li i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
</style>"""  # noqa: E501


@dataclass(frozen=True)
class Predicted:
    """GiB by category over a step of one rank."""

    gpu: str
    limit: float  # GiB of the GPU
    rank: int
    ranks: int
    names: list[str]
    points: list[list[float]]  # [time][category]

    @property
    def peak(self) -> float:
        return max(map(sum, self.points))


def read_predicted(path: Path) -> Predicted | None:
    """What a run's folder has; None where there is none, or what is there is no prediction."""
    try:
        if path.stat().st_size > BYTES:
            return None
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        memory = Predicted(**cast(dict[str, Any], content))
        names = [str(name) for name in memory.names]
        sizes = [row for row in memory.points if len(row) == len(names)]
        numbers = [memory.limit, memory.rank, memory.ranks, *(x for row in sizes for x in row)]
        whole = 0 < len(sizes) == len(memory.points) <= POINTS and 0 < len(names) <= NAMES
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if not whole or not all(is_number(x) and math.isfinite(x) and 0 <= x < 1e6 for x in numbers):
        return None
    if not sum(map(sum, sizes)) > 0:
        return None
    return Predicted(str(memory.gpu), memory.limit, memory.rank, memory.ranks, names, sizes)


def section(runs: Sequence[Run]) -> str:
    """HTML of the first RUNS runs that have a prediction; empty where none has."""
    known = [(run, memory) for run in runs if (memory := read_predicted(run.path / FILE))]
    if not known:
        return ""
    more = f" {len(known) - RUNS} more runs have one." * (len(known) > RUNS)
    note = (
        "What the fullest rank was predicted, when the run began, to hold over one step, allocation"
        f" by allocation; and the most that the first rank has held, as its ledger says.{more}"
    )
    head = f'<div class="bar"><h2>Memory of a step</h2></div><p class="note">{note}</p>'
    parts = [_of_run(run, memory) for run, memory in known[:RUNS]]
    return f'{_STYLE}\n<section class="memory" id="memory">{head}\n{"".join(parts)}</section>'


def _measured(run: Run, name: str) -> float | None:
    """The most of a figure of the ledger."""
    series = run.curves.figures.get(name)
    values = list(series.finite().values) if series is not None else []
    return max(values, default=None)


def _of_run(run: Run, memory: Predicted) -> str:
    measured, first = (_measured(run, name) for name in ("memory_gib", "predicted/memory_gib"))
    facts = [
        f"rank {memory.rank:.0f} of {memory.ranks:.0f} is predicted to hold {memory.peak:.1f} GiB"
    ]
    if first is not None and memory.rank:
        facts.append(f"the first rank {first:.1f}")
    if measured is not None:
        facts.append(f"the first rank has held {measured:.1f}")
    facts.append(f"{memory.gpu} has {memory.limit:.1f}")
    legend = "".join(
        f'<li><i style="background:{_color(i)}"></i>{_text(name)}</li>'
        for i, name in enumerate(memory.names)
    )
    caption = f"<b>{_text(run.name)}</b>: {_text(', '.join(facts))}"
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f"{_svg(memory, measured)}<ul>{legend}</ul></figure>\n"
    )


def _svg(memory: Predicted, measured: float | None) -> str:
    """Areas, one upon the other, and lines of what the GPU has and what was measured."""
    shown = max(memory.peak, measured or 0.0)
    has_limit = memory.limit <= FAR * shown
    top = 1.06 * max(shown, memory.limit if has_limit else 0.0)
    across = (WIDTH - LEFT) / max(1, len(memory.points) - 1)

    def y(gib: float) -> str:
        return f"{(HEIGHT - BOTTOM) * (1 - gib / top):.1f}"

    rows = memory.points if len(memory.points) > 1 else memory.points * 2
    below = [0.0] * len(rows)
    areas: list[str] = []
    for i in range(len(memory.names)):
        above = [low + row[i] for low, row in zip(below, rows, strict=True)]
        places = [f"{LEFT + j * across:.1f}" for j in range(len(rows))]
        edge = [f"{x},{y(gib)}" for x, gib in zip(places, above, strict=True)]
        edge += [f"{x},{y(gib)}" for x, gib in zip(places[::-1], below[::-1], strict=True)]
        title = f"<title>{_text(memory.names[i])}</title>"
        areas.append(f'<polygon fill="{_color(i)}" points="{" ".join(edge)}">{title}</polygon>')
        below = above
    lines: list[str] = []
    if has_limit:
        label = f"{memory.gpu}: {memory.limit:.1f} GiB"
        lines.append(_line(memory.limit, y(memory.limit), label, "6 4"))
    if measured is not None:
        label = f"measured on the first rank: {measured:.1f} GiB"
        lines.append(_line(measured, y(measured), label, "none"))
    ticks = "".join(
        f'<text x="{LEFT - 6}" y="{float(y(gib)) + 4:.1f}" text-anchor="end">{gib:.3g}</text>'
        for gib in (0.0, memory.peak / 2, memory.peak)
    )
    name = f"GiB over a step, at most {memory.peak:.1f}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(name)}">'
        f'{"".join(areas)}{ticks}{"".join(lines)}<text x="{LEFT}" y="{HEIGHT - 5}">'
        f"GiB of tensors over one step</text></svg>"
    )


def _line(gib: float, y: str, label: str, dash: str) -> str:
    return (
        f'<line class="at" data-gib="{gib:.4g}" x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}"'
        f' stroke="#1c1e21" stroke-dasharray="{dash}"/><text x="{WIDTH - 4}"'
        f' y="{max(11.0, float(y) - 5):.1f}" text-anchor="end">{_text(label)}</text>'
    )


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _text(text: str) -> str:
    return escape(harmless(text[:200]))
