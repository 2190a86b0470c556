"""Trajectories of several turns: what the model says goes to the environment, and the model goes on
from its reply, by token ids.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetrain.config.recipe import Recipe
from moetrain.data.begun import begun_in
from moetrain.data.chat import Chat
from moetrain.data.continuation import Continuation, Continuer
from moetrain.data.messages import FormatError, Message
from moetrain.data.samples import Prompt, Sample
from moetrain.data.scene import messages_of
from moetrain.data.thoughts import opened_by
from moetrain.data.trajectories import Branch, Trajectory
from moetrain.environments.base import Reply
from moetrain.environments.calls import TurnReader, check_format
from moetrain.environments.service import EnvironmentService
from moetrain.errors import DataError
from moetrain.loops.agents import Agents
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.follow_ups import FollowUps

POLL_SECONDS = 0.5  # after which a draw that has ended is noticed
Key = tuple[str, int]  # a prompt's id, which answer to it


@dataclass(frozen=True)
class Dialogues:
    """What all draws of a run have alike."""

    service: EnvironmentService
    chat: Chat
    stop_ids: tuple[int, ...]
    reader: TurnReader
    max_turns: int  # of the model
    max_length: int  # tokens of a sequence, whoever wrote them
    max_prompt: int  # tokens of a prompt, so that a turn has room

    def begin(self, prompt: Prompt) -> Prompt:
        """The prompt with the environment's tools and what it says at first. Raises DataError."""
        try:
            return self.service.scene.begin(prompt, self.chat, self.max_prompt)
        except FormatError as error:
            raise DataError(
                f"{prompt.source}: {error}. Leave the record out, or mend it."
            ) from None

    def after(self, prompt: Prompt, one: Trajectory, reply: Sequence[Message]) -> Continuation:
        """How an open trajectory goes on. Raises FormatError where the template cannot say it."""
        continuer = Continuer(self.chat, self.stop_ids, **self._kwargs(prompt))
        branch, last = one.branches[-1], one.turns[-1]
        return continuer.after(
            [*messages_of(prompt), *one.messages[:-1]],
            one.messages[-1],
            last.text,
            branch.tokens[-last.num_tokens :].tolist(),
            reply,
        )

    def _kwargs(self, prompt: Prompt) -> dict[str, Any]:
        return self.service.scene.kwargs_of(prompt.columns)


def open_dialogues(
    recipe: Recipe, chat: Chat, stop_ids: tuple[int, ...], stack: ExitStack
) -> Dialogues | Agents | None:
    """The recipe's environment, which ends with `stack`; None where an answer is one turn. Raises
    ConfigError.
    """
    rollout = recipe.rollout
    if rollout is None or rollout.environment == "single":
        return None
    if rollout.environment == "agents":
        return Agents(recipe, chat, stop_ids, stack)
    service = EnvironmentService(rollout)
    stack.callback(service.close)
    check_format(chat.template, rollout.call_format, service.tools)
    reader = TurnReader.of(chat.template, service.tools, rollout.call_format)
    length = recipe.data.seq_len
    return Dialogues(
        service,
        chat,
        stop_ids,
        reader,
        rollout.max_turns,
        length,
        length - rollout.max_tokens,
    )


def with_environment(
    prompts: Sequence[Prompt], dialogues: Dialogues | Agents | None
) -> list[Prompt]:
    """The prompts as they are given to the model. Raises DataError."""
    return [prompt if dialogues is None else dialogues.begin(prompt) for prompt in prompts]


@dataclass(frozen=True)
class _Waiting:
    """A trajectory whose next turn is being drawn."""

    trajectory: Trajectory
    context: NDArray[np.int32] | None  # what the model sees, where the template rewrote it
    opened: str  # the thought that is begun for it

    def seen(self, prompt: Prompt) -> list[int]:
        """The ids that the model sees before the turn."""
        if self.context is not None:
            return self.context.tolist()
        last = self.trajectory.branches[-1]
        before = prompt.tokens if last.context is None else last.context.tolist()
        return [*before, *last.tokens.tolist()]


