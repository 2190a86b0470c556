"""What came of one prompt: turns of the model, with what answered them in between.

Legend: t tokens of a branch, l MoE layers, k experts of a token, or a teacher's likeliest tokens.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from moetrain.data.messages import Message
from moetrain.data.samples import NUMBER, Kept, Sample, check_types, decode_routes

Author = Literal["model", "reply"]
# How a trajectory ended: by the model and with the environment's consent, at a limit of tokens, at
# rollout.max_turns, or by a fault of its environment; "open" where it goes on.
Finish = Literal["stop", "length", "turns", "timeout", "crash", "error", "open"]
FAULTS = ("timeout", "crash", "error")


def narrow(routes: NDArray[Any] | None) -> NDArray[Any] | None:
    """Choices in a byte each, where they fit: they are most of a batch."""
    if routes is None or routes.dtype == np.uint8 or not routes.size:
        return routes
    return routes.astype(np.uint8) if 0 <= routes.min() and routes.max() < 256 else routes


@dataclass(frozen=True)
class Turn:
    """What one side wrote in a row."""

    author: Author
    num_tokens: int
    text: str  # the model's as in `Sample`; a reply's as it stands in the context
    finish: str = ""  # of the model's: "stop", "length", or "open" where it was stopped within it
    version: int = 0  # of the weights that began it; of a reply: of those that were served


class Word(NamedTuple):
    """What a teacher says of a branch's tokens: log-probs, and its k likeliest tokens."""

    logp: NDArray[np.float32]  # [t] of each token; 0 in replies
    ids: NDArray[np.int32]  # [t, k]
    top: NDArray[np.float32]  # [t, k] the log-probs of `ids`


