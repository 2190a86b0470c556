"""A prompt and a sampled answer, in memory and as JSONL."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from moetrain import files
from moetrain.data.parsing import parse_json
from moetrain.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    id: str  # of its content; "#k" behind it in the k-th epoch after the first
    tokens: tuple[int, ...]  # the chat template applied, with its generation prompt
    columns: dict[str, Any]  # the record's fields, for rewards; "prompt" holds the messages
    opened: str = ""  # the thought that the template began for the answer, such as "<think>\n"
    is_text: bool = False  # the record gave its prompt as text, not as messages
    source: str = ""  # the file or folder of the record

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Prompt":
        """From its fields. Raises LookupError or TypeError on something else."""
        check_types(content, id=str, columns=dict)
        check_ids(content["tokens"], "a prompt's tokens")
        fields: dict[str, Any] = content | {"tokens": tuple(content["tokens"])}
        one = cls(**fields)
        check_types(vars(one), opened=str, is_text=bool, source=str)
        return one


Kinds = type | tuple[type, ...]
NUMBER: Kinds = (int, float)


def check_types(row: Mapping[str, Any], **kinds: Kinds) -> None:
    """Raises KeyError or TypeError unless the row has values of these types by these names."""
    for name, kind in kinds.items():
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {type(value).__name__}")


def check_ids(ids: Any, name: str) -> None:
    """Raises TypeError unless these are numbers of tokens."""
    if not isinstance(ids, list | tuple) or not all(
        type(one) is int and 0 <= one < 2**31 for one in cast(Sequence[Any], ids)
    ):
        raise TypeError(f"{name} are no numbers of tokens")


class Kept(NamedTuple):
    """What could be drawn at each place of an answer, where that was less than everything: token
    ids, those of the first place first.
    """

    sizes: NDArray[np.int32]  # [answer], how many ids a place has
    ids: NDArray[np.int32]  # [sum of sizes]

    @classmethod
    def of(cls, places: Sequence[Sequence[int] | NDArray[np.int32]]) -> "Kept":
        """From the ids of each place."""
        sizes = np.array([len(ids) for ids in places], np.int32)
        return cls(sizes, np.concatenate([np.asarray(ids, np.int32) for ids in places]))

    def to_json(self) -> dict[str, str]:
        """Both as base64 of little-endian int32."""
        return {
            name: base64.b64encode(ids.astype("<i4").tobytes()).decode()
            for name, ids in self._asdict().items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, str]) -> "Kept":
        """What `to_json` gave."""
        sizes, ids = (
            np.frombuffer(base64.b64decode(content[name]), "<i4").astype(np.int32)
            for name in cls._fields
        )
        return cls(sizes, ids)

    def check(self, num: int) -> None:
        """Raises ValueError unless this is of `num` places."""
        sizes = self.sizes.astype(np.int64)
        if sizes.shape != (num,) or self.ids.ndim != 1:
            raise ValueError(f"kept has {len(sizes)} places")
        if min(sizes.min(initial=0), self.ids.min(initial=0)) < 0 or sizes.sum() != len(self.ids):
            raise ValueError(f"kept has {len(self.ids)} ids for {sizes.sum()}")


def decode_routes(packed: Mapping[str, Any]) -> NDArray[np.int16]:
    """The router's choices out of {"shape": ..., "int16": base64 of little-endian numbers}."""
    flat = np.frombuffer(base64.b64decode(packed["int16"]), "<i2")
    return flat.reshape(packed["shape"]).astype(np.int16)


@dataclass(frozen=True)
class Sample:
    """One answer as it was drawn."""

    prompt_id: str
    index: int  # which answer to its prompt
    # With the end-of-turn token where it ended by itself, with those of a stop string where by one.
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, under the distribution that it was drawn from
    text: str  # special tokens too, but for those that ended it; up to a stop string, and with it
    finish: Literal["stop", "length", "open"]  # open: it was stopped on the way, and can go on
    version: int  # of the weights, 0 before the first step; the oldest, where several wrote it
    # [prompt + answer - 1, MoE layers, top_k] int16: the router's choices, where asked for
    routes: NDArray[np.int16] | None = None
    kept: Kept | None = None  # what could be drawn, where the sampler left something out
    versions: tuple[int, ...] | None = None  # of each token, where several weights wrote it

    @property
    def by_token(self) -> tuple[int, ...]:
        """The weights' version that wrote each token."""
        return self.versions or (self.version,) * len(self.tokens)

    def behind(self, begun: "Sample | None") -> "Sample":
        """The whole answer, of which the tokens of `begun` were there before; the text and the
        routes are of the whole already.
        """
        if begun is None or not begun.tokens:
            return self
        kept = self.kept
        if kept is not None and begun.kept is not None:
            kept = Kept(*map(np.concatenate, zip(begun.kept, kept, strict=True)))
        versions = begun.by_token + self.by_token
        return replace(
            self,
            tokens=begun.tokens + self.tokens,
            logprobs=begun.logprobs + self.logprobs,
            version=versions[0],
            versions=versions if len(set(versions)) > 1 else None,
            kept=kept,
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sample":
        """From what people are given (`trajectories.to_json`). What raises on something else is
        told by `read_as`.
        """
        check_types(content, prompt_id=str, index=int, text=str, finish=str, version=int)
        check_types(content, logprobs=list)
        check_ids(content["tokens"], "tokens")
        if not all(isinstance(value, int | float) for value in content["logprobs"]):
            raise TypeError("logprobs are no numbers")
        if "versions" in content:
            check_ids(content["versions"], "versions")
        routes, kept = content.get("routes"), content.get("kept")
        if routes is not None:
            routes = decode_routes(routes)
        if kept is not None:
            kept = Kept.from_json(kept)
            kept.check(len(content["tokens"]))
        return cls(
            prompt_id=content["prompt_id"],
            index=content["index"],
            tokens=tuple(content["tokens"]),
            logprobs=tuple(content["logprobs"]),
            text=content["text"],
            finish=content["finish"],
            version=content["version"],
            routes=routes,
            kept=kept,
            versions=tuple(content["versions"]) if "versions" in content else None,
        )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; a last one that a kill cut short is left out.

    Raises DataError for a line in the middle that is no JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}")
            except ValueError as error:
                raise DataError(
                    f"{path}:{number} is not a JSON object ({error}). Remove the line, or the file."
                ) from error
            yield row


def read_as[T](path: Path, make: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `make` makes of each line of `read_lines`. DataError, with the line, where it is not
    what was written there.
    """
    for number, row in enumerate(read_lines(path), 1):
        try:
            yield make(row)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{path}:{number} is not as it was written ({type(error).__name__}: {error})."
                " Remove the line, or the file."
            ) from error


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, which appears whole or not at all. Raises OSError."""
    with files.publish(path) as (part,):
        put_lines(part, rows)


def open_lines(path: Path, mode: Literal["w", "a"]) -> TextIO:
    """A JSONL file to write. Half of a character, which no encoding has and which people's rewards
    and tools can return, becomes a question mark: it costs itself, and not the run.
    """
    return path.open(mode, encoding="utf-8", errors="replace")


def put_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file where nobody looks yet."""
    with open_lines(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
