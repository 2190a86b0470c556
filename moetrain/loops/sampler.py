"""Where a step's graded answers come from: a rollout engine that one process drives, or a folder of
earlier rollouts.

All methods are collective. The first rank drives: it samples and grades in a thread of its own,
while the others, and its own main thread, wait in short rounds in which a signal is heard.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

from moetrain.config.recipe import Recipe
from moetrain.data.packing import pack
from moetrain.data.prompts import PromptSet, prompts_read
from moetrain.data.run_tokenizer import chat_of, tokenizer_of
from moetrain.data.trajectories import Trajectory
from moetrain.data.turns import stop_ids
from moetrain.engine import Engine
from moetrain.errors import DataError, RolloutError
from moetrain.loops.collector import Collector
from moetrain.loops.dialogues import open_dialogues, with_environment
from moetrain.loops.held_out import Answers, exhaust
from moetrain.loops.outline import Outline, outlined
from moetrain.loops.replayed import Replayed
from moetrain.loops.rollouts import Drawing, means, timed, turn_figures, verdicts, with_reward
from moetrain.loops.store import Batch, Place, Store, drawn_with
from moetrain.loops.teacher_servers import TeacherServers
from moetrain.methods import METHODS
from moetrain.ops.packed import concat, from_tokens
from moetrain.pulse import beat
from moetrain.rewards import Grader
from moetrain.rollout import open_engine
from moetrain.rollout.base import Probe, RolloutEngine, Sampling
from moetrain.rollout.parity import gap_of, tolerance_of
from moetrain.run.stop import StopSignal
from moetrain.weights.sent import Sent

ROUND_SECONDS = 2.0
NUM_PROBES = 4  # prompts that are scored on both sides after every push
PROBE_LENGTH = 72  # tokens at least: two blocks of a prefix cache, or a stale one is not seen
T = TypeVar("T")


class Sampler(Protocol):
    """Gives a step its batch, and takes its weights."""

    def start(self, step: int, last: int, state: dict[str, Any]) -> None:
        """Go on after `step` of a run of `last` steps, with what `state_dict` gave."""
        ...

    def take(self, step: int) -> Outline | None:
        """The batch that `step` learns from, its answers on the first rank; None when the run was
        told to stop.
        """
        ...

    def push(self, step: int) -> dict[str, float]:
        """Hand the weights after `step` on; figures of the proof that they arrived."""
        ...

    def evaluate(self, step: int) -> dict[str, Any]:
        """Rewards of answers to the held-out prompts, and of how many answers; a fault's words."""
        ...

    def state_dict(self, given: Outline) -> dict[str, Any]:
        """The place in the stream of prompts after this batch."""
        ...


@contextmanager
def open_sampler(
    recipe: Recipe, engine: Engine, prompts: PromptSet, stop: StopSignal
) -> Iterator[Sampler]:
    """The recipe's sampler: a rollout engine, or `rollout.replay`."""
    _, rollout = recipe.sampling
    if rollout.replay is not None:
        store, drawn = Store(rollout.replay), drawn_with(rollout)
        yield Replayed(store, prompts, drawn, engine.world, engine.model)
        return
    with ExitStack() as stack:
        driver = None
        if engine.world.is_first:
            driver = Driver(recipe, engine, prompts, stack)
        yield Live(recipe, engine, prompts, stop, driver)