@dataclass(frozen=True, eq=False)
class Branch:
    """Turns that the model saw one behind the other. What it wrote is never tokenised anew."""

    turns: tuple[Turn, ...]
    tokens: NDArray[np.int32]  # [t] of all turns
    logprobs: NDArray[np.float32]  # [t] as drawn; 0 in replies
    # What stood before: the prompt (None), or the conversation as its template rewrote it.
    context: NDArray[np.int32] | None = None
    # [context + t - 1, l, k]: the router's choices, where asked for
    routes: NDArray[Any] | None = None
    kept: Kept | None = None  # what could be drawn, where the sampler left something out
    versions: NDArray[np.int32] | None = None  # [t] of weights; None: those of the turns
    word: Word | None = None  # of a teacher, where one was asked before the batch was whole

    @classmethod
    def of(cls, sample: Sample, context: NDArray[np.int32] | None = None) -> Self:
        """A turn as an engine drew it."""
        num = len(sample.tokens)
        return cls(
            (Turn("model", num, sample.text, sample.finish, sample.version),),
            np.array(sample.tokens, np.int32),
            np.array(sample.logprobs, np.float32),
            context,
            narrow(sample.routes),
            sample.kept,
            None if sample.versions is None else np.array(sample.versions, np.int32),
        )

    @cached_property
    def by_token(self) -> NDArray[np.int32]:
        """[t] the weights' version that wrote each token."""
        if self.versions is not None:
            return self.versions
        return np.repeat(
            np.array([turn.version for turn in self.turns], np.int32),
            [turn.num_tokens for turn in self.turns],
        )

    def check(self, context: int | None = None) -> None:
        """Raises ValueError where arrays that were read are not those of these turns.

        context: tokens of the prompt; None: it may go on, so that it may have other routes yet.
        """
        num = sum(turn.num_tokens for turn in self.turns)
        if not (num,) == self.tokens.shape == self.logprobs.shape:
            raise ValueError(f"turns of {num} tokens, and {self.tokens.shape} of them")
        prefix = self.context
        if prefix is not None and (prefix.ndim != 1 or not len(prefix)):
            raise ValueError(f"a context of {prefix.shape} tokens")
        if min(self.tokens.min(initial=0), 0 if prefix is None else prefix.min()) < 0:
            raise ValueError("tokens below 0")
        if self.versions is not None and self.versions.shape != (num,):
            raise ValueError(f"versions of {self.versions.shape} tokens, and {num} of them")
        if min(self.by_token.min(initial=0), *(turn.version for turn in self.turns), 0) < 0:
            raise ValueError("versions below 0")
        if self.routes is not None:
            before = context if prefix is None else len(prefix)
            places = None if context is None or before is None else before + num
            is_right = places in (None, len(self.routes) + 1) and self.routes.ndim == 3
            if not is_right or self.routes.min(initial=0) < 0:
                raise ValueError(f"routes of {self.routes.shape} for {num} tokens")
        if self.kept is not None:
            self.kept.check(num)

    @cached_property
    def written(self) -> NDArray[np.bool_]:
        """[t]: this token is the model's."""
        return np.repeat(
            np.array([turn.author == "model" for turn in self.turns], np.bool_),
            [turn.num_tokens for turn in self.turns],
        )

    def with_reply(self, tokens: Sequence[int], text: str) -> Self:
        """With a reply behind it."""
        num, last = len(tokens), self.turns[-1]
        kept = self.kept
        if kept is not None:
            kept = Kept(np.concatenate([kept.sizes, np.zeros(num, np.int32)]), kept.ids)
        versions, served = self.versions, last.version
        if versions is not None:
            served = int(versions[-1])
            versions = np.concatenate([versions, np.full(num, served, np.int32)])
        return replace(
            self,
            turns=(*self.turns, Turn("reply", num, text, version=served)),
            versions=versions,
            tokens=np.concatenate([self.tokens, np.array(tokens, np.int32)]),
            logprobs=np.concatenate([self.logprobs, np.zeros(num, np.float32)]),
            kept=kept,
        )

    def with_turn(self, sample: Sample) -> Self:
        """With a further turn of the model, whose request held all of this as its prompt."""
        more, kept = Branch.of(sample), self.kept
        if kept is not None and more.kept is not None:
            kept = Kept(*map(np.concatenate, zip(kept, more.kept, strict=True)))
        several = self.versions is not None or more.versions is not None
        return replace(
            self,
            turns=self.turns + more.turns,
            versions=np.concatenate([self.by_token, more.by_token]) if several else None,
            tokens=np.concatenate([self.tokens, more.tokens]),
            logprobs=np.concatenate([self.logprobs, more.logprobs]),
            routes=more.routes,  # the whole context passed the router again
            kept=kept,
        )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All turns to one prompt. Where the template rewrites earlier turns (it drops their thoughts,
    say), a new branch begins with what the model then saw.
    """

    prompt_id: str
    index: int  # which answer to its prompt
    branches: tuple[Branch, ...]
    finish: Finish
    messages: tuple[Message, ...] = ()  # after the prompt's, where an environment replied
    counts: Mapping[str, float] | None = None  # of the environment: calls of tools, ...
    detail: str = ""  # of a fault

    @classmethod
    def of(cls, sample: Sample) -> Self:
        """An answer of one turn."""
        return cls(sample.prompt_id, sample.index, (Branch.of(sample),), sample.finish)

    @property
    def turns(self) -> list[Turn]:
        """All turns in order."""
        return [turn for branch in self.branches for turn in branch.turns]

    @property
    def written(self) -> list[Turn]:
        """The model's."""
        return [turn for turn in self.turns if turn.author == "model"]

    @property
    def text(self) -> str:
        """What the model said last; nothing where an agent never asked it."""
        return self.written[-1].text if self.written else ""

    @property
    def num_tokens(self) -> int:
        """That the model wrote."""
        return sum(turn.num_tokens for turn in self.written)

    @property
    def num_replies(self) -> int:
        """Tokens that it did not write."""
        return sum(turn.num_tokens for turn in self.turns) - self.num_tokens

    @property
    def logp(self) -> float:
        """The sum of the log-probs of what it wrote."""
        return float(sum(one.logprobs.sum(dtype=np.float64) for one in self.branches))

    @property
    def version(self) -> int:
        """Of the oldest weights that wrote a turn."""
        return min((turn.version for turn in self.written), default=0)

    @property
    def is_open(self) -> bool:
        """Whether it goes on."""
        return self.finish == "open"

    @property
    def is_within(self) -> bool:
        """Whether it was stopped within a turn of the model."""
        return self.is_open and self.turns[-1].finish == "open"

    @property
    def is_lost(self) -> bool:
        """Whether a fault of its environment ended it: it has no reward."""
        return self.finish in FAULTS

    @property
    def is_cut(self) -> bool:
        """Whether a limit of tokens ended it."""
        return self.finish == "length"

    @property
    def is_plain(self) -> bool:
        """Whether it is one turn of the model, which ended it."""
        turns = self.turns
        is_plain = len(turns) == 1 and turns[0].finish == self.finish
        return is_plain and not self.messages and not self.is_open

    @property
    def tokens(self) -> list[int]:
        """Of the model's turns, one behind the other."""
        return [int(n) for one in self.branches for n in one.tokens[one.written]]

    @property
    def logprobs(self) -> list[float]:
        """Aligned with `tokens`."""
        return [float(x) for one in self.branches for x in one.logprobs[one.written]]


# As JSON


