"""From an answer's text to what it says: a number with its unit, a list, a set of numbers, an
expression, words. In bounded time: nothing is computed that the text does not write out.
"""

import re
from collections.abc import Iterator
from functools import partial

from moetrain.rewards.meaning import Algebra, Group, Named, Number, Reading, Words
from moetrain.rewards.numerals import DECIMAL_COMMA, numbers
from moetrain.rewards.plain import whole
from moetrain.rewards.regions import regions
from moetrain.rewards.splits import AND, OR, enclosed, parts_of
from moetrain.rewards.units import UNSURE, unit_of

LONGEST = 400  # characters that are read as one answer
DEEPEST = 4  # brackets within brackets


_NAME = re.compile(
    r"(\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\s*\(\s*[a-zA-Z\d, ]+\s*\))?|\\angle\s*[A-Z]{1,3}"
    r"|(?:the )?(?:final )?answer)\s*(?:=|\\in(?![a-zA-Z])|\\to(?![a-zA-Z])|:)\s*(.+)"
)
_EITHER = re.compile(r"(?:either|both)\s+(?=\S)")
_INLINE = re.compile(r"(?<!\\)\$(\S(?:[^$]*[^\s$])?)\$(?!\d)")
_SUM = re.compile(r"[\d\s+*/().^{},-]*(?:\\(?:times|cdot|div)[\d\s+*/().^{},-]*)*=(.+)")
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4,}|(?:[IiAa]s|[Ii]t|[Ss]o|[Ww]e|[Tt]o|of|[Ii]n|be|[Bb]y|[Ii]f|[Aa]t|[Aa]n|[Nn]o|do|[Hh]e|[Oo]r|and)"
    r"(?![a-zA-Z]))|(?:^|\s)[a-zA-Z]{3,}(?:\s|$)|[^\W\d_a-zA-Z\u0370-\u03ff]|\$"
)
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?=\s*[a-zA-Z\\(])")


def readings(text: str) -> list[Reading]:
    """What `text` can mean as an answer, the likeliest first."""
    plain = whole(text)
    if plain.count("$") > 3:  # $x = 3$ or $x = 4$
        plain = _INLINE.sub(r"\1", plain)
    if not plain:
        return []
    if len(plain) > LONGEST:
        return [Words(plain)]
    return list(dict.fromkeys(_read(plain, 0))) or [Words(plain)]


def _read(text: str, depth: int) -> Iterator[Reading]:
    text = text.strip()
    inner = enclosed(text)
    if inner is not None and text[0] in "({" and not parts_of(inner)[1:] and depth < DEEPEST:
        if text[0] == "(" or inner.startswith("\\{") or not inner:
            yield from _read(inner, depth + 1)
    sure = list(numbers(text))
    yield from sure
    if (not sure or DECIMAL_COMMA.fullmatch(text)) and depth < DEEPEST:
        several = [*regions(text, partial(_first, depth=depth + 1)), *_groups(text, depth)]
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
    """Whether nothing was found in it but words, or a number with a word that no table has."""
    match one:
        case Words():
            return True
        case Number(unit=str(unit)) | Algebra(unit=str(unit)):
            return unit.startswith(UNSURE)
        case Named():
            return is_words(one.content)
        case Group():
            return any(map(is_words, one.items))
        case _:
            return False


def _named(text: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(text)
    if match is None or match[2].lstrip().startswith(("=", ":")):
        return None
    name = " ".join(match[1].split())
    if ":" in text[len(match[1]) : text.index(match[2], len(match[1]))] and len(name) > 1:
        name = ""  # "Answer: 5"
    return ("" if "answer" in name.casefold() else name), match[2]


# Several


def _groups(text: str, depth: int) -> Iterator[Group]:
    if text.startswith("\\pm") or re.match(r"[^,;()]*\S\s*\\pm", text):
        both = [text.replace("\\pm", sign, 1).strip() for sign in ("+", "-")]
        both = [one.removeprefix("+").strip() for one in both]
        yield Group("", tuple(_first(one, depth) for one in both))
        return
    inner = enclosed(text)
    bracket = "{" if text.startswith("\\{") else text[0] if inner is not None else ""
    body = text if inner is None else inner
    body = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), body)
    parts = parts_of(AND.sub(", ", OR.sub(", ", body)) if not bracket else body)
    parts = [_EITHER.sub("", part) for part in parts if part]
    if len(parts) > 1 or (bracket == "{" and parts):
        items = tuple(_first(part, depth) for part in parts)
        names = {item.name for item in items if isinstance(item, Named)}
        if len(names) == 1 and len(items) > 1 and not bracket:  # x = 1 or x = 2; x = 1, 2
            items = tuple(i.content if isinstance(i, Named) else i for i in items)
        yield Group(bracket, items)


def _first(text: str, depth: int) -> Reading:
    return next(_read(text, depth + 1))


# Expressions


def _algebra(text: str) -> Algebra | None:
    """`text` as an expression, with the unit that stands behind it; None where it is prose."""
    text = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
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
