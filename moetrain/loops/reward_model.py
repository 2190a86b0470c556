"""`moetrain serve --reward-model`: a reward model under the engine at any layout, behind an
endpoint. What has come meanwhile goes through together, in packs without padding.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.answering import SERVED
from moetrain.config.recipe import Recipe
from moetrain.data import tokenizer
from moetrain.engine import Engine
from moetrain.engine.on_disk import recipe_for
from moetrain.engine.source import find_source, model_of
from moetrain.engine.world import is_lost
from moetrain.errors import ConfigError
from moetrain.loops.agent_api import Refused
from moetrain.loops.reward_server import RewardServer
from moetrain.loops.score import bins_of, of_run
from moetrain.models import read_model
from moetrain.models.config import has_scalar_head
from moetrain.ops.packed import concat, from_tokens
from moetrain.pulse import beat
from moetrain.run.stop import StopSignal
from moetrain.weights.peft_reader import PeftReader

RUN_DIR = Path(SERVED["run_dir"])
KEY = "REWARD_MODEL_API_KEY"
MOST_WAITING = 1 << 16  # rows
IDLE_SECONDS = 1.0  # between two words of the ranks to each other, where nobody asks


def serve_reward_model(model: str, host: str, port: int, overrides: Sequence[str] = ()) -> int:
    """Serve `model` until SIGTERM. Every rank of the job calls this; the first one listens. Returns
    the exit code. Raises MoetrainError for what is no reward model.
    """
    recipe = reward_recipe(model, overrides)
    token = os.environ.get(KEY, "")
    if not token:
        raise ConfigError(
            f"The server's token is wanted: set {KEY} here and where the trainer runs, such as"
            f" {KEY}=$(openssl rand -hex 32)."
        )
    engine = Engine(recipe, train=False)
    world = engine.world
    with ExitStack() as stack:
        desk = stack.enter_context(_desk(engine)) if world.is_first else None

        def listen() -> None:
            assert desk is not None
            try:
                server = RewardServer(desk, host, port, token)
            except OSError as error:
                raise ConfigError(
                    f"--host {host} --port {port}: {error.strerror}. Give others, or none."
                ) from None
            stack.callback(server.close)
            print(f"ready at {server.address}, the token is {KEY}'s", flush=True)

        try:
            world.first(listen)
            _score_what_comes(engine, desk, stack.enter_context(StopSignal(world)))
        except RuntimeError as error:
            if not is_lost(error):
                raise
            # Whoever started the ranks says which, and why.
            print("moetrain: another rank is gone, and so is this server.", file=sys.stderr)
            return 1
    engine.close()
    return 0


def _score_what_comes(engine: Engine, desk: "Desk | None", stop: StopSignal) -> None:
    """Until a rank is told to stop. Collective; the first rank has the desk."""
    world = engine.world
    most = engine.recipe.data.seq_len * world.dp_size * world.plan.pp
    while not stop.agreed():
        rows = world.first(lambda: [] if desk is None else desk.take(most))
        beat()
        if rows:
            scores = score_rows(engine, rows)
            if desk is not None:
                desk.give(scores)


def reward_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that names the reward model. Raises ConfigError where it is none."""
    path, adapter = of_run(model)
    source = find_source(recipe_for(path, RUN_DIR).model)
    longest = source.hf.get("max_position_embeddings")
    data = dict(SERVED["data"])
    if isinstance(longest, int):
        data["seq_len"] = min(data["seq_len"], longest)
    sections = adapter | {"method": SERVED["method"], "data": data}
    recipe = recipe_for(path, RUN_DIR, overrides, sections)
    if not has_scalar_head(source.hf) and not _adapter_has_head(recipe):
        raise ConfigError(
            f"{model} has no score head: it is no reward model. Give the run_dir or the folder of a"
            " model that `method: reward` trained."
        )
    return recipe


def _adapter_has_head(recipe: Recipe) -> bool:
    if recipe.adapter is None or recipe.adapter.path is None:
        return False
    source = model_of(recipe)
    model = read_model(source.hf)
    return PeftReader(recipe.adapter.path, model, source.reader(recipe, model)).head is not None


def score_rows(engine: Engine, rows: Sequence[Sequence[int]]) -> list[float]:
    """The scalar at the last token of each row, on the first rank. Collective."""
    world = engine.world
    members = list(bins_of([len(row) for row in rows], engine.recipe.data.seq_len))
    mine = members[world.dp_rank :: world.dp_size]
    packs = [concat([from_tokens(rows[i]) for i in indices]) for indices in mine]
    scores: dict[int, float] = {}
    for indices, pack, out in zip(mine, packs, engine.outputs(packs), strict=True):
        assert out.value is not None, "the model has no scalar head"
        last = pack.cu_seqlens[1 : len(indices) + 1].long() - 1
        scores |= zip(indices, out.value[last].tolist(), strict=True)
    for part in world.to_first(scores) or ():
        scores |= part
    return [scores[i] for i in range(len(rows))] if world.is_first else []


@dataclass(eq=False)
class _Job:
    """A request that waits."""

    rows: Sequence[Sequence[int]]
    scores: list[float] = field(default_factory=list[float])
    num_taken: int = 0
    is_done: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Between the threads of requests and the ranks, which take what has come: `Scorer`."""

    def __init__(self, tokenizer: Any, longest: int, vocab: int):
        self.longest, self.vocab = longest, vocab
        self._tokenizer = tokenizer
        self._tokenizing = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._taken: list[_Job] = []  # of each row that is being scored
        self._is_over = False

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *exc: object) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._is_over = True
            for job in {*self._waiting, *self._taken}:
                job.is_done.set()

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise Refused(501, "the model has no tokenizer: set model.tokenizer=FOLDER")
        with self._tokenizing:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def ask(self, rows: Sequence[Sequence[int]]) -> list[float]:
        job = _Job(rows)
        with self._changed:
            if self._is_over:
                raise Refused(503, "the server is being stopped", "stopped")
            if sum(len(one.rows) for one in self._waiting) + len(rows) > MOST_WAITING:
                raise Refused(429, f"{MOST_WAITING} rows wait", "too_many")
            self._waiting.append(job)
            self._changed.notify_all()
        job.is_done.wait()
        if len(job.scores) < len(rows):
            raise Refused(503, "the server was stopped", "stopped")
        return job.scores

    def take(self, most: int) -> list[Sequence[int]]:
        """Rows in the order of their coming, up to `most` tokens; none where none came for a
        while.
        """
        rows: list[Sequence[int]] = []
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting), IDLE_SECONDS)
            self._taken = []
            while self._waiting:
                job = self._waiting[0]
                row = job.rows[job.num_taken]
                if rows and len(row) > most:
                    break
                rows.append(row)
                self._taken.append(job)
                most -= len(row)
                job.num_taken += 1
                if job.num_taken == len(job.rows):
                    self._waiting.popleft()
        return rows

    def give(self, scores: Sequence[float]) -> None:
        """Of the rows that were taken."""
        with self._changed:
            for job, score in zip(self._taken, scores, strict=True):
                job.scores.append(score)
                if len(job.scores) == len(job.rows):
                    job.is_done.set()
            self._taken = []


def _desk(engine: Engine) -> Desk:
    folder = engine.source.tokenizer
    loaded = None if folder is None else tokenizer.load(folder)
    return Desk(loaded, engine.recipe.data.seq_len, engine.model.heads.vocab)
