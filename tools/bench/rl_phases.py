"""Where the seconds of a reinforcement learning run went, from its ledger: the median of each phase
of a step and of a push, and the share of each in the step.

    python tools/bench/rl_phases.py RUN [RUN ...]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

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
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="where a step's seconds went")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    Console().print(table_of(parser.parse_args().runs))


if __name__ == "__main__":
    main()
