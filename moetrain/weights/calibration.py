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
from moetrain.models import Model, read_model
from moetrain.models.rules import EMBEDDING, HF_LAYER
from moetrain.weights.expand import Expansion, expanded_config, sources
from moetrain.weights.reader import Reader

# As ModelOpt's examples calibrate: what a scale is made of is a maximum, which more do not change.
MOST_SEQUENCES, MOST_TOKENS = 512, 512
ROWS = 4096  # of the embedding, read at a time
WORDS = 8  # of the one-layer model, whose embedding is not used


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
    for row in (row for found in find_sources([file]) for row in read_rows(found)):
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


def embedded(reader: Reader, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The hidden states [t, h] in bf16 that enter the first layer; the embedding is read in runs of
    rows.
    """
    vocab, hidden = reader.shape(EMBEDDING)
    found = [torch.empty(len(ids), hidden, dtype=torch.bfloat16) for ids in sequences]
    tokens = [torch.tensor(ids) for ids in sequences]
    used = torch.cat(tokens).unique()
    for start in range(0, vocab, ROWS):
        stop = min(start + ROWS, vocab)
        if not ((used >= start) & (used < stop)).any():
            continue
        rows = reader.read(EMBEDDING, (slice(start, stop), slice(0, hidden))).bfloat16()
        for ids, into in zip(tokens, found, strict=True):
            here = (ids >= start) & (ids < stop)
            into[here] = rows[ids[here] - start]
    return found


def layers(
    hf: Mapping[str, Any], model: Model, reader: Reader, sequences: Sequence[Sequence[int]]
) -> Iterator[OneLayer]:
    """Each layer with what enters it and what leaves it as it is, in bf16; one in memory."""
    inputs = embedded(reader, sequences)
    for number in range(model.num_layers):
        made, names = _one_layer(hf, model, reader, number)
        outputs: list[Tensor] = []
        met = torch.zeros(model.num_experts, dtype=torch.long) if model.num_experts else None
        hooks = [made.model.layers[0].register_forward_hook(_kept(outputs))]
        experts = [m for n, m in made.named_modules() if n.endswith(".experts")]
        if met is not None and experts:
            hooks.append(experts[0].register_forward_pre_hook(_counted(met)))
        layer = OneLayer(number, made, names, inputs, outputs, met if experts else None)
        layer.forward()
        for hook in hooks:
            hook.remove()
        yield layer
        inputs = outputs


def _kept(outputs: list[Tensor]) -> Any:
    def keep(module: Any, given: Any, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        outputs.append(hidden[0].clone())

    return keep


def _counted(met: Tensor) -> Any:
    """Of the experts of a layer in transformers 5, called with (hidden, chosen, weights)."""

    def count(module: Any, given: Any) -> None:
        met.add_(torch.bincount(given[1].flatten(), minlength=len(met)))

    return count


def _one_layer(
    hf: Mapping[str, Any], model: Model, reader: Reader, number: int
) -> tuple[Any, dict[str, str]]:
    """(transformers model of one layer in bf16, its names -> those of the whole model)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    alone = Expansion(1, (number,), ())
    config = expanded_config(hf, alone) | {"vocab_size": WORDS, "tie_word_embeddings": False}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    one = read_model(config)
    names = {new: source.old for new, source in sources(model, alone).items()}
    fields = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    given = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    with no_init_weights():
        made: Any = AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16)
    params = {name: param.data for name, param in made.named_parameters()}
    for name, param in params.items():
        if not name.startswith(HF_LAYER.format(l=0)):
            param.zero_()  # not used
    slices = one.fused_slices
    for key in (key for rule in one.table.values() if rule.layer == 0 for key in rule.hf):
        cut = slices.get(key)
        into = params[key if cut is None or cut.key not in params else cut.key]
        if cut is not None and cut.key in params:
            into = into if cut.expert is None else into[cut.expert]
            rows = into.shape[0] // cut.num_parts
            into = into[rows * cut.part : rows * (cut.part + 1)]
        into.copy_(reader.read(names[key], tuple(slice(0, n) for n in into.shape)))
    made.eval()
    return made, names
