"""One decoder layer of a model as a transformers model of its own, filled from a reader: so that
hidden states go through a model of any size with one layer of it in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetrain.models import Model, read_model
from moetrain.models.rules import EMBEDDING, HF_LAYER, FusedSlice
from moetrain.weights.expand import Expansion, expanded_config, sources
from moetrain.weights.fused import matrix_in
from moetrain.weights.reader import Reader

ROWS = 4096  # of the embedding, read at a time
WORDS = 8  # of the one-layer model, whose embedding is not used


def embedded(
    reader: Reader, sequences: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[Tensor]:
    """The hidden states [t, h] that enter the first layer; the embedding is
    read in runs of rows.
    """
    vocab, hidden = reader.shape(EMBEDDING)
    result = [torch.empty(len(ids), hidden, dtype=dtype) for ids in sequences]
    tokens = [torch.tensor(ids) for ids in sequences]
    used = torch.cat(tokens).unique()
    for start in range(0, vocab, ROWS):
        stop = min(start + ROWS, vocab)
        if not ((used >= start) & (used < stop)).any():
            continue
        rows = reader.read(EMBEDDING, (slice(start, stop), slice(0, hidden))).to(dtype)
        for ids, into in zip(tokens, result, strict=True):
            here = (ids >= start) & (ids < stop)
            into[here] = rows[ids[here] - start]
    return result


def one_layer(
    hf: Mapping[str, Any],
    model: Model,
    reader: Reader,
    number: int,
    dtype: torch.dtype,
    *,
    holds_experts: bool = True,
) -> tuple[Any, dict[str, str]]:
    """(transformers model of layer `number` alone, its names -> those of the whole model).

    Args:
        holds_experts: whether the experts' matrices are parameters of it, as what changes them
            needs; else an expert is read when a token meets it, and is let go again.
    """
    alone = Expansion(1, (number,), ())
    config = expanded_config(hf, alone) | {"vocab_size": WORDS, "tie_word_embeddings": False}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    one = read_model(config)
    names = {new: source.old for new, source in sources(model, alone).items()}
    stacks: dict[str, _Stack] = {}
    slices = {} if holds_experts else one.fused_slices
    for key, cut in slices.items():
        if cut.expert is not None and key.startswith(HF_LAYER.format(l=0)):
            stack = stacks.setdefault(cut.key, _Stack(reader, dtype))
            stack.add(cut, names[key])
    made = _built(config, dtype, stacks)
    keys = [key for rule in one.table.values() if rule.layer == 0 for key in rule.hf]
    read = [key for key in keys if key not in slices or slices[key].key not in stacks]
    _fill(made, one, {key: names[key] for key in read}, reader)
    made.eval()
    return made, names


def outputs(made: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What leaves the layer [t, h] of what enters it, a sequence at a time."""
    result: list[Tensor] = []
    hook = made.model.layers[0].register_forward_hook(collecting(result))
    with torch.inference_mode():
        for hidden in inputs:
            made.model(inputs_embeds=hidden[None], use_cache=False)
    hook.remove()
    return result


def collecting(outputs: list[Tensor]) -> Any:
    """A hook that adds what leaves a layer to `outputs`."""

    def keep(module: Any, given: Any, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        outputs.append(hidden[0].clone())

    return keep


class _Stack:
    """The matrices of all experts of a layer, each read from its parts when it is asked for."""

    def __init__(self, reader: Reader, dtype: torch.dtype):
        self.reader, self.dtype = reader, dtype
        self.parts: dict[int, list[tuple[FusedSlice, str]]] = {}

    def add(self, cut: FusedSlice, name: str) -> None:
        """The next part of an expert's matrix."""
        expert = cut.expert or 0
        self.parts.setdefault(expert, []).append((replace(cut, expert=None), name))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        parts = self.parts[int(expert)]
        cut, first = parts[0]
        rows, *columns = self.reader.shape(first)
        shape = (rows * cut.num_parts, *columns)
        result = torch.empty(shape[::-1] if cut.interleaved else shape, dtype=self.dtype)
        for cut, name in parts:
            whole = tuple(slice(0, n) for n in (rows, *columns))
            matrix_in(result, cut).copy_(self.reader.read(name, whole))
        return result


def _built(config: Mapping[str, Any], dtype: torch.dtype, stacks: Mapping[str, _Stack]) -> Any:
    """transformers' model with parameters that hold anything; `stacks` take the places of some,
    which never are in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    given = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    if stacks:  # the one arithmetic that asks for an expert after the other
        given._experts_implementation = "eager"
    with no_init_weights(), torch.device("meta" if stacks else "cpu"):
        made: Any = AutoModelForCausalLM.from_config(given, dtype=dtype)
    if not stacks:
        return made
    for name, param in list(made.named_parameters()):
        module, _, leaf = name.rpartition(".")
        holder = made.get_submodule(module)
        delattr(holder, leaf)
        if name in stacks:
            setattr(holder, leaf, stacks[name])
        else:
            empty = torch.empty(param.shape, dtype=param.dtype)
            holder.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))
    made.model.rotary_emb = type(made.model.rotary_emb)(given)  # its frequencies were on meta too
    return made


def _fill(made: Any, one: Model, names: Mapping[str, str], reader: Reader) -> None:
    """The layer's parameters from the tensors `names`; all others are zero, being not used."""
    params = {name: param.data for name, param in made.named_parameters()}
    for name, param in params.items():
        if not name.startswith(HF_LAYER.format(l=0)):
            param.zero_()
    for key, source in names.items():
        cut = one.fused_slices.get(key)
        into = params[key if cut is None or cut.key not in params else cut.key]
        if cut is not None and cut.key in params:
            into = matrix_in(into, cut)
        into.copy_(reader.read(source, tuple(slice(0, n) for n in into.shape)))
