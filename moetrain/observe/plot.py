"""Curves of a run as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetrain import files
from moetrain.observe.curves import Curves, Series
from moetrain.observe.figures import label
from moetrain.observe.ledger import rows_of

DECAY = 0.9  # of the running mean
WIDTH, HEIGHT = 5.2, 3.4  # of a panel, in inches
# Around its axes, in inches, for labels of the default size. matplotlib's "constrained" layout
# measures each text for it, twice, in 40 % of the time that a picture takes.
LEFT, RIGHT, BOTTOM, TOP = 1.0, 0.15, 0.5, 0.35


def plot_figures(ledgers: Mapping[str, tuple[Path, Sequence[str]]], out: Path) -> None:
    """Write a PNG: for each ledger a panel for each of the figures that it has (the first, where it
    has none), two in a line; training as it is, its running mean, and held out.
    """
    panels: list[list[tuple[str, str, Series, Series]]] = []
    for title, (path, names) in ledgers.items():
        curves = _curves(path, names)
        figure_curves = [
            (n, curves.get(n, Series()), curves.get(f"eval_{n}", Series())) for n in names
        ]
        some = [one for one in figure_curves if len(one[1]) or len(one[2])] or figure_curves[:1]
        panels += [[(title, *one) for one in some[i : i + 2]] for i in range(0, len(some), 2)]
    columns = max(map(len, panels), default=1)
    figure = _figure(columns, max(len(panels), 1))
    for line, line_panels in enumerate(panels):
        for i, panel in enumerate(line_panels):
            _draw(figure.add_subplot(len(panels), columns, line * columns + i + 1), *panel)
    with files.publish(out) as (part,):
        figure.savefig(part, dpi=130, format="png")


def plot_samples(
    title: str, curves: Mapping[str, Mapping[int, tuple[float, float, float]]], out: Path
) -> None:
    """Write a PNG of scores against samples: for each name, samples -> (low, score, high)."""
    figure = _figure(1, 1)
    axes = figure.add_subplot()
    for name, points in curves.items():
        counts = sorted(points)
        low, middle, high = zip(*(points[k] for k in counts), strict=True)
        (line,) = axes.plot(counts, middle, "o-", markersize=3, label=name)
        if all(map(math.isfinite, (*low, *high))):
            axes.fill_between(counts, low, high, alpha=0.15, color=line.get_color())
    ticks = sorted({k for points in curves.values() for k in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(title=title, xlabel="samples", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with files.publish(out) as (part,):
        figure.savefig(part, dpi=130, format="png")


def _figure(columns: int, lines: int) -> Any:
    """An empty figure with room for `columns` x `lines` panels and what stands around them."""
    from matplotlib.figure import Figure  # without pyplot no display is looked for

    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines))
    figure.subplots_adjust(
        left=LEFT / (WIDTH * columns),
        right=1 - RIGHT / (WIDTH * columns),
        bottom=BOTTOM / (HEIGHT * lines),
        top=1 - TOP / (HEIGHT * lines),
        wspace=(LEFT + RIGHT) / (WIDTH - LEFT - RIGHT),
        hspace=(BOTTOM + TOP) / (HEIGHT - BOTTOM - TOP),
    )
    return figure


def _curves(path: Path, names: Sequence[str]) -> dict[str, Series]:
    wanted = {"step", "loss", *names, *(f"eval_{name}" for name in names)}
    curves = Curves()
    for row in rows_of(path):
        curves.add({key: value for key, value in row.items() if key in wanted})
    return {key: series.finite() for key, series in curves.figures.items()}


def _draw(axes: Any, title: str, name: str, training: Series, held_out: Series) -> None:
    blue, steps = "tab:blue", training.steps
    if len(training):
        raw = {"color": blue, "alpha": 0.3, "linewidth": 0.8, "label": "training, raw"}
        axes.plot(steps, training.values, **raw)
        smooth = _running_mean(training.values)
        axes.plot(steps, smooth, color=blue, linewidth=1.5, label="training, smoothed")
    if len(held_out):
        dots = {"color": "tab:orange", "markersize": 3, "label": "held out"}
        axes.plot(held_out.steps, held_out.values, "o-", **dots)
    axes.set(title=f"{title}: {label(name)}", xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    if len(training) or len(held_out):
        axes.legend(fontsize="small")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = DECAY * total + value, DECAY * weight + 1
        out.append(total / weight)
    return out
