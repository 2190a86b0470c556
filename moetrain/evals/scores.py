"""What is made of graded answers: scores a question, and how sure their mean is.

Legend: n answers to a question, c of them right; q questions.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moetrain.observe.interval import Z, wilson
from moetrain.rewards.compare import plain_words
from moetrain.rewards.meaning import Algebra, Group, Named, Number, Reading, Region, Words
from moetrain.rewards.reading import readings


@dataclass(frozen=True)
class Score:
    """A mean over questions and where it lies with 95 % probability.

    The spread is that of questions: it says how another sample of questions would come out, and
    counts the answers to one question as the one observation that they are.
    """

    value: float
    low: float
    high: float
    num: int  # questions behind it


def pass_at_k(num: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): that at least one of k answers is right, without bias (Chen et
    al. 2021, arXiv 2107.03374, eq. 1). `k` may not exceed `num`.
    """
    assert 0 <= right <= num and 1 <= k <= num
    if num - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num - right + 1, num + 1))


def majority(votes: Sequence[str], right: Sequence[bool]) -> float:
    """Whether the answer that most agree on is right: the share of right ones among the largest
    groups where there are several, as if one of them were drawn.
    """
    sizes = Counter(votes)
    most = max(sizes.values())
    winners = [vote for vote, size in sizes.items() if size == most]
    shares = [
        fmean(r for vote, r in zip(votes, right, strict=True) if vote == winner)
        for winner in winners
    ]
    return fmean(shares)


def vote_of(text: str) -> str:
    """A name for what an answer says: two answers are one vote where it is the same, so votes are
    classes whatever the order in which answers come. Numbers are exact, with their unit;
    expressions are told apart as they are written.
    """
    answers = readings(text)
    return _named(answers[0]) if answers else ""


def _named(one: Reading) -> str:
    match one:
        case Number():
            return f"{one.value} {one.unit or ''}".strip()
        case Algebra():
            return f"{re.sub(r'(?<!\d)\s+|\s+(?!\d)', '', one.text)} {one.unit or ''}".strip()
        case Words():
            return plain_words(one.text)
        case Named():
            return _named(one.content)
        case Group(bracket="{" | "", items=items):
            names = sorted(map(_named, items))
            return names[0] if len(set(names)) == 1 and one.bracket else f"{{{'; '.join(names)}}}"
        case Group():
            return f"{one.bracket}{'; '.join(map(_named, one.items))}"
        case Region():
            ends = [
                f"{piece.has_low:d}{'' if piece.low is None else _named(piece.low)}"
                f"..{'' if piece.high is None else _named(piece.high)}{piece.has_high:d}"
                for piece in one.pieces
            ]
            return f"<{' '.join(ends)}>"


def share(values: Sequence[float]) -> Score:
    """The mean of values from 0 to 1, with Wilson's interval for as many yes-or-no questions as
    their spread is worth: it neither leaves [0, 1] nor shrinks to nothing when all are equal.
    """
    q = len(values)
    mean = fmean(values)
    spread = fmean((v - mean) ** 2 for v in values)
    worth = q * mean * (1 - mean) / spread if spread > 0 else q
    return Score(mean, *wilson(mean, worth), q)


def mean_of(values: Sequence[float]) -> Score:
    """The mean of any values, two standard errors each way; without bounds for a single one."""
    q = len(values)
    mean = fmean(values)
    if q < 2:
        return Score(mean, -math.inf, math.inf, q)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (q - 1) / q)
    return Score(mean, mean - Z * error, mean + Z * error, q)
