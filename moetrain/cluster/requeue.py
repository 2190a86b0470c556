"""What becomes of a job whose step has ended: queued again, or stopped with the reason."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.cluster.watchdog import HUNG
from moetrain.errors import DivergedError, MoetrainError
from moetrain.run.starts import StartRow, add_row, read_starts, saved_step, streak

SAVED = 128 + signal.SIGTERM  # the exit code of a run that was told to stop, saved and left
LONGEST_PAUSE = 3600  # seconds
SAID = {
    "USR1": "its time was over",
    "TERM": "Slurm said SIGTERM",
    "nothing": "a signal to its ranks ended it",
}
FOR_GOOD = {
    MoetrainError.exit_code: "a mistake that another start would meet again (its message is above)",
    DivergedError.exit_code: "the loss or a gradient was not finite (see above)",
}


@dataclass(frozen=True)
class Decision:
    """Whether the job goes on, after so many seconds, and why."""

    again: bool
    why: str
    seconds: int = 0
    crash: bool = False

    def __str__(self) -> str:
        return f"again in {self.seconds} s: {self.why}" if self.again else f"stopped: {self.why}"


def cause(codes: Sequence[int]) -> int:
    """The exit code that says why, of a step's and its nodes': srun ends the others, and theirs
    says nothing.
    """

    def rate(code: int) -> int:
        return 0 if code in FOR_GOOD else 1 if code == HUNG else 3 if code in (0, SAVED) else 2

    return min(codes, key=rate)


def judge(
    code: int, told: str, rows: list[StartRow], step: int, retries: int, pause: int
) -> Decision:
    """The decision on exit code `code` after Slurm's signal `told` (USR1, TERM or nothing).

    rows: of starts.jsonl; `step`: of the newest checkpoint. A new checkpoint clears the account of
    what broke off, so that a long run may lose a node a week and a broken one does not go on for
    ever.
    """
    if code in FOR_GOOD:
        return Decision(False, FOR_GOOD[code])
    started = next((row["step"] for row in reversed(rows) if "start" in row), 0)
    what = f"exit code {code}"
    if code == HUNG:
        what = "it hung"
    elif code == SAVED:
        what = SAID[told]
        if step > started:
            return Decision(True, f"{what}, saved at step {step}")
    broken = streak(rows, step)
    place = f"checkpoint {step}" if step else "the beginning"
    if broken >= retries:
        return Decision(
            False,
            f"{what}; it broke off {broken + 1} times since {place} (MOETRAIN_RETRIES={retries})."
            " Mend the cause, then submit it again",
            crash=True,
        )
    seconds = min(pause * 2**broken, LONGEST_PAUSE)
    return Decision(True, f"{what}, time {broken + 1} since {place}", seconds, crash=True)


def after(run_dir: Path, code: int, told: str, retries: int, pause: int) -> Decision:
    """Judge, and record the end in the run's starts.jsonl."""
    step = saved_step(run_dir)
    decision = judge(code, told, read_starts(run_dir), step, retries, pause)
    if decision.crash or run_dir.is_dir():  # a mistake found at once leaves no folder
        row = {"end": code, "step": step, "crash": decision.crash, "decision": str(decision)}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            add_row(run_dir, row)
        except OSError as error:
            return Decision(
                False, f"{run_dir} cannot be written ({error.strerror}): {decision.why}"
            )
    return decision
