"""Whether an answer is right, as mathematics or as text."""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from moetrain.rewards.base import Scores

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
_BESIDE = re.compile(rf"(?<={_CJK})(?=[-\d$\\])|(?<=[\d%$}}])(?={_CJK})")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([a-z])[).:]?")
_ANSWER = re.compile(r"\banswer\s*(?:is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|[\n$]|\\\(")
_FINAL = re.compile(r"####\s*(.+?)\s*$")

LONGEST = 200  # characters that are read as one expression


def accuracy(
    completions: list[str],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    **columns: Any,
) -> Scores:
    """1 or 0 against the column `answer` (or `solution`); None where the record has neither.

    LaTeX and plain numbers by math-verify, anything else as words. Of a completion, what stands in
    <answer> tags, in the last \\boxed{} or behind #### is read where there is such a thing.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        return [None] * len(completions)
    return [
        None if gold is None else float(equal(final(str(gold)), final(text)))
        for text, gold in zip(completions, golds, strict=True)
    ]


def exact(completions: list[str], answer: list[Any] | None = None, **columns: Any) -> Scores:
    """1 when the completion is the column `answer`, but for outer blanks; None without one."""
    golds = answer or [None] * len(completions)
    return [
        None if gold is None else float(text.strip() == str(gold).strip())
        for text, gold in zip(completions, golds, strict=True)
    ]


def final(text: str) -> str:
    """The part of an answer that is compared."""
    tagged = _TAGGED.findall(text)
    if tagged:
        text = tagged[-1]
    marked = _FINAL.search(text)
    return (boxed(text) or (marked.group(1) if marked else text)).strip()


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def equal(gold: str, given: str) -> bool:
    """The same text, or the same mathematics."""
    gold, given = _even(gold), _even(given)
    if _plain(gold) in (_plain(given), _plain(_said(given))) or _same_number(gold, given):
        return True
    from math_verify import verify

    # The first reading of the gold answer that there is; any of the other.
    wanted = next(_readings(gold), None)
    return wanted is not None and any(
        verify(wanted, other, timeout_seconds=None) for other in _readings(given, whole_first=False)
    )


def _readings(text: str, whole_first: bool = True) -> Iterator[list[Any]]:
    """What math-verify makes of `text`: as one expression, where it is no prose, and of those in
    it.
    """
    from math_verify import parse

    texts = [text]
    if len(text) <= LONGEST and not _PROSE.search(text):
        texts.insert(0 if whole_first else 1, f"\\boxed{{{text}}}")
    for one in texts:
        found: list[Any] = parse(one, parsing_timeout=None)
        if found:
            yield found


def _even(text: str) -> str:
    """Digits and signs in their usual width, money without its sign, numbers apart from words."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\\$", "")
    return _BESIDE.sub(" ", text).strip()


def _plain(text: str) -> str:
    """As words that are compared: (B), \\text{b} and B. are the same."""
    text = _TEXT.sub(r"\1", text).strip(" .。\"'`*$").casefold()
    letter = _LETTER.fullmatch(text)
    return letter.group(1) if letter else " ".join(text.split())


def _said(text: str) -> str:
    """What follows the last "answer is", or nothing."""
    found = _ANSWER.findall(text)
    return found[-1] if found else "\0"


def _same_number(gold: str, given: str) -> bool:
    try:
        return float(gold) == float(given)
    except ValueError:
        return False
