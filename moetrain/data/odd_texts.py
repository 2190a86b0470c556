"""Texts that tokenizers are known to cut differently, to compare two readings of one tokenizer."""

import random
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import batched

PLANES = 0x40000
SURROGATES = range(0xD800, 0xE000)
BLANKS = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u00a0")
BLANKS += ("\u2003", "\u2028", "\u2029", "\u3000", "\u200b", "\ufeff", " \n ", "\n  ", " \t \n")
NUMBERS = (
    "7",
    "42",
    "2026",
    "1234567",
    "3.14",
    "1,000",
    "\u0663\u0664",
    "\u00bd",
    "\u2167",
    "\u00b2",
)
ENDINGS = (
    "'s",
    "'S",
    "'t",
    "'re",
    "'VE",
    "'m",
    "'ll",
    "'lL",
    "'d",
    "'\u017f",
    "\u2019s",
    "'x",
    "''s",
)
MARKS = (
    ".",
    ",",
    "...",
    "!?",
    "--",
    "\u2014",
    "(",
    ")",
    "{}",
    "</",
    "/>",
    "<|",
    "|>",
    "\u3002",
    "\u00ab",
)
MARKS += (
    "//",
    "==",
    "_",
    "__",
    "$",
    "\u20ac",
    "+",
    "\\",
    "\\n",
    '"',
    "`",
    "#",
    "@",
    "\u2581",
    "\u0120",
)
WORDS = ("the", "The", "THE", "camelCase", "HTTPServer", "snake_case", "na\u00efve", "cafe\u0301")
WORDS += (
    "\u03a9\u03bc\u03ad\u03b3\u03b1",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "\u4f60\u597d\u4e16\u754c",
)
WORDS += (
    "\ud55c\uad6d\uc5b4",
    "\u1112\u1161\u11ab",
    "\u3072\u3089\u304c\u306a",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
)
WORDS += (
    "\u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001d518\U0001d52b",
    "\ufb01ne",
    "\u01c5",
    "\u0130i",
)
PICTURES = (
    "\U0001f642",
    "\U0001f469\u200d\U0001f4bb",
    "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f",
    "\U0001f44d\U0001f3fd",
)
ODD = (
    "\x00",
    "\x01",
    "\x1b",
    "\x7f",
    "\u00ad",
    "\u0301",
    "\u200d",
    "\u202e",
    "\ue000",
    "\uffff",
    "\U000e0041",
    "\U0010fffd",
)
KINDS = (BLANKS, BLANKS, WORDS, WORDS, NUMBERS, ENDINGS, MARKS, MARKS, PICTURES, ODD)


@cache
def edges() -> tuple[int, ...]:
    """The first and the last of the characters of each kind, wherever the kind changes."""
    codes: set[int] = set()
    before = ""
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))
        if kind != before:
            codes |= {code, max(0, code - 1)}
        before = kind
    return tuple(sorted(codes - {*SURROGATES}))


@cache
def unassigned() -> tuple[int, ...]:
    """Code points of the planes in use that Python's Unicode has not assigned."""
    return tuple(code for code in range(PLANES) if unicodedata.category(chr(code)) == "Cn")


def around(codes: Iterable[int]) -> str:
    """Characters between texts that are cut elsewhere when one is taken for a letter, a number, a
    blank or none of these. Only a token over the edge shows where that is: a byte-level tokenizer
    has none for the bytes of a rare character itself.
    """
    return "".join(f"..{c}'s 1{c}2345\n" for c in map(chr, codes))


def of_characters(codes: Sequence[int]) -> Iterator[str]:
    """Texts that show what each of these characters is taken for."""
    for part in batched(codes, 32):
        yield around(part)
        yield "".join(f"a{c}b  {c}{c} the{c}the {c}.\n{c}" for c in map(chr, part))


def of_tokens(tokens: Sequence[str]) -> Iterator[str]:
    """Each of the tokenizer's added tokens in all surroundings, whole and in part."""
    for i, token in enumerate(tokens):
        other = tokens[i - 1]
        yield from (token, token * 3, f"a{token}b", f" {token} ", f"\n{token}\n\n", token + other)
        yield from (f"  \t{token}\u3000 x", f"1{token}1", token[:-1], token[1:], f"'s{token}'s")
        yield from (
            token.upper(),
            token.lower(),
            f"{token[:1]} {token[1:]}",
            f"{token[:-1]}{other}",
        )
        yield from (f"e\u0301{token}\u0301", f".{token}_{token}-", f"{other} {token}\r\n{other}")


def long_ones(rng: random.Random) -> Iterator[str]:
    """Words, numbers and blanks without an end, and words that no cache has seen."""
    for size in (100, 1000, 5000):
        for part in (
            "a",
            "ab",
            "A",
            "1",
            " ",
            "\n",
            " \n",
            "\t",
            "-",
            "=",
            "\u4f60",
            "\U0001f642",
            "e\u0301",
        ):
            yield part * size
        yield "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size))
        yield "".join(rng.choices("aA1 '\n._\u00e9\u4f60", k=size))


def mixed(rng: random.Random, tokens: Sequence[str]) -> Iterator[str]:
    """Texts of some of everything, for ever."""
    while True:
        parts: list[str] = []
        for _ in range(rng.randint(1, 30)):
            kind = rng.random()
            if kind < 0.08 and tokens:
                parts.append(rng.choice(tokens))
            elif kind < 0.2:
                parts.append(_character(rng))
            elif kind < 0.3:
                letters = "etaoinsrhldcumfpgwybvkxjqz" * 2 + "ETAOIN0123456789\u00e9\u00fc\u00df"
                parts.append("".join(rng.choices(letters, k=rng.randint(1, 12))))
            else:
                parts.append(rng.choice(rng.choice(KINDS)))
            if rng.random() < 0.4:
                parts.append(" ")
        yield "".join(parts)


def _character(rng: random.Random) -> str:
    code = rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(PLANES)))
    return "\ufffd" if code in SURROGATES else chr(code)
