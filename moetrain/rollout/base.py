"""What a rollout engine is: it samples, takes weights, and shows what it holds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor

from moetrain.config.rollout import MOST_KEPT, RolloutConfig
from moetrain.data.samples import Prompt, Sample

if TYPE_CHECKING:
    from moetrain.rollout.follow_ups import FollowUps

PROBE_TOKENS = 8  # greedy tokens that follow each probe


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Without what stands in `rollout` beside the temperature, and at 1, the
    distribution is the model's own.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()  # an answer ends with one of these
    stop: tuple[str, ...] = ()  # or when its text has one of these
    routes: bool = False  # record the router's choices
    kept: bool = False  # record what could be drawn

    @classmethod
    def of(cls, rollout: RolloutConfig, temperature: float, stop_ids: tuple[int, ...]) -> Self:
        """As the section says. At temperature 0 there is nothing to choose from."""
        made = cls(
            rollout.max_tokens,
            temperature,
            repetition_penalty=rollout.repetition_penalty,
            stop_ids=stop_ids,
            stop=tuple(rollout.stop),
        )
        if not temperature:
            return made
        return replace(made, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p)

    def to_learn_from(self, *, routes: bool) -> Self:
        """With all that training asks for: what could be drawn is recorded, so it is bounded."""
        if self.top_p == 1 and not self.top_k and not self.min_p:
            return replace(self, routes=routes)
        return replace(self, routes=routes, kept=True, top_k=self.top_k or MOST_KEPT)


@dataclass(frozen=True)
class Request:
    """One answer to draw; the seed is its own, whatever else is drawn beside it."""

    prompt: Prompt
    index: int
    seed: int
    sampling: Sampling
    # What there is of the answer, which goes on behind it. The seed must be another than that which
    # drew it: its random numbers have been used.
    begun: Sample | None = None

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that the model sees at first."""
        return self.prompt.tokens + (self.begun.tokens if self.begun is not None else ())

    @property
    def room(self) -> int:
        """Tokens that may be drawn."""
        return self.sampling.max_tokens - (len(self.given) - len(self.prompt.tokens))


@dataclass(frozen=True)
class Probe:
    """What the engine says of given sequences, and of what it generates itself.

    Scoring alone would not see a stale prefix cache, which only generation reads.
    """

    sequences: tuple[tuple[int, ...], ...]  # given ones, then the same with their greedy answers
    logprobs: tuple[tuple[float, ...], ...]  # of each token after the first; NaN where not known

    @classmethod
    def of(
        cls,
        given: Sequence[Sequence[int]],
        scored: Sequence[Sequence[float]],
        answers: Sequence[Sample],
    ) -> "Probe":
        """From given sequences with a log-prob for each token after the first, and the greedy
        answer to each.
        """
        unknown = [(math.nan,) * (len(made) - 1) for made in given]
        longer = [(*made, *answer.tokens) for made, answer in zip(given, answers, strict=True)]
        drawn = [(*u, *answer.logprobs) for u, answer in zip(unknown, answers, strict=True)]
        return cls(sequences=(*map(tuple, given), *longer), logprobs=(*map(tuple, scored), *drawn))


class RolloutEngine(Protocol):
    """Driven by one process. Raises RolloutError when it gives up."""

    counts: Counter[str]  # faults so far: restarts, timeouts, ...

    @property
    def held(self) -> int | None:
        """The version that a push of what moved since can build on; None: it needs everything."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        follow_ups: "FollowUps | None" = None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        """Draw all, and their `follow_ups`; `on_sample` as each one ends, in any order, one at a
        time. Once there is `enough` the others are stopped: those that have tokens come with finish
        "open", without routes.
        """
        ...

    def batches(
        self, requests: Sequence[Request], *, stops: bool = False
    ) -> Iterable[Sequence[Request]]:
        """The requests by who is drawn together: the shapes of a batch decide the last bits of its
        log-probs, so a batch of which one answer is missing is drawn again as a whole. `stops`: by
        whose lengths decide when the others are stopped, too.
        """
        ...

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        """Serve these weights (Hugging Face name, whole tensor) from now on, as number `version`:
        all of them, or with `since`, which is what `held` was, those that may have moved.

        Seconds by phase, the bytes that were sent and those of all weights.
        """
        ...

    def reload(self) -> None:
        """Start afresh: the next push finds an engine that has never served."""
        ...

    def probe(self, sequences: Sequence[tuple[int, ...]]) -> Probe:
        """Score given token sequences and continue them greedily."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready again; weights are pushed after it."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def text_of_answer(
    tokenizer: Any, tokens: Sequence[int], stop_ids: Sequence[int], stop: Sequence[str] = ()
) -> str:
    """What was said, without the tokens that ended it, up to a stop string and with that: it was
    drawn, and rewards look for it. Other special tokens are part of it: marks of a thought are, in
    some models, and rewards have to see them.
    """
    end = len(tokens)
    while end and tokens[end - 1] in stop_ids:
        end -= 1
    text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=False)
    return text[: stopped_at(text, stop)]


def stopped_at(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string of a text ends; None where it has none."""
    ends = [text.find(word) + len(word) for word in stop if word in text]
    return min(ends, default=None)
