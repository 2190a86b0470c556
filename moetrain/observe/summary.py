"""What came of a run, in one line of a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from moetrain.observe.ledger import read_ledger


@dataclass(frozen=True)
class Summary:
    """A run as its ledger tells it."""

    stage: str
    num_steps: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    tokens_per_s: float | None  # median over the steps
    files: str


def summarise(stage: str, run_dir: Path, files: str | None = None) -> Summary:
    """Read `<run_dir>/ledger.jsonl`; figures that it lacks are None."""
    rows = read_ledger(run_dir / "ledger.jsonl")
    train = [row for row in rows if "loss" in row]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return Summary(
        stage=stage,
        num_steps=train[-1]["step"] if train else 0,
        first_loss=train[0]["loss"] if train else None,
        last_loss=train[-1]["loss"] if train else None,
        eval_loss=held_out[-1] if held_out else None,
        tokens_per_s=median(row["tokens_per_s"] for row in train) if train else None,
        files=files or str(run_dir),
    )


def print_summaries(summaries: Iterable[Summary], console: Console | None = None) -> None:
    """Print one table: stage, steps, loss first -> last, held-out loss, tokens/s, where the files
    are.
    """
    table = Table()
    for name in ("stage", "steps", "loss", "held-out loss", "tokens/s", "files"):
        right = name in ("steps", "held-out loss", "tokens/s")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for s in summaries:
        loss = f"{_figure(s.first_loss)} -> {_figure(s.last_loss)}"
        speed = f"{s.tokens_per_s:,.0f}" if s.tokens_per_s is not None else "-"
        table.add_row(s.stage, str(s.num_steps), loss, _figure(s.eval_loss), speed, s.files)
    (console or Console(highlight=False)).print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
