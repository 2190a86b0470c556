"""Answers in a run's folder, as they are read again: rollouts, held-out answers, and files of
`moetrain sample`, which are lines of one kind.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from moetrain.errors import MoetrainError
from moetrain.observe.ledger import is_number

ROLLOUTS, ANSWERS = "rollouts", "answers"  # folders of a run
TITLES = {ROLLOUTS: "rollouts", ANSWERS: "held-out answers"}
# Control characters, and those that turn the direction of text: a terminal or a page acts on them.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True)
class Answer:
    """An answer and its prompt, as text."""

    number: int  # of the answers in its file, from 1
    prompt: str  # the messages, a role before each
    columns: Mapping[str, Any]  # the record's other fields
    text: str  # of several turns, the messages
    reward: float | None
    parts: Mapping[str, float | None]
    tokens: int
    finish: str  # "stop", or "length" where it was cut
    fault: str  # of a reward

    @property
    def was_cut(self) -> bool:
        """Whether it has no end of its own."""
        return self.finish == "length"


@dataclass(frozen=True)
class Summary:
    """What there is to say of all answers of a file."""

    num_prompts: int
    num_answers: int
    num_graded: int
    num_cut: int
    mean_reward: float | None
    mean_tokens: float
    most_tokens: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Summary":
        """Of these."""
        rewards = [a.reward for a in answers if a.reward is not None]
        return cls(
            num_prompts=len({a.prompt for a in answers}),
            num_answers=len(answers),
            num_graded=len(rewards),
            num_cut=sum(a.was_cut for a in answers),
            # Not fmean: it raises where rewards are infinite, or too large for a float's sum.
            mean_reward=sum(rewards) / len(rewards) if rewards else None,
            mean_tokens=sum(a.tokens for a in answers) / max(1, len(answers)),
            most_tokens=max((a.tokens for a in answers), default=0),
        )

    def describe(self) -> str:
        """In a line."""
        words = [f"{_num(self.num_answers, 'answer')} to {_num(self.num_prompts, 'prompt')}"]
        if self.mean_reward is not None:
            of = f" ({self.num_graded} graded)" if self.num_graded < self.num_answers else ""
            words.append(f"mean reward {self.mean_reward:.3f}{of}")
        words.append(
            f"{_num(round(self.mean_tokens), 'token')} on average, {self.most_tokens} at most"
        )
        return ", ".join([*words, f"{self.num_cut} cut at the limit"])


def _num(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def steps_of(folder: Path) -> dict[int, Path]:
    """The whole files of a folder of answers, by their steps in order."""
    paths = (path for path in folder.glob("*.jsonl") if path.stem.isdecimal())
    return dict(sorted((int(path.stem), path) for path in paths))


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file; lines that are none are passed over, such as a head, or a last one
    that a kill cut short. Raises MoetrainError where the file cannot be read or has none.
    """
    try:
        with path.open("rb") as file:
            answers = [answer for line in file for answer in answers_of(row_of(line))]
    except OSError as error:
        raise MoetrainError(f"{path} cannot be read: {error.strerror}.") from None
    if not answers:
        raise MoetrainError(
            f"{path} holds no answers. Give a run's folder, one of its files in {ROLLOUTS}/ or"
            f" {ANSWERS}/, or a file of `moetrain sample`."
        )
    return [replace(answer, number=number) for number, answer in enumerate(answers, 1)]


