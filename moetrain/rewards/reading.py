"""From an answer's text to what it says: a number with its unit, a list, a set of numbers, an
expression, words. In bounded time: nothing is computed that the text does not write out.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from moetrain.rewards.meaning import Algebra, Group, Named, Number, Piece, Reading, Region, Words
from moetrain.rewards.numerals import DECIMAL_COMMA, numbers
from moetrain.rewards.plain import whole
from moetrain.rewards.units import unit_of

LONGEST = 400  # characters that are read as one answer
DEEPEST = 4  # brackets within brackets


_NAME = re.compile(
    r"(\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\s*\(\s*[a-zA-Z\d, ]+\s*\))?|\\angle\s*[A-Z]{1,3}"
    r"|(?:the )?(?:final )?answer)\s*(?:=|\\in(?![a-zA-Z])|\\to(?![a-zA-Z])|:)\s*(.+)"
)
_SUM = re.compile(r"[\d\s+*/().^{},-]*(?:\\(?:times|cdot|div)[\d\s+*/().^{},-]*)*=(.+)")
_OR = re.compile(r"\s*(?:\\lor|\\vee|(?<![a-zA-Z\\])or(?![a-zA-Z])|或者?|または)\s*")
_AND = re.compile(r"\s*(?:,\s*)?(?:\\land|\\wedge|(?<![a-zA-Z\\])and(?![a-zA-Z])|和|と)\s*")
_ORDER = re.compile(r"\s*(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)\s*")
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-zA-Z]{2,8}|[a-zA-Z]_\{?\w\}?")
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4,}|(?:is|it|so|we|to|of|in|be|by|if|as|at|an|no|do|he|or|and)"
    r"(?![a-zA-Z]))|(?:^|\s)[a-zA-Z]{3,}(?:\s|$)|[^\W\d_a-zA-Z\u0370-\u03ff]|\$"
)
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?=\s*[a-zA-Z\\(])")
_FULL = {"(": ")", "[": "]", "{": "}"}
_ALL = re.compile(r"\\mathbb\{?R\}?|all real numbers|all reals|\\Re")
_NONE = re.compile(r"\\emptyset|\\?\{\s*\\?\}|(?:the )?empty set")


def readings(text: str) -> list[Reading]:
    """What `text` can mean as an answer, the likeliest first."""
    plain = whole(text)
    if not plain:
        return []
    if len(plain) > LONGEST:
        return [Words(plain)]
    return list(dict.fromkeys(_read(plain, 0))) or [Words(plain)]


def _read(text: str, depth: int) -> Iterator[Reading]:
    text = text.strip()
    inner = _enclosed(text)
    if inner is not None and text[0] in "({" and not _parts(inner)[1:] and depth < DEEPEST:
        if text[0] == "(" or inner.startswith("\\{") or not inner:
            yield from _read(inner, depth + 1)
    sure = list(numbers(text))
    yield from sure
    if (not sure or DECIMAL_COMMA.fullmatch(text)) and depth < DEEPEST:
        several = [*_regions(text, depth), *_groups(text, depth)]
        sure += several
        yield from several
        if not several and (named := _named(text)):
            name, rest = named
            for one in _read(rest, depth + 1):
                own = one.content if isinstance(one, Named) else one
                sure += [own] if isinstance(own, Number) else []
                yield Named(name, own) if name else own
        if (result := _SUM.fullmatch(text)) and "=" not in result[1]:  # 7 * 2 = 14
            results = list(numbers(result[1]))
            sure += results
            yield from results
    if not sure and (expression := _algebra(text)):
        yield expression
    yield Words(text)


def is_words(one: Reading) -> bool:
    """Whether nothing but words was found in it."""
    match one:
        case Words():
            return True
        case Named():
            return is_words(one.content)
        case Group():
            return any(map(is_words, one.items))
        case _:
            return False


def _named(text: str) -> tuple[str, str] | None:
    found = _NAME.fullmatch(text)
    if found is None or found[2].lstrip().startswith(("=", ":")):
        return None
    name = " ".join(found[1].split())
    if ":" in text[len(found[1]) : text.index(found[2], len(found[1]))] and len(name) > 1:
        name = ""  # "Answer: 5"
    return ("" if "answer" in name.casefold() else name), found[2]


# Several


def _enclosed(text: str) -> str | None:
    """What stands in the brackets that enclose all of `text`."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return text[2:-2].strip()
    if text[:1] in _FULL and text[-1:] == _FULL[text[0]] and len(text) > 1:
        depth = 0
        for place, letter in enumerate(text):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0 and place < len(text) - 1:
                return None
        return text[1:-1].strip()
    return None


def _parts(text: str) -> list[str]:
    """Split at commas (semicolons, where there are any) outside of brackets."""
    mark = ";" if _at(text, ";") else ","
    places = [-1, *_at(text, mark), len(text)]
    return [text[a + 1 : b].strip() for a, b in pairwise(places)]


def _at(text: str, mark: str) -> list[int]:
    found: list[int] = []
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth <= 0:
            found.append(place)
    return found


def _groups(text: str, depth: int) -> Iterator[Group]:
    if text.startswith("\\pm") or re.match(r"[^,;()]*\S\s*\\pm", text):
        both = [text.replace("\\pm", sign, 1).strip() for sign in ("+", "-")]
        both = [one.removeprefix("+").strip() for one in both]
        yield Group("", tuple(_first(one, depth) for one in both))
        return
    inner = _enclosed(text)
    bracket = "{" if text.startswith("\\{") else text[0] if inner is not None else ""
    body = text if inner is None else inner
    body = _THOUSANDS.sub(lambda found: found[1].replace(",", ""), body)
    parts = _parts(_AND.sub(", ", _OR.sub(", ", body)) if not bracket else body)
    parts = [part for part in parts if part]
    if len(parts) > 1 or (bracket == "{" and parts):
        items = tuple(_first(part, depth) for part in parts)
        names = {item.name for item in items if isinstance(item, Named)}
        if len(names) == 1 and len(items) > 1 and not bracket:  # x = 1 or x = 2; x = 1, 2
            items = tuple(i.content if isinstance(i, Named) else i for i in items)
        yield Group(bracket, items)


