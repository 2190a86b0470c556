"""Ledger, plots, summary and progress."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from moetrain.observe.ledger import Ledger, read_ledger
from moetrain.observe.plot import plot_losses
from moetrain.observe.progress import ProgressDisplay
from moetrain.observe.summary import print_summaries, summarise


def row(step: int) -> dict[str, Any]:
    figures = {
        "lr": 1e-3,
        "tokens": 64,
        "tokens_per_s": 10.0 * step,
        "grad_norm": 1.0,
        "memory_gib": 0.5,
    }
    return {"step": step, "loss": 5.0 / step, **figures}


def write_run(folder: Path, num_steps: int, step: int = 0) -> Path:
    ledger = Ledger(folder / "ledger.jsonl", step)
    for i in range(step + 1, num_steps + 1):
        ledger.write(row(i))
        if i % 2 == 0:
            ledger.write({"step": i, "eval_loss": 6.0 / i})
    ledger.close()
    return folder / "ledger.jsonl"


def test_a_resumed_ledger_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", 8)
    path = write_run(tmp_path / "killed", 6)
    path.write_text(path.read_text() + '{"step": 7, "lo')
    assert [r["step"] for r in read_ledger(path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert write_run(tmp_path / "killed", 8, step=4).read_text() == whole.read_text()


def test_a_new_run_starts_an_empty_ledger(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    write_run(tmp_path, 3)
    assert write_run(tmp_path, 1).read_text() == json.dumps(row(1)) + "\n"


def test_summary_and_plot(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "run", 5)
    found = summarise("pretrain", tmp_path / "run")
    assert (found.num_steps, found.first_loss, found.last_loss, found.eval_loss) == (
        5,
        5.0,
        1.0,
        1.5,
    )
    assert found.tokens_per_s == 30.0
    text = io.StringIO()
    print_summaries([found, summarise("sft", tmp_path / "none")], Console(file=text, width=120))
    assert "5.000 -> 1.000" in text.getvalue() and "- -> -" in text.getvalue()
    plot_losses(
        {"pretrain": ledger, "sft": tmp_path / "none.jsonl"}, tmp_path / "plots" / "loss.png"
    )
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_gets_plain_lines(capsys: Any) -> None:
    display = ProgressDisplay("sft", 200)
    for step in range(1, 201):
        display.step(row(step))
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sft 1/200  loss 5.0000") and lines[-1].startswith("sft 200/200")
    assert len(lines) == 51 and "\x1b" not in "".join(lines)
