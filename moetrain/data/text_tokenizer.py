"""What a tokenizer makes of plain text, without transformers, which takes seconds to import.

What transformers says of a tokenizer's folder is remembered in the cache; the tokens come from
gigatoken, where that gives the same ones, or from Hugging Face's tokenizers.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrain import files, manifest
from moetrain.data.cache import cache_root, digest_files, key_of
from moetrain.data.controls import Spelling
from moetrain.data.limits import PAGE
from moetrain.data.tokenizer_files import FILES, check_folder, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

type Ids = NDArray[np.uint32]
VERSION = 2  # of what is remembered
SLOW, FAST = "tokenizers", "gigatoken"
BATCH = 1 << 18  # characters that `tokenizers` gets together: it takes 100 bytes for each
RECYCLE = 1 << 27  # bytes that a tokenizer's memory of words may take


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer's folder as transformers reads it."""

    content: str  # a whole tokenizer.json
    vocab: int
    end: int  # the token after each document
    control: tuple[str, ...]
    spells: bool
    is_split: bool  # whether special tokens in texts are cut in pieces
    apart: str = ""  # a pattern of characters that gigatoken has in other tables

    @cached_property
    def spelling(self) -> Spelling:
        return Spelling(self.control, self.spells)

    def open(self, engine: str) -> "Engine":
        """What makes tokens of texts."""
        return Fast(self) if engine == FAST else Slow(self)


def read(folder: Path) -> TextTokenizer:
    """What transformers makes of the tokenizer in `folder`, remembered for the same files and
    versions. DataError and DamageError as tokenizer.load.
    """
    check_folder(folder)
    manifest.check(folder, FILES)
    deciding = [*tokenizer_files(folder), *folder.glob("config.json")]
    digests = sorted((Path(p).name, d) for p, d in digest_files(deciding, cache_root()))
    known = note([digests, "transformers", "tokenizers"])
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        noted = json.loads(known.read_text(encoding="utf-8"))
        return TextTokenizer(**noted | {"control": tuple(noted["control"])})
    from moetrain.data import tokenizer

    loaded = tokenizer.load(folder)
    made = of(loaded, tokenizer.end_of_document(loaded))
    remember(known, json.dumps(asdict(made)))
    return made


def of(loaded: "PreTrainedTokenizerFast", end: int = -1) -> TextTokenizer:
    """A tokenizer that transformers has loaded, with `end` after each document."""
    from moetrain.data import tokenizer

    spelling = Spelling.of(loaded)
    return TextTokenizer(
        loaded.backend_tokenizer.to_str(),
        tokenizer.vocab_of(loaded),
        end,
        spelling.tokens,
        spelling.possible,
        bool(loaded.split_special_tokens),
    )


class Engine:
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        raise NotImplementedError


class Slow(Engine):
    """By Hugging Face's tokenizers, as transformers has it done."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        from tokenizers import Tokenizer

        self.written = Tokenizer.from_str(tokenizer.content)
        self.written.encode_special_tokens = tokenizer.is_split
        self.written.no_truncation()
        self.written.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        ids: list[Ids] = []
        for part in _parts(texts):
            encoded = self.written.encode_batch_fast(part, add_special_tokens=False)
            ids += [np.array(one.ids, dtype=np.uint32) for one in encoded]
        return ids

    def decode(self, ids: Ids) -> str:
        return self.written.decode(ids.tolist(), skip_special_tokens=False)


class Fast(Engine):
    """It keeps every word that it has met, which is why it is fast, and gives that memory back only
    with the tokenizer: gigatoken 0.10 takes 3 to 20 bytes for each byte of new words.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._made, self._before = tokenizer, None, 0
        self._apart = re.compile(tokenizer.apart or r"(?!)")

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokenizer": self._tokenizer, "_made": None, "_before": 0, "_apart": self._apart}

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        if self._made is not None and _anonymous() - self._before > RECYCLE:
            self._made = None
        encode, apart = self._opened().encode, self._apart.search
        return [
            encode(text) if text.isascii() or apart(text) is None else self._slow([text])[0]
            for text in texts
        ]

    @cached_property
    def _slow(self) -> "Slow":
        return Slow(self._tokenizer)

    def decode(self, ids: Ids) -> bytes:
        return self._opened().decode(ids)

    def token_lengths(self) -> NDArray[np.int64]:
        """The bytes of each token, by its id."""
        made = self._opened()
        lengths = np.zeros(made.vocab_size, dtype=np.int64)
        for token, raw in made.vocab.items():
            lengths[token] = len(raw)
        return lengths

    def _opened(self) -> Any:
        if self._made is None:
            import gigatoken  # pyright: ignore[reportMissingImports]

            self._made: Any = gigatoken.Tokenizer.from_json(self._tokenizer.content)
            self._before = _anonymous()
        return self._made


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= BATCH:
            yield part
            part, size = [], 0
    if part:
        yield part


def _anonymous() -> int:
    """Bytes of memory that this process has for itself."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared = map(int, file.read().split()[:3])
    return (resident - shared) * PAGE


def note(content: list[Any]) -> Path:
    """Where something is remembered that depends on this content and on the versions of packages
    that it names.
    """
    packages = ("transformers", SLOW, FAST)
    named = [f"{c} {metadata.version(c)}" if c in packages else c for c in content]
    return cache_root() / "tokenizers" / f"{key_of([VERSION, named])}.txt"


def remember(place: Path, content: str) -> None:
    with contextlib.suppress(OSError):  # it only saves time; a cache may be read-only
        files.write_text(place, content)
