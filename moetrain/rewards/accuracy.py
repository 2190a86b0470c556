"""Whether an answer is right, as mathematics or as text."""

import re
from typing import Any

from moetrain.rewards.base import Scores

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FINAL = re.compile(r"####\s*(.+?)\s*$")


def accuracy(
    completions: list[str],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    **columns: Any,
) -> Scores:
    """1 or 0 against the column `answer` (or `solution`); None where the record has neither.

    LaTeX and plain numbers by math-verify, anything else as text without outer blanks. Of a
    completion, what stands in <answer> tags or behind #### is read where there is such a thing.
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
    return (marked.group(1) if marked else text).strip()


def equal(gold: str, given: str) -> bool:
    """The same text, or the same mathematics."""
    if gold == given:
        return True
    from math_verify import parse, verify

    # Its own timeouts use signals, which do not stop every hang: the grader has a deadline.
    wanted = parse(gold, parsing_timeout=None)
    if not wanted:
        return False
    return bool(verify(wanted, parse(given, parsing_timeout=None), timeout_seconds=None))
