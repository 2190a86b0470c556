"""Made-up multiplications, and how they are worked out with a tool, to see a small model learn it.

The same on every machine.
"""

import random
from typing import Any

TOOL = "multiply"
# As examples/calculator.py says it, so that worked examples show what a run offers.
TOOLS: list[dict[str, Any]] = [{"name": TOOL, "description": "Multiply two whole numbers."}]
LARGEST = 99


def pairs(num: int, seed: int, *, avoid: frozenset[tuple[int, int]] = frozenset()) -> list[Any]:
    """(a, b), none twice and none of `avoid`."""
    rng = random.Random(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < num:
        one = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
        if one not in avoid:
            pairs[one] = None
    return list(pairs)


def prompts(made: list[tuple[int, int]]) -> list[dict[str, object]]:
    """`prompt` and `answer`."""
    return [{"prompt": question(a, b), "answer": str(a * b)} for a, b in made]


def worked(made: list[tuple[int, int]]) -> list[dict[str, object]]:
    """`messages` in which the tool is called and its result is the answer, and `tools`."""
    records: list[dict[str, object]] = []
    for a, b in made:
        function = {"name": TOOL, "arguments": {"a": a, "b": b}}
        messages = [
            {"role": "user", "content": question(a, b)},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "name": TOOL, "content": str(a * b)},
            {"role": "assistant", "content": str(a * b)},
        ]
        records.append({"messages": messages, "tools": TOOLS})
    return records


def question(a: int, b: int) -> str:
    return f"{a} * {b}"
