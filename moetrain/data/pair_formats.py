"""From a record as people store it to two answers to one prompt, or to one answer and its label.

One small function a format, in one table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.data.formats import (
    Conversation,
    Record,
    alpaca_prompt,
    detect,
    filled,
    is_spoken,
    query_response,
    sharegpt,
    template_kwargs_of,
    templated,
    with_system,
)
from moetrain.data.messages import (
    FormatError,
    Message,
    MissingError,
    joined_calls,
    listed,
    read_messages,
    read_turn,
    refuse_many,
    shown,
)

REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages")
LABEL_KEYS = ("label", "kto_tag")  # TRL's and ms-swift's; LLaMA-Factory's
# A list of messages that begins with one of these is a whole conversation and not its end.
OPENING_ROLES = ("system", "developer", "user")

LARGEST = 3.4028234663852886e38  # a float32's, which margins are kept as

Two = tuple[list[Message], list[Message]]


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last turn, which alone is learned."""

    chosen: Conversation
    rejected: Conversation
    margin: float | None  # by how much chosen is the better one, where the record says


@dataclass(frozen=True)
class Labelled:
    """A conversation whose last turn, which alone is learned, is a good or a bad answer."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True)
class PairFormat:
    """A record is in this format when it has all of `keys`."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], Two]  # the two whole conversations
    others: tuple[str, ...] = ()  # columns that it may have, too


def _answer(value: Any, where: str) -> list[Message]:
    """An answer as a text, as a message of OpenAI's or ShareGPT's form, or as a list of them."""
    value = listed(value)
    if isinstance(value, str):
        if not value.strip():
            raise FormatError(f"{where} is empty")
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [read_turn(value, where)]
    if isinstance(value, list) and value:
        refuse_many(value, where)
        return joined_calls([read_turn(turn, f"{where}[{i}]") for i, turn in enumerate(value)])
    if isinstance(value, list):
        raise FormatError(f"{where} is empty")
    raise FormatError(f"{where} must be text, a message or a list, not {type(value).__name__}")


def _after(prompt: list[Message], record: Record, key: str) -> list[Message]:
    """The conversation that `prompt` and the answer under `key` make.

    An answer that is a whole conversation already must have the prompt in it.
    """
    answer = _answer(record[key], key)
    if answer[0]["role"] not in OPENING_ROLES:
        return prompt + answer
    text = {_role_and_text(message) for message in answer}
    if any(_role_and_text(message) not in text for message in prompt):
        raise FormatError(f"{key} is a whole conversation and the prompt is not in it")
    return answer


def _role_and_text(message: Message) -> tuple[str, str]:
    return message["role"], (message["content"] or "").strip()


def _both(prompt: list[Message], record: Record) -> Two:
    return _after(prompt, record, "chosen"), _after(prompt, record, "rejected")


def _explicit(record: Record) -> Two:
    """TRL's with a prompt: a text (a user turn) or a list of messages."""
    prompt = listed(record["prompt"])
    if isinstance(prompt, list):
        return _both(read_messages(prompt, "prompt"), record)
    return _both([{"role": "user", "content": filled(record, "prompt")}], record)


def _implicit(record: Record) -> Two:
    """TRL's without a prompt: two whole conversations."""
    for key in ("chosen", "rejected"):
        if not isinstance(listed(record[key]), list):
            raise FormatError(
                f"there is no prompt: {key} is {type(record[key]).__name__} and not a list of"
                " messages; add the key prompt"
            )
    return _both([], record)


def _swift_response(record: Record) -> Two:
    chosen = read_messages(record["messages"], "messages")
    return chosen, chosen[:-1] + _answer(record["rejected_response"], "rejected_response")


def _swift_query(record: Record) -> Two:
    chosen = query_response(record)
    return chosen, chosen[:-1] + _answer(record["rejected_response"], "rejected_response")


def _swift_messages(record: Record) -> Two:
    chosen = read_messages(record["messages"], "messages")
    return chosen, read_messages(record["rejected_messages"], "rejected_messages")


