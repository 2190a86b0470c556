"""Made-up instructions with one right answer each, to see a small model learn.

The same on every machine.
"""

import random
import re
from collections.abc import Callable

WORDS = (
    "apple bread chair dream eagle flame grape house island jungle kettle lemon marble needle"
    " ocean pencil quiet river"
    " silver table under violet window yellow zebra basket candle dragon engine forest garden"
    " hammer insect jacket"
    " ladder mirror napkin orange planet rabbit saddle ticket velvet walnut"
).split()

Exchange = tuple[str, str]
Kind = Callable[[random.Random], Exchange]


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


KINDS: tuple[Kind, ...] = (
    _add,
    _subtract,
    _larger,
    _reverse,
    _first_letter,
    _upper,
    _repeat,
    _order,
)


def _off_by_a_little(rng: random.Random, question: str, answer: str) -> str:
    wrong = int(answer) + rng.choice((-3, -2, -1, 1, 2, 3))
    return str(wrong if wrong >= 0 else int(answer) + 1)


def _the_other_number(rng: random.Random, question: str, answer: str) -> str:
    return next(number for number in re.findall(r"\d+", question) if number != answer)


def _two_letters_swapped(rng: random.Random, question: str, answer: str) -> str:
    places = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    i = rng.choice(places)
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]


def _another_letter(rng: random.Random, question: str, answer: str) -> str:
    word = question.rstrip("?").split()[-1]
    return rng.choice([letter for letter in word if letter != answer])


def _lower(rng: random.Random, question: str, answer: str) -> str:
    return rng.choice((answer.lower(), answer.capitalize()))


def _another_count(rng: random.Random, question: str, answer: str) -> str:
    words = answer.split()
    return " ".join(words + words[:1] if rng.random() < 0.5 else words[1:])


def _another_order(rng: random.Random, question: str, answer: str) -> str:
    words = answer.split(", ")
    while words == answer.split(", "):
        rng.shuffle(words)
    return ", ".join(words)


# A mistake that one could make, for each kind of question.
MISTAKES: dict[Kind, Callable[[random.Random, str, str], str]] = {
    _add: _off_by_a_little,
    _subtract: _off_by_a_little,
    _larger: _the_other_number,
    _reverse: _two_letters_swapped,
    _first_letter: _another_letter,
    _upper: _lower,
    _repeat: _another_count,
    _order: _another_order,
}


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


def _held_out(num_records: int, seed: int) -> dict[str, tuple[Kind, str]]:
    """Question -> its kind and its answer."""
    rng = random.Random(seed)
    questions: dict[str, tuple[Kind, str]] = {}
    while len(questions) < num_records:
        # Words are few: asking for one of them held out would leave too little to learn their
        # spelling from.
        kind = rng.choice((_add, _subtract, _larger, _order))
        question, answer = kind(rng)
        questions[question] = kind, answer
    return questions


def held_out(num_records: int, seed: int) -> list[dict[str, object]]:
    """One-round `messages` records, each question once.

    What `records(avoid=questions(...))` leaves out.
    """
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, (_, a) in _held_out(num_records, seed).items()
    ]


def _then(rng: random.Random) -> Exchange:
    first, second = rng.sample(WORDS, 2)
    return f"Say {first} and then {second}.", f"{first} {second}"


def _swap(rng: random.Random) -> Exchange:
    first, second = rng.sample(WORDS, 2)
    return f"Swap these words: {first}, {second}.", f"{second}, {first}"


# What a small model can come to do by trying, on questions that it has not seen too.
TRIABLE: tuple[Kind, ...] = (_then, _swap)


def prompts(
    num_records: int, seed: int, *, avoid: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """`prompt` and `answer`, each question once; no question is in `avoid`."""
    rng = random.Random(seed)
    questions: dict[str, str] = {}
    while len(questions) < num_records:
        question, answer = rng.choice(TRIABLE)(rng)
        if question not in avoid:
            questions[question] = answer
    return [{"prompt": question, "answer": answer} for question, answer in questions.items()]


def starts(
    num_records: int, seed: int, *, avoid: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """`prompt` and `completion` of the same kinds, to learn the form from; questions may return."""
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    while len(made) < num_records:
        question, answer = rng.choice(TRIABLE)(rng)
        if question not in avoid:
            made.append({"prompt": question, "completion": answer})
    return made


def pairs(
    num_records: int, seed: int, *, avoid: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """TRL's `prompt`, `chosen`, `rejected` records: the right answer and a plausible wrong one.

    No question is in `avoid`.
    """
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    while len(made) < num_records:
        kind = rng.choice(KINDS)
        question, answer = kind(rng)
        if question not in avoid:
            made.append(_pair(question, answer, MISTAKES[kind](rng, question, answer)))
    return made


def held_out_pairs(num_records: int, seed: int) -> list[dict[str, object]]:
    """`pairs` on the questions of `held_out`, so that no instruction data has taught them."""
    rng = random.Random(seed)
    return [
        _pair(question, answer, MISTAKES[kind](rng, question, answer))
        for question, (kind, answer) in _held_out(num_records, seed).items()
    ]


def _pair(question: str, chosen: str, rejected: str) -> dict[str, object]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def labels(pairs: list[dict[str, object]], seed: int) -> list[dict[str, object]]:
    """TRL's `prompt`, `completion`, `label` records: one answer of each pair, either one."""
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    for pair in pairs:
        label = rng.random() < 0.5
        answer = pair["chosen"] if label else pair["rejected"]
        made.append({"prompt": pair["prompt"], "completion": answer, "label": label})
    return made


def questions(made: list[dict[str, object]]) -> frozenset[str]:
    """Every question asked in records of `held_out` or `held_out_pairs`."""
    questions: set[str] = set()
    for record in made:
        messages = record.get("messages") or record["prompt"]
        assert isinstance(messages, list)
        questions.update(str(m["content"]) for m in messages if m["role"] == "user")
    return frozenset(questions)
