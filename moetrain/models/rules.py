"""A family's weight table: which Hugging Face tensors make which Megatron parameter.

A rule's names are templates in the GLOBAL layer number `{l}` and the GLOBAL expert number `{e}`.
`expand` binds a table to a model's sizes. Only `BoundRule.local_shape` knows of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from moetrain.models.dims import Dims, HfConfig
from moetrain.models.sharding import QKV, Cols, Copy, GateUp, Layout, Shape, Vocab

# dense, moe: layers of that kind. The others: models of that kind.
type When = Literal["all", "dense", "moe", "untied", "scalar_head", "value_head", "qkv_bias"]


@dataclass(frozen=True)
class Rule:
    """One line of a table; `hf` is in the layout's order (q, k, v; gate, up)."""

    mcore: str
    hf: tuple[str, ...]
    layout: Layout
    when: When = "all"


@dataclass(frozen=True)
class Family:
    """A model family: how its config is read, and its weight table.

    `fused` has the names that transformers 5 uses in memory, and on disk too after
    `save_pretrained(save_original_format=False)`, where the table has others: key -> the table's.
    With `{e}` in those the fused tensor is [experts, rows, columns], an expert's rows being the
    named tensors' in order ([E, 2f, h]: gate, then up). Without, the key is a mere other name.
    """

    name: str  # transformers' model_type
    architecture: str
    dims: Callable[[HfConfig], Dims]
    rules: tuple[Rule, ...]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule of one parameter of one model."""

    name: str  # canonical Megatron name, global layer and expert numbers
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]  # global
    layout: Layout
    layer: int | None  # None: embedding, final norm, output layer
    expert: int | None  # global number; sharded over EP, its tensor-parallel group being ETP's

    @property
    def num_params(self) -> int:
        """Global, without padding."""
        return sum(prod(shape) for shape in self.hf_shapes)

    def local_shape(self, dims: Dims, tp_rank: int, tp_size: int) -> Shape:
        """Of the Megatron tensor there, padding included. An expert's rank and size are ETP's."""
        return self.layout.local_shape(dims, tp_rank, tp_size)


@dataclass(frozen=True, slots=True)
class FusedSlice:
    """Where a tensor of the table lies in a fused one.

    In run number `part` of the `num_parts` equal runs of rows that the matrix `key[expert]` has;
    with `expert` None it is the whole of `key`.
    """

    key: str
    expert: int | None
    part: int
    num_parts: int


def expand(family: Family, dims: Dims) -> dict[str, BoundRule]:
    """The whole table of one model, by canonical name; in the same order in every process."""
    table: dict[str, BoundRule] = {}
    owners: dict[str, str] = {}
    for bound in _bind(family, dims):
        assert bound.name not in table, f"two rules of {family.name} make {bound.name}"
        table[bound.name] = bound
        for key in bound.hf:
            assert key not in owners, f"{key} goes into both {owners[key]} and {bound.name}"
            owners[key] = bound.name
    return table


def _bind(family: Family, dims: Dims) -> Iterator[BoundRule]:
    for rule in family.rules:
        if "{l}" not in rule.mcore and _applies(rule.when, dims, False):
            yield _bound(rule, dims, None, None)
    layered = [rule for rule in family.rules if "{l}" in rule.mcore]
    for layer in range(dims.num_layers):
        for rule in layered:
            if not _applies(rule.when, dims, dims.moe_layers[layer]):
                continue
            experts = range(dims.experts) if "{e}" in rule.mcore else (None,)
            for expert in experts:
                yield _bound(rule, dims, layer, expert)


def _applies(when: When, dims: Dims, is_moe_layer: bool) -> bool:
    match when:
        case "all":
            return True
        case "dense":
            return not is_moe_layer
        case "moe":
            return is_moe_layer
        case "untied":
            return not dims.tied and not dims.scalar_head
        case "scalar_head":
            return dims.scalar_head
        case "value_head":
            return dims.value_head
        case "qkv_bias":
            return dims.qkv_bias


def _bound(rule: Rule, dims: Dims, layer: int | None, expert: int | None) -> BoundRule:
    shapes = rule.layout.hf_shapes(dims)
    assert len(shapes) == len(rule.hf), f"{rule.mcore}: the layout wants {len(shapes)} HF tensors"
    return BoundRule(
        name=rule.mcore.format(l=layer, e=expert),
        hf=tuple(key.format(l=layer, e=expert) for key in rule.hf),
        hf_shapes=shapes,
        layout=rule.layout,
        layer=layer,
        expert=expert,
    )


def fused_slices(family: Family, dims: Dims) -> dict[str, FusedSlice]:
    """For each HF name of the table that a fused key can stand for: where it lies there."""
    result: dict[str, FusedSlice] = {}
    for key, names in family.fused.items():
        for layer in range(dims.num_layers):
            if not dims.moe_layers[layer]:
                continue
            for part, name in enumerate(names):
                for expert in range(dims.experts) if "{e}" in name else (None,):
                    where = FusedSlice(key.format(l=layer), expert, part, len(names))
                    result[name.format(l=layer, e=expert)] = where
    return result


def ignored_keys(dims: Dims) -> frozenset[str]:
    """HF keys that a checkpoint may hold and no parameter is made of.

    The output layer of a model that is tied or has a scalar head, and the rotary frequencies that
    old transformers saved.
    """
    no_head = dims.tied or dims.scalar_head
    return rotary_keys(dims) | ({HEAD} if no_head else frozenset[str]())


def rotary_keys(dims: Dims) -> frozenset[str]:
    """Where old transformers saved rotary frequencies."""
    leaf = "self_attn.rotary_emb.inv_freq"
    return frozenset(H.format(l=layer) + leaf for layer in range(dims.num_layers))


# Groups of rules that the families share. L: a decoder layer in Megatron; H: in Hugging Face.
L = "decoder.layers.{l}."
H = "model.layers.{l}."

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUE_HEAD = "value_head.weight"  # trained and saved, and no part of the exported model

MODEL = (
    Rule(
        "embedding.word_embeddings.weight",
        (EMBEDDING,),
        Vocab(("vocab", "hidden")),
    ),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Copy(("hidden",))),
    Rule("output_layer.weight", (HEAD,), Vocab(("vocab", "hidden")), "untied"),
    Rule("output_layer.weight", ("score.weight",), Copy((1, "hidden")), "scalar_head"),
    Rule(VALUE_HEAD, (VALUE_HEAD,), Copy((1, "hidden")), "value_head"),
)


def head_names(dims: Dims) -> frozenset[str]:
    """Megatron names of the heads of one number a token: a language model's folder may lack them,
    and they are trained whole beside an adapter.
    """
    scalar = {"output_layer.weight"} if dims.scalar_head else set[str]()
    return frozenset(scalar | ({VALUE_HEAD} if dims.value_head else set[str]()))


_QKV = (H + "self_attn.q_proj", H + "self_attn.k_proj", H + "self_attn.v_proj")

ATTENTION = (
    Rule(L + "input_layernorm.weight", (H + "input_layernorm.weight",), Copy(("hidden",))),
    Rule(
        L + "self_attention.linear_qkv.weight",
        tuple(name + ".weight" for name in _QKV),
        QKV(("queries", "hidden")),
    ),
    Rule(
        L + "self_attention.linear_qkv.bias",
        tuple(name + ".bias" for name in _QKV),
        QKV(("queries",)),
        "qkv_bias",
    ),
    Rule(
        L + "self_attention.linear_proj.weight",
        (H + "self_attn.o_proj.weight",),
        Cols(("hidden", "queries")),
    ),
    Rule(
        L + "pre_mlp_layernorm.weight", (H + "post_attention_layernorm.weight",), Copy(("hidden",))
    ),
)

QK_NORM = (
    Rule(
        L + "self_attention.q_layernorm.weight",
        (H + "self_attn.q_norm.weight",),
        Copy(("head_dim",)),
    ),
    Rule(
        L + "self_attention.k_layernorm.weight",
        (H + "self_attn.k_norm.weight",),
        Copy(("head_dim",)),
    ),
)

DENSE_MLP = (
    Rule(
        L + "mlp.linear_fc1.weight",
        (H + "mlp.gate_proj.weight", H + "mlp.up_proj.weight"),
        GateUp(("ffn", "hidden")),
        "dense",
    ),
    Rule(
        L + "mlp.linear_fc2.weight",
        (H + "mlp.down_proj.weight",),
        Cols(("hidden", "ffn")),
        "dense",
    ),
)


def moe_mlp(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts, from the HF name of the block and of one expert's three projections."""
    expert = H + block + ".experts.{e}."
    return (
        Rule(
            L + "mlp.router.weight",
            (H + block + ".gate.weight",),
            Copy(("experts", "hidden")),
            "moe",
        ),
        Rule(
            L + "mlp.experts.linear_fc1.weight{e}",
            (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
            GateUp(("moe_ffn", "hidden")),
            "moe",
        ),
        Rule(
            L + "mlp.experts.linear_fc2.weight{e}",
            (f"{expert}{down}.weight",),
            Cols(("hidden", "moe_ffn")),
            "moe",
        ),
    )


def fused_experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """`Family.fused` for what transformers 5 calls mlp.experts: [E, 2f, h] and [E, h, f]."""
    expert = H + block + ".experts.{e}."
    return {
        H + "mlp.experts.gate_up_proj": (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        H + "mlp.experts.down_proj": (f"{expert}{down}.weight",),
    }
