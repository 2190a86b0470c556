"""Sets of real numbers, as intervals and as inequalities."""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

from moetrain.rewards.meaning import Algebra, Named, Number, Piece, Reading, Region
from moetrain.rewards.splits import AND, OR, parts_of

Read = Callable[[str], Reading]

_ORDER = re.compile(r"\s*(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)\s*")
_VARIABLE = re.compile(r"(?!\\infty)(?:[a-zA-Z]|\\[a-zA-Z]{2,8}|[a-zA-Z]_\{?\w\}?)")
_REAL = r"\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|\\Re)"
_ALL = re.compile(rf"(?:[a-zA-Z]\s*{_REAL})|\\mathbb\{{?R\}}?|all real numbers|all reals|\\Re")
_NONE = re.compile(r"\\emptyset|\\?\{\s*\\?\}|(?:the )?empty set")
_SUCH = re.compile(
    rf"([a-zA-Z])\s*(?:{_REAL}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(.+[<>].*|.+\\[lgn]e.+)"
)
_WHERE = re.compile(rf"(.+?)(?:[,;]|[,;]?\s*(?:where|with|for|and))\s*[a-zA-Z]\s*{_REAL}")
_AWAY = re.compile(r"\|\s*([a-zA-Z])\s*(?:([-+])\s*([\d./]+)\s*)?\|")


def regions(text: str, read: Read) -> Iterator[Reading]:
    """`text` as a set of numbers; `read` is for its ends."""
    if _ALL.fullmatch(text):
        yield Region((Piece(None, None),))
        return
    if _NONE.fullmatch(text):
        yield Region(())
        return
    such = _SUCH.fullmatch(text)  # \{x \mid x > 5\}
    text = such[2] if such else text
    where = _WHERE.fullmatch(text)
    text = where[1].strip() if where else text
    cups = [part.strip() for part in text.split("\\cup")]
    pieces = [_interval(part, read) for part in cups]
    if all(piece is not None for piece in pieces):
        yield Region(_joined([piece for piece in pieces if piece is not None]))
        return
    chain = _choices(OR.split(text), read) or _listed(parts_of(text), read)
    if chain is not None and (such is None or such[1] == chain[0]):
        yield Named(chain[0], Region(_joined(chain[1])))


def _choices(parts: list[str], read: Read) -> tuple[str, list[Piece]] | None:
    """x < 1 or x > 2."""
    choices = [one for part in parts if (one := _chain(part, read)) is not None]
    if len(choices) < len(parts) or len({one[0] for one in choices}) != 1:
        return None
    return choices[0][0], [piece for one in choices for piece in one[1]]


def _listed(parts: list[str], read: Read) -> tuple[str, list[Piece]] | None:
    """x < 1, x > 2: either, where both cannot be; else both."""
    if len(parts) < 2 or (choices := _choices(parts, read)) is None:
        return None
    name, pieces = choices
    if _apart(pieces):
        return name, pieces
    met = _met(pieces[:1], pieces[1:])
    return None if met is None else (name, met)


def _apart(pieces: list[Piece]) -> bool:
    """Whether no number lies in two of them."""

    def before(one: Piece, other: Piece) -> bool:
        a, b = one.high, other.low
        if not isinstance(a, Number) or not isinstance(b, Number):
            return False
        return a.value < b.value or (a.value == b.value and not (one.has_high and other.has_low))

    if any(isinstance(end, Algebra) for piece in pieces for end in (piece.low, piece.high)):
        return False
    return all(before(one, other) for one, other in pairwise(_joined(pieces)))


def _interval(text: str, read: Read) -> Piece | None:
    """(a, b), [a, b), ]a, b[, ...: without an infinite end it is a point as well."""
    if not (text[:1] in ("(", "[", "]") and text[-1:] in (")", "]", "[") and len(text) > 4):
        return None
    parts = parts_of(text[1:-1])
    if len(parts) != 2:
        return None
    low, high = (_end(part, read) for part in parts)
    if low == "none" or high == "none" or low == "+" or high == "-":
        return None
    return Piece(
        None if isinstance(low, str) else low,
        None if isinstance(high, str) else high,
        text[0] == "[" and not isinstance(low, str),
        text[-1] == "]" and not isinstance(high, str),
    )


