"""Whether gigatoken gives a tokenizer's tokens, tried on what is likely to show where not."""

import contextlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from itertools import batched, islice
from pathlib import Path

import numpy as np

from moetrain.data import odd_texts
from moetrain.data.text_tokenizer import FAST, SLOW, Fast, Ids, Slow, TextTokenizer, note, remember

MIXED = 2000  # generated texts
SEED = 1


def compared(tokenizer: TextTokenizer, sample: Sequence[str] = ()) -> TextTokenizer | str:
    """The tokenizer with what gigatoken has to know of it; or why it is not to be used: it is not
    here, does not read this tokenizer, or gives other tokens for a text of `sample` or one that
    such a tokenizer is likely to cut in its own way. The latter texts are looked at once.

    Characters that the two have in tables of different years of Unicode are set apart: texts with
    one go to `tokenizers`.
    """
    try:
        metadata.version(FAST)
    except metadata.PackageNotFoundError:
        return "gigatoken is not installed"
    known = verdict(tokenizer, "tokens", MIXED)
    noted: list[str | None] | None = None
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(known.read_text(encoding="utf-8"))
    if noted is None:
        noted = list(_looked_at(tokenizer))
        remember(known, json.dumps(noted))
    why, apart = noted
    made = replace(tokenizer, apart=apart or "")
    return why or (_difference(made, sample) if sample else None) or made


def verdict(tokenizer: TextTokenizer, what: str, num: int) -> Path:
    """Where it is remembered what `num` texts have shown, with these versions of packages."""
    return note([asdict(tokenizer), what, num, SEED, "transformers", SLOW, FAST])


def _looked_at(tokenizer: TextTokenizer) -> tuple[str | None, str]:
    """(Why not, a pattern of the characters that are set apart)."""
    try:
        apart = _in_other_tables(tokenizer)
    except BaseException as error:
        return _not_read(error), ""
    made = replace(tokenizer, apart=apart)
    return _difference(made, special_cases(tokenizer)), apart


def _in_other_tables(tokenizer: TextTokenizer) -> str:
    """A pattern of the characters that Python's Unicode has not assigned and that the two take for
    something different.
    """
    fast, slow = Fast(tokenizer), Slow(tokenizer)
    codes: list[int] = []
    for part in batched(odd_texts.unassigned(), 4096):
        groups = list(batched(part, 32))
        whole = [odd_texts.around(group) for group in groups]
        for group, a, b in zip(groups, slow(whole), fast(whole), strict=True):
            if not np.array_equal(a, b):
                each = [odd_texts.around([code]) for code in group]
                compared = zip(group, slow(each), fast(each), strict=True)
                codes += [code for code, c, d in compared if not np.array_equal(c, d)]
    return class_of(codes)


def class_of(codes: Sequence[int]) -> str:
    """A pattern of these characters, in order. As ranges: Python looks at one after the other."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return f"[{''.join(f'\\U{a:08x}-\\U{b:08x}' for a, b in runs)}]" if runs else ""


def special_cases(tokenizer: TextTokenizer, num: int = MIXED, seed: int = SEED) -> Iterator[str]:
    """Texts on which two readings of a tokenizer are likely to differ, if they do anywhere."""
    rng = random.Random(seed)
    slow = Slow(tokenizer)
    added = [token.content for token in slow.written.get_added_tokens_decoder().values()]
    yield from ("", *odd_texts.of_tokens(added), *odd_texts.long_ones(rng))
    yield from odd_texts.of_characters(odd_texts.edges())
    words = [slow.written.decode([i], skip_special_tokens=False) for i in range(tokenizer.vocab)]
    rng.shuffle(words)
    yield from ("".join(part) for part in batched(words, 64))
    yield from islice(odd_texts.mixed(rng, added), num)


def _difference(tokenizer: TextTokenizer, texts: Iterable[str]) -> str | None:
    """How gigatoken differs from `tokenizers` on some of these texts; None where it does not."""
    try:
        fast, slow = Fast(tokenizer), Slow(tokenizer)
        for part in batched(texts, 256):
            right, fast_ids = slow(part), fast(part)
            for text, a, b in zip(part, right, fast_ids, strict=True):
                if not np.array_equal(a, b):
                    return f"gigatoken cuts {_shown(text, a, b, slow)} otherwise"
    except BaseException as error:
        return _not_read(error)
    return None


def _not_read(error: BaseException) -> str:
    """What Rust panics with is no Exception."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise error
    message = (str(error).splitlines() or [""])[0]
    return f"gigatoken cannot read it ({type(error).__name__}: {message[:120]})"


def _shown(text: str, right: Ids, other: Ids, slow: "Slow") -> str:
    """The place of a text where two readings part."""
    size = min(len(right), len(other))
    same = np.flatnonzero(right[:size] != other[:size])
    at = int(same[0]) if len(same) else size
    near: str = slow.decode(right[max(0, at - 2) : at + 3])
    return repr(near if near in text else text[:40])
