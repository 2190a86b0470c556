"""OpenAI's chat completions, as far as an agent's turns become trajectories: what is read of a
request's body, what is refused, and what is answered.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.data.formats import name_of
from moetrain.data.messages import FormatError, Message, arguments_of, read_messages, shown
from moetrain.data.samples import Sample
from moetrain.environments.base import Tool

# What would change what an answer is, and is not built. Whatever else a request says of sampling
# (temperature, top_p, seed, ...) is the recipe's, and is not read.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "stream": (None, False, True),
    "n": (None, 1),
    "stop": (None, [], ""),
    "logprobs": (None, False),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto"),
    "logit_bias": (None, {}),
    "functions": (None, []),
    "audio": (None,),
}


class Refused(Exception):
    """A request that is answered with an error. `code` is OpenAI's, or one of ours."""

    def __init__(self, status: int, message: str, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    messages: tuple[Message, ...]  # in the form of `data/messages.py`
    tools: tuple[Tool, ...]
    max_tokens: int | None


def asked_in(body: Any) -> Asked:
    """What a request's body asks for; a text says why there is none. Raises Refused."""
    if not isinstance(body, Mapping):
        raise Refused(400, body if isinstance(body, str) else "the body is no JSON object")
    for name, allowed in _REFUSED.items():
        if body.get(name) not in allowed:
            raise Refused(
                400, f"{name}={shown(body[name])} is not built here: leave it out", "unsupported"
            )
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    if most is not None and (type(most) is not int or most < 1):
        raise Refused(400, f"max_tokens is {shown(most)}: give a whole number of at least 1")
    try:
        messages = read_messages(body.get("messages"), "messages")
    except FormatError as error:
        raise Refused(400, str(error)) from None
    if messages[-1]["role"] == "assistant":
        raise Refused(400, "the last message is the assistant's: the model would have to go on it")
    return Asked(tuple(messages), tuple(_tools(body.get("tools"))), most)


def _tools(tools: Any) -> Sequence[Tool]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Refused(400, f"tools is {shown(tools)}, not a list")
    for i, tool in enumerate(tools):
        is_one = isinstance(tool, Mapping) and tool.get("type", "function") == "function"
        if not is_one or not isinstance(tool.get("function"), Mapping):
            raise Refused(400, f'tools[{i}] is no {{"type": "function", "function": {{...}}}}')
        parameters = tool["function"].get("parameters")
        properties = (parameters or {}).get("properties") if _is_object(parameters) else None
        if not isinstance(name_of(tool), str) or not _is_object(parameters):
            raise Refused(400, f"tools[{i}].function needs a name, and parameters as an object")
        if not _is_object(properties) or not all(map(_is_object, (properties or {}).values())):
            raise Refused(400, f"tools[{i}].function.parameters.properties is no object of objects")
    return tools


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


# What was said before


def same(before: Message, now: Message) -> bool:
    """Whether a message is the one that was said before; a thought counts where it is sent back,
    which most clients do not do.
    """
    if before["role"] != "assistant" or now["role"] != "assistant":
        return before == now
    if _calls(before) != _calls(now) or (before["content"] or "") != (now["content"] or ""):
        return False
    thought = now.get("reasoning_content")
    return thought is None or thought == before.get("reasoning_content")


def _calls(message: Message) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], arguments_of(call)) for call in message.get("tool_calls") or ()
    ]


def goes_on(before: Sequence[Message], now: Sequence[Message]) -> bool:
    """Whether `now` is all of `before`, which ends with a turn of the model, and replies to it."""
    rest = now[len(before) :]
    return (
        bool(rest)
        and all(message["role"] != "assistant" for message in rest)
        and all(map(same, before, now))
    )


def num_common(before: Sequence[Message], now: Sequence[Message]) -> int:
    """Messages at the beginning that are the same."""
    pairs = enumerate(zip(before, now, strict=False))
    return next((i for i, pair in pairs if not same(*pair)), min(len(before), len(now)))


# What is answered


def as_sent(turn: Message) -> Message:
    """A turn of the model as an agent gets it, and is to send it back."""
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in turn.get("tool_calls") or ()
    ]
    sent: Message = {"role": "assistant", "content": turn["content"] or (None if calls else "")}
    if turn.get("reasoning_content"):
        sent["reasoning_content"] = turn["reasoning_content"]
    return sent | ({"tool_calls": calls} if calls else {})


def answer_of(number: str, model: str, now: int, turn: Message, sample: Sample, seen: int) -> Any:
    """The body of an answer. `seen`: tokens of its prompt; `now`: seconds since 1970."""
    sent = as_sent(turn)
    finish = "tool_calls" if "tool_calls" in sent else "stop"
    num = len(sample.tokens)
    return {
        "id": number,
        "object": "chat.completion",
        "created": now,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": sent,
                "finish_reason": "length" if sample.finish == "length" else finish,
            }
        ],
        "usage": {"prompt_tokens": seen, "completion_tokens": num, "total_tokens": seen + num},
    }


def wants_usage(body: Any) -> bool:
    """Whether a request to be streamed asks for the numbers of tokens, too."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


def chunks_of(answer: Mapping[str, Any], *, with_usage: bool) -> Iterator[Any]:
    """The bodies of a streamed answer's events: what `answer_of` gave, part by part."""
    head = {name: answer[name] for name in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = [{"index": i} | call for i, call in enumerate(message.get("tool_calls", ()))]
    parts = {name: message.get(name) for name in ("reasoning_content", "content")}
    deltas: list[Any] = [{"role": "assistant", "content": ""}]
    deltas += [{name: text} for name, text in parts.items() if text]
    deltas += [{"tool_calls": calls}] if calls else []
    more = {"usage": None} if with_usage else {}
    for delta in (*deltas, {}):
        finish = None if delta else choice["finish_reason"]
        yield head | more | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    if with_usage:
        yield head | {"choices": [], "usage": answer["usage"]}
