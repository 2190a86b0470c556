"""From graded answers to preference pairs and to instruction data.

The rejected answer is the wrong one that the model was surest of (Cho et al. 2025): the highest
mean log-prob a token. The chosen one is a right answer of about its length, so that what is learned
is neither to be long nor to be short.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from moetrain.data.formats import TEMPLATE_KEYS
from moetrain.data.thoughts import after_thought

BINS = (0.25, 0.5, 0.75, 1.0)  # of difficulty: upper ends of the share of right answers


@dataclass(frozen=True)
class Candidate:
    """One answer; `confidence` is its mean log-prob a token, `length` its tokens."""

    text: str
    reward: float
    confidence: float
    length: int


@dataclass
class AnsweredPrompt:
    """A prompt and its different answers that could be learned from."""

    id: str
    source: int
    messages: list[dict[str, Any]]
    answers: list[Candidate]
    given: dict[str, Any] = field(default_factory=dict[str, Any])  # what else its template reads
    num_graded: int = 0  # also of answers that are cut, empty, or the same as another
    num_right: int = 0
    templated: bool = False  # a text, whose answers' end of turn no record could say

    @property
    def share_right(self) -> float:
        return self.num_right / max(1, self.num_graded)

    @property
    def bin(self) -> int:
        return next(i for i, end in enumerate(BINS) if self.share_right <= end)


@dataclass(frozen=True)
class Choice:
    """How to choose. A reward of at least `right` is a right answer, one of at most `wrong` a wrong
    one. No bin of difficulty gives more than `balance` times their mean (0: as it comes).
    """

    right: float = 1.0
    wrong: float = 0.0
    cut: bool = False  # whether answers cut at the limit are answers, too; cut thoughts are not
    by: str | None = None  # the part of the reward that counts; None: the whole
    per_prompt: int = 1
    balance: float = 2.0
    shares: tuple[float, ...] | None = None  # of the sources; None: as it comes
    num: int | None = None  # at most so many
    seed: int = 1234


@dataclass(frozen=True)
class Slot:
    """A place for one record: a prompt, and of a pair the rejected answer."""

    asked: AnsweredPrompt
    rank: int  # how many of its prompt come before it
    answer: Candidate


@dataclass
class Chosen:
    """Records, and how many prompts gave none for what reason."""

    records: list[dict[str, Any]]
    reasons: Counter[str]
    left_out: Counter[str]  # records
    per_source: list[int]


def gather(rows: Iterable[tuple[int, dict[str, Any]]], choice: Choice) -> list[AnsweredPrompt]:
    """(source, prompt with its answers as JSON) -> prompts, each once: one that returns in its
    source brings more answers, one that another source has asked is left to that.
    """
    prompts: dict[str, AnsweredPrompt] = {}
    texts: dict[str, set[str]] = {}
    for source, row in rows:
        columns = row["prompt"]["columns"]
        messages = columns["prompt"]
        templated = isinstance(messages, str)
        if templated:
            messages = [{"role": "user", "content": messages}]  # to be told apart by
        given = {name: columns[name] for name in TEMPLATE_KEYS if columns.get(name)}
        opened = row["prompt"].get("opened", "")
        key = plain(" ".join(str(message.get("content")) for message in messages))
        key += json.dumps(given, sort_keys=True) if given else ""
        new = AnsweredPrompt(row["prompt"]["id"], source, messages, [], given, templated=templated)
        asked = prompts.setdefault(key, new)
        if asked.source != source:
            continue
        seen = texts.setdefault(key, set())
        # The surest of answers that read the same stands for all of them.
        for content in sorted(row["answers"], key=confidence, reverse=True):
            reward = content["parts"].get(choice.by) if choice.by else content["reward"]
            if reward is None:
                continue
            asked.num_graded += 1
            asked.num_right += reward >= choice.right
            # What the prompt has begun is part of what was said. A thought without its end is never
            # learned from: a chat template would write one that was not sampled.
            whole = after_thought(content["text"], opened) is not None
            text = (opened + content["text"]).strip()
            usable = content["text"].strip() and whole
            usable = usable and (choice.cut or content["finish"] == "stop")
            if usable and plain(text) not in seen:
                seen.add(plain(text))
                num = num_tokens(content)
                asked.answers.append(Candidate(text, reward, confidence(content), num))
    return list(prompts.values())


def confidence(answer: dict[str, Any]) -> float:
    """Mean log-prob a token, under the distribution that it was drawn from."""
    logp = answer["logp"] if "logp" in answer else sum(answer["logprobs"])
    return logp / max(1, num_tokens(answer))


def num_tokens(answer: dict[str, Any]) -> int:
    """Of an answer, which has them as a list, or in a run's rollouts their number."""
    tokens = answer["tokens"]
    return tokens if isinstance(tokens, int) else len(tokens)


def plain(text: str) -> str:
    """What two texts that read the same have in common."""
    return re.sub(r"\s+", " ", text).strip().casefold()