# The first whose keys are all there is taken.
PAIR_FORMATS: tuple[PairFormat, ...] = (
    PairFormat("ms-swift response", ("messages", "rejected_response"), _swift_response),
    PairFormat(
        "ms-swift query",
        ("query", "response", "rejected_response"),
        _swift_query,
        ("history",),
    ),
    PairFormat("ms-swift messages", ("messages", "rejected_messages"), _swift_messages),
    PairFormat(
        "sharegpt",
        ("conversations", "chosen", "rejected"),
        lambda record: _both(sharegpt(record), record),
    ),
    PairFormat(
        "alpaca",
        ("instruction", "chosen", "rejected"),
        lambda record: _both(alpaca_prompt(record), record),
        ("input", "history"),
    ),
    PairFormat("trl", ("prompt", "chosen", "rejected"), _explicit),
    PairFormat("trl implicit", ("chosen", "rejected"), _implicit),
)


def _present(record: Record) -> list[str]:
    """The keys of a record; a parquet or Arrow table fills those that it lacks with null."""
    return sorted(str(key) for key, value in record.items() if value is not None)


def detect_pair(record: Record) -> PairFormat:
    """The format of a record of two answers.

    MissingError when there is no rejected one, FormatError when there is no known format.
    """
    for form in PAIR_FORMATS:
        if all(record.get(key) is not None for key in form.keys):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in PAIR_FORMATS)
    keys = _present(record)
    if not any(key in REJECTED_KEYS for key in keys):
        raise MissingError(f"no rejected answer with the keys {keys}; known: {known}", keys)
    raise FormatError(f"no known format of pairs with the keys {keys}; known: {known}")


def pair_columns(record: Record) -> tuple[str, ...]:
    """The columns that are read of a record of two answers."""
    form = detect_pair(record)
    return form.keys + form.others


def _answered(messages: list[Message], where: str, kwargs: dict[str, Any]) -> Conversation:
    """A conversation of which the last turn alone is learned."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise FormatError(f"{where} ends with a {last['role']} turn and not with an answer")
    if len(messages) == 1:
        raise FormatError(f"there is no prompt before the answer in {where}")
    if not is_spoken(last):
        raise FormatError(f"the answer in {where} is empty")
    if not last.get("weight", True):
        raise FormatError(f"the answer in {where} is switched off by its weight")
    # Which of the turns before it to train on is a matter of instruction data.
    plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    return Conversation(plain, [False] * (len(plain) - 1) + [True], kwargs)


def to_pair(record: Record) -> Pair:
    """Read a record of two answers to one prompt, in any known format.

    FormatError gives the reason when it cannot be trained on.
    """
    if (texts := templated(record, "prompt", "chosen", "rejected")) is not None:
        prompt, *answers = texts
        if answers[0] == answers[1]:
            raise FormatError("chosen and rejected are identical")
        both = [Conversation([], [], rendered=(prompt, answer)) for answer in answers]
        return Pair(both[0], both[1], _margin(record))
    first, second = (with_system(one, record) for one in detect_pair(record).read(record))
    kwargs = template_kwargs_of(record)
    chosen, rejected = _answered(first, "chosen", kwargs), _answered(second, "rejected", kwargs)
    if chosen.messages[:-1] != rejected.messages[:-1]:
        pairs = zip(chosen.messages[:-1], rejected.messages[:-1], strict=False)
        turn = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        where = "have prompts of different lengths" if turn is None else f"differ in turn {turn}"
        raise FormatError(f"chosen and rejected {where}: only their last turns may differ")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise FormatError("chosen and rejected are identical")
    return Pair(chosen, rejected, _margin(record))


def _margin(record: Record) -> float | None:
    margin = record.get("margin")
    if margin is None:
        return None
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not number or not abs(margin) <= LARGEST:
        raise FormatError(f"margin must be a number, not {shown(margin)}")
    return float(margin)


def to_labelled(record: Record) -> Labelled:
    """Read a record of one answer in any format of instruction data, and its label.

    MissingError when there is no label, FormatError gives the reason when it cannot be used.
    """
    keys = _present(record)
    key = next((key for key in LABEL_KEYS if key in keys), None)
    if key is None:
        names = " or ".join(LABEL_KEYS)
        raise MissingError(f"no {names} with the keys {keys}", keys)
    label = record[key]
    if not isinstance(label, bool | int | float) or label not in (0, 1):  # tables make 1 and 0
        raise FormatError(f"{key} must be true or false, not {shown(label)}")
    if (texts := templated(record, "prompt", "completion")) is not None:
        return Labelled(Conversation([], [], rendered=(texts[0], texts[1])), bool(label))
    messages = with_system(detect(record).read(record), record)
    return Labelled(_answered(messages, "the record", template_kwargs_of(record)), bool(label))
