"""Ledger, plots, summary and progress."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moetrain.config.method import about
from moetrain.observe import figures, interval, progress
from moetrain.observe.ledger import Ledger, read_ledger
from moetrain.observe.plot import plot_figures
from moetrain.observe.progress import ByteDisplay, ProgressDisplay
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
    assert (found.num_steps, found.tokens_per_s) == (5, 30.0)
    assert found.training == {"loss": ("5.000", "1.000")}
    assert found.held_out == {"loss": ("3.000", "1.500")}
    text = io.StringIO()
    print_summaries([found, summarise("sft", tmp_path / "none")], Console(file=text, width=80))
    assert "5.000 -> 1.000 │ 3.000 -> 1.500" in text.getvalue()
    assert "sft: 0 steps, - tokens/s" in text.getvalue()
    ledgers = {"pretrain": (ledger, ("loss", "kl")), "sft": (tmp_path / "none.jsonl", ("loss",))}
    plot_figures(ledgers, tmp_path / "plots" / "loss.png")
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


RL: dict[str, Any] = {
    "reward/mean": 0.6131,
    "reward/graded": 64.0,
    "groups/graded": 8.0,
    "groups/std": 0.2,
    "groups/no_signal": 0.875,
    "length/mean": 1432.5,
    "kl": 0.0213,
}
HELD_OUT_RL = {"eval_reward/mean": 0.55, "eval_reward/std": 0.4975, "eval_reward/graded": 40.0}


def test_a_method_is_opened_on_what_it_is_about(tmp_path: Path) -> None:
    """The table of a run with rollouts at 80 columns: its figures, with what they are worth."""
    first = about("grpo")
    assert first == ("reward/mean", "length/mean", "kl", "groups/no_signal")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write({"step": 0, **HELD_OUT_RL, "eval_reward/mean": 0.675})
    ledger.write(row(1) | RL)
    ledger.write({"step": 1, **HELD_OUT_RL})
    ledger.close()
    text = io.StringIO()
    print_summaries([summarise("grpo", tmp_path, first=first)], Console(file=text, width=80))
    said = text.getvalue()
    assert "0.613 -> 0.613 ±0.13 of 8 │ 0.675 -> 0.550 ±0.15 of 40" in said
    assert "no signal │ 0.875 -> 0.875 ±0.22 of 8" in said and "loss" not in said, said
    assert max(map(len, said.splitlines()[:-1])) <= 80, "the last line is a path"


@pytest.mark.parametrize(
    "width, shown",
    [(60, ["reward"]), (80, ["reward", "length", "KL"]), (120, ["reward", "no signal", "tok/s"])],
)
def test_the_bar_has_as_many_figures_as_fit(width: int, shown: list[str]) -> None:
    display = ProgressDisplay("dr_grpo", 30000, first=about("dr_grpo"))
    text = io.StringIO()
    display.console = Console(file=text, width=width, force_terminal=True, color_system=None)
    display.open_bar(0)
    display.step(row(12345) | RL)
    display.say("Collapse: " + "answers " * 30)
    display.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    assert all(len(line.rstrip()) <= width for line in re.split(r"[\r\n]+", said))
    lines = [line for line in re.split(r"[\r\n]+", text.getvalue()) if "12345/30000" in line]
    assert all(name in lines[-1] for name in shown)
    assert len(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", lines[-1])) <= width


@pytest.mark.parametrize(
    "value, text",
    [
        (0.513, "0.513"),
        (0.9996, "1.000"),
        (12.345, "12.35"),
        (1432.5, "1,432"),
        (-0.0213, "-0.0213"),
        (5e-4, "5.00e-04"),
        (0, "0"),
        (float("nan"), "nan"),
    ],
)
def test_figures_are_written_for_people(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_what_a_rate_is_worth() -> None:
    """Wilson's interval for shares, two standard errors for rewards outside [0, 1]."""
    assert figures.interval(
        {"rewards/accuracies": 0.5, "rewards/graded": 100}, "rewards/accuracies"
    )
    assert interval.around(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval.around(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval.around(2.0, 101, 1.0) == pytest.approx((1.804, 2.196), abs=1e-3)
    assert interval.around(2.0, 1, 0.0) is None and interval.around(0.5, 0) is None
    surer = interval.around(0.5, 100, 0.1)
    assert surer is not None and surer[1] - surer[0] < 0.05
    assert figures.interval(RL, "reward/mean") == (8, pytest.approx(0.134, abs=1e-3)), "of groups"
    assert figures.interval(HELD_OUT_RL, "eval_reward/mean") == (40, pytest.approx(0.15, abs=0.01))
    assert figures.interval({"loss": 0.5, "graded": 3}, "loss") is None
    assert figures.interval({"eval_rewards/accuracies": 0.5}, "eval_rewards/accuracies") is None


def test_no_escape_reaches_the_terminal(capsys: Any) -> None:
    """A reward's fault may quote what the model wrote."""
    display = ProgressDisplay("grpo", 4, 0)
    display.say("the last fault: \x1b]0;title\x07")
    display.close()
    assert "\x1b" not in (text := "".join(capsys.readouterr())) and "\\x1b]0;title\\x07" in text


def test_a_log_gets_plain_lines(capsys: Any) -> None:
    display = ProgressDisplay("sft", 200)
    for step in range(1, 201):
        display.step(row(step))
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sft 1/200  loss 5.000  lr 0.0010  10 tok/s  |g| 1.000  0.50 GiB"
    assert lines[-1].startswith("sft 200/200")
    assert len(lines) == 51 and "\x1b" not in "".join(lines)


def test_bytes_that_are_done_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    display = ByteDisplay("index")
    for megabytes in (100, 200, 300):  # 100 of them are an earlier start's
        display.advance(megabytes * 10**6, 1100 * 10**6)
    display.close()
    assert capsys.readouterr().err == "index 300 of 1,100 MB  10.0 MB/s  0:01:20 left\n"