def pairs(asked: Sequence[AnsweredPrompt], choice: Choice) -> Chosen:
    """TRL's `prompt`, `chosen`, `rejected`, with what they were chosen by beside them."""
    reasons: Counter[str] = Counter()
    slots: list[Slot] = []
    for one in asked:
        wrong = [a for a in one.answers if a.reward <= choice.wrong]
        if one.templated or not wrong or not _right(one, choice):
            reasons[_lack(one, choice)] += 1
            continue
        surest = sorted(wrong, key=lambda a: -a.confidence)[: choice.per_prompt]
        slots += [Slot(one, rank, answer) for rank, answer in enumerate(surest)]
    chosen_slots, left_out, per_source = _selected(slots, choice)
    records: list[dict[str, Any]] = []
    tilt = 0  # tokens by which chosen answers are longer in all
    for slot in chosen_slots:
        best = min(_right(slot.asked, choice), key=_mismatch(slot.answer, tilt))
        tilt += best.length - slot.answer.length
        records.append(_pair(slot, best))
    return Chosen(records, reasons, left_out, per_source)


def _mismatch(rejected: Candidate, tilt: int) -> Callable[[Candidate], tuple[int, float]]:
    def cost(answer: Candidate) -> tuple[int, float]:
        more = answer.length - rejected.length
        return abs(more) + abs(tilt + more), -answer.confidence

    return cost


def right_answers(asked: Sequence[AnsweredPrompt], choice: Choice) -> Chosen:
    """`messages` with a right answer, of middling length among the right ones: instruction data by
    rejection sampling.
    """
    reasons: Counter[str] = Counter()
    slots: list[Slot] = []
    for one in asked:
        right = _right(one, choice)
        if one.templated or not right:
            reasons[_lack(one, choice)] += 1
            continue
        middle = median(answer.length for answer in right)
        best = sorted(right, key=lambda a: abs(a.length - middle))[: choice.per_prompt]
        slots += [Slot(one, rank, answer) for rank, answer in enumerate(best)]
    chosen_slots, left_out, per_source = _selected(slots, choice)
    records = [
        {
            "messages": [*slot.asked.messages, _turn(slot.answer)],
            **slot.asked.given,
            **_summary(slot.asked),
        }
        for slot in chosen_slots
    ]
    return Chosen(records, reasons, left_out, per_source)


def _right(asked: AnsweredPrompt, choice: Choice) -> list[Candidate]:
    return [answer for answer in asked.answers if answer.reward >= choice.right]


def _lack(asked: AnsweredPrompt, choice: Choice) -> str:
    """Why a prompt gives nothing."""
    if asked.templated:
        return 'with "templated": true, sample prompts that are messages'
    if not asked.num_graded:
        return "without a grade"
    if not asked.num_right:
        return "none right"
    if asked.num_right == asked.num_graded:
        return "all right" if _right(asked, choice) else "right ones cut at the limit"
    if not _right(asked, choice):
        return "right ones cut at the limit"
    return "wrong ones cut at the limit, or neither right nor wrong"


def _selected(slots: list[Slot], choice: Choice) -> tuple[list[Slot], Counter[str], list[int]]:
    """(those that stay, in a shuffled order; how many are left out for what; how many of each
    source).
    """
    rng = random.Random(choice.seed)
    rng.shuffle(slots)
    slots.sort(key=lambda slot: slot.rank)  # a prompt's second answer only after all first ones
    num_sources = len(choice.shares or ()) or 1 + max((s.asked.source for s in slots), default=0)
    left_out: Counter[str] = Counter()
    evened: list[list[Slot]] = []
    for source in range(num_sources):
        mine = [slot for slot in slots if slot.asked.source == source]
        evened.append(_evened(mine, choice.balance))
        left_out["too many of their difficulty"] += len(mine) - len(evened[-1])
    wanted = [len(part) for part in evened]
    total = sum(wanted)
    shares = choice.shares or tuple(n / total for n in wanted if total)
    if shares:
        most = min(n / share for n, share in zip(wanted, shares, strict=True) if share)
        most = min(most, choice.num or most)
        wanted = [min(n, round(most * share)) for n, share in zip(wanted, shares, strict=True)]
    left_out["more than the shares or the number asked for"] += total - sum(wanted)
    chosen_slots = [slot for part, n in zip(evened, wanted, strict=True) for slot in part[:n]]
    rng.shuffle(chosen_slots)
    return chosen_slots, left_out, wanted


def _evened(slots: list[Slot], balance: float) -> list[Slot]:
    """Without what is more than `balance` times the mean of the bins of difficulty."""
    sizes = Counter(slot.asked.bin for slot in slots)
    if not balance or not sizes:
        return slots
    most = balance * len(slots) / len(sizes)
    taken: Counter[int] = Counter()
    chosen_slots: list[Slot] = []
    for slot in slots:
        taken[slot.asked.bin] += 1
        if taken[slot.asked.bin] <= most:
            chosen_slots.append(slot)
    return chosen_slots


def _turn(answer: Candidate) -> dict[str, str]:
    return {"role": "assistant", "content": answer.text}


def _summary(asked: AnsweredPrompt) -> dict[str, Any]:
    return {"id": asked.id, "source": asked.source, "share_right": round(asked.share_right, 4)}


def _pair(slot: Slot, chosen: Candidate) -> dict[str, Any]:
    figures = {
        f"{name}_{key}": value
        for name, answer in (("chosen", chosen), ("rejected", slot.answer))
        for key, value in (("tokens", answer.length), ("logp", round(answer.confidence, 5)))
    }
    return {
        "prompt": slot.asked.messages,
        "chosen": [_turn(chosen)],
        "rejected": [_turn(slot.answer)],
        **slot.asked.given,
        **_summary(slot.asked),
        **figures,
    }
