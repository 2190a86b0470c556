"""A run's trajectories as text: a sample of its rollouts, read without holding a whole batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from moetrain.observe.answers import (
    ROLLOUTS,
    field_of,
    json_of,
    number_of,
    parted,
    row_of,
    said_by,
    steps_of,
)


@dataclass(frozen=True)
class Turn:
    """What the model wrote at one go, and what was replied to it."""

    text: str  # as sampled
    tokens: int | None  # None: the file does not say
    version: int | None  # of the weights that wrote it
    finish: str
    calls: tuple[str, ...]  # as read in the text: NAME(ARGUMENT=VALUE, ...)
    malformed: tuple[str, ...]  # what is wrong with calls that could not be read
    replies: tuple[tuple[str, str], ...]  # (who, what they said)
    reply_tokens: int | None  # None: the conversation was rendered anew, or the file does not say
    # What stood before was rendered anew: the template rewrites it, or an agent has changed it.
    is_anew: bool
    before: tuple[tuple[str, str], ...] = ()  # (who, what they said) in front of the first turn


@dataclass(frozen=True)
class Trajectory:
    """A trajectory and its prompt, as text."""

    step: int
    prompt: str  # the messages, a role before each
    columns: Mapping[str, Any]  # the record's other fields
    turns: tuple[Turn, ...]
    finish: str
    reward: float | None
    parts: Mapping[str, float | None]
    counts: Mapping[str, float]  # of the environment: tools/calls, ...
    problem: str  # of a reward that failed, or of the environment
    extra: Mapping[str, Any]  # what rewards have logged


@dataclass(frozen=True)
class Sampled:
    """Some of a run's trajectories, and of how many."""

    trajectories: tuple[Trajectory, ...] = ()
    num_there: int = 0  # in the steps that were read
    num_read: int = 0  # steps
    num_steps: int = 0
    num_unreadable: int = 0  # steps


@dataclass(frozen=True)
class _Place:
    """Where an answer lies in its file, and what a choice looks at."""

    offset: int
    index: int
    reward: float | None
    finish: str


