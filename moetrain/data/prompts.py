"""Prompts to answer: records with their chat template applied, in an order that is the same at
every layout and after every restart.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.recipe import Recipe
from moetrain.data import assets
from moetrain.data import tokenizer as tokenizers
from moetrain.data.cache import cache_root
from moetrain.data.chat import Chat
from moetrain.data.formats import FormatError, read_message
from moetrain.data.loader import model_vocab, tokenizer_of, told_of_tokenizer, write_rejected
from moetrain.data.rejects import Reject, check_rejects
from moetrain.data.samples import Prompt
from moetrain.data.selection import Selection, rows_of
from moetrain.data.thoughts import opened_by
from moetrain.errors import DataError

# Where a record keeps its prompt: messages, or a text that is a user's only message.
KEYS = ("prompt", "messages", "question", "problem")
TAIL = 48  # tokens at the end of a prompt in which a thought can begin
AGAIN = "-"  # in the id of a record that stands in the files before, with how often


def read_prompts(
    inputs: Iterable[str | Path],
    tokenizer_folder: Path,
    *,
    template: str | None = None,
    max_tokens: int | None = None,
    held_out: bool = False,
    selection: Selection | None = None,
) -> tuple[list[Prompt], list[Reject]]:
    """(usable prompts in the order of the files, rejected records).

    A record has `prompt` (text or messages), `messages` (an assistant's last turn is left out),
    `question` or `problem`; its other fields are columns for rewards. A prompt over `max_tokens`
    is rejected; `held_out` as for `find_sources`. Raises DataError where nothing is usable.
    """
    chat = Chat(tokenizers.load(tokenizer_folder), template)
    prompts: list[Prompt] = []
    rejects: list[Reject] = []
    seen: dict[str, int] = {}
    for row in rows_of([str(path) for path in inputs], selection, held_out=held_out):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            prompt = replace(read_prompt(row.value, chat, max_tokens), source=row.file)
        except FormatError as error:
            rejects.append(Reject(row.file, row.line, str(error)))
            continue
        number = seen[prompt.id] = seen.get(prompt.id, 0) + 1
        # One that returns is asked as often as it stands there, under a name of its own.
        again = replace(prompt, id=f"{prompt.id}{AGAIN}{number}")
        prompts.append(prompt if number == 1 else again)
    if not prompts:
        first = f" The first: {rejects[0].file}:{rejects[0].line}: {rejects[0].reason}." * bool(
            rejects
        )
        raise DataError(f"No record in {', '.join(map(str, inputs))} can be used.{first}")
    return prompts, rejects


def told_repeats(prompts: Iterable[Prompt]) -> str:
    """How many of the prompts are records that others are too, in words."""
    num = sum(AGAIN in prompt.id for prompt in prompts)
    return f", {num} of them records that stand there before" if num else ""


def read_prompt(record: Mapping[str, Any], chat: Chat, max_tokens: int | None = None) -> Prompt:
    """Raises FormatError with the reason."""
    key = next((key for key in KEYS if record.get(key)), None)
    if key is None:
        raise FormatError(
            f"has none of {', '.join(KEYS)}; its keys are {', '.join(sorted(record))}"
        )
    messages = _messages(record[key], key)
    tokenizer: Any = chat.tokenizer
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            chat_template=chat.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise FormatError(f"the chat template refuses it: {error}") from error
    if max_tokens is not None and len(ids) > max_tokens:
        raise FormatError(
            f"the prompt has {len(ids)} tokens, of {max_tokens} that there are for it"
        )
    columns = {name: value for name, value in record.items() if name not in KEYS}
    columns["prompt"] = messages
    content = json.dumps(columns, sort_keys=True, default=str).encode()
    name = hashlib.sha256(content).hexdigest()[:16]
    opened = opened_by(tokenizer.decode(ids[-TAIL:], skip_special_tokens=False))
    return Prompt(name, tuple(map(int, ids)), columns, opened, isinstance(record[key], str))


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence):
        raise FormatError(f"{key} must be text or a list of messages, not {type(value).__name__}")
    messages = [read_message(m, f"{key}[{i}]") for i, m in enumerate(value)]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise FormatError(f"{key} has no message to answer")
    return messages


class PromptOrder:
    """An endless stream of prompts: every epoch has each once, shuffled anew."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        ids = "".join(prompt.id for prompt in prompts)
        self.fingerprint = hashlib.sha256(f"{ids} {seed} {shuffle}".encode()).hexdigest()[:16]

    def take(self, start: int, num: int) -> list[Prompt]:
        """Numbers [start, start + num) of the stream."""
        return [self._at(*divmod(i, len(self.prompts))) for i in range(start, start + num)]

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
    folder = tokenizer_of(recipe)
    tokenizers.check_vocab(
        tokenizers.vocab_of(tokenizers.load(folder)), model_vocab(recipe), f"The tokenizer {folder}"
    )
    room = recipe.data.seq_len - rollout.max_tokens
    root = cache_root(recipe.data.cache)

    def read(
        paths: Sequence[str], held_out: bool, selection: Selection | None = None
    ) -> tuple[list[Prompt], list[Reject]]:
        inputs = [assets.resolve(path, root) for path in paths]
        return read_prompts(
            inputs,
            folder,
            template=recipe.data.chat_template,
            max_tokens=room,
            held_out=held_out,
            selection=selection,
        )

    selection = Selection.of(recipe)
    prompts, rejects = read(recipe.data.train, False, selection)
    check_rejects(rejects, len(prompts) + len(rejects), recipe.data.max_rejected)
    held_out, more = read(recipe.data.eval, True) if recipe.data.eval else ([], [])
    if selection is not None and selection.share:
        held_out, more = read(recipe.data.train, False, selection.other())
    write_rejected(recipe, rejects + more)
    line = f"train: {len(prompts)} prompts{told_repeats(prompts)}"
    if rejects:
        line += f"; {len(rejects)} rejected, see {recipe.run_dir / 'rejected.jsonl'}"
    order = PromptOrder(prompts, recipe.seed, recipe.data.shuffle)
    return PromptSet(order, held_out[: rollout.eval_prompts], [line, *told_of_tokenizer(recipe)])
