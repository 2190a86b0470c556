"""What the tests of moetrain.data share: a small tokenizer, files and recipes."""

import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data import preference, tokenizer_training
from moetrain.data.encode import SetKind, Spec
from moetrain.data.sets import PackedSet, build

QUESTIONS = [(f"What is {a} plus {b}?", str(a + b)) for a in range(8) for b in range(8)]

PAIRS = [{"prompt": q, "chosen": f"It is {a}.", "rejected": f"It is {a}1."} for q, a in QUESTIONS]
LABELS = [
    {"prompt": q, "completion": f"It is {a}{1 - i % 2}.", "label": i % 2 == 0}
    for i, (q, a) in enumerate(QUESTIONS)
]


@functools.cache
def tokenizer_folder() -> Path:
    """A tokenizer of 400 tokens, trained on this file and the questions; once per process."""
    root = Path(tempfile.mkdtemp())
    text = root / "text.txt"
    text.write_text(Path(__file__).read_text() + "\n".join(q + a for q, a in QUESTIONS))
    return tokenizer_training.train([text], 400, root / "tokenizer")


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """One record a line; a string stands as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def chat(*turns: str) -> dict[str, Any]:
    """A `messages` record with user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def questions(num_records: int = len(QUESTIONS)) -> list[dict[str, Any]]:
    return [chat(q, a) for q, a in QUESTIONS[:num_records]]


def recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe for the small tokenizer with its own cache; `sections` add to the defaults here."""
    base: dict[str, Any] = {
        "model": {
            "hf": {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 512},
            "tokenizer": str(tokenizer_folder()),
        },
        "method": {"name": "sft"},
        "data": {"train": [], "seq_len": 64, "cache": str(folder / "cache")},
        "train": {"steps": 4} | ({} if "rollout" in sections else {"global_batch": 4}),
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    if base["train"].get("epochs") is not None:
        base["train"].pop("steps")
    return Recipe.model_validate({"run_dir": str(folder / "run"), **base})


def preference_spec(path: Path, **changes: Any) -> Spec:
    """A spec for the small tokenizer; `changes` replace the defaults here."""
    given: dict[str, Any] = {"seq_len": 96, "too_long": "truncate", "seed": 1, **changes}
    return Spec((str(path),), tokenizer_folder(), **given)


def preference_set(
    folder: Path, records: list[Any], kind: SetKind = preference.PAIRS, **changes: Any
) -> PackedSet:
    """The set of these records, in a cache under `folder`."""
    path = write_jsonl(folder / "a.jsonl", records)
    return PackedSet(build(kind, preference_spec(path, **changes), folder / "cache"))


def answers_shown(run_dir: Path) -> dict[str, list[int]]:
    """The steps of which TensorBoard has answers, by what they are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("answers/")]
    return {tag.split("/")[1]: [event.step for event in events.Tensors(tag)] for tag in tags}
