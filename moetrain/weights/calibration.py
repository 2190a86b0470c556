"""Running a model one layer at a time, for what has to be calibrated: a transformers model of one
layer is filled from the source, and the sequences' hidden states go through it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.data import tokenizer as tokenizers
from moetrain.data.chat import ChatOptions
from moetrain.data.formats import to_conversation
from moetrain.data.messages import FormatError
from moetrain.data.rejects import Reject
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError
from moetrain.models import Model
from moetrain.weights.one_layer import collecting, embedded, one_layer
from moetrain.weights.reader import Reader

# As ModelOpt's examples calibrate: what a scale is made of is a maximum, which more do not change.
MOST_SEQUENCES, MOST_TOKENS = 512, 512


@dataclass(frozen=True)
class OneLayer:
    """A layer as a transformers model, and the hidden states that enter it: [t, h] a sequence."""

    number: int
    model: Any
    names: Mapping[str, str]  # Hugging Face name in the one-layer model -> in the whole
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    met: Tensor | None  # [experts] tokens that each expert met; None: it has none

    def forward(self) -> None:
        """Show the layer its inputs."""
        with torch.inference_mode():
            for hidden in self.inputs:
                self.model.model(inputs_embeds=hidden[None], use_cache=False)


def read_sequences(file: Path, tokenizer: Path, vocab: int) -> list[list[int]]:
    """Token ids of the first records of a file: `text`, `tokens`, or a conversation in any format
    that is trained on. DataError with file and line for one that is neither.
    """
    rows: list[list[int]] = []
    loaded = chat = None
    for row in (row for source in find_sources([file]) for row in read_rows(source)):
        if len(rows) == MOST_SEQUENCES:
            break
        where = f"{row.file}:{row.line}"
        if isinstance(row, Reject):
            raise DataError(f"{where}: {row.reason}.")
        ids: Any = row.value.get("tokens")
        if ids is None and isinstance(row.value.get("text"), str):
            loaded = loaded or tokenizers.load(tokenizer)
            ids = loaded(row.value["text"], verbose=False)["input_ids"]
        elif ids is None:
            chat = chat or ChatOptions().open(tokenizer)
            ids = _turns(chat, row, where)
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < vocab for i in ids):
            raise DataError(f"{where}: its tokens are no ids of a vocabulary of {vocab}.")
        if ids:
            rows.append(ids[:MOST_TOKENS])
    if not rows:
        raise DataError(f"{file} has no text. A row has `text`, `messages` or `tokens`.")
    return rows


def _turns(chat: Any, row: Record, where: str) -> list[int]:
    try:
        marked = chat.mark(to_conversation(row.value))
    except FormatError as error:
        raise DataError(f"{where}: {error}. A row has `text`, `messages` or `tokens`.") from None
    return chat.encode(marked[-1:])[0].tokens.tolist()  # the last holds the whole conversation


def layers(
    hf: Mapping[str, Any], model: Model, reader: Reader, sequences: Sequence[Sequence[int]]
) -> Iterator[OneLayer]:
    """Each layer with what enters it and what leaves it as it is, in bf16; one in memory."""
    inputs = embedded(reader, sequences, torch.bfloat16)
    for number in range(model.num_layers):
        made, names = one_layer(hf, model, reader, number, torch.bfloat16)
        outputs: list[Tensor] = []
        met = torch.zeros(model.num_experts, dtype=torch.long) if model.num_experts else None
        hooks = [made.model.layers[0].register_forward_hook(collecting(outputs))]
        experts = [m for n, m in made.named_modules() if n.endswith(".experts")]
        if met is not None and experts:
            hooks.append(experts[0].register_forward_pre_hook(_counted(met)))
        layer = OneLayer(number, made, names, inputs, outputs, met if experts else None)
        layer.forward()
        for hook in hooks:
            hook.remove()
        yield layer
        inputs = outputs


def _counted(met: Tensor) -> Any:
    """Of the experts of a layer in transformers 5, called with (hidden, chosen, weights)."""

    def count(module: Any, given: Any) -> None:
        met.add_(torch.bincount(given[1].flatten(), minlength=len(met)))

    return count
