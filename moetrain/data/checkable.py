"""Made-up instructions with one right answer each, to see a small model learn.

The same on every machine.
"""

import random
from collections.abc import Callable

WORDS = (
    "apple bread chair dream eagle flame grape house island jungle kettle lemon marble needle"
    " ocean pencil quiet river"
    " silver table under violet window yellow zebra basket candle dragon engine forest garden"
    " hammer insect jacket"
    " ladder mirror napkin orange planet rabbit saddle ticket velvet walnut"
).split()

Exchange = tuple[str, str]


def _add(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return f"What is {a} plus {b}?", str(a + b)


def _subtract(rng: random.Random) -> Exchange:
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return f"What is {a} minus {b}?", str(a - b)


def _larger(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _reverse(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    return f"Reverse the word {word}.", word[::-1]


def _first_letter(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    return f"What is the first letter of {word}?", word[0]


def _upper(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    return f"Write {word} in capital letters.", word.upper()


def _repeat(rng: random.Random) -> Exchange:
    word, count = rng.choice(WORDS), rng.randint(2, 4)
    return f"Say {word} {count} times.", " ".join([word] * count)


def _order(rng: random.Random) -> Exchange:
    words = rng.sample(WORDS, 3)
    return f"Sort these words: {', '.join(words)}.", ", ".join(sorted(words))


KINDS: tuple[Callable[[random.Random], Exchange], ...] = (
    _add,
    _subtract,
    _larger,
    _reverse,
    _first_letter,
    _upper,
    _repeat,
    _order,
)


def records(
    num_records: int, seed: int, *, avoid: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """`messages` records, one in five of two rounds.

    No round asks a question that is in `avoid`.
    """
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    while len(made) < num_records:
        rounds = 2 if rng.random() < 0.2 else 1
        exchanges = [rng.choice(KINDS)(rng) for _ in range(rounds)]
        if any(question in avoid for question, _ in exchanges):
            continue
        messages: list[dict[str, str]] = []
        for question, answer in exchanges:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        made.append({"messages": messages})
    return made


def held_out(num_records: int, seed: int) -> list[dict[str, object]]:
    """One-round `messages` records, each question once.

    What `records(avoid=questions(...))` leaves out.
    """
    rng = random.Random(seed)
    exchanges: dict[str, str] = {}
    while len(exchanges) < num_records:
        # Words are few: asking for one of them held out would leave too little to learn their
        # spelling from.
        question, answer = rng.choice((_add, _subtract, _larger, _order))(rng)
        exchanges[question] = answer
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in exchanges.items()
    ]


def questions(made: list[dict[str, object]]) -> frozenset[str]:
    """Every question asked in records of `held_out`."""
    found: set[str] = set()
    for record in made:
        messages = record["messages"]
        assert isinstance(messages, list)
        found.update(str(m["content"]) for m in messages if m["role"] == "user")
    return frozenset(found)
