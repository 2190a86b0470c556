"""Best of n: the score of the answer that a reward ranks highest, against how many are drawn.

Legend: n answers to a question, k of them drawn; q questions.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from moetrain.config.bench import BenchConfig
from moetrain.errors import ConfigError
from moetrain.evals.scores import Score, majority, pass_at_k

SUBSETS = 256  # draws of k answers that a vote is counted in, where there are more


@dataclass
class BestOf:
    """The scores of each k of 1, 2, 4, ... n, a value a question.

    Args:
        num: n of the last row.
        by: the label of the reward that ranks.
    """

    num: int
    by: str
    num_answers: int = 0
    num_unranked: int = 0
    values: dict[str, dict[int, list[float]]] = field(
        default_factory=dict[str, dict[int, list[float]]]
    )

    def add(
        self,
        ranks: Sequence[float | None],
        scores: Sequence[float],
        right: Sequence[bool] | None,
        votes: Sequence[str] | None,
    ) -> None:
        """A question's answers: what ranks them, what they are worth, which are right (None: the
        benchmark asks for a mean), and what they say (None: no vote).
        """
        self.num_answers += len(ranks)
        self.num_unranked += sum(rank is None for rank in ranks)
        for k in (k for k in counts_to(self.num) if k <= len(scores)):
            self._put(f"best by {self.by}", k, best_of(ranks, scores, k))
            if right is not None:
                self._put("pass", k, pass_at_k(len(right), sum(right), k))
                if votes is not None:
                    self._put("majority", k, vote_of_k(votes, right, k))

    def _put(self, name: str, k: int, value: float) -> None:
        self.values.setdefault(name, {}).setdefault(k, []).append(value)


def ranking_reward(bench: BenchConfig, num: int, by: str | None) -> str:
    """The label of the reward that ranks. Raises ConfigError where there is none, or where a
    question has fewer answers than `num`.
    """
    labels = [reward.label for reward in bench.rewards]
    if num > bench.samples:
        raise ConfigError(
            f"--best-of {num} needs as many answers to a question; samples is {bench.samples}. Give"
            f" samples={num}."
        )
    if by is None and not labels:
        raise ConfigError(
            f"{bench.name} has no reward that ranks answers, only the scorer"
            f" {bench.scorer.label}. Give one: 'rewards=[{{name: reward_model, options: {{path:"
            " FOLDER}}]', or a judge, or FILE.py:FUNCTION."
        )
    there = [*labels, bench.scorer.label]
    if by is not None and by not in there:
        raise ConfigError(f"--by {by}: {bench.name} has {', '.join(there)}. Add it to `rewards`.")
    return by or labels[0]


def counts_to(num: int) -> list[int]:
    """1, 2, 4, ... and `num` itself."""
    return sorted({*(1 << i for i in range(num.bit_length())), num})


def best_of(ranks: Sequence[float | None], scores: Sequence[float], k: int) -> float:
    """The mean over all draws of k of the answers, of the score of the one that ranks highest; of
    several, as if one of them were drawn. An answer without a rank comes last.
    """
    n = len(scores)
    assert 1 <= k <= n == len(ranks)
    order = sorted(range(n), key=lambda i: _key(ranks[i]), reverse=True)
    total, left, all_draws = 0.0, n, math.comb(n, k)  # left: answers that rank no higher
    for _, group in groupby(order, key=lambda i: _key(ranks[i])):
        tied = [scores[i] for i in group]
        # That one of these is the best drawn: none before them is, and not all come after.
        draws = math.comb(left, k) - math.comb(left - len(tied), k)
        total += draws / all_draws * fmean(tied)
        left -= len(tied)
    return total


def _key(rank: float | None) -> float:
    return -math.inf if rank is None or math.isnan(rank) else rank


def vote_of_k(votes: Sequence[str], right: Sequence[bool], k: int) -> float:
    """The mean of `majority` over draws of k of the answers: over all, or over SUBSETS of them that
    are the same in every call.
    """
    n = len(votes)
    if math.comb(n, k) <= SUBSETS:
        draws = combinations(range(n), k)
    else:
        rng = random.Random(f"{n} {k}")
        draws = (rng.sample(range(n), k) for _ in range(SUBSETS))
    return fmean(majority([votes[i] for i in own], [right[i] for i in own]) for own in draws)


def show(title: str, scores: Mapping[str, Mapping[int, Score]], console: Console) -> None:
    """Print a line for each number of samples."""
    table = Table(title=title)
    table.add_column("samples", justify="right")
    for name in scores:
        table.add_column(name, justify="right")
    for k in sorted({k for own in scores.values() for k in own}):
        cells = (_cell(own.get(k)) for own in scores.values())
        table.add_row(str(k), *cells)
    console.print(table)


def _cell(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.4f} ({score.low:.3f} to {score.high:.3f})"


def content_of(best: BestOf, scores: Mapping[str, Mapping[int, Score]]) -> dict[str, Any]:
    """For the file of scores."""
    return {
        "n": best.num,
        "by": best.by,
        "scores": {
            name: {
                str(k): {"score": one.value, "interval": [one.low, one.high], "n": one.num}
                for k, one in own.items()
            }
            for name, own in scores.items()
        },
    }
