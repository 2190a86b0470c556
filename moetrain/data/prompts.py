"""Prompts to answer: records with their chat template applied, in an order that is the same at
every layout and after every restart.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.config.recipe import Recipe
from moetrain.data import assets
from moetrain.data import tokenizer as tokenizers
from moetrain.data.cache import cache_root
from moetrain.data.chat import Chat
from moetrain.data.demonstrations import prepare_demonstrations
from moetrain.data.formats import (
    SWITCHES,
    SYSTEM_KEYS,
    TEMPLATE_KEYS,
    TEMPLATED,
    alpaca_prompt,
    filled,
    query_prompt,
    sharegpt,
    template_kwargs_of,
    templated,
    unread_fields,
    with_system,
)
from moetrain.data.messages import FormatError, Message, listed, read_messages
from moetrain.data.rejects import Reject, check_rejects, noted, write_rejects
from moetrain.data.run_tokenizer import chat_of, model_vocab, tokenizer_notes, tokenizer_of
from moetrain.data.samples import Prompt
from moetrain.data.selection import Selection, rows_of
from moetrain.data.thoughts import opened_by
from moetrain.errors import DataError, plural

# Where a record keeps its prompt: messages, or a text that is a user's only message.
KEYS = ("prompt", "messages", "question", "problem", "conversations", "instruction", "query")
TEXTS = ("question", "problem", "query")  # of them, those that are columns, too
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # that no model here sees
AGAIN = "-"  # in the id of a record that stands in the files before, with how often


class Found(NamedTuple):
    """What files of prompts hold."""

    prompts: list[Prompt]  # the usable ones, in the order of the files
    rejects: list[Reject]
    notes: Counter[str]  # on what of a record is not rendered, and of how many


def read_prompts(
    inputs: Iterable[str | Path],
    chat: Chat,
    max_tokens: int | None = None,
    *,
    held_out: bool = False,
    selection: Selection | None = None,
) -> Found:
    """Every record of the inputs as a prompt.

    A record has `prompt` (text or messages), `messages` or `conversations` (an assistant's last
    turn is left out), `question`, `problem` or `instruction`; its other fields are columns for
    rewards. A prompt over `max_tokens` is rejected; `held_out` as for `find_sources`. Raises
    DataError where nothing is usable.
    """
    prompts = Found([], [], Counter())
    seen: dict[str, int] = {}
    for row in rows_of([str(path) for path in inputs], selection, held_out=held_out):
        if isinstance(row, Reject):
            prompts.rejects.append(row)
            continue
        try:
            prompt, notes = read_prompt(row.value, chat, max_tokens)
        except FormatError as error:
            prompts.rejects.append(Reject(row.file, row.line, str(error)))
            continue
        prompts.notes.update(notes)
        prompt = replace(prompt, source=row.file)
        number = seen[prompt.id] = seen.get(prompt.id, 0) + 1
        # One that returns is asked as often as it stands there, under a name of its own.
        again = replace(prompt, id=f"{prompt.id}{AGAIN}{number}")
        prompts.prompts.append(prompt if number == 1 else again)
    if not prompts.prompts:
        why = "".join(f" The first: {r.file}:{r.line}: {r.reason}." for r in prompts.rejects[:1])
        raise DataError(f"No record in {', '.join(map(str, inputs))} can be used.{why}")
    return prompts


def describe_repeats(prompts: Iterable[Prompt]) -> str:
    """How many of the prompts are records that others are too, in words."""
    num = sum(AGAIN in prompt.id for prompt in prompts)
    return f", {num} of them records that were there before" if num else ""


def read_prompt(
    record: Mapping[str, Any],
    chat: Chat,
    max_tokens: int | None = None,
) -> tuple[Prompt, tuple[str, ...]]:
    """(the prompt, notes on what of it is not rendered). Raises FormatError with the reason."""
    key = _key(record)
    columns = {name: value for name, value in record.items() if name not in KEYS}
    if (texts := templated(record, "prompt")) is not None:
        (text,), notes = texts, ()
        if max_tokens is not None:
            chat.refuse_long(max_tokens, text)
        columns["prompt"] = text
    else:
        messages = to_prompt(record)
        kwargs = template_kwargs_of(record)
        if max_tokens is not None:
            chat.refuse_long(max_tokens, messages, kwargs)
        text = chat.prompt(messages, **kwargs)
        notes = chat.prompt_notes(messages, text, **kwargs)
        columns["prompt"] = messages
    notes = (*notes, *_unread(record, key))
    ids = chat.ids(text)
    if max_tokens is not None and len(ids) > max_tokens:
        raise FormatError(
            f"the prompt has {len(ids)} tokens, of {max_tokens} that there are for it"
        )
    content = json.dumps(columns, sort_keys=True, default=str).encode()
    name, is_text = hashlib.sha256(content).hexdigest()[:16], isinstance(record[key], str)
    # Rewards see a question as a column, too, as in TRL.
    columns |= {column: record[column] for column in TEXTS if isinstance(record.get(column), str)}
    return Prompt(name, tuple(ids), columns, opened_by(text), is_text), notes


def _unread(record: Mapping[str, Any], key: str) -> Iterator[str]:
    """Notes on what neither the prompt nor a reward can take in."""
    for name in (*MEDIA, *SWITCHES):
        if record.get(name) or (name in SWITCHES and name in record):
            yield f"the column {name} is not read"
    if record.get(TEMPLATED):
        for name in (*SYSTEM_KEYS, *TEMPLATE_KEYS):
            if record.get(name):
                yield f"the column {name} is not read"
    yield from unread_fields([record[key]])


def to_prompt(record: Mapping[str, Any]) -> list[Message]:
    """The messages to answer, in any known form of a prompt. FormatError."""
    key = _key(record)
    if key == "conversations":
        messages = sharegpt(record)
    elif key == "instruction":
        messages = alpaca_prompt(record)
    elif key == "query":
        messages = query_prompt(record)
    else:
        value = listed(record[key])
        if isinstance(value, str):
            messages: list[Message] = [{"role": "user", "content": filled(record, key)}]
        else:
            messages = read_messages(value, key)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    if not messages:
        raise FormatError(f"{key} has no message to answer")
    return with_system(messages, record)


def _key(record: Mapping[str, Any]) -> str:
    """The column that holds the prompt."""
    key = next((key for key in KEYS if record.get(key)), None)
    if key is None:
        raise FormatError(
            f"has none of {', '.join(KEYS)}; its keys are {', '.join(sorted(map(str, record)))}"
        )
    return key


class PromptOrder:
    """An endless stream of prompts: every epoch has each once, shuffled anew."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        ids = "".join(prompt.id for prompt in prompts)
        self.fingerprint = hashlib.sha256(f"{ids} {seed} {shuffle}".encode()).hexdigest()[:16]

    def as_given(self, prompts: Sequence[Prompt]) -> "PromptOrder":
        """The same stream of the same prompts in other words, as an environment begins them."""
        return PromptOrder(prompts, self.seed, self.shuffle)

    def take(self, start: int, num: int) -> list[Prompt]:
        """Numbers [start, start + num) of the stream."""
        return [self.at(number) for number in range(start, start + num)]

    def at(self, number: int) -> Prompt:
        """Of the stream."""
        return self._at(*divmod(number, len(self.prompts)))

    def _at(self, epoch: int, number: int) -> Prompt:
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            number = int(order[number])
        prompt = self.prompts[number]
        return prompt if epoch == 0 else replace(prompt, id=f"{prompt.id}#{epoch}")