class Driver:
    """What the first rank alone has: the rollout engine, the grader, and a thread that makes
    batches one after the other.
    """

    def __init__(self, recipe: Recipe, engine: Engine, prompts: PromptSet, stack: ExitStack):
        method, rollout = recipe.sampling
        self.store = Store(recipe.run_dir / "rollouts")
        self.held_out = Answers(recipe.run_dir / "answers")
        folder = tokenizer_of(recipe)
        self.engine: RolloutEngine = open_engine(recipe, engine.source.hf, folder)
        stack.callback(self.engine.close)
        self.grader = Grader(recipe.rewards, rollout.reward_workers, rollout.reward_seconds)
        stack.callback(self.grader.close)
        teacher = None
        if recipe.teacher is not None and recipe.teacher.address:
            teacher = TeacherServers(recipe)
            stack.callback(teacher.close)
        chat = chat_of(recipe)
        self.stop_ids = stop_ids(chat, engine.source.hf)
        self.dialogues = open_dialogues(recipe, chat, self.stop_ids, stack)
        sampling = Sampling.of(rollout, rollout.temperature, self.stop_ids)
        sampling = sampling.to_learn_from(routes=rollout.routing_replay)
        self.prompts = with_environment(prompts.held_out, self.dialogues)
        online = METHODS[recipe.method.name].online
        assert online is not None
        drops = online.drops
        self.collector = Collector(
            drawing=Drawing(self.engine, sampling, recipe.seed, self.dialogues),
            grader=self.grader,
            teacher=teacher,
            prompts=prompts.train.as_given(with_environment(prompts.train.prompts, self.dialogues)),
            store=self.store,
            drawn=drawn_with(rollout),
            num_prompts=rollout.prompts_per_step,
            group_size=rollout.group_size,
            drops=None if drops is None else lambda r, g: drops(r, g, method),
            leaves_cut=online.truncated(method) == "mask",
            rounds=method.rounds,
            limit=prompts_read(recipe, len(prompts.train.prompts)),
            surplus=rollout.surplus,
            partial=rollout.partial,
            most=rollout.max_staleness,
        )
        self._changed = threading.Condition()
        self._asked: list[int] = []
        self._done: dict[int, Batch | BaseException] = {}
        self._place = Place(0)
        self._busy = self._paused = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="rollouts")

    def start(self, place: Place) -> None:
        self._place = place
        self._thread.start()

    def ask(self, step: int) -> None:
        with self._changed:
            self._asked.append(step)
            self._changed.notify_all()

    def wait(self, step: int) -> bool:
        """Whether the batch of `step`, or a reason why there is none, came within a round."""
        with self._changed:
            return self._changed.wait_for(lambda: step in self._done, ROUND_SECONDS)

    def pause(self) -> bool:
        """Begin no further batch; whether the one in hand ended within a round."""
        with self._changed:
            self._paused = True
            return self._changed.wait_for(lambda: not self._busy, ROUND_SECONDS)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def result(self, step: int) -> Batch:
        batch = self._done.pop(step)
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._asked) and not self._paused)
                step = self._asked.pop(0)
                self._busy = True
            try:
                batch: Batch | BaseException = self.collector.batch(step, self._place)
                self._place = batch.place
            except BaseException as error:  # raised again by `result`, where it is heard
                batch = error
            with self._changed:
                self._done[step] = batch
                self._busy = False
                self._changed.notify_all()


