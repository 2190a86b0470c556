"""`moetrain watch`: what a frame says of a run's folder as it grows, and what it costs."""

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from moetrain import cli
from moetrain.observe import follow
from moetrain.observe.follow import Follower, Holder, Thinned
from moetrain.observe.watch import Watch, curve_of, frame

LEDGERS = Path(__file__).parent / "fixtures" / "ledgers"
BARS = "01234567"


def answer(text: str, reward: float | None, **more: Any) -> dict[str, Any]:
    said = {"text": text, "reward": reward, "parts": {"exact": reward}, "tokens": [1, 2, 3]}
    return said | {"finish": "stop"} | more


def batch(path: Path, *answers: dict[str, Any], asked: str = "70 times 76?") -> None:
    prompt = {"id": "0", "tokens": [1], "columns": {"prompt": [{"role": "user", "content": asked}]}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"prompt": prompt, "answers": answers}) + "\n")


def run_of(folder: Path, method: str, steps: int, ledger: str | None = None) -> Path:
    """A run's folder with a real ledger."""
    folder.mkdir()
    (folder / "resolved.yaml").write_text(f"method:\n  name: {method}\n")
    (folder / "environment.json").write_text(json.dumps({"num_steps": steps}))
    if ledger:
        shutil.copy(LEDGERS / ledger, folder / "ledger.jsonl")
    return folder


def append(run: Path, *rows: dict[str, Any], cut: str = "") -> None:
    with (run / "ledger.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + cut)


def shown(run: Watch | Path, width: int = 120, height: int | None = None) -> str:
    """A frame, of which no line is wider or later than it may be."""
    watch = run if isinstance(run, Watch) else Watch(run)
    watch.look()
    console = Console(width=width, height=height or 100, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(watch, console, height))
    text = capture.get()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert height is None or len(text.splitlines()) <= height
    return text


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    ("method", "steps", "wanted"),
    [
        ("chord", 300, {"reward ": "0.750", "reward/exact": "0.750", "length ": "47.00",
                        "turns/mean": "2.000", "tools/calls": "8.000", "entropy": "0.0244",
                        "mismatch/kl": "1.58e-12", "loss": "0.0027", "lr": "0.0020",
                        "tokens_per_s": "1,197"}),
        ("dpo", 2, {"accuracy": "0.651", "margin": "0.0022", "loss": "0.692", "KL": "3.50e-04"}),
        ("sft", 200, {"loss": "0.0255", "lr": "0.0020", "grad_norm": "0.257"}),
    ],
)  # fmt: skip
def test_a_frame_says_what_the_ledger_says(
    tmp_path: Path, method: str, steps: int, wanted: dict[str, str], width: int
) -> None:
    run = run_of(tmp_path / "run", method, steps, f"{method}.jsonl")
    text = shown(run, width)
    for name, value in wanted.items():
        assert line_of(text, name).removeprefix(name).split()[0] == value, text
    state = "stopped" if method == "sft" else "finished"
    assert f"run  {method}  {state}  step " in text
    held = {"chord": "0.750 ±0.14 of 32", "dpo": "0.608 ±0.09 of 120", "sft": "0.0264"}[method]
    assert held in text and "step_" not in text
    if method == "chord":
        words = line_of(text, "seconds").replace(",", "").split()
        assert words[2:4] == ["a", "step"] and words[4::2] == ["train", "sample", "push", "score"]


def test_seconds_faults_warnings_and_what_was_predicted(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "grpo", 50)
    rows = [
        {"step": step, "loss": 0.5, "seconds": 2.0, "seconds/train": 0.5, "seconds/sample": 1.5}
        | {"predicted/seconds": 1.6, "memory_gib": 3.0, "predicted/memory_gib": 4.0}
        | ({"faults/timeout": 2.0, "faults/a\u001bb": 1.0} if step in (3, 7) else {})
        for step in range(1, 11)
    ]
    append(run, *rows, {"step": 10, "warning": ["Collapse:\nall alike"]})
    text = shown(run)
    assert "2.000 a step, sample 1.500, train 0.500" in text
    assert "1.600 s, measured 2.000 s (+25%); 4.000 GiB, measured 3.000 GiB (-25%)" in text
    assert "timeout 4, a\\x1bb 2 (last at step 7)" in text
    assert "step 10: Collapse: all alike" in text