def as_row(one: Trajectory) -> dict[str, Any]:
    """Without its arrays: what can be read, and how much there is of each turn."""
    row = {
        "prompt_id": one.prompt_id,
        "index": one.index,
        "text": one.text,
        "finish": one.finish,
        "version": one.version,
        "tokens": one.num_tokens,
        "logp": one.logp,
    }
    if not one.is_plain:
        row["messages"] = list(one.messages)
        row["branches"] = [[vars(turn) for turn in branch.turns] for branch in one.branches]
    if one.counts:
        row["counts"] = dict(one.counts)
    return row | ({"detail": one.detail} if one.detail else {})


def to_json(one: Trajectory, *, readable: bool = False) -> dict[str, Any]:
    """Whole, arrays as base64; `readable`: as an answer of one turn is given to people, tokens and
    log-probs as lists.
    """
    arrays = [_arrays(branch) for branch in one.branches]
    if readable and one.is_plain:
        versions = one.branches[0].versions
        return (
            as_row(one)
            | {"tokens": one.tokens, "logprobs": one.logprobs}
            | {name: value for name, value in arrays[0].items() if name in ("kept", "routes")}
            | ({} if versions is None else {"versions": versions.tolist()})
        )
    return as_row(one) | {"arrays": arrays}


def _arrays(branch: Branch) -> dict[str, Any]:
    content: dict[str, Any] = {
        "tokens": _packed(branch.tokens, "<i4"),
        "logprobs": _packed(branch.logprobs, "<f4"),
    }
    if branch.context is not None:
        content["context"] = _packed(branch.context, "<i4")
    if branch.kept is not None:
        content["kept"] = branch.kept.to_json()
    if branch.routes is not None:
        packed = _packed(branch.routes, "<i2")
        content["routes"] = {"shape": branch.routes.shape, "int16": packed}
    if branch.versions is not None:
        content["versions"] = _packed(branch.versions, "<i4")
    return content


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def from_json(content: dict[str, Any]) -> Trajectory:
    """What `to_json` gave, in either form. Raises LookupError, TypeError or ValueError on something
    else, which `read_as` says with its line.
    """
    if "arrays" not in content:
        return Trajectory.of(Sample.from_json(content))
    return assembled(content, [_from_arrays(one) for one in content["arrays"]])


def assembled(row: Mapping[str, Any], parts: Sequence[Branch]) -> Trajectory:
    """A trajectory of `as_row` and its branches, whose turns are not known yet. Raises as
    `from_json`.
    """
    check_types(row, prompt_id=str, index=int, text=str, finish=str)
    if "branches" in row:
        turns = [tuple(map(_turn, branch)) for branch in row["branches"]]
    else:
        finish = "length" if row["finish"] == "length" else "stop"
        turns = [(Turn("model", int(row["tokens"]), row["text"], finish, int(row["version"])),)]
    branches: list[Branch] = []
    for own_turns, part in zip(turns, parts, strict=True):
        part = replace(part, turns=own_turns)
        part.check()
        branches.append(part)
    never_asked = not turns and row["finish"] in FAULTS  # an agent that failed before it asked
    if not never_asked and not _has_model(turns):
        raise ValueError("the last turns are none of the model's")
    more = {"messages": (), "counts": {}, "detail": ""} | dict(row)
    check_types(more, messages=(list, tuple), counts=(dict, type(None)), detail=str)
    if not all(isinstance(message, dict) for message in more["messages"]):
        raise TypeError("messages are no objects")
    check_types(more["counts"] or {}, **dict.fromkeys(more["counts"] or {}, NUMBER))
    return Trajectory(
        row["prompt_id"],
        row["index"],
        tuple(branches),
        cast(Finish, row["finish"]),
        tuple(row.get("messages", ())),
        row.get("counts"),
        row.get("detail", ""),
    )


def _has_model(branches: Sequence[Sequence[Turn]]) -> bool:
    return any(turn.author == "model" for turn in (branches[-1] if branches else ()))


def _turn(content: dict[str, Any]) -> Turn:
    turn = Turn(**content)
    check_types(vars(turn), num_tokens=int, text=str, finish=str, version=int)
    if turn.author not in ("model", "reply") or turn.num_tokens < 0 or turn.version < 0:
        raise ValueError(f"a turn of {turn.author!r:.20} with {turn.num_tokens} tokens")
    return turn


def _from_arrays(content: Mapping[str, Any]) -> Branch:
    def flat(name: str, dtype: str) -> NDArray[Any]:
        return np.frombuffer(base64.b64decode(content[name], validate=True), dtype)

    return Branch(
        (),
        flat("tokens", "<i4").astype(np.int32),
        flat("logprobs", "<f4").astype(np.float32),
        flat("context", "<i4").astype(np.int32) if "context" in content else None,
        narrow(decode_routes(content["routes"])) if "routes" in content else None,
        Kept.from_json(content["kept"]) if "kept" in content else None,
        flat("versions", "<i4").astype(np.int32) if "versions" in content else None,
    )
