"""Words behind a number that make another number of it: 3 million, 4 twelfths, 4 squared, 50%."""

import math
import re
from collections.abc import Callable
from fractions import Fraction

SCALES = {
    "tens": 10, "dozen": 12, "dozens": 12, "hundred": 100, "hundreds": 100,
    "thousand": 10**3, "thousands": 10**3, "lakh": 10**5, "lakhs": 10**5, "lac": 10**5,
    "million": 10**6, "millions": 10**6, "crore": 10**7, "crores": 10**7,
    "billion": 10**9, "billions": 10**9, "trillion": 10**12, "trillions": 10**12,
    "quadrillion": 10**15, "quadrillions": 10**15, "quintillion": 10**18, "quintillions": 10**18,
    "十": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "十万": 10**5,
    "百万": 10**6, "千万": 10**7, "億": 10**8, "亿": 10**8, "兆": 10**12, "만": 10**4, "억": 10**8,
    "ダース": 12,
}  # fmt: skip
_ONES = "first second third fourth fifth sixth seventh eighth ninth".split()
_PARTS = {
    "half": 2, "halves": 2, "quarter": 4, "tenth": 10, "eleventh": 11, "twelfth": 12,
    "thirteenth": 13, "fourteenth": 14, "fifteenth": 15, "sixteenth": 16, "seventeenth": 17,
    "eighteenth": 18, "nineteenth": 19, "hundredth": 100, "thousandth": 1000,
    "ten thousandth": 10**4, "hundred thousandth": 10**5, "millionth": 10**6, "billionth": 10**9,
    "trillionth": 10**12,
}  # fmt: skip
_PARTS |= {name: number for number, name in enumerate(_ONES, 1) if number > 2}
for _ten, _word in enumerate("twent thirt fort fift sixt sevent eight ninet".split(), 2):
    _PARTS[f"{_word}ieth"] = 10 * _ten
    _PARTS |= {f"{_word}y {name}": 10 * _ten + number for number, name in enumerate(_ONES, 1)}
_MOST = 100  # of which a factorial is made

_OPERATORS: dict[str, Callable[[Fraction], Fraction | None]] = {
    "squared": lambda value: value**2,
    "cubed": lambda value: value**3,
    "factorial": lambda value: (
        Fraction(math.factorial(int(value))) if value.denominator == 1 and value <= _MOST else None
    ),
    "doubled": lambda value: value * 2,
    "tripled": lambda value: value * 3,
    "quadrupled": lambda value: value * 4,
    "halved": lambda value: value / 2,
}


def _either(words: list[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True)).replace(" ", "[- ]")


_SCALE = re.compile(rf"({_either(list(SCALES))})(?![a-z])\s*")
_PART = re.compile(rf"({_either(list(_PARTS))})(s?)(?![a-z])\s*")
_SHARE = re.compile(
    r"(\\?%|percent(?:age points?)?|per cent|パーセント|퍼센트)|(\u2030|per mille?)|(basis points?)"
)
BEHIND = re.compile(
    rf"\s*-?(?:{_either([*SCALES, *_PARTS])}|{'|'.join(_OPERATORS)}|basis points?)s?(?![a-z])"
)


def scaled(rest: str, is_one: bool = False) -> tuple[Fraction, str]:
    """(the factor that `rest`, which follows a number, begins with, what comes after it)."""
    if share := _SHARE.match(rest):
        factor = Fraction(1, 100 if share[1] else 1000 if share[2] else 10_000)
        return factor, rest[share.end() :].strip()
    if (part := _PART.match(rest)) and (part[2] or part[1] == "halves" or is_one):
        return Fraction(1, _PARTS[part[1].replace("-", " ")]), rest[part.end() :]
    match = _SCALE.match(rest)
    return (Fraction(SCALES[match[1]]), rest[match.end() :]) if match else (Fraction(1), rest)


def worked(value: Fraction, word: str) -> Fraction | None:
    """A number on which the operator behind it is carried out; None where there is no such one."""
    return _OPERATORS[word](value) if word in _OPERATORS and value >= 0 else None
