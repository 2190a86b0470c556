"""Numbers as people write them: grouped, with a decimal comma, as fractions, mixed, in powers of
ten, with money before them or a unit behind.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from moetrain.rewards.meaning import Number
from moetrain.rewards.scales import scaled, worked
from moetrain.rewards.units import MONEY, unit_of, without_ending

MOST_DIGITS = 400

_INT = r"\d+"
_DECIMAL = re.compile(r"(\d*)\.(\d+)|(\d+)\.?")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:([, '_])\d{3})(?:\1\d{3})*(\.\d+)?")
_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(\.\d+)?")
_POINTED = re.compile(r"[1-9]\d{0,2}(?:([. ])\d{3})(?:\1\d{3})*,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")
DECIMAL_COMMA = re.compile(r"\d+,\d+")
_FRAC = r"\\frac\s*(?:\{\s*(-?[\d., ]+?)\s*\}|(\d))\s*(?:\{\s*(-?[\d., ]+?)\s*\}|(\d))"
_LATEX = re.compile(_FRAC)
_SLASH = re.compile(r"([\d.,]+)\s*/\s*([\d.,]+)")
_ASIAN = re.compile(r"(\d+)\s*(?:分\s*の|分之)\s*(\d+)")
_MIXED = re.compile(rf"({_INT})\s+({_INT})\s*/\s*({_INT})|({_INT})\s*{_FRAC}")
_SCIENCE = re.compile(
    r"(-?[\d.,]+)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))"
    r"|([\d.]+)[eE]([-+]?\d{1,3})"
)
_REPEATED = re.compile(r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?")
_RAISED = re.compile(r"(\d{1,6})\s*\^\s*(?:\{\s*(-?\d{1,2})\s*\}|(-?\d{1,2}))")
_HEAD = re.compile(
    r"\d+\.\d*\\(?:overline|bar|dot)\s*(?:\{[\d\s]+\}|\d)|"
    rf"(?:[\d.,]+\s*(?:\\times|\\cdot|\*)\s*)?\d+\s*\^\s*(?:\{{[^{{}}]*\}}|-?\d+)"
    rf"|{_INT}\s+{_INT}\s*/\s*{_INT}|(?:{_INT}\s*)?{_FRAC}|\d+\s*(?:分\s*の|分之)\s*\d+"
    rf"|\d[\d.,'_]*(?:[eE][-+]?\d+(?![\da-zA-Z]))?\s*/\s*\d[\d.,]*"
    r"|(?:\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?|\d[\d.,'_]*\d|\d|\.\d+)"
    r"(?:[eE][-+]?\d+(?![\da-zA-Z]))?"
)


def numbers(text: str) -> Iterator[Number]:
    """What `text` can mean as one number with its unit."""
    sign, rest = _signed(text)
    money = MONEY.match(rest)
    if money is not None:
        more, rest = _signed(rest[money.end() :])
        sign *= more
    head = _HEAD.match(rest)
    if head is None:
        return
    tail = rest[head.end() :]
    apart = not tail or not tail[0].isalpha() or not tail[0].isascii()
    tail = without_ending(tail.strip())
    if sign > 0 and money is None:
        for value, _ in _values(head.group().strip()):
            if (result := worked(value, tail)) is not None:
                yield Number(result)
                return
    factor, left = scaled(tail, head.group().strip() == "1")
    unit = unit_of(left, apart or factor != 1) if left else None
    if left and unit is None:
        return
    if money is not None:
        money_unit = unit_of(re.sub(r"^US(?=\$)", "", money.group()), True)
        if unit not in (None, money_unit):
            return
        unit = money_unit
    for value, digits in _values(head.group().strip()):
        yield Number(sign * value * factor, unit, digits if factor == 1 else 0)


def _signed(text: str) -> tuple[int, str]:
    text = text.strip()
    if text[:1] in ("-", "+"):
        return (-1 if text[0] == "-" else 1), text[1:].strip()
    return 1, text


def _values(text: str) -> Iterator[tuple[Fraction, int]]:
    """(value, digits behind the point) of a number without sign and unit."""
    if len(text) > MOST_DIGITS:
        return
    try:
        yield from _written(text)
        for value in _made(text):
            yield value, 0
    except (ZeroDivisionError, ValueError):
        return


def _written(text: str) -> Iterator[tuple[Fraction, int]]:
    plain = _DECIMAL.fullmatch(text)
    if plain:
        yield Fraction(text.rstrip(".")), len(plain[2] or "")
    elif _GROUPED.fullmatch(text) or _INDIAN.fullmatch(text):
        bare = re.sub("[, '_]", "", text)
        yield Fraction(bare), len(bare.partition(".")[2])
    elif _POINTED.fullmatch(text):
        bare = re.sub(r"[. ]", "", text).replace(",", ".")
        yield Fraction(bare), len(bare.partition(".")[2])
    elif DECIMAL_COMMA.fullmatch(text):
        bare = text.replace(",", ".")
        yield Fraction(bare), len(bare.partition(".")[2])


def _made(text: str) -> Iterator[Fraction]:
    """Fractions, mixed numbers, powers."""
    if match := _ASIAN.fullmatch(text):
        yield Fraction(int(match[2]), int(match[1]))
    elif match := _REPEATED.fullmatch(text):
        whole, once, again = match.groups()
        nines = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        yield Fraction(f"{whole}.{once or 0}") + nines
    elif match := _SLASH.fullmatch(text):
        yield _one(match[1]) / _one(match[2])
    elif match := _LATEX.fullmatch(text):
        yield _one(match[1] or match[2]) / _one(match[3] or match[4])
    elif match := _MIXED.fullmatch(text):
        count, up, down = (x for x in match.groups() if x is not None)
        part = _one(up) / _one(down)
        if 0 < part < 1:
            yield int(count) + part
    elif match := _SCIENCE.fullmatch(text):
        base, power = (x for x in match.groups() if x is not None)
        yield _one(base) * Fraction(10) ** int(power)
    elif match := _RAISED.fullmatch(text):
        yield Fraction(int(match[1])) ** int(match[2] or match[3])


def _one(text: str) -> Fraction:
    """A decimal number. Raises ValueError."""
    sign, rest = _signed(text)
    found = next(_written(rest), None)
    if found is None:
        raise ValueError(text)
    return sign * found[0]