def test_only_what_is_new_is_read_and_half_a_line_waits(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "sft", 9)
    watch = Watch(run)
    assert "has not begun" in shown(watch) and "no row of the ledger yet" in shown(watch)
    append(run, {"step": 1, "loss": 2.0}, cut='{"step": 2, "lo')
    assert "step 1/9" in shown(watch) and "2.000" in shown(watch)
    with (run / "ledger.jsonl").open("r+b") as file:
        file.write(b"x" * 10)  # what was read already is not looked at again
    append(run, cut='ss": 3.5}\n')
    assert "step 2/9" in shown(watch) and watch.ledger.said.num_broken == 0
    assert line_of(shown(watch), "loss").split()[1] == "3.500"
    assert not watch.ledger.poll()
    append(run, cut="no row\n[]\n")
    assert "ledger.jsonl: no row in 2 lines" in shown(watch)


def test_a_ledger_that_a_resumed_run_wrote_anew(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "sft", 9)
    append(run, *({"step": step, "loss": float(step)} for step in range(1, 8)))
    watch = Watch(run)
    assert "step 7/9" in shown(watch)
    part = run / "part"
    part.write_text('{"step": 1, "loss": 1.0}\n' + '{"step": 2, "loss": 9.0}\n' * 40)
    part.replace(run / "ledger.jsonl")
    assert "step 2/9" in shown(watch) and watch.ledger.said.num_rows == 41
    (run / "ledger.jsonl").unlink()
    assert "step 0/9" in shown(watch)


def test_a_ledger_of_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """Opened in under a second, with all that was lost and the last evaluation, wherever they
    are.
    """
    run = run_of(tmp_path / "run", "chord", 100_000)
    rows = [json.loads(line) for line in (LEDGERS / "chord.jsonl").read_text().splitlines()]
    row = next(one for one in rows if one["step"] == 200 and "loss" in one)
    held_out = next(one for one in rows if one["step"] == 200 and "loss" not in one)
    row = {name: value for name, value in row.items() if not name.startswith(("router/", "push/"))}
    rest = json.dumps(row).removeprefix('{"step": 200')
    lost = rest[:-1] + ', "faults/timeout": 2.0}'
    lines = [f'{{"step": {i}{rest if i % 1000 else lost}\n' for i in range(1, 100_001)]
    lines.insert(40_000, json.dumps(held_out | {"step": 40_000}) + "\n")
    (run / "ledger.jsonl").write_text("".join(lines))
    follower = Follower(run / "ledger.jsonl")
    started = time.process_time()
    follower.poll()
    assert time.process_time() - started < 1
    said = follower.said
    assert said.step == 100_000 and said.faults == {"faults/timeout": 200}
    assert said.held_out["step"] == 40_000 and said.training["step"] == 100_000
    assert said.num_rows < 3000  # that were kept in mind, but for what was counted
    assert all(len(curve.steps) <= follow.POINTS for curve in said.curves.values())
    assert said.curves["loss"].steps[0] == 1
    before = said.num_rows
    append(run, {"step": 100_001, "loss": 1.0})
    assert follower.poll() and follower.said.num_rows == before + 1


def test_a_curve_keeps_its_way_when_it_is_thinned() -> None:
    curve = Thinned()
    for step in range(100_000):
        curve.add(step, float(step))
    assert len(curve.steps) < follow.POINTS
    assert curve_of(curve, 8, BARS) == BARS
    peak = Thinned()
    for step, value in enumerate([0.0, 1.0, float("nan"), 0.5, -1e308, 1e308]):
        peak.add(step, value)
    assert curve_of(peak, 8, "0123") == "22203"
    assert curve_of(Thinned(), 8, BARS) == curve_of(None, 8, BARS) == ""


def test_the_newest_answers_with_their_verdicts(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "grpo", 300, "chord.jsonl")
    batch(run / "rollouts" / "00000008.jsonl", answer("old", 0.0))
    watch = Watch(run)
    assert "old" in shown(watch)
    lost = answer("lost", None, fault="timeout")
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "mul"}]},
        {"role": "tool", "content": "5320"},
        {"role": "assistant", "content": "5320"},
    ]
    best = answer("5320", 1.0, messages=turns)
    file = run / "rollouts" / "00000009.jsonl"
    batch(file, answer("middle", 0.5), answer("9", 0.0, finish="length"), best, lost)
    watch._rest = 0.0  # pyright: ignore[reportPrivateUsage]
    text = shown(watch)
    assert "rollouts of step 9" in text and "old" not in text and "middle" not in text
    assert "best 1  reward 1 (exact 1)  3 tokens" in text
    assert "worst 1  reward 0 (exact 0)  3 tokens  cut at the limit" in text
    assert 'assistant: {"name": "mul"}' in text and "tool: 5320" in text
    time.sleep(0.01)
    batch(file, answer("again", 0.25))  # a run that went on from an earlier step
    watch._rest = 0.0  # pyright: ignore[reportPrivateUsage]
    assert "again" in shown(watch) and "middle" not in shown(watch)


