"""What came of a run, in one table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.observe.curves import Curves
from moetrain.observe.figures import label, number, written
from moetrain.observe.ledger import rows_of


@dataclass(frozen=True)
class Summary:
    """A run as its ledger tells it.

    Args:
        training, held_out: figure without `eval_` -> (first, last), as they are written.
        tokens_per_s: median over the steps.
    """

    stage: str
    num_steps: int
    training: dict[str, tuple[str, str]]
    held_out: dict[str, tuple[str, str]]
    tokens_per_s: float | None
    files: str
    first: Sequence[str] = field(default=("loss",))


def summarise(
    stage: str, run_dir: Path, files: str | None = None, first: Sequence[str] = ("loss",)
) -> Summary:
    """Read `<run_dir>/ledger.jsonl` for the figures that come `first`; it may lack any."""
    curves = Curves()
    ends: dict[str, tuple[str, str]] = {}
    for row in rows_of(run_dir / "ledger.jsonl"):
        curves.add({key: row[key] for key in ("step", "loss", "tokens_per_s") if key in row})
        for name in [*first, *(f"eval_{name}" for name in first)]:
            if name in row:
                ends[name] = _ends(row, name, ends.get(name))
    return Summary(
        stage=stage,
        num_steps=curves.step,
        training={name: ends[name] for name in first if name in ends},
        held_out={name: ends[f"eval_{name}"] for name in first if f"eval_{name}" in ends},
        tokens_per_s=curves.final.get("tokens_per_s"),
        files=files or str(run_dir),
        first=tuple(first),
    )


def _ends(row: dict[str, Any], name: str, earlier: tuple[str, str] | None) -> tuple[str, str]:
    return (earlier[0] if earlier else number(row[name])), written(row, name)


def print_summaries(summaries: Iterable[Summary], console: Console | None = None) -> None:
    """Print one table, a line a figure: training and held-out, first -> last. Below it steps,
    speed, and where the files are.
    """
    console = console or Console(highlight=False)
    table = Table(show_edge=False)  # three figures and their intervals fit 80 columns
    for name in ("stage", "figure", "training", "held-out"):
        table.add_column(name, overflow="fold")
    lines: list[str] = []
    for s in summaries:
        names = [name for name in s.first if name in s.training or name in s.held_out]
        for i, name in enumerate(names or s.first[:1]):
            cells = [_arrow(s.training.get(name)), _arrow(s.held_out.get(name))]
            table.add_row(*map(Text, (s.stage if i == 0 else "", label(name), *cells)))
        table.add_section()
        speed = "-" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}"
        steps = f"{s.num_steps:,} step{'s' * (s.num_steps != 1)}"
        lines.append(f"{s.stage}: {steps}, {speed} tokens/s, files in {s.files}")
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _arrow(ends: tuple[str, str] | None) -> str:
    return "-" if ends is None else f"{ends[0]} -> {ends[1]}"
