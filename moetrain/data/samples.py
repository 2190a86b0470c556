"""A prompt and a sampled answer, in memory and as JSONL."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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


def decode_routes(packed: Mapping[str, Any]) -> NDArray[np.int16]:
    """The router's choices out of {"shape": ..., "int16": base64 of little-endian numbers}."""
    flat = np.frombuffer(base64.b64decode(packed["int16"]), "<i2")
    return flat.reshape(packed["shape"]).astype(np.int16)


@dataclass(frozen=True)
class Sample:
    """One answer as it was drawn."""

    prompt_id: str
    index: int  # which answer to its prompt
    tokens: tuple[int, ...]  # with the end-of-turn token where it ended by itself
    logprobs: tuple[float, ...]  # of each token, under the distribution that it was drawn from
    text: str  # special tokens too, but for those that ended it
    finish: Literal["stop", "length"]
    version: int  # of the weights: 0 before the first step
    # [prompt + answer - 1, MoE layers, top_k] int16: the router's choices, where asked for
    routes: NDArray[np.int16] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; routes as base64 with their shape."""
        content = {name: value for name, value in asdict(self).items() if name != "routes"}
        if self.routes is not None:
            packed = base64.b64encode(self.routes.astype("<i2").tobytes()).decode()
            content["routes"] = {"shape": self.routes.shape, "int16": packed}
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sample":
        """What `to_json` gave. What raises on something else is told by `read_as`."""
        for name, kinds in (("tokens", int), ("logprobs", int | float)):
            if not all(isinstance(value, kinds) for value in content[name]):
                raise TypeError(f"{name} are no numbers")
        for name, kind in (("prompt_id", str), ("index", int), ("text", str), ("finish", str)):
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is {type(content[name]).__name__}")
        routes = content.get("routes")
        if routes is not None:
            routes = decode_routes(routes)
        return cls(
            prompt_id=content["prompt_id"],
            index=content["index"],
            tokens=tuple(content["tokens"]),
            logprobs=tuple(content["logprobs"]),
            text=content["text"],
            finish=content["finish"],
            version=content["version"],
            routes=routes,
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
        except (LookupError, TypeError, ValueError, AttributeError) as error:
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
