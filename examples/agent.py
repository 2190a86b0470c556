"""An agent of one's own: it speaks to the model as to OpenAI's API, and calls the tool itself. With
`openai` it would be OpenAI(base_url=base_url, api_key=session).
"""

import json
import urllib.request
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def agent(record: dict[str, Any], base_url: str, session: str) -> float:
    """Ask until the model calls no tool any more; the reward is whether it said the product."""
    asked = record["prompt"]
    said = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    while True:
        turn = ask(base_url, session, said)
        said.append(turn)
        if not turn.get("tool_calls"):
            return float((turn["content"] or "").strip() == record["answer"])
        for call in turn["tool_calls"]:
            result = multiply(call["function"]["arguments"])
            said.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def multiply(arguments: str) -> str:
    """The tool."""
    try:
        own = json.loads(arguments)
        return str(int(own["a"]) * int(own["b"]))
    except (KeyError, TypeError, ValueError) as error:
        return f"Error: {type(error).__name__}: {error}"


def ask(base_url: str, session: str, messages: list[Any]) -> dict[str, Any]:
    """The model's next turn."""
    body = {"model": "moetrain", "messages": messages, "tools": [TOOL]}
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {session}"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]