def _first(text: str, depth: int) -> Reading:
    return next(_read(text, depth + 1))


# Sets of numbers


def _regions(text: str, depth: int) -> Iterator[Reading]:
    if _ALL.fullmatch(text):
        yield Region((Piece(None, None),))
        return
    if _NONE.fullmatch(text):
        yield Region(())
        return
    cups = [part.strip() for part in text.split("\\cup")]
    pieces = [_interval(part, depth, len(cups) > 1) for part in cups]
    if all(piece is not None for piece in pieces):
        yield Region(_joined([piece for piece in pieces if piece is not None]))
        return
    choices = _OR.split(text)
    found = [_chain(choice, depth) for choice in choices]
    names = {one[0] for one in found if one is not None}
    if all(one is not None for one in found) and len(names) == 1:
        own = [piece for one in found if one is not None for piece in one[1]]
        yield Named(names.pop(), Region(_joined(own)))


def _interval(text: str, depth: int, sure: bool) -> Piece | None:
    """(a, b), [a, b), ...: an end without limit makes it one, and so does `sure`, or brackets that
    differ; else it is one as well as a point.
    """
    if not (text[:1] in "([" and text[-1:] in ")]" and len(text) > 4):
        return None
    parts = _parts(text[1:-1])
    if len(parts) != 2:
        return None
    low, high = (_end(part, depth) for part in parts)
    if low == "none" or high == "none" or low == "+" or high == "-":
        return None
    return Piece(
        None if isinstance(low, str) else low,
        None if isinstance(high, str) else high,
        text[0] == "[" and not isinstance(low, str),
        text[-1] == "]" and not isinstance(high, str),
    )


def _end(text: str, depth: int) -> "Number | Algebra | str":
    """A number or expression, "+" or "-" for infinity, "none"."""
    plain = text.replace(" ", "")
    if plain in ("\\infty", "+\\infty", "-\\infty"):
        return "-" if plain[0] == "-" else "+"
    one = _first(text, depth + 1)
    return one if isinstance(one, Number | Algebra) else "none"


def _chain(text: str, depth: int) -> tuple[str, list[Piece]] | None:
    """(variable, pieces) of x > 2, 1 < x \\le 2, x \\ne 3, x > 1 and x < 2."""
    both = _AND.split(text)
    if len(both) == 2:
        one, other = (_chain(part, depth) for part in both)
        if one is None or other is None or one[0] != other[0]:
            return None
        met = _met(one[1], other[1])
        return None if met is None else (one[0], met)
    parts = _ORDER.split(text)
    if len(parts) == 3:
        left, sign, right = parts
        if not _VARIABLE.fullmatch(left):
            left, right, sign = right, left, _turned(sign)
        return _half(left, sign, right, depth)
    if len(parts) == 5 and _VARIABLE.fullmatch(parts[2]):
        low = _half(parts[2], _turned(parts[1]), parts[0], depth)
        high = _half(parts[2], parts[3], parts[4], depth)
        if low is None or high is None or "\\ne" in parts:
            return None
        met = _met(low[1], high[1])
        return None if met is None else (parts[2], met)
    return None


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)


def _half(name: str, sign: str, end: str, depth: int) -> tuple[str, list[Piece]] | None:
    if not _VARIABLE.fullmatch(name) or _VARIABLE.fullmatch(end):
        return None
    limit = _end(end, depth)
    if isinstance(limit, str):
        return None
    if sign in ("<", "\\le"):
        return name, [Piece(None, limit, False, sign == "\\le")]
    if sign in (">", "\\ge"):
        return name, [Piece(limit, None, sign == "\\ge", False)]
    return name, [Piece(None, limit), Piece(limit, None)]


def _met(one: list[Piece], other: list[Piece]) -> list[Piece] | None:
    """Where two half-lines meet; None for what is not two that face each other."""
    if len(one) != 1 or len(other) != 1:
        return None
    left, right = sorted((one[0], other[0]), key=lambda piece: piece.low is None)
    if left.low is None or left.high is not None or right.low is not None:
        return None
    return [Piece(left.low, right.high, left.has_low, right.has_high)]


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """In order, where all ends are numbers."""

    def place(piece: Piece) -> tuple[int, Fraction]:
        low = piece.low
        return (0, Fraction(0)) if low is None else (1, low.value)  # type: ignore[union-attr]

    if any(isinstance(piece.low, Algebra) for piece in pieces):
        return tuple(pieces)
    return tuple(sorted(pieces, key=place))


# Expressions


def _algebra(text: str) -> Algebra | None:
    """`text` as an expression, with the unit that stands behind it; None where it is prose."""
    text = _THOUSANDS.sub(lambda found: found[1].replace(",", ""), text)
    head, _, unit = text.rpartition(" ")
    while head:
        name = unit_of(unit, True) if len(unit) > 1 else None
        if name is not None and not _is_prose(head):
            return Algebra(head, name)
        head, _, more = head.rpartition(" ")
        unit = f"{more} {unit}"
    return None if _is_prose(text) else Algebra(text)


def _is_prose(text: str) -> bool:
    bare = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", r"\\", text)
    return _PROSE.search(bare) is not None
