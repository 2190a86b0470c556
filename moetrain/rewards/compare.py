"""Whether two readings say the same. Units that only one side gives are not held against the other;
math-verify is asked about what needs algebra.
"""

import re
from fractions import Fraction
from functools import partial
from typing import Any

from moetrain.rewards.meaning import Algebra, Group, Named, Number, Piece, Reading, Region, Words
from moetrain.rewards.units import UNSURE

FEWEST_DIGITS = 6  # from which on a rounded number stands for what it was rounded from
_LETTER = re.compile(r"\(?([a-z])[).:]?")
_CHOICE = re.compile(r"\(?([A-Z])(?:\)|\.|:)\s*\S.*", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_CAPITAL = re.compile(r"(?<![\\a-zA-Z{])[A-Z](?![a-zA-Z}])|(?<=[\da-z^])[A-Z]")
_TOWER = re.compile(
    r"(.*)\^\s*(\d+|[a-zA-Z])\s*\^\s*"
    r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\d+|[a-zA-Z])"
)


def same(one: Reading, other: Reading) -> bool:
    """In either order."""
    match one, other:
        case Named(), Named():
            if _name(one.name) == _name(other.name):
                return same(one.content, other.content)
            equations = [f"{side.name} = {_latex(side.content)}" for side in (one, other)]
            if isinstance(one.content, Algebra) and isinstance(other.content, Algebra):
                return _algebra(*equations)
            return False
        case Named(), _:
            return same(one.content, other)
        case _, Named():
            return same(one, other.content)
        case Number(), Number():
            return _units(one, other) and _close(one, other)
        case Number() | Algebra(), Number() | Algebra():
            return _units(one, other) and _algebra(_latex(one), _latex(other))
        case Region(), Region():
            return _same_region(one, other)
        case Group(), Group():
            return _same_group(one, other)
        case Group(bracket="{", items=(only,)), _:
            return same(only, other)
        case _, Group(bracket="{", items=(only,)):
            return same(one, only)
        case Words(), Words():
            return _same_words(one.text, other.text)
        case _:
            return False


def _name(text: str) -> str:
    return re.sub(r"[\s{}']|\([^()]*\)", "", text)


def _units(one: Number | Algebra, other: Number | Algebra) -> bool:
    if one.unit is None or other.unit is None:
        return not (one.unit or other.unit or "").startswith(UNSURE)
    return one.unit == other.unit


def _close(one: Number, other: Number) -> bool:
    if one.value == other.value:
        return True
    for exact, written in ((one, other), (other, one)):
        if written.digits >= FEWEST_DIGITS and exact.digits != written.digits:
            step = Fraction(1, 10**written.digits)
            if abs(exact.value - written.value) <= step / 2:
                return True
    return False


def _same_region(one: Region, other: Region) -> bool:
    return len(one.pieces) == len(other.pieces) and all(
        _same_piece(a, b) for a, b in zip(one.pieces, other.pieces, strict=True)
    )


def _same_piece(one: Piece, other: Piece) -> bool:
    if (one.has_low, one.has_high) != (other.has_low, other.has_high):
        return False
    for a, b in ((one.low, other.low), (one.high, other.high)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not same(a, b):
            return False
    return True


def _same_group(one: Group, other: Group) -> bool:
    """Brackets that one side leaves out are the other's; a set, or a bare list, has no order."""
    brackets = {one.bracket, other.bracket} - {""}
    if len(brackets) > 1:
        return False
    if brackets & {"(", "["}:
        return len(one.items) == len(other.items) and all(map(same, one.items, other.items))
    if not brackets and len(one.items) != len(other.items):
        return False
    return _within(one, other) and _within(other, one)


def _within(one: Group, other: Group) -> bool:
    return all(any(same(a, b) for b in other.items) for a in one.items)


def _same_words(one: str, other: str) -> bool:
    if plain_words(one) == plain_words(other) or _blank(one) == _blank(other):
        return True
    for text, letter in ((one, plain_words(other)), (other, plain_words(one))):
        match = _CHOICE.fullmatch(text)
        if match and match[1].casefold() == letter:
            return True
    return False


def plain_words(text: str) -> str:
    """(B), b and B. are the same; in what has digits, letters are what they are (mW is not MW)."""
    text = text.strip(" .。\"'`*$")
    text = text if any(map(str.isdigit, text)) else text.casefold()
    letter = _LETTER.fullmatch(text)
    return letter.group(1) if letter else " ".join(text.split())


# Algebra


def _latex(one: Reading) -> str:
    match one:
        case Number():
            value = one.value
            sign = "-" * (value < 0)
            if value.denominator == 1:
                return str(value)
            return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
        case Algebra():
            return one.text
        case _:
            return ""


def _algebra(one: str, other: str) -> bool:
    """As math-verify sees it, in either order, of things of a kind."""
    if not one or not other:
        return False
    if _blank(one) == _blank(other):
        return True
    if _differ_in_case(one, other):
        return False
    from math_verify import verify

    a, b = _parsed(one), _parsed(other)
    if not a or not b or _kind(a[0]) != _kind(b[0]):
        return False
    return verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None)


def _differ_in_case(one: str, other: str) -> bool:
    """Whether a letter is a capital on one side alone: math-verify 0.9 makes no difference."""
    a, b = (set(_COMMAND.sub("", text)) for text in (one, other))
    return any(x.islower() and x.upper() in b - a and x not in b for x in a) or any(
        x.isupper() and x.lower() in b - a and x not in b for x in a
    )


def _parsed(text: str) -> list[Any]:
    """As one LaTeX expression. By default math-verify 0.9 strips what may be a unit (2ab is 2), and
    of what it cannot read, it takes a number that it finds there. Of powers of powers it takes the
    left one first.
    """
    while (tower := _TOWER.sub(r"\1^{\2^\3}", text)) != text:
        text = tower
    if {x.lower() for x in _COMMAND.sub("", text) if x.isupper()} & set(_COMMAND.sub("", text)):
        text = _CAPITAL.sub(lambda match: f"{match[0].lower()}_{{0}}", text)
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normal = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)
    return parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)


def is_parsed(one: Algebra) -> bool:
    """Whether math-verify makes more of it than a text, or of a part of it."""
    from math_verify import parse

    for read in (_parsed, partial(parse, parsing_timeout=None)):
        if any(not isinstance(value, str) for value in read(one.text)):
            return True
    return False


def _blank(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _kind(value: Any) -> str:
    """What math-verify made of a text."""
    from sympy import MatrixBase, Set
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import Boolean

    if isinstance(value, str):
        return "text"
    if isinstance(value, MatrixBase):
        return "matrix"
    if isinstance(value, Set | Relational | Boolean) and getattr(value, "rel_op", "") != "==":
        return "set"
    return "equation" if isinstance(value, Relational) else "number"
