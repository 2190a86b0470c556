"""Where the seconds of a reinforcement learning run went, from its ledger: the median of each phase
of a step and of a push, and the share of each in the step; the mean bytes of a push, and their
share in all weights.

    python tools/bench/rl_phases.py RUN [RUN ...]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

PHASES = ("seconds/sample", "seconds/score", "seconds/train", "seconds/push")


def phases(ledger: Path) -> dict[str, float]:
    """phase -> median seconds over all steps but the first, which also warms up."""
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    steps = [row for row in rows if "seconds/train" in row]
    steps = steps[1:] or steps
    names = [*PHASES, *sorted(n for n in steps[-1] if n.startswith("push/") and n.endswith("_s"))]
    return {name: median(row.get(name, 0.0) for row in steps) for name in names}


def sent(ledger: Path) -> tuple[float, float]:
    """Mean bytes of a push, and those of all weights; 0 where nothing was pushed."""
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    pushes = [row for row in rows if "push/bytes" in row]
    if not pushes:
        return 0.0, 0.0
    return mean(row["push/bytes"] for row in pushes), pushes[-1]["push/whole_bytes"]


def table_of(runs: Sequence[Path]) -> Table:
    """A column a run: seconds, and the share of the four phases together."""
    found = [phases(run / "ledger.jsonl") for run in runs]
    table = Table("phase", *(run.name for run in runs))
    for name in dict.fromkeys(name for own in found for name in own):
        cells: list[str] = []
        for own in found:
            whole = sum(own[phase] for phase in PHASES)
            share = f"  {own[name] / whole:4.0%}" if name in PHASES else ""
            cells.append(f"{own[name]:.3f} s{share}" if name in own else "")
        table.add_row(name, *cells)
    pushed = [sent(run / "ledger.jsonl") for run in runs]
    cells = [f"{some / 1e6:.2f} MB  {some / whole:4.1%}" if whole else "" for some, whole in pushed]
    table.add_row("push/bytes", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="where a step's seconds went")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    Console().print(table_of(parser.parse_args().runs))


if __name__ == "__main__":
    main()