@dataclass
class Turns:
    """One draw's trajectories between the engine and the environment; a context, which the draw is
    inside of.

    Args:
        prompts: by their ids.
        seed_of: (prompt, index, turn, tokens of it that there are) -> the seed of what follows.
        keep: takes each trajectory after every turn of the model; its finish is "open" until it
            ends. Called by one thread at a time.
    """

    dialogues: Dialogues
    prompts: Mapping[str, Prompt]
    sampling: Sampling
    seed_of: Callable[[str, int, int, int], int]
    keep: Callable[[Trajectory], None]
    follow_ups: FollowUps = field(default_factory=FollowUps)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._asked: dict[Key, Trajectory] = {}  # that the environment has to reply to
        self._waiting: dict[Key, _Waiting] = {}
        self._is_over = False
        self._thread = threading.Thread(target=self._listen, daemon=True, name="replies")

    def __enter__(self) -> "Turns":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        self._thread.join()

    def resume(self, one: Trajectory) -> None:
        """Go on with one that was stopped after a turn of the model."""
        self.follow_ups.ask()
        self._ask(one)

    def go_on(self, one: Trajectory) -> Request:
        """The request for the rest of a turn that one was stopped within."""
        prompt, begun = self.prompts[one.prompt_id], begun_in(one)
        assert begun is not None, "it was"
        seen: Sequence[int] = prompt.tokens
        if begun.before is not None:
            opened = opened_for_last_turn(prompt, one)
            waiting = _Waiting(begun.before, begun.context, opened)
            self._waiting[one.prompt_id, one.index] = waiting
            seen = waiting.seen(prompt)
        return self._request(prompt, one, seen, begun.turn)

    def drawn(self, sample: Sample) -> None:
        """Take a turn of the model."""
        key = sample.prompt_id, sample.index
        with self._lock:
            one = self._with_turn(self._waiting.pop(key, None), sample)
            if sample.finish == "open":
                self.keep(one)
                return
            if sample.finish == "length":
                self.keep(replace(one, finish="length"))
                return
            self.keep(one)
            self.follow_ups.ask()
            self._ask(one)

    def _with_turn(self, before: _Waiting | None, sample: Sample) -> Trajectory:
        """The trajectory with a turn more, open."""
        prompt = self.prompts[sample.prompt_id]
        if before is None:
            one, branches = Trajectory.of(sample), (Branch.of(sample),)
        else:
            one = before.trajectory
            branches = one.branches
            if before.context is None:
                branches = (*branches[:-1], branches[-1].with_turn(sample))
            else:
                branches = (*branches, Branch.of(sample, before.context))
        if sample.finish == "open":
            return replace(one, branches=branches, finish="open")
        num_calls = sum(len(message.get("tool_calls") or ()) for message in one.messages)
        parsed = self.dialogues.reader.read(
            sample.text, prompt.opened if before is None else before.opened, num_calls
        )
        return replace(one, branches=branches, messages=(*one.messages, parsed), finish="open")

    def _ask(self, one: Trajectory) -> None:
        key = one.prompt_id, one.index
        prompt = self.prompts[one.prompt_id]
        with self._lock:
            self._asked[key] = one
        messages = [*messages_of(prompt), *one.messages]
        self.dialogues.service.ask((key, len(one.written)), prompt.columns, messages)

    def _listen(self) -> None:
        """The thread of replies."""
        try:
            while not self._is_over:
                for asked, reply in self.dialogues.service.answers(POLL_SECONDS):
                    key, turn = cast(tuple[Key, int], asked)
                    with self._lock:
                        one = self._asked.get(key)
                        if one is not None and len(one.written) == turn:  # not of an earlier draw
                            del self._asked[key]
                            self.follow_ups.settle(self._replied(one, reply))
        except BaseException as error:  # raised again by the engine's draw
            self.follow_ups.fail(error)

    def _replied(self, one: Trajectory, reply: Reply) -> Request | None:
        """What is drawn next; None where the trajectory has ended, and is kept."""
        one = replace(one, counts=dict(Counter(one.counts or {}) + Counter(reply.counts)))
        if reply.fault:
            self.keep(replace(one, finish=reply.fault, detail=reply.detail))
        elif reply.messages is None:
            self.keep(replace(one, finish="stop"))
        elif len(one.written) >= self.dialogues.max_turns:
            self.keep(replace(one, finish="turns"))
        else:
            try:
                request = self._next(one, reply.messages)
            except FormatError as error:
                self.keep(replace(one, finish="error", detail=str(error)))
                return None
            if request is not None:
                return request
            self.keep(replace(one, finish="length"))
        return None

    def _next(self, one: Trajectory, reply: Sequence[Message]) -> Request | None:
        """The request for the turn behind a reply; None where there is no room for it. Raises
        FormatError.
        """
        prompt, branches = self.prompts[one.prompt_id], one.branches
        continued = self.dialogues.after(prompt, one, reply)
        context: NDArray[np.int32] | None = None
        if continued.whole is not None:
            context = np.array(continued.whole, np.int32)
        else:
            assert continued.tokens is not None, "what is not rewritten goes on"
            text = self.dialogues.chat.tokenizer.decode(list(continued.tokens))
            branches = (*branches[:-1], branches[-1].with_reply(continued.tokens, str(text)))
        counts = Counter(one.counts or {})
        counts["tools/errors"] += continued.num_refused
        going_on = replace(
            one,
            branches=branches,
            messages=(*one.messages[:-1], *continued.messages),
            counts=dict(+counts),
        )
        waiting = _Waiting(going_on, context, continued.opened)
        seen = waiting.seen(prompt)
        if len(seen) >= self.dialogues.max_length:
            return None
        self._waiting[one.prompt_id, one.index] = waiting
        return self._request(prompt, one, seen)

    def _request(
        self, prompt: Prompt, one: Trajectory, seen: Sequence[int], begun: Sample | None = None
    ) -> Request:
        """For a turn behind what is `seen`, or for the rest of one."""
        room = self.dialogues.max_length - len(seen)
        turn, num = len(one.written), 0
        if begun is not None:
            turn, num = turn - 1, len(begun.tokens)
        return Request(
            replace(prompt, tokens=tuple(seen)),
            one.index,
            self.seed_of(one.prompt_id, one.index, turn, num),
            replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room)),
            begun,
        )


def opened_for_last_turn(prompt: Prompt, one: Trajectory) -> str:
    """The thought that was begun for the model's last turn."""
    before = one.branches[-1].turns[:-1]
    if before:
        return opened_by(before[-1].text)
    return prompt.opened
