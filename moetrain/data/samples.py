"""A prompt and a sampled answer, in memory and as JSONL."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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


class Kept(NamedTuple):
    """What could be drawn at each place of an answer, where that was less than everything: token
    ids, those of the first place first.
    """

    sizes: NDArray[np.int32]  # [answer], how many ids a place has
    ids: NDArray[np.int32]  # [sum of sizes]

    @classmethod
    def of(cls, places: Sequence[Sequence[int] | NDArray[np.int32]]) -> "Kept":
        """From the ids of each place."""
        sizes = np.array([len(own) for own in places], np.int32)
        return cls(sizes, np.concatenate([np.asarray(own, np.int32) for own in places]))

    def to_json(self) -> dict[str, str]:
        """Both as base64 of little-endian int32."""
        return {
            name: base64.b64encode(own.astype("<i4").tobytes()).decode()
            for name, own in self._asdict().items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, str]) -> "Kept":
        """What `to_json` gave."""
        sizes, ids = (
            np.frombuffer(base64.b64decode(content[name]), "<i4").astype(np.int32)
            for name in cls._fields
        )
        if sizes.sum() != len(ids):
            raise ValueError(f"kept has {len(ids)} ids for {sizes.sum()}")
        return cls(sizes, ids)


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
        for name, kinds in (("tokens", int), ("logprobs", int | float)):
            if not all(isinstance(value, kinds) for value in content[name]):
                raise TypeError(f"{name} are no numbers")
        for name, kind in (("prompt_id", str), ("index", int), ("text", str), ("finish", str)):
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is {type(content[name]).__name__}")
        routes, kept = content.get("routes"), content.get("kept")
        if routes is not None:
            routes = decode_routes(routes)
        if kept is not None:
            kept = Kept.from_json(kept)
            if len(kept.sizes) != len(content["tokens"]):
                raise ValueError(f"kept has {len(kept.sizes)} places")
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
                found = parse_json(line)
                if not isinstance(found, dict):
                    raise ValueError(f"it is a {type(found).__name__}")
            except ValueError as error:
                raise DataError(
                    f"{path}:{number} is not a JSON object ({error}). Remove the line, or the file."
                ) from error
            yield found


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


def put_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file where nobody looks yet."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
