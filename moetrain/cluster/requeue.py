"""What becomes of a job whose step has ended: queued again, or stopped with the reason. No torch."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.cluster.watchdog import HUNG
from moetrain.errors import DivergedError, MoetrainError
from moetrain.loops.starts import add_row, read_starts, saved_step, streak

SAVED = 128 + signal.SIGTERM  # the exit code of a run that was told to stop, saved and left
LONGEST_PAUSE = 3600  # seconds
FOR_GOOD = {
    MoetrainError.exit_code: "a mistake that another start would meet again (its message is above)",
    DivergedError.exit_code: "the loss or a gradient was not finite (see above)",
}


@dataclass(frozen=True)
class Verdict:
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


def judge(code: int, told: str, broken: int, step: int, retries: int, pause: int) -> Verdict:
    """The verdict on exit code `code` after Slurm's signal `told` (USR1, TERM or nothing).

    broken: how often the run has broken off since checkpoint `step`. A new checkpoint clears the
    account, so that a long run may lose a node a week and a broken one does not run for ever.
    """
    if code in FOR_GOOD:
        return Verdict(False, FOR_GOOD[code])
    if code == SAVED and told != "nothing":
        ends = "its time is over" if told == "USR1" else "Slurm said SIGTERM"
        return Verdict(True, f"{ends}; saved at step {step}")
    what = {HUNG: "it hung", SAVED: "a signal to its ranks ended it"}.get(code, f"exit code {code}")
    place = f"checkpoint {step}" if step else "the beginning"
    if broken >= retries:
        return Verdict(
            False,
            f"{what}; it broke off {broken + 1} times since {place} (MOETRAIN_RETRIES={retries})."
            " Mend the cause, then submit it again",
            crash=True,
        )
    seconds = min(pause * 2**broken, LONGEST_PAUSE)
    return Verdict(True, f"{what}, time {broken + 1} since {place}", seconds, crash=True)


def after(run_dir: Path, code: int, told: str, retries: int, pause: int) -> Verdict:
    """Judge, and record the end in the run's starts.jsonl."""
    step = saved_step(run_dir)
    verdict = judge(code, told, streak(read_starts(run_dir), step), step, retries, pause)
    if run_dir.is_dir():  # a mistake found at once has made none
        row = {"end": code, "step": step, "crash": verdict.crash, "verdict": str(verdict)}
        try:
            add_row(run_dir, row)
        except OSError as error:
            return Verdict(False, f"{run_dir} cannot be written ({error.strerror}): {verdict.why}")
    return verdict
