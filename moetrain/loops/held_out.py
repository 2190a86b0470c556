"""Answers to held-out prompts, kept: `<run_dir>/answers` has a file for each evaluation,
`00000050.jsonl`: a head (step, temperature), then a line for each prompt, as in a run's rollouts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.data.samples import Prompt, Sample, write_lines
from moetrain.rewards import Graded

KEPT_BYTES = 1 << 29  # of all evaluations together: the oldest go first, the newest always stays


class Answers:
    """The folder of a run's held-out answers."""

    def __init__(self, folder: Path):
        self.folder = folder

    def go_on(self, step: int) -> None:
        """Remove what an earlier start wrote past `step`, as the ledger drops its rows; all of it
        for a run from the start.
        """
        for path in self._files():
            if not step or int(path.stem) > step:
                path.unlink(missing_ok=True)

    def write(
        self,
        step: int,
        temperature: float,
        answers: Sequence[tuple[Prompt, Sample]],
        graded: Sequence[Graded],
    ) -> None:
        """Keep the answers of an evaluation, and of the earlier ones as many as KEPT_BYTES hold."""
        pairs = zip(answers, graded, strict=True)
        head: dict[str, Any] = {"step": step, "temperature": temperature}
        rows = (row_of(prompt, [sample], [one]) for (prompt, sample), one in pairs)
        write_lines(self.folder / f"{step:08d}.jsonl", [head, *rows])
        total = 0
        for number, path in enumerate(reversed(self._files())):
            total += path.stat().st_size
            if number and total > KEPT_BYTES:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """In the order of their steps."""
        return sorted(path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())


def row_of(prompt: Prompt, samples: Sequence[Sample], graded: Sequence[Graded]) -> dict[str, Any]:
    """A prompt with its answers, as a line of JSON."""
    answers = [
        sample.to_json()
        | {"reward": one.reward, "parts": dict(one.parts)}
        | ({"fault": one.fault} if one.fault else {})
        | ({"extra": dict(one.extra)} if one.extra else {})
        for sample, one in zip(samples, graded, strict=True)
    ]
    return {"prompt": asdict(prompt), "answers": answers}
