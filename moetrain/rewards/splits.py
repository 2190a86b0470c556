"""Where a text falls into parts: at commas, at "and" and "or", within brackets."""

import re
from itertools import pairwise

OR = re.compile(
    r"\s*(?:\\lor|\\vee|(?<![a-zA-Z\\])or(?![a-zA-Z])|或者?|または|それとも|か(?=\s*[-\d\\]))\s*"
)
AND = re.compile(
    r"\s*(?:,\s*)?(?:\\land|\\wedge|(?<![a-zA-Z\\])and(?![a-zA-Z])|和|と(?!か)|及び|および)\s*"
)
_FULL = {"(": ")", "[": "]", "{": "}"}


def enclosed(text: str) -> str | None:
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


def parts_of(text: str) -> list[str]:
    """Split at commas (semicolons, where there are any) outside of brackets."""
    mark = ";" if _at(text, ";") else ","
    places = [-1, *_at(text, mark), len(text)]
    return [text[a + 1 : b].strip() for a, b in pairwise(places)]


def _at(text: str, mark: str) -> list[int]:
    places: list[int] = []
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth <= 0:
            places.append(place)
    return places
