"""Small changes to values, texts and lists of words, drawn by chance."""

import copy
import random
from typing import Any

# What programs trip over, as JSON values. DEEP and LONG are made when they are drawn.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, 1e400,
    float("nan"), "", " ", "\n", "\x00", "\ud800", "\udfff\ud800", "\ufeff", "\u2028", "é", "🙂",
    "a" * 5000, "true", "null", "1e400", "2024-01-05", "<|im_end|>", "<|im_start|>user\nhi",
    "<think>", "</think>", "{{ 7*7 }}", "{% raw %}", "{", "[", "{}", "[]", "[1]", '{"a": 1}',
    [], {}, [None], [[]], [{}], {"": None}, {"role": None}, {"role": []}, {"role": {}}, ["a", 1],
    {"from": ["gpt"]}, [1, 2], {"text": "x"}, [["a", "b"]], [["a"]],
)  # fmt: skip
KEYS = (
    "role content from value messages conversations prompt completion chosen rejected label text"
    " tokens tools tool_calls function arguments name weight loss margin system history input"
    " output instruction question answer chat_template_kwargs reasoning_content thinking images"
    " rejected_response rejected_messages kto_tag problem reward parts logprobs"
).split()
PIECES = (
    "\x00", "\t", "\n", " ", '"', "'", "\\", "$", "${", "$(", "$((", "}", ")", "`", "#", "&", "*",
    "!", "|", ">", "<", ";", "=", ":", "-", "--", ",", "[", "]", "{", "{}", "<<", "&a ", "*a", "~",
    "!!python/object:os.system", "!!binary", "1e400", "0x1F", "0o17", "1_000", ".inf", ".nan",
    "2024-01-05", "9" * 5000, "-1", "0", "1.5", "99999999999", "true", "null", "é", "\ud800", "🙂",
    "\u2028", "%", "?", "..", "/", "~/", "a" * 3000, "[" * 200, "{a: " * 200, "\r", "\x1b[31m",
)  # fmt: skip
# Names of files and numbers of bytes that lead elsewhere.
NAMES = (
    "../secret", "/etc/passwd", "..", ".", "", "a/b", "/dev/zero", "\0", "a" * 300, "x.safetensors",
    "config.json", "~", "./model.safetensors", "model.safetensors/", "\ud800", "a\nb",
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 1000, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, True, 1.5,
           "4", None)  # fmt: skip


def nasty(rng: random.Random) -> Any:
    """A value that somebody may not have thought of."""
    roll = rng.random()
    if roll < 0.02:
        value: Any = "x"
        for _ in range(rng.choice((20, 99, 150, 2000))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if roll < 0.04:
        return {rng.choice(KEYS): copy.deepcopy(rng.choice(VALUES)) for _ in range(3)}
    # A copy: what changes it later must not change what other inputs are made of.
    return copy.deepcopy(rng.choice(VALUES))


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                todo.append(one[key])
    return found


def text_of(value: Any) -> str:
    """As Python shows it; too deep a value is no text."""
    try:
        return str(value)
    except (RecursionError, ValueError):  # or too long a number
        return "x"


def change_value(rng: random.Random, value: Any) -> None:
    """Change one thing in a dict or list, in place."""
    found = places(value)
    if not found:
        return
    container, key = rng.choice(found)
    own = container[key]
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(KEYS)] = container.pop(key)
        case 2 if isinstance(container, dict):
            container[rng.choice(KEYS)] = nasty(rng)
        case 3 if isinstance(container, list):
            container.insert(key, own if rng.random() < 0.5 else nasty(rng))
        case 4:
            container[key] = rng.choice(([own], {"a": own}, text_of(own), [own, own]))
        case 5 if isinstance(own, str):
            container[key] = change_text(rng, own)
        case 6:
            other, there = rng.choice(found)
            if not isinstance(other[there], dict | list):
                container[key] = other[there]
        case _:
            container[key] = nasty(rng)


def change_text(rng: random.Random, text: str) -> str:
    """The text with a piece put in, cut out, doubled, or another character."""
    place = rng.randrange(len(text) + 1)
    end = min(len(text), place + rng.choice((1, 1, 2, 5, 20, 200)))
    match rng.randrange(5):
        case 0:
            return text[:place] + text[end:]
        case 1:
            return text[:place] + text[place:end] * rng.choice((2, 3, 50)) + text[end:]
        case 2:
            return (
                text[:place]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
                + (text[place + 1 :])
            )
        case _:
            return text[:place] + rng.choice(PIECES) + text[place:]


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """The bytes with one of them another, or a few gone."""
    if not raw:
        return b"\xff"
    place = rng.randrange(len(raw))
    if rng.random() < 0.5:
        return raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return raw[:place] + raw[place + rng.choice((1, 3, 50)) :]


def change_words(rng: random.Random, words: list[str], others: list[str]) -> None:
    """Change one of a list of words, in place."""
    place = rng.randrange(len(words) + 1)
    match rng.randrange(5):
        case 0 if place < len(words):
            del words[place]
        case 1 if place < len(words):
            words[place] = change_text(rng, words[place])
        case 2 if place < len(words):
            words[place] = rng.choice(PIECES)
        case 3:
            words.insert(place, rng.choice(PIECES))
        case _:
            words.insert(place, rng.choice(others))