def test_hostile_text_is_shown_harmless(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r\x1b[31mun", "sft\x1b[2J", 9)
    evil = "\x1b]0;title\x07\x1b[2J[bold]x[/bold]\u202egnp.exe\u2028\r" + "字" * 400 + "a" * 5000
    append(run, {"step": 1, "loss": 1.0, "reward/\x1b[2J\n" + "字" * 90: 1.0, "warning": [evil]})
    batch(run / "rollouts" / "00000001.jsonl", answer(evil, 1.0), asked=evil)
    for width in (80, 120):
        text = shown(run, width)
        assert not set(text) & set("\x1b\x07\r\u202e\u2028")
        assert "\\x1b]0;title\\x07" in text and "[bold]x[/bold]" in text
        for height in (10, 24, 50):
            shown(run, width, height)


def test_a_terminal_with_few_lines_has_the_first_figures_and_an_answer(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "chord", 300, "chord.jsonl")
    batch(run / "rollouts" / "00000300.jsonl", answer("good\n" * 40, 1.0), answer("bad", 0.0))
    small, large = shown(run, 80, 24), shown(run, 120, 60)
    assert "reward " in small and "loss " in small and "more with --once" in small
    assert "best 1" in small and "best 1" in large and "worst 1" in large


def test_whether_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "run", "sft", 9)
    append(run, {"step": 1, "loss": 1.0, "seconds": 2.0})
    watch = Watch(run)
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "  running  step 1/9" in shown(watch) and "about 16 s left" in shown(watch)
    (run / "starts.jsonl").write_text('{"start": "fresh", "step": 0}\n')
    assert "stopped (killed, or lost with its node)" in shown(watch)
    (run / "starts.jsonl").write_text('{"start": "fresh"}\n{"end": 1, "crash": true}\n')
    assert "stopped (exit code 1, a crash)" in shown(watch)
    append(run, {"step": 9, "loss": 1.0})
    assert "  finished  " in shown(watch)


def test_a_job_of_another_node_is_known_by_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lease(count: int, host: str = "n17", age: float = 0.0) -> None:
        path = tmp_path / ".lease"
        path.write_text(json.dumps({"token": "a", "host": host, "count": count}))
        os.utime(path, (time.time() - age, time.time() - age))

    holder = Holder(tmp_path)
    assert holder.look() is None
    lease(3)
    assert holder.look() == "n17"
    lease(3, age=1000)
    old = Holder(tmp_path)
    assert old.look() is None  # nobody has written for long
    lease(4, age=1000)
    assert old.look() == "n17"  # but clocks of nodes differ: it counts
    (tmp_path / ".lease").unlink()
    assert old.look() is None


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert cli.main(["watch", str(path), "--once"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("moetrain: error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["watch", str(tmp_path), "--every", "nan"])


def test_a_pipe_gets_one_frame(tmp_path: Path) -> None:
    """Also where it takes few characters."""
    run = run_of(tmp_path / "run", "chord", 300, "chord.jsonl")
    batch(run / "rollouts" / "00000300.jsonl", answer("é字", 1.0))
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    words = [sys.executable, "-m", "moetrain", "watch", str(run)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.isascii() and "\\xe9\\u5b57" in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_in_a_terminal_until_it_is_interrupted(tmp_path: Path) -> None:
    """It goes on with the run, and leaves the terminal as it was with exit code 0."""
    run = run_of(tmp_path / "run", "sft", 9)
    append(run, {"step": 1, "loss": 1.0})
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it in what they put aside
        words = [sys.executable, "-m", "moetrain", "watch", str(run), "--every", "0.1"]
        os.execve(sys.executable, words, os.environ | {"TERM": "xterm"})
    termios.tcsetwinsize(terminal, (24, 80))
    text = b""

    def wait_for(word: bytes) -> None:
        nonlocal text
        deadline = time.monotonic() + 60
        while word not in text and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    text += os.read(terminal, 1 << 16)
                except OSError:  # it has ended
                    break
        assert word in text, text

    wait_for(b"step 1/9")
    append(run, {"step": 4, "loss": 1.0})
    wait_for(b"step 4/9")
    os.kill(pid, signal.SIGINT)
    wait_for(b"\x1b[?1049l")
    wait_for(b"\x1b[?25h")
    while True:
        try:
            if not os.read(terminal, 1 << 16):
                break
        except OSError:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