def _end(text: str, read: Read) -> "Number | Algebra | str":
    """A number or expression, "+" or "-" for infinity, "none"."""
    plain = text.replace(" ", "")
    if plain in ("\\infty", "+\\infty", "-\\infty"):
        return "-" if plain[0] == "-" else "+"
    one = read(text)
    return one if isinstance(one, Number | Algebra) else "none"


def _chain(text: str, read: Read) -> tuple[str, list[Piece]] | None:
    """(variable, pieces) of x > 2, 1 < x \\le 2, x \\ne 3, x > 1 and x < 2."""
    both = AND.split(text)
    if len(both) == 2:
        one, other = (_chain(part, read) for part in both)
        if one is None or other is None or one[0] != other[0]:
            return None
        met = _met(one[1], other[1])
        return None if met is None else (one[0], met)
    parts = _ORDER.split(text)
    if len(parts) == 3:
        left, sign, right = parts
        if not _VARIABLE.fullmatch(left) and not _AWAY.fullmatch(left):
            left, right, sign = right, left, _turned(sign)
        return _half(left, sign, right, read)
    if len(parts) == 5 and _VARIABLE.fullmatch(parts[2]):
        low = _half(parts[2], _turned(parts[1]), parts[0], read)
        high = _half(parts[2], parts[3], parts[4], read)
        if low is None or high is None or "\\ne" in parts:
            return None
        met = _met(low[1], high[1])
        return None if met is None else (parts[2], met)
    return None


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)


def _half(name: str, sign: str, end: str, read: Read) -> tuple[str, list[Piece]] | None:
    if away := _AWAY.fullmatch(name):
        return _ring(away, sign, read(end), read)
    if not _VARIABLE.fullmatch(name) or _VARIABLE.fullmatch(end):
        return None
    limit = _end(end, read)
    if isinstance(limit, str):
        free = {"<": "+", "\\le": "+", ">": "-", "\\ge": "-"}.get(sign) == limit
        return (name, [Piece(None, None)]) if free else None
    if sign in ("<", "\\le"):
        return name, [Piece(None, limit, False, sign == "\\le")]
    if sign in (">", "\\ge"):
        return name, [Piece(limit, None, sign == "\\ge", False)]
    return name, [Piece(None, limit), Piece(limit, None)]


def _ring(
    away: re.Match[str], sign: str, size: Reading, read: Read
) -> tuple[str, list[Piece]] | None:
    """|x| < a, |x - c| > a."""
    name, how, shift = away.groups()
    middle = read(shift) if shift else Number(Fraction(0))
    if isinstance(size, Number) and isinstance(middle, Number) and size.value > 0:
        center = middle.value * (-1 if how == "+" else 1)
        low, high = Number(center - size.value), Number(center + size.value)
    elif isinstance(size, Algebra) and shift is None:
        low, high = Algebra(f"-{size.text}"), size
        if re.search(r"[-+]", size.text):
            return None
    else:
        return None
    if sign in ("<", "\\le"):
        return name, [Piece(low, high, sign == "\\le", sign == "\\le")]
    if sign in (">", "\\ge"):
        return name, [
            Piece(None, low, False, sign == "\\ge"), Piece(high, None, sign == "\\ge", False)
        ]  # fmt: skip
    return None


def _met(one: list[Piece], other: list[Piece]) -> list[Piece] | None:
    """Where two half-lines meet; None for what is not two that face each other."""
    if len(one) != 1 or len(other) != 1:
        return None
    for whole, rest in ((one, other), (other, one)):
        if whole[0] == Piece(None, None):
            return rest
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