@dataclass(frozen=True)
class PromptSet:
    """What a run answers, and what there is to say about it."""

    train: PromptOrder
    held_out: list[Prompt]
    lines: list[str]


def prepare_prompts(recipe: Recipe) -> PromptSet:
    """Read data.train and data.eval as prompts; writes <run_dir>/rejected.jsonl as `prepare` does.

    Raises DataError: no usable record, too many rejected, a tokenizer larger than the model's.
    """
    _, rollout = recipe.sampling
    chat = chat_of(recipe)
    tokenizers.check_vocab(
        tokenizers.vocab_of(chat.tokenizer),
        model_vocab(recipe),
        f"The tokenizer {tokenizer_of(recipe)}",
    )
    room = recipe.data.seq_len - rollout.max_tokens
    root = cache_root(recipe.data.cache)

    def read(paths: Sequence[str], held_out: bool, selection: Selection | None = None) -> Found:
        inputs = [assets.resolve(path, root) for path in paths]
        return read_prompts(inputs, chat, room, held_out=held_out, selection=selection)

    selection = Selection.of(recipe)
    train = read(recipe.data.train, False, selection)
    check_rejects(train.rejects, len(train.prompts) + len(train.rejects), recipe.data.max_rejected)
    held_out = read(recipe.data.eval, True) if recipe.data.eval else Found([], [], Counter())
    if selection is not None and selection.share:
        held_out = read(recipe.data.train, False, selection.other())
    shown, unusable = prepare_demonstrations(recipe)
    rejects = train.rejects + held_out.rejects + unusable
    write_rejects(recipe.run_dir / "rejected.jsonl", rejects)
    line = f"train: {plural(len(train.prompts), 'prompt')}{describe_repeats(train.prompts)}"
    if train.rejects:
        line += f"; {len(train.rejects)} rejected, see {recipe.run_dir / 'rejected.jsonl'}"
    notes = noted(chat.notes(), train.notes + held_out.notes)
    lines = [line, *tokenizer_notes(recipe), *notes, *shown]
    order = PromptOrder(train.prompts, recipe.seed, recipe.data.shuffle)
    asked = held_out.prompts[: rollout.eval_prompts][: recipe.train.eval_packs]
    return PromptSet(order, asked, lines)


def prompts_read(recipe: Recipe, num_prompts: int) -> int | None:
    """Prompts that train.epochs answers, one at least, and no part of one more; None with
    train.steps, which reads as many as it takes.
    """
    if recipe.train.epochs is None:
        return None
    return max(1, math.floor(recipe.train.epochs * num_prompts + 1e-9))
