"""Whether an answer is right, as mathematics or as words."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from moetrain.data.thoughts import after_thought
from moetrain.rewards.base import Scores, is_absent, text_of
from moetrain.rewards.compare import is_parsed, same
from moetrain.rewards.meaning import Algebra, Reading, Words
from moetrain.rewards.prose import SAID, candidates
from moetrain.rewards.reading import is_words, readings

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BETWEEN = re.compile(r"[\s$]*(?:,|;|,?\s*(?:and|or)|和|或)[\s$]*")
_LEAD = re.compile(
    r"(?:\w+, )?(?:(?:so|thus|hence|therefore|the|my|final|correct|right),?\s+)*answer\s*"
    r"(?:is|:|=)\s*:?\s*(?=\S)",
    re.IGNORECASE,
)


def accuracy(
    completions: Sequence[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 or 0 against the column `answer` (where it is empty, `solution`); None where the record has
    neither, or one that cannot be read.

    Of a completion, what stands in <answer> tags, in the last \\boxed{} or behind #### is read as
    it stands, where there is such a thing; else what it says that the answer is, or the last
    formula or number in it.
    """
    num = len(completions)
    golds = [
        second if is_absent(first) else first
        for first, second in zip(answer or [None] * num, solution or [None] * num, strict=True)
    ]
    return [
        None
        if is_absent(gold) or not is_readable(str(gold))
        else float(equal(str(gold), said(text_of(text), begun)))
        for text, gold, begun in zip(completions, golds, opened or [""] * num, strict=True)
    ]


def exact(
    completions: Sequence[Any],
    answer: list[Any] | None = None,
    opened: list[str] | None = None,
    **columns: Any,
) -> Scores:
    """1 when the completion is the column `answer`, but for outer blanks; None without one."""
    num = len(completions)
    return [
        None if is_absent(gold) else float(said(text_of(text), begun).strip() == str(gold).strip())
        for text, gold, begun in zip(
            completions, answer or [None] * num, opened or [""] * num, strict=True
        )
    ]


def said(text: str, opened: str = "") -> str:
    """An answer without its thought; nothing where the thought has no end."""
    return after_thought(text, opened) or ""


def equal(gold: str, given: str) -> bool:
    """The same text, or the same mathematics; either may be the right one."""
    given = given.strip()
    if not given:
        return False
    if gold.strip() == given:
        return True
    return any(
        same(wanted, other) for wanted in _readings(gold, True) for other in _readings(given)
    )


@lru_cache(maxsize=1024)
def is_readable(gold: str) -> bool:
    """Whether an answer can be compared with `gold`: there is something in it, and of what is
    neither a number nor words, math-verify can make something.
    """
    readings = _readings(gold, True)
    others = [one for one in readings if not isinstance(one, Algebra | Words)]
    algebra = [one for one in readings if isinstance(one, Algebra) and "\\" in one.text]
    return bool(readings) and (bool(others) or all(map(is_parsed, algebra)))


def _readings(text: str, is_gold: bool = False) -> list[Reading]:
    final_text, is_marked = marked(text)
    collected: list[Reading] = []
    for candidate in [final_text] if is_marked else candidates(final_text, not is_gold):
        collected += readings(_LEAD.sub("", candidate, count=1) if is_marked else candidate)
        # Words are what they are wherever they stand; of numbers, the surest place alone counts.
        if not all(is_words(one) for one in collected):
            break
    return collected


def final(text: str) -> str:
    """The part of an answer that is compared."""
    own, is_marked = marked(text)
    if is_marked:
        return own.strip()
    last = ""
    for candidate in candidates(own):
        last = candidate
        if not all(is_words(one) for one in readings(candidate)):
            return candidate.strip()
    return own.strip() if not SAID.search(own) else last.strip()


def marked(text: str) -> tuple[str, bool]:
    """(what is compared, whether a tag, a box or #### says that it is the answer)."""
    tagged = _TAGGED.findall(text)
    if tagged:
        text = tagged[-1]
    box = boxed(text)
    if box is not None:
        return box, True
    _, mark, line = text.rstrip().rpartition("\n")[2].rpartition("####")
    return (line, True) if mark else (text, bool(tagged))


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, and those before it that it is listed with; nothing where
    it has no end.
    """
    boxes: list[tuple[int, int, str]] = []
    place = 0
    while start := _BOX.search(text, place):
        place, content = _box(text, start.end())
        boxes.append((start.start(), place, content))
    if not boxes:
        return None
    parts = [boxes[-1][2]]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _BETWEEN.fullmatch(text[before[1] : after[0]]):
            break
        parts.insert(0, before[2])
    return ", ".join(parts)


def _box(text: str, start: int) -> tuple[int, str]:
    """(its end, its content) of a box whose brace is at `start`; or a single word's."""
    if text[start : start + 1] != "{":
        word = re.compile(r"[^\s$]*").match(text, start)
        assert word is not None
        return word.end(), word[0]
    depth = 0
    for place in range(start, len(text)):
        if text[place - 1] == "\\":
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1, text[start + 1 : place]
    return len(text), ""