class Live:
    """A rollout engine beside the run."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        prompts: PromptSet,
        stop: StopSignal,
        driver: Driver | None,
    ):
        self.recipe = recipe
        _, self.rollout = recipe.sampling
        self.engine, self.prompts = engine, prompts
        self.stop, self.driver = stop, driver
        self._last = self._asked = 0
        self._sent = Sent()
        length = min(PROBE_LENGTH, recipe.data.seq_len // 2)
        self._probes = [
            p.tokens * -(-length // len(p.tokens)) for p in prompts.train.prompts[:NUM_PROBES]
        ]

    def start(self, step: int, last: int, state: dict[str, Any]) -> None:
        self._last, self._asked = last, step
        place = state.get("prompts", {"cursor": 0, "fingerprint": self.prompts.train.fingerprint})
        if place["fingerprint"] != self.prompts.train.fingerprint:
            raise DataError(
                "The checkpoint was taken with other prompts (data.train, tokenizer, seed or"
                " data.shuffle): restore what it was made with, or start another run_dir."
            )
        if self.driver is not None:
            self.driver.collector.num_steps = last
            self.driver.start(Place(place["cursor"], tuple(place.get("held", ()))))
            self.driver.held_out.go_on(step)
        self.push(step)

    def take(self, step: int) -> Outline | None:
        while self._asked < min(step + self.rollout.steps_off, self._last):
            self._asked += 1
            if self.driver is not None:
                self.driver.ask(self._asked)
        while not self._shared(lambda driver: driver.wait(step)):
            if self.stop.agreed():
                return None
        driver = self.driver
        given = outlined(lambda: _driving(driver).result(step), self.engine.world.first)
        if not self.rollout.steps_off:  # training has the device to itself
            self._shared(lambda driver: driver.engine.sleep())
        return given

    def push(self, step: int) -> dict[str, float]:
        """Prove that the rollout engine serves these weights; else once more from a fresh start.

        Raises RolloutError with the numbers when they differ then, too.
        """
        while not self._shared(lambda driver: driver.pause()):
            pass
        self._shared(lambda driver: driver.engine.wake())
        limit = tolerance_of(self.recipe)
        figures: dict[str, float] = {}
        for attempt in ("push", "reload"):
            sent = self._send(step, attempt)
            sent["push/bytes"] += figures.get("push/bytes", 0.0)
            started = time.perf_counter()
            gap = self._gap()
            figures |= sent
            figures |= {"push/probe_s": time.perf_counter() - started, "push/logprob_gap": gap}
            if gap <= limit:
                break
        else:
            raise RolloutError(
                f"Step {step}: the rollout engine serves other weights than the trainer holds: its"
                f" log-probs differ by {gap:.3g} nats after a push and a reload; rollout.tolerance"
                f" is {limit:.3g}. Nothing more was sampled; the last checkpoint is whole."
            )
        figures["push/reloads"] = float(attempt == "reload")
        self._shared(lambda driver: driver.resume())
        return figures

    def _send(self, step: int, attempt: str) -> dict[str, float]:
        """Of the weights what moved, or all to an engine that holds others than it was sent."""
        held = None
        if attempt == "push":
            held = self._shared(lambda driver: driver.engine.held)
        if held is None or held != self._sent.version:
            held = None
            self._sent.forget()
        weights = self.engine.export("first", self._sent)  # which alone has the driver

        def send(driver: Driver) -> dict[str, float]:
            try:
                if attempt == "reload":
                    driver.engine.reload()
                pushed = driver.engine.push(weights, step, held)
                return {f"push/{name}": value for name, value in pushed.items()}
            finally:
                exhaust(weights)  # after a push that failed, too: the other ranks do

        if self.driver is None:
            exhaust(weights)  # every rank takes part in what is exported, to the end
        figures = self._shared(send)
        self._sent.version = step
        return figures

    def _gap(self) -> float:
        """The largest difference of a log-prob between the two sides, over given and generated
        tokens.
        """
        probe: Probe = self._shared(lambda driver: driver.engine.probe(self._probes))
        return gap_of(probe, self._score(probe.sequences))

    def _score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """The trainer's log-prob of each token after the first, of each sequence. One that another
        begins with is scored with it, and several go in a pack: servers mostly say the same, and a
        short pass takes as long as one over a whole pack.
        """
        distinct = dict.fromkeys(sequences)
        whole = [s for s in distinct if not any(s == o[: len(s)] and s != o for o in distinct)]
        lengths = [len(sequence) for sequence in whole]
        members = pack(lengths, max(self.recipe.data.seq_len, *lengths), 0)
        packs = [concat([from_tokens(whole[i]) for i in indices]) for indices in members]
        ours: dict[tuple[int, ...], list[float]] = {}
        for indices, logp in zip(members, self.engine.logprobs(packs), strict=True):
            parts = logp.split([lengths[i] for i in indices])
            ours |= {whole[i]: part.tolist() for i, part in zip(indices, parts, strict=True)}
        longer = [next(w for w in whole if w[: len(s)] == s) for s in sequences]
        return [ours[w][: len(s) - 1] for s, w in zip(sequences, longer, strict=True)]

    def evaluate(self, step: int) -> dict[str, Any]:
        while not self._shared(lambda driver: driver.pause()):
            pass
        figures = self.engine.world.first_slowly(lambda: self._answers(step))
        self._shared(lambda driver: driver.resume())
        return figures

    def _answers(self, step: int) -> dict[str, Any]:
        driver = _driving(self.driver)
        seconds: dict[str, float] = {}
        sampling = Sampling.of(self.rollout, self.rollout.eval_temperature, driver.stop_ids)
        drawing = Drawing(driver.engine, sampling, 0, driver.dialogues)
        drawn: dict[tuple[str, int], Trajectory] = {}
        with timed(seconds, "seconds"):
            drawing.draw(driver.prompts, 1, drawn, lambda one: None)
            before = driver.grader.num_faults
            answers = [(prompt, drawn[prompt.id, 0]) for prompt in driver.prompts]
            graded = verdicts(driver.grader, answers)
        driver.held_out.write(step, sampling.temperature, answers, graded)
        made = [one for _, one in answers]
        figures = means(with_reward(made, graded), "eval_reward")
        figures["eval_reward/answers"] = float(len(made))
        logged = driver.grader.take_metrics()
        figures |= {f"eval_logged/{name}": value for name, value in logged.items()}
        if driver.grader.num_faults > before:
            figures["eval_reward/fault"] = driver.grader.said
        figures |= {f"eval_{name}": value for name, value in turn_figures(made).items()}
        lengths = [one.num_tokens for one in made]
        return figures | {"eval_length/mean": sum(lengths) / max(1, len(lengths))} | seconds

    def state_dict(self, given: Outline) -> dict[str, Any]:
        return given.state(self.prompts.train.fingerprint)

    # Between the driver and the other ranks

    def _shared(self, ask: Callable[[Driver], T]) -> T:
        """What the driver answers, on every rank; what it raises, too."""

        result = self.engine.world.first(lambda: ask(_driving(self.driver)))
        beat()  # a rollout engine that hangs is noticed by its client, not by the launcher
        return result


def _driving(driver: Driver | None) -> Driver:
    assert driver is not None, "the first rank drives"
    return driver
