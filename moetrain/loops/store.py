"""Batches of graded trajectories on disk, where a killed run and a replay find them.

`<run_dir>/rollouts` holds two files per step: `00000012.jsonl`, a head, then one line per prompt
with what is to be read of its trajectories, and `00000012.safetensors` with their tokens,
log-probs, router's choices, what could be drawn, which weights drew it and a teacher's word. While
a step is being made there is `00000012.partial.jsonl`: each trajectory as it ends, so that a killed
run loses none; and, where a step stops what is late, `00000012.held.jsonl`: what the step before
left for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np

from moetrain import files
from moetrain.config.rollout import RolloutConfig
from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import (
    NUMBER,
    Kept,
    Prompt,
    check_types,
    open_lines,
    put_lines,
    read_as,
    write_lines,
)
from moetrain.data.trajectories import (
    Branch,
    Trajectory,
    Word,
    as_row,
    assembled,
    from_json,
    to_json,
)
from moetrain.errors import DataError
from moetrain.loops.columns import read_columns, write_columns
from moetrain.loops.quota import Key
from moetrain.rewards import Verdict

# Of a batch's files. 1: all in one JSONL, answers of one turn; 2: a turn has one version.
SCHEMA = 3
WHOLE = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # all may be drawn


class Place(NamedTuple):
    """A place in the stream of prompts."""

    cursor: int  # prompts that have been begun
    held: tuple[int, ...] = ()  # of them, those whose answers go on


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    step: int
    groups: tuple[Group, ...]
    cursor: int  # prompts of the stream that are used up after it
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, int] = field(default_factory=dict[str, int])  # dropped answers, faults, ...
    metrics: dict[str, float] = field(default_factory=dict[str, float])  # that rewards have logged
    fault: str = ""  # why the last answer that a reward failed on has none
    temperature: float | None = None  # its answers were sampled at; None: written by 0.1
    sampling: dict[str, float] = field(default_factory=dict[str, float])  # the rest; {}: before 0.2
    # Places in the stream of prompts before the cursor, whose answers go on after it.
    held: tuple[int, ...] = ()

    @property
    def drawn_with(self) -> dict[str, float | None]:
        """How its answers were sampled; until 0.2 from the whole distribution."""
        return {"temperature": self.temperature, **WHOLE, **self.sampling}

    @property
    def place(self) -> Place:
        return Place(self.cursor, self.held)

    @property
    def answers(self) -> list[GradedAnswer]:
        return [answer for group in self.groups for answer in group.answers]


def drawn_with(rollout: RolloutConfig) -> dict[str, float]:
    """What of a recipe says from which distribution answers are drawn and how they are scored."""
    return {name: getattr(rollout, name) for name in ("temperature", *WHOLE)}


class Store:
    """The folder of a run's rollouts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, step: int) -> Batch | None:
        """The whole batch of a step, if it is there. Raises DataError."""
        path = self._path(step)
        rows = read_as(path, dict[str, Any])
        head = next(rows, None)
        if head is None:
            return None
        schema, crc = head.pop("schema", 1), head.pop("crc", 0)
        if schema not in range(1, SCHEMA + 1):
            raise DataError(
                f"{path} was written by a later moetrain (schema {schema}; this one reads up to"
                f" {SCHEMA}). Go on with that one, or give another run_dir."
            )
        columns = read_columns(path.with_suffix(".safetensors"), crc) if schema > 1 else None
        branches = None if columns is None else _branches(columns)
        rows = read_as(path, lambda row: _group(row, branches) if "prompt" in row else None)
        groups = [one for number, one in enumerate(rows) if number]
        try:
            if None in groups or not groups:
                raise TypeError("a line has no prompt, or there is none but the first")
            head["held"] = tuple(head.get("held", ()))
            batch = Batch(step, tuple(cast(list[Group], groups)), **head)
            _check_head(batch)
            return batch
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not as it was written ({error}). Remove the file."
            ) from error

    def write(self, batch: Batch) -> None:
        """Keep a whole batch; its parts are no longer needed."""
        names = ("cursor", "seconds", "counts", "metrics", "fault", "temperature", "sampling")
        head = {name: getattr(batch, name) for name in names} | {"schema": SCHEMA}
        if batch.held:
            head["held"] = batch.held
        path = self._path(batch.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.publish(path.with_suffix(".safetensors"), path) as (numbers, lines):
            parts = [one for answer in batch.answers for one in answer.trajectory.branches]
            head["crc"] = write_columns(numbers, _columns(parts))
            put_lines(lines, [head, *map(_row, batch.groups)])
        self._partial(batch.step).unlink(missing_ok=True)
        self._held(batch.step).unlink(missing_ok=True)

    def held(self, step: int) -> dict[Key, Trajectory]:
        """How far the steps before brought what goes on in `step`."""
        return {(one.prompt_id, one.index): one for one in read_as(self._held(step), from_json)}

    def hold(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Keep what goes on in `step`; nothing where that is nothing."""
        rows = [to_json(one) for one in trajectories]
        if rows:
            write_lines(self._held(step), rows)
        else:
            self._held(step).unlink(missing_ok=True)

    def finished(self, step: int) -> dict[Key, Trajectory]:
        """The trajectories of a batch that a kill interrupted, by prompt and index; one that went
        on for several turns as far as it came.
        """
        trajectories = read_as(self._partial(step), from_json)
        return {(one.prompt_id, one.index): one for one in trajectories}

    def open(self, step: int, done: Iterable[Trajectory]) -> TextIO:
        """The file to append a batch's trajectories to, with those that are there already."""
        write_lines(self._partial(step), map(to_json, done))
        return open_lines(self._partial(step), "a")

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.jsonl"

    def _partial(self, step: int) -> Path:
        return self.folder / f"{step:08d}.partial.jsonl"

    def _held(self, step: int) -> Path:
        return self.folder / f"{step:08d}.held.jsonl"


def _columns(parts: Sequence[Branch]) -> dict[str, Any]:
    routes = [one.routes for one in parts]
    most = max((int(one.max(initial=0)) for one in routes if one is not None), default=0)
    kept = [one.kept for one in parts]
    return {
        "tokens": ([one.tokens for one in parts], np.int32),
        "logprobs": ([one.logprobs for one in parts], np.float32),
        "context": ([one.context for one in parts], np.int32),
        "routes": (routes, np.uint8 if most < 256 else np.int16),
        "kept/sizes": ([None if one is None else one.sizes for one in kept], np.int32),
        "kept/ids": ([None if one is None else one.ids for one in kept], np.int32),
        "versions": ([one.versions for one in parts], np.int32),
        **_words([one.word for one in parts]),
    }


def _words(words: Sequence[Word | None]) -> dict[str, Any]:
    """What a teacher said."""
    several = [one if one is not None and one.ids.size else None for one in words]
    return {
        "teacher/logp": ([None if one is None else one.logp for one in words], np.float32),
        "teacher/ids": ([None if one is None else one.ids for one in several], np.int32),
        "teacher/top": ([None if one is None else one.top for one in several], np.float32),
    }


NAMES = (
    *("tokens", "logprobs", "context", "routes", "versions", "kept/sizes", "kept/ids"),
    *("teacher/logp", "teacher/ids", "teacher/top"),
)


def _branches(columns: Mapping[str, Sequence[Any]]) -> Iterator[Branch]:
    """In the order in which they were written, without their turns."""
    num = max(map(len, columns.values()), default=0)
    for row in zip(*(columns.get(name, [None] * num) for name in NAMES), strict=True):
        tokens, logprobs, context, routes, versions, sizes, ids, *word = row
        kept = None if sizes is None else Kept(sizes, ids)
        yield Branch((), tokens, logprobs, context, routes, kept, versions, _word(*word))


def _word(logp: Any, ids: Any, top: Any) -> Word | None:
    if logp is None:
        return None
    if ids is None:
        ids, top = np.zeros((len(logp), 0), np.int32), np.zeros((len(logp), 0), np.float32)
    return Word(logp, ids, top)


def row_of(
    prompt: Prompt, made: Sequence[Mapping[str, Any]], graded: Sequence[Verdict]
) -> dict[str, Any]:
    """A prompt with its trajectories, each as `as_row` or `to_json` gave it, as a line of JSON."""
    answers = [
        dict(row)
        | {"reward": one.reward, "parts": dict(one.parts)}
        | ({"fault": one.fault} if one.fault else {})
        | ({"extra": dict(one.extra)} if one.extra else {})
        for row, one in zip(made, graded, strict=True)
    ]
    return {"prompt": asdict(prompt), "answers": answers}


def readable(made: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """What `row_of` takes, whole."""
    return [to_json(one, readable=True) for one in made]


def _row(group: Group) -> dict[str, Any]:
    graded = [Verdict(one.reward, one.parts, None, one.extra) for one in group.answers]
    return row_of(group.prompt, [as_row(one.trajectory) for one in group.answers], graded)


def _group(row: dict[str, Any], branches: Iterator[Branch] | None) -> Group:
    """branches: where the arrays of the answers come from; None: they are in the row."""

    def trajectory(answer: dict[str, Any]) -> Trajectory:
        if branches is None:
            return from_json(answer)
        num = len(answer.get("branches", [0]))
        parts = [one for _, one in zip(range(num), branches, strict=False)]
        return assembled(answer, parts)

    def graded(answer: dict[str, Any]) -> GradedAnswer:
        parts, extra = answer["parts"], answer.get("extra", {})
        check_types(answer | {"extra": extra}, reward=NUMBER, parts=dict, extra=dict)
        check_types(parts, **dict.fromkeys(parts, (int, float, type(None))))
        if not isfinite(answer["reward"]):
            raise ValueError(f"a reward of {answer['reward']}")
        one = trajectory(answer)
        for branch in one.branches:
            branch.check(len(prompt.tokens))
        return GradedAnswer(one, answer["reward"], parts, extra)

    prompt = Prompt.from_json(row["prompt"])
    if not prompt.tokens or not row["answers"]:
        raise ValueError("a prompt without tokens or answers")
    return Group(prompt, tuple(map(graded, row["answers"])))


def _check_head(batch: Batch) -> None:
    """Raises TypeError or ValueError."""
    fields = vars(batch)
    check_types(fields, cursor=int, fault=str, temperature=(int, float, type(None)))
    for name in ("seconds", "counts", "metrics", "sampling"):
        check_types(fields, **{name: dict})
        check_types(fields[name], **dict.fromkeys(fields[name], NUMBER))
    if batch.cursor < 0:
        raise ValueError(f"cursor={batch.cursor}")
    if not all(type(place) is int and 0 <= place < batch.cursor for place in batch.held):
        raise ValueError(f"held={batch.held}")
