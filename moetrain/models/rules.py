"""The weight table: which Hugging Face tensors make which Megatron parameter.

A part yields `Weight`s, whose names are relative to its layer; a model binds them to `Rule`s with
GLOBAL layer and expert numbers. Only `Rule.local_shape` knows of ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from moetrain.models.sharding import Shape, Sharding

# What `adapter.target` calls a matrix.
type Kind = Literal["attention", "mlp", "experts", "router"]

# A decoder layer, in Megatron and in Hugging Face.
MCORE_LAYER, HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUE_HEAD = "value_head.weight"  # trained and saved, and no part of the exported model


@dataclass(frozen=True)
class Weight:
    """One parameter of a part, or one for each of `num_experts`, whose number `{e}` stands for."""

    mcore: str
    hf: tuple[str, ...]  # in the sharding's order: q, k, v; gate, up
    sharding: Sharding
    adapts: Kind | None = None  # None: no adapter stands beside it
    writes: bool = False  # what it makes is added to the residual stream
    # What transformers 5 calls it in memory, and on disk after
    # `save_pretrained(save_original_format=False)`: for experts [E, rows, columns], an expert's
    # rows being those of `hf` in order; for others a mere second name.
    fused: str | None = None
    # Where `fused` has an expert's matrix as [columns, rows], with the rows of `hf` in turn. Files
    # hold such a tensor whole, never expert by expert.
    interleaved: bool = False
    num_experts: int | None = None
    # What Megatron's checkpoints call it where that is not `mcore`: a norm is a part of the linear
    # layer that follows it (as in Transformer Engine), and experts are one tensor.
    saved: str | None = None

    def bind(self, layer: int | None) -> "Iterator[Rule]":
        """Its rules in one layer; None where it is in no layer."""
        mcore, hf = ("", "") if layer is None else (MCORE_LAYER, HF_LAYER)
        mcore, hf = mcore.format(l=layer), hf.format(l=layer)
        module = self.mcore.rpartition(".")[0]
        fused = None if self.fused is None else hf + self.fused
        for expert in (None,) if self.num_experts is None else range(self.num_experts):
            yield Rule(
                name=mcore + self.mcore.replace("{e}", str(expert)),
                hf=tuple(hf + key.replace("{e}", str(expert)) for key in self.hf),
                sharding=self.sharding,
                layer=layer,
                expert=expert,
                module=module,
                adapts=self.adapts,
                writes=self.writes,
                fused=fused,
                interleaved=self.interleaved,
                saved=self.mcore if self.saved is None else self.saved,
            )


@dataclass(frozen=True, slots=True)
class Rule:
    """One parameter of one model."""

    name: str  # canonical Megatron name, global layer and expert numbers
    hf: tuple[str, ...]
    sharding: Sharding
    layer: int | None  # None: embedding, final norm, heads
    expert: int | None  # global number; split over EP, its tensor-parallel group being ETP's
    module: str = ""  # that holds it, relative to the layer
    adapts: Kind | None = None
    writes: bool = False
    fused: str | None = None
    interleaved: bool = False
    saved: str = ""  # the name in Megatron's checkpoints, relative to the layer

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Global."""
        return self.sharding.hf_shapes()

    @property
    def num_params(self) -> int:
        """Global, without padding."""
        return sum(prod(shape) for shape in self.hf_shapes)

    def local_shape(self, tp_rank: int, tp_size: int) -> Shape:
        """Of the Megatron tensor there, padding included. An expert's rank and size are ETP's."""
        return self.sharding.local_shape(tp_rank, tp_size)


def exported(table: Mapping[str, Rule]) -> dict[str, Rule]:
    """What of a table goes into an exported model."""
    return {name: rule for name, rule in table.items() if name != VALUE_HEAD}


@dataclass(frozen=True, slots=True)
class FusedSlice:
    """Where a tensor of the table lies in a fused one.

    In run number `part` of the `num_parts` equal runs of rows that the matrix `key[expert]` has;
    with `expert` None it is the whole of `key`. Where it is `interleaved`, every `num_parts`-th
    column from `part` on is a row.
    """

    key: str
    expert: int | None
    part: int
    num_parts: int
    interleaved: bool = False


def fused_slices(rule: Rule) -> Iterator[tuple[str, FusedSlice]]:
    """For each Hugging Face name of a rule that a fused tensor can hold: where it lies there."""
    if rule.fused is not None:
        for part, key in enumerate(rule.hf):
            yield key, FusedSlice(rule.fused, rule.expert, part, len(rule.hf), rule.interleaved)
