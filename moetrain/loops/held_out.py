"""Answers to held-out prompts, kept: `<run_dir>/answers` has a file for each evaluation,
`00000050.jsonl`: a head (step, temperature), then a line for each prompt, as in a run's rollouts.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data.run_tokenizer import chat_of, tokenizer_of
from moetrain.data.samples import Prompt, Sample, write_lines
from moetrain.data.trajectories import Trajectory
from moetrain.data.turns import stop_ids
from moetrain.engine import Engine
from moetrain.loops.store import readable, row_of
from moetrain.rewards import Verdict
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.embedded import Embedded

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
        answers: Sequence[tuple[Prompt, Trajectory]],
        graded: Sequence[Verdict],
    ) -> None:
        """Keep the answers of an evaluation, and of the earlier ones as many as KEPT_BYTES hold."""
        pairs = zip(answers, graded, strict=True)
        head: dict[str, Any] = {"step": step, "temperature": temperature}
        rows = (row_of(prompt, readable([made]), [one]) for (prompt, made), one in pairs)
        write_lines(self.folder / f"{step:08d}.jsonl", [head, *rows])
        total = 0
        for number, path in enumerate(reversed(self._files())):
            total += path.stat().st_size
            if number and total > KEPT_BYTES:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """In the order of their steps."""
        return sorted(path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())


class SamplePrompts:
    """Answers to `train.sample_prompts` of a run that samples nothing to learn from: greedy, from a
    copy of the model on the first rank, which lives for as long as it answers.
    """

    def __init__(self, recipe: Recipe, engine: Engine, prompts: Sequence[Prompt], step: int):
        self.engine, self.prompts = engine, prompts
        self.kept = Answers(recipe.run_dir / "answers")
        self.tokenizer = tokenizer_of(recipe)
        stops = stop_ids(chat_of(recipe), engine.source.hf)
        self.sampling = Sampling(recipe.train.sample_tokens, 0.0, stop_ids=stops)
        if engine.world.is_first:
            self.kept.go_on(step)

    def answer(self, step: int) -> None:
        """Answer all, and keep the answers as those of `step`. Collective."""
        weights = self.engine.export("first")
        world, models = self.engine.world, list[Embedded]()

        def pushed() -> None:
            try:
                models.append(Embedded(self.engine.source.hf, self.tokenizer))
                models[0].push(weights, step)
            finally:
                exhaust(weights)  # after one that failed, too: the other ranks do

        def answered() -> None:
            requests = [Request(prompt, 0, 0, self.sampling) for prompt in self.prompts]
            drawn: dict[str, Sample] = {}
            models[0].generate(requests, lambda sample: drawn.update({sample.prompt_id: sample}))
            answers = [(prompt, Trajectory.of(drawn[prompt.id])) for prompt in self.prompts]
            self.kept.write(step, 0.0, answers, [Verdict(None, {})] * len(answers))

        if not world.is_first:
            exhaust(weights)
        world.first(pushed)
        world.first_slowly(answered)


def exhaust(tensors: Iterable[Any]) -> None:
    """Go through what is left."""
    for _ in tensors:
        pass