def row_of(line: bytes) -> Any:
    """What a whole line of a file of answers holds; None where that is no JSON."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def answers_of(row: Any) -> Iterator[Answer]:
    """The answers of a line, none where it is another thing."""
    prompt, answers = field_of(row, "prompt", dict), field_of(row, "answers", list)
    if prompt is None or answers is None:
        return
    columns: dict[str, Any] = field_of(prompt, "columns", dict) or {}
    asked, rest = parted(columns)
    for one in cast(list[Any], answers):
        text = field_of(one, "text", str)
        if text is None:
            continue
        parts: dict[str, Any] = field_of(one, "parts", dict) or {}
        yield Answer(
            number=0,
            prompt=asked,
            columns=rest,
            text=said_in(text, field_of(one, "messages", list) or ()),
            reward=number_of(one.get("reward")),
            parts={str(name): number_of(value) for name, value in parts.items()},
            tokens=field_of(one, "tokens", int) or len(field_of(one, "tokens", list) or ()),
            finish=field_of(one, "finish", str) or "",
            fault=field_of(one, "fault", str) or "",
        )


def field_of(row: Any, key: str, kind: type) -> Any:
    """The value at `key` of what was read, where it is an object that has one of this kind."""
    value = cast(Mapping[str, Any], row).get(key) if isinstance(row, dict) else None
    return value if isinstance(value, kind) else None


def number_of(value: Any) -> float | None:
    """What was read, where it is a number."""
    return float(value) if is_number(value) and value == value else None


def parted(columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the prompt as text, a record's other fields); a templated prompt is text already."""
    rest = {name: value for name, value in columns.items() if name != "prompt"}
    return _messages(columns.get("prompt")), rest


def said_in(text: str, messages: Sequence[Any]) -> str:
    """An answer as text: what the model said last, or all messages where there are several."""
    return _messages(list(messages)) if len(messages) > 1 else text


def _messages(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return prompt if isinstance(prompt, str) else ""
    lines: list[str] = []
    for message in cast(list[Any], prompt):
        lines.append(f"{field_of(message, 'role', str) or '?'}: {said_by(message)}")
    return "\n".join(lines)


def said_by(message: Any) -> str:
    """What a message says: its thought, its content, and its calls as JSON."""
    content = message.get("content") if isinstance(message, dict) else message
    text = content if isinstance(content, str) else json_of(content)
    thought = field_of(message, "reasoning_content", str)
    calls = field_of(message, "tool_calls", list) or ()
    parts = [f"<think>{thought}</think>"] * bool(thought) + [text] * bool(text)
    return "\n".join([*parts, *map(json_of, calls)])


def json_of(value: Any) -> str:
    """What was read, as JSON again."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:  # it is read to a greater depth than it is written
        return "(nested too deeply)"


def ranked(answers: Iterable[Answer]) -> list[Answer]:
    """Those with a reward, the best first; of equals in the file's order."""
    graded = [a for a in answers if a.reward is not None]
    return sorted(graded, key=lambda a: -cast(float, a.reward))


def picked(answers: Sequence[Answer], best: int, worst: int) -> list[tuple[str, Answer]]:
    """(a title, the answer) of the best and of the worst ones, none twice; without any reward the
    first ones.
    """
    order = ranked(answers)
    if not order:
        return [("", answer) for answer in answers[: best + worst]]
    top = order[:best]
    low = order[len(top) :][::-1][:worst]
    chosen = [(f"best {i}", answer) for i, answer in enumerate(top, 1)]
    return chosen + [(f"worst {i}", answer) for i, answer in enumerate(low, 1)]


def describe_reward(answer: Answer) -> str:
    """An answer's reward and its parts, in words."""
    if answer.reward is None:
        return f"no reward ({answer.fault})" if answer.fault else ""
    values = {name: "-" if v is None else f"{v:.4g}" for name, v in answer.parts.items()}
    parts = [f"{name} {value}" for name, value in values.items()]
    return f"reward {answer.reward:.4g}" + f" ({', '.join(parts)})" * bool(parts)


def harmless(text: str) -> str:
    """The text with what a terminal would act on written as its code, but for ends of lines."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return _UNSAFE.sub(lambda match: _code(ord(match[0])), text)


def _code(number: int) -> str:
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def shortened(text: str, most: int, lines: int) -> str:
    """The text, or of a longer one the beginning and the end, with how much it is in all between
    them.
    """
    if len(text) <= most and text.count("\n") < lines:
        return text
    # A third is the end's, where an answer's result is.
    head = "\n".join(text[: most * 2 // 3].split("\n")[: max(1, lines * 2 // 3)])
    tail = "\n".join(text[max(0, len(text) - most // 3) :].split("\n")[-max(1, lines // 3) :])
    left = len(text) - len(head) - len(tail)
    return f"{head}\n[... {left:,} of {len(text):,} characters are left out here ...]\n{tail}"