def sample(folder: Path, most_steps: int, most_of_step: int, most: int, most_bytes: int) -> Sampled:
    """At most `most` trajectories of the run in `folder`, of at most `most_steps` steps spread over
    it, the first and the newest among them; of fewer where their files have more bytes than that.
    """
    files = steps_of(folder / ROLLOUTS)
    mean = sum(map(_size, files.values())) / max(1, len(files))
    room = max(1, int(min(most_steps, most / 4, most_bytes // max(1, mean))))
    steps = spread(list(files), room)
    trajectories, num_there, num_unreadable = list[Trajectory](), 0, 0
    for step in steps:
        try:
            with files[step].open("rb") as file:
                places = list(_places(file))
                chosen = choose(places, min(most_of_step, most // len(steps)))
                trajectories += [one for at in chosen if (one := _at(file, step, places[at]))]
        except OSError:
            num_unreadable += 1
            continue
        num_there += len(places)
    return Sampled(
        tuple(trajectories), num_there, len(steps) - num_unreadable, len(files), num_unreadable
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it was removed meanwhile
        return 0


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, as even as they come, with the last one and the first."""
    if len(values) <= most:
        return list(values)
    if most < 2:
        return list(values[len(values) - most :])
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def choose(places: Sequence[_Place], most: int) -> list[int]:
    """Numbers of at most so many answers in the file's order: one of each ending, the best and the
    worst, and of the others by their rewards as even as they come.
    """
    by_ending = {one.finish: i for i, one in reversed(list(enumerate(places)))}
    order = sorted(range(len(places)), key=lambda i: _rank(places[i].reward))
    rest = spread(order, most)
    # Best and worst are first and last of `rest`, and go before what lies between.
    chosen = dict.fromkeys([*rest[:1], *rest[-1:], *by_ending.values(), *rest[1:-1]])
    return sorted(list(chosen)[:most])


def _rank(reward: float | None) -> tuple[bool, float]:
    return reward is None, -(reward or 0.0)


def _places(file: Any) -> Iterator[_Place]:
    """The answers of a file; lines that are none are passed over."""
    offset = 0
    for line in file:
        row = row_of(line)
        if field_of(row, "prompt", dict) is not None:
            for index, one in enumerate(field_of(row, "answers", list) or ()):
                if field_of(one, "text", str) is not None:
                    finish = field_of(one, "finish", str) or ""
                    yield _Place(offset, index, number_of(one.get("reward")), finish)
        offset += len(line)


def _at(file: Any, step: int, place: _Place) -> Trajectory | None:
    file.seek(place.offset)
    row = row_of(file.readline())
    answers: list[Any] = field_of(row, "answers", list) or []
    if place.index >= len(answers):  # it was written anew meanwhile
        return None
    columns: dict[str, Any] = field_of(row["prompt"], "columns", dict) or {}
    one, (asked, rest) = answers[place.index], parted(columns)
    parts: dict[str, Any] = field_of(one, "parts", dict) or {}
    counts: dict[str, Any] = field_of(one, "counts", dict) or {}
    return Trajectory(
        step,
        asked,
        rest,
        tuple(turns_of(one)),
        place.finish,
        place.reward,
        {str(name): number_of(value) for name, value in parts.items()},
        {str(k): n for k, value in counts.items() if (n := number_of(value)) is not None},
        field_of(one, "fault", str) or field_of(one, "detail", str) or "",
        field_of(one, "extra", dict) or {},
    )


def turns_of(one: Mapping[str, Any]) -> Iterator[Turn]:
    """The model's turns of an answer with the replies to them, as a rollout's row has them."""
    messages = [m for m in field_of(one, "messages", list) or () if isinstance(m, dict)]
    before, said = _by_turn(cast(list[dict[str, Any]], messages))
    branches: list[Any] = field_of(one, "branches", list) or []
    if not branches:
        # An answer of one turn; the tokens of old files and of `moetrain sample` are a list.
        tokens = field_of(one, "tokens", int) or len(field_of(one, "tokens", list) or ())
        row = {"text": one.get("text"), "num_tokens": tokens, "version": one.get("version"),
               "finish": one.get("finish"), "author": "model"}  # fmt: skip
        branches = [[row]]
    number = 0
    for at, branch in enumerate(branches):
        rows = branch if isinstance(branch, list) else []
        for place, row in enumerate(cast(list[Any], rows)):
            if field_of(row, "author", str) != "model":
                continue
            reply = rows[place + 1] if place + 1 < len(rows) else None
            message, replies = said[number] if number < len(said) else ({}, [])
            turn = _turn(row, message, replies, reply, is_anew=at > 0 and place == 0)
            yield turn if number else replace(turn, before=tuple(before))
            number += 1


def _turn(
    row: Mapping[str, Any],
    message: Mapping[str, Any],
    replies: Sequence[tuple[str, str]],
    reply: Any,
    *,
    is_anew: bool,
) -> Turn:
    is_reply = field_of(reply, "author", str) == "reply"
    if is_reply and not replies:
        replies = [("reply", field_of(reply, "text", str) or "")]
    return Turn(
        text=field_of(row, "text", str) or "",
        tokens=field_of(row, "num_tokens", int),
        version=field_of(row, "version", int),
        finish=field_of(row, "finish", str) or "",
        calls=tuple(map(call_text, field_of(message, "tool_calls", list) or ())),
        malformed=tuple(map(str, field_of(message, "malformed", list) or ())),
        replies=tuple(replies),
        reply_tokens=field_of(reply, "num_tokens", int) if is_reply else None,
        is_anew=is_anew,
    )


Said = list[tuple[str, str]]


def _by_turn(messages: Sequence[dict[str, Any]]) -> tuple[Said, list[tuple[dict[str, Any], Said]]]:
    """(what is said before the model, (the model's message, the replies to it) of each turn)."""
    before: Said = []
    turns: list[tuple[dict[str, Any], Said]] = []
    for message in messages:
        # An agent may put words into the model's mouth.
        if message.get("role") == "assistant" and message.get("given") is not True:
            turns.append((message, []))
        else:
            names = [field_of(message, name, str) for name in ("role", "name")]
            who = " ".join(filter(None, names)) or "?"
            (turns[-1][1] if turns else before).append((who, said_by(message)))
    return before, turns


def call_text(call: Any) -> str:
    """A call as people write it."""
    function = field_of(call, "function", dict)
    name, given = field_of(function, "name", str), (function or {}).get("arguments")
    if not isinstance(given, dict):
        return f"{name or '?'}({'' if given is None else json_of(given)})"
    words = [f"{key}={json_of(value)}" for key, value in cast(dict[Any, Any], given).items()]
    return f"{name or '?'}({', '.join(words)})"
