"""An agent's session: what it asks for, request by request, becomes a trajectory by token ids.

A request that says all that was said before, and replies to it, goes on from the tokens that were
sampled. Any other, one that edits the history or begins a second conversation, begins a branch with
what the model then sees.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetrain.data.chat import Chat
from moetrain.data.continuation import Continuer
from moetrain.data.formats import template_kwargs_of
from moetrain.data.messages import FormatError, Message
from moetrain.data.samples import Prompt, Sample
from moetrain.data.scene import messages_of
from moetrain.data.thoughts import opened_by
from moetrain.data.trajectories import Branch, Finish, Trajectory
from moetrain.environments.base import Reply, Tool
from moetrain.environments.calls import TurnReader, check_format
from moetrain.errors import ConfigError
from moetrain.loops.agent_api import Asked, Refused, as_sent, asked_in, goes_on, num_common
from moetrain.rollout.base import Request, Sampling

REWARD = "agent/reward"  # among a trajectory's counts


class _Limit(Refused):
    """A request that the recipe has no room for."""

    def __init__(self, finish: Finish, message: str, code: str):
        super().__init__(400, message, code)
        self.finish: Finish = finish


@dataclass(frozen=True)
class Limits:
    """How the recipe has turns drawn and read."""

    chat: Chat
    stop_ids: tuple[int, ...]
    call_format: str
    max_turns: int  # of the model in a session
    max_length: int  # tokens of a sequence, whoever wrote them


@dataclass(eq=False)
class _Conversation:
    """Messages one behind the other, and the tokens that they are."""

    tools: tuple[Tool, ...]
    continuer: Continuer
    reader: TurnReader
    sent: list[Message] = field(default_factory=list[Message])  # as the agent is to send them back
    before: list[Message] = field(default_factory=list[Message])  # as the template gets them
    turn: Message = field(default_factory=dict[str, Any])  # the model's last
    branches: list[Branch] = field(default_factory=list[Branch])
    log: list[Message] = field(default_factory=list[Message])  # that are not another's, in order
    is_busy: bool = False  # a turn of it is being drawn


@dataclass(eq=False)
class Turn:
    """A turn that is being drawn."""

    request: Request
    conversation: _Conversation
    sent: list[Message]
    before: list[Message]
    branches: list[Branch]  # of the conversation, but for the turn
    context: NDArray[np.int32] | None  # where it begins a branch: what the model sees
    begins: bool  # a branch
    opened: str
    new: list[Message]  # for the log
    num_refused: int = 0


class Session:
    """One agent's turns. Not for several threads at a time.

    Args:
        prompt: the record; None: the first request is one.
        seed_of: number of a request -> the seed of its turn.
    """

    def __init__(
        self,
        limits: Limits,
        prompt: Prompt | None,
        index: int,
        name: str,
        sampling: Sampling,
        seed_of: Callable[[int], int],
    ):
        self.limits, self.prompt, self.index = limits, prompt, index
        self.name, self.sampling, self._seed_of = name, sampling, seed_of
        self._conversations: list[_Conversation] = []
        self._num_asked = 0
        self._limit: Finish | None = None  # that a request ran into
        self.counts: Counter[str] = Counter()
        self.reward: float | None = None

    # A request

    def ask(self, body: Any) -> Turn:
        """The turn that is to be drawn for a request's body. Raises Refused."""
        try:
            turn = self._turn(asked_in(body))
        except FormatError as error:
            self.counts["agents/refused"] += 1
            raise Refused(400, str(error)) from None
        except _Limit as limit:
            self._limit = limit.finish
            raise
        except Refused:
            self.counts["agents/refused"] += 1
            raise
        turn.conversation.is_busy = True
        self._num_asked += 1
        return turn

    def _turn(self, asked: Asked) -> Turn:
        if self._num_asked >= self.limits.max_turns:
            text = f"rollout.max_turns={self.limits.max_turns}: the session has no more turns"
            raise _Limit("turns", text, "max_turns")
        self.limits.chat.refuse_long(self.limits.max_length, list(asked.messages), asked.tools)
        fitting = [
            one
            for one in self._conversations
            if not one.is_busy and one.tools == asked.tools and goes_on(one.sent, asked.messages)
        ]
        if fitting:
            return self._going_on(max(fitting, key=lambda one: len(one.sent)), asked)
        return self._begun(asked)

    def _going_on(self, one: _Conversation, asked: Asked) -> Turn:
        """By tokens, behind the last turn."""
        replies = list(asked.messages[len(one.sent) :])
        last = one.branches[-1]
        sampled = last.turns[-1]
        tokens = last.tokens[-sampled.num_tokens :].tolist()
        continued = one.continuer.after(one.before, one.turn, sampled.text, tokens, replies)
        context: NDArray[np.int32] | None = None
        branches = one.branches
        if continued.whole is not None:
            context = np.array(continued.whole, np.int32)
            seen = list(continued.whole)
        else:
            assert continued.tokens is not None, "what is not rewritten goes on"
            text = str(self.limits.chat.tokenizer.decode(list(continued.tokens)))
            last = last.with_reply(continued.tokens, text)
            begin = self._prompt.tokens if last.context is None else last.context.tolist()
            seen, branches = [*begin, *last.tokens.tolist()], [*branches[:-1], last]
        return Turn(
            self._request(seen, asked),
            one,
            list(asked.messages),
            [*one.before, *continued.messages],
            branches,
            context,
            continued.whole is not None,
            continued.opened,
            replies,
            continued.num_refused,
        )

    def _begun(self, asked: Asked) -> Turn:
        """A conversation with what the template makes of its messages."""
        limits, messages = self.limits, list(asked.messages)
        try:
            check_format(limits.chat.template, limits.call_format, asked.tools)
        except ConfigError as error:
            raise FormatError(str(error)) from None
        columns = {} if self.prompt is None else self.prompt.columns
        kwargs = {k: v for k, v in template_kwargs_of(columns).items() if k != "tools"}
        kwargs |= {"tools": list(asked.tools)} if asked.tools else {}
        text = limits.chat.prompt(messages, **kwargs)
        ids = tuple(limits.chat.ids(text))
        if self.prompt is None:
            self.prompt = Prompt(self.name, ids, {"prompt": messages}, opened_by(text))
        one = _Conversation(
            asked.tools,
            Continuer(limits.chat, limits.stop_ids, **kwargs),
            TurnReader.of(limits.chat.template, asked.tools, limits.call_format),
        )
        request = self._request(list(ids), asked)
        self.counts["agents/anew"] += self._num_asked > 0
        context = None if ids == self._prompt.tokens else np.array(ids, np.int32)
        new = self._new(messages)
        return Turn(request, one, messages, messages, [], context, True, opened_by(text), new)

    def _new(self, messages: list[Message]) -> list[Message]:
        """Of a conversation's first messages those that stand in no other; the assistant's are not
        the model's here.
        """
        others = [messages_of(self._prompt), *(one.sent for one in self._conversations)]
        num = max(num_common(other, messages) for other in others)
        return [
            message | {"given": True} if message["role"] == "assistant" else message
            for message in messages[num:]
        ]

    def _request(self, seen: Sequence[int], asked: Asked) -> Request:
        room = self.limits.max_length - len(seen)
        if room < 1:
            text = f"{len(seen)} tokens are said, of data.seq_len={self.limits.max_length}"
            raise _Limit("length", text, "context_length_exceeded")
        most = min(self.sampling.max_tokens, room, asked.max_tokens or room)
        number = self._num_asked
        # A name of its own, since an agent may ask for several turns at once.
        prompt = replace(self._prompt, id=f"{self.name}/{number:05d}", tokens=tuple(seen))
        sampling = replace(self.sampling, max_tokens=most)
        return Request(prompt, self.index, self._seed_of(number), sampling)

    @property
    def _prompt(self) -> Prompt:
        assert self.prompt is not None, "a request has been seen"
        return self.prompt

    # What was drawn

    def take(self, turn: Turn, sample: Sample) -> Message:
        """Take what was drawn for a request; the turn as it is read."""
        one = turn.conversation
        num_calls = sum(len(message.get("tool_calls") or ()) for message in turn.before)
        parsed = one.reader.read(sample.text, turn.opened, num_calls)
        if turn.begins:
            one.branches = [*turn.branches, Branch.of(sample, turn.context)]
        else:
            one.branches = [*turn.branches[:-1], turn.branches[-1].with_turn(sample)]
        one.before, one.turn, one.is_busy = turn.before, parsed, False
        one.sent = [*turn.sent, as_sent(parsed)]
        one.log += [*turn.new, parsed]
        # The one that spoke last is the last.
        self._conversations = [*(other for other in self._conversations if other is not one), one]
        malformed = len(parsed.get("malformed") or ())
        self.counts["tools/calls"] += len(parsed.get("tool_calls") or ()) + malformed
        self.counts["tools/errors"] += malformed + turn.num_refused
        return parsed

    # Its end

    def ended(self, reply: Reply) -> Trajectory:
        """The trajectory, when the agent has come to its end in one way or another."""
        branches = tuple(branch for one in self._conversations for branch in one.branches)
        log = tuple(message for one in self._conversations for message in one.log)
        fault, detail = reply.fault, reply.detail
        if fault == "error" and self._limit is not None:
            fault = ""  # it has raised what it was told of the limit
        if not fault and not branches:
            fault, detail = "error", "the agent has asked for no turn"
        finish = self._limit or "stop"
        if not fault and not self._limit and branches[-1].turns[-1].finish == "length":
            finish = "length"
        reward = self.reward if reply.reward is None else reply.reward
        counts: dict[str, float] = {name: float(n) for name, n in self.counts.items() if n}
        if reward is not None:
            counts[REWARD] = reward
        name = self.name if self.prompt is None else self.prompt.id
        end = cast(Finish, fault or finish)
        reason = detail if fault else ""
        return Trajectory(name, self.index, branches, end, log, counts, reason)
