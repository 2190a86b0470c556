"""What ends an assistant's turn, as token ids."""

from collections.abc import Mapping
from typing import Any

from moetrain.data import tokenizer
from moetrain.data.chat import Chat


def end_of_turn(chat: Chat) -> tuple[int, ...]:
    """The token ids that end an assistant's turn in the rendered template, the answer's first.

    Empty where the template ends a turn with none.
    """
    return _ids(chat, chat.template.ends.tokens)


def stop_ids(chat: Chat, hf: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends an answer: the template's end of a turn (or what begins the next role's), the
    tokenizer's end of a document, and the model's eos_token_id.
    """
    stops = {tokenizer.end_of_document(chat.tokenizer), *_ids(chat, chat.template.ends.stops)}
    eos = hf.get("eos_token_id")
    stops.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return tuple(sorted(stops))


def _ids(chat: Chat, tokens: tuple[str, ...]) -> tuple[int, ...]:
    vocab = chat.tokenizer.get_vocab()
    return tuple(vocab[token] for token in tokens if token in vocab)
