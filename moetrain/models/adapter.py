"""Low-rank adapters as weights: which matrices have one, and the adapter's own weight table.

A matrix W [out, in] acts as W + s B A, with A [r, in], B [out, r] and s = `AdapterSpec.scale`
(LoRA, arXiv 2106.09685, equation 3); with DoRA (arXiv 2402.09353, equation 5) its rows are then
scaled to the norms m [out]. The table has the base table's names and shardings, so that what loads
and exports weights does so for adapters: `X.weight` -> `X.lora_A`, `X.lora_B`, `X.lora_magnitude`,
and for expert e `X.lora_A{e}`, `X.lora_B{e}`.

Where Megatron holds several Hugging Face matrices as one, each has an A of its own: they lie one
above the other in lora_A. An expert's gate and up share one A, as PEFT's `target_parameters` have
it, which see one matrix [2f, h] there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import sqrt
from typing import Literal, Self

from moetrain.config.recipe import AdapterConfig
from moetrain.errors import ConfigError
from moetrain.models.model import Model
from moetrain.models.patterns import matcher, nothing_matches, trainable_names
from moetrain.models.rules import Kind, Rule
from moetrain.models.sharding import Cols, Copy, Shape, Sharding, Stack

type Tensors = Literal["lora_A", "lora_B", "lora_magnitude"]

_ALL: dict[str, tuple[Kind, ...]] = {
    "all-linear": ("attention", "mlp", "experts"),
    "all-router": ("attention", "mlp", "experts", "router"),
}


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, apart from its values. `target` as in the recipe."""

    rank: int
    alpha: float
    target: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    dora: bool = False
    init: Literal["lora", "olora", "pissa"] = "lora"
    dropout: float = 0.0  # before A, in training

    @property
    def scale(self) -> float:
        """s; alpha / sqrt(r) is rsLoRA's (arXiv 2312.03732)."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def starts_at_base(self) -> bool:
        """Whether B A is 0 at first. If not, the base gives s B0 A0 up (OLoRA, PiSSA)."""
        return self.init == "lora"

    @classmethod
    def of(cls, config: AdapterConfig) -> Self:
        """The recipe's section, its `path` aside."""
        return cls(
            rank=config.rank,
            alpha=config.alpha,
            target=tuple(config.target),
            rslora=config.type == "rslora",
            dora=config.type == "dora",
            init=config.type if config.type in ("olora", "pissa") else "lora",
            dropout=config.dropout or 0.0,
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """What can have one pair A, B: a Hugging Face matrix, or one expert's gate and up as one."""

    name: str  # its tensors are `<name>.lora_A.weight`, ...
    weights: tuple[str, ...]  # the base's tensors, one above the other
    shape: Shape  # [out, in] of them together
    kind: Kind
    module: str  # transformers' name of the module; of experts, that of the parameter of them all
    expert: int | None


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of an adapter as a checkpoint would name it."""

    matrix: Matrix
    tensors: Tensors
    rows: tuple[int, int]  # first and last + 1 of the matrix's rows that a B or magnitude is for
    live: bool  # trained and exported; if not it shares a Megatron tensor with one that is


@dataclass(frozen=True, eq=False)
class AdapterTable(Mapping[str, Rule]):
    """The weight table of an adapter, by canonical name, and what it is made from."""

    model: Model
    spec: AdapterSpec
    rules: Mapping[str, Rule]
    base: Mapping[str, Rule]  # canonical name here -> the base's rule that it adapts
    places: Mapping[str, Place]  # by the names in the rules' `hf`
    matrices: Mapping[str, Matrix]  # those with an adapter, by name

    def __getitem__(self, name: str) -> Rule:
        return self.rules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def of_layer(self, layer: int) -> list[Rule]:
        """The base's rules that are adapted there; of experts the first's, for all of them."""
        return self._by_layer.get(layer, [])

    @cached_property
    def _by_layer(self) -> dict[int, list[Rule]]:
        result: dict[int, list[Rule]] = {}
        for name, base in self.base.items():
            if base.layer is not None and name == adapter_name(base.name, "lora_A"):
                if not base.expert:
                    result.setdefault(base.layer, []).append(base)
        return result

    def parts(self, name: str) -> tuple[bool, ...]:
        """Of each Hugging Face tensor of a rule, whether it is trained. The others stay 0 (the
        base's norms in a magnitude) and are not exported.
        """
        return tuple(self.places[key].live for key in self.rules[name].hf)


def adapter_name(base: str, tensors: Tensors) -> str:
    """`X.lora_A3` of `X.weight3`: where the adapter of a base weight is held."""
    stem, _, expert = base.rpartition("weight")
    return stem + tensors + expert


def row_parts(rule: Rule, tp_rank: int, tp_size: int) -> list[int]:
    """Of each local row, the number of the Hugging Face tensor it belongs to (0 in padding).

    For a lora_B or lora_magnitude, and for any base weight but one split along its columns.
    """
    result = [0] * rule.local_shape(tp_rank, tp_size)[0]
    for piece in rule.sharding.pieces(tp_rank, tp_size) if rule.sharding.dim != 1 else ():
        stop = piece.local_start + piece.length
        result[piece.local_start : stop] = [piece.part] * piece.length
    return result


@lru_cache(maxsize=4)  # of 235B it takes seconds
def adapter_table(model: Model, spec: AdapterSpec, *, loaded: bool = False) -> AdapterTable:
    """The table of `spec`'s adapter on a model; `loaded` when the adapter is there already, whose
    rank may then be any.

    Raises ConfigError: a target that matches nothing, or gate without up, or some experts of a
    layer; a rank larger than a matrix; DoRA where PEFT has none.
    """
    every = [(rule, _matrices(rule)) for rule in model.table.values()]
    chosen = _targeted([matrix for _, matrices in every for matrix in matrices], spec.target)
    for matrix in chosen.values():
        if not loaded:
            _check_rank(matrix, spec)
        if spec.dora:
            _check_dora(matrix, model)
    rules: dict[str, Rule] = {}
    base: dict[str, Rule] = {}
    places: dict[str, Place] = {}
    for rule, matrices in every:
        if not any(matrix.name in chosen for matrix in matrices):
            continue
        for tensors, sharding in _shardings(rule, spec).items():
            placed = _places(matrices, tensors, spec.rank, chosen)
            name = adapter_name(rule.name, tensors)
            saved = f"{rule.module}.{tensors}"
            rules[name] = Rule(name, tuple(placed), sharding, rule.layer, rule.expert, saved=saved)
            base[name] = rule
            places |= placed
    return AdapterTable(model, spec, rules, base, places, chosen)


def _shardings(rule: Rule, spec: AdapterSpec) -> dict[Tensors, Sharding]:
    """Of each tensor of a base weight's adapter: B is split as W's rows, A as its columns."""
    base = rule.sharding
    out, into = base.shape
    whole = isinstance(base, Copy | Cols)
    into_rank = (spec.rank, into)
    result: dict[Tensors, Sharding] = {}
    if isinstance(base, Cols):
        result["lora_A"] = Cols(into_rank)
    elif len(rule.hf) > 1 and rule.expert is None:
        result["lora_A"] = Stack(into_rank, len(rule.hf))
    else:
        result["lora_A"] = Copy(into_rank)
    result["lora_B"] = Copy((out, spec.rank)) if whole else replace(base, shape=(out, spec.rank))
    if spec.dora:
        result["lora_magnitude"] = Copy((out,)) if whole else replace(base, shape=(out,))
    return result


def trained_table(
    model: Model, trainable: Sequence[str] | None, adapters: AdapterTable | None
) -> Mapping[str, Rule]:
    """The weight table of what a recipe trains: an adapter with what heads are new beside it, the
    part of the model that the `trainable` patterns select, or all of it. Raises ConfigError for a
    pattern that matches nothing.
    """
    table = model.table
    if adapters is not None:
        return {name: table[name] for name in model.heads.added} | dict(adapters)
    if trainable is None:
        return table
    names = trainable_names(table, trainable)
    return {name: rule for name, rule in table.items() if name in names}


# What a tensor's name has after its module's, here and in PEFT.
SUFFIX: dict[Tensors, str] = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude": ".lora_magnitude_vector",
}


def _places(
    matrices: tuple[Matrix, ...], tensors: Tensors, rank: int, chosen: Mapping[str, Matrix]
) -> dict[str, Place]:
    """One kind of tensor of all matrices of a base weight, in the order of its sharding's parts."""
    result: dict[str, Place] = {}
    for matrix in matrices:
        live = matrix.name in chosen
        if tensors == "lora_A":
            result[matrix.name + SUFFIX[tensors]] = Place(matrix, tensors, (0, rank), live)
            continue
        rows = matrix.shape[0] // len(matrix.weights)
        for part, key in enumerate(matrix.weights):
            place = Place(matrix, tensors, (part * rows, (part + 1) * rows), live)
            result[key.removesuffix(".weight") + SUFFIX[tensors]] = place
    return result


def all_matrices(model: Model) -> list[Matrix]:
    """Everything of a model that can have an adapter, in the table's order."""
    return [m for rule in model.table.values() for m in _matrices(rule)]


def _matrices(rule: Rule) -> tuple[Matrix, ...]:
    """The matrices of a base rule, in its order; none where an adapter cannot be."""
    if rule.adapts is None:
        return ()
    if rule.expert is not None:
        assert rule.fused is not None, f"{rule.name} has no fused name"
        first = rule.hf[0].removesuffix(".weight")
        if len(rule.hf) > 1:
            first = first.rpartition(".")[0] + "." + rule.fused.rpartition(".")[2]
        shape = (sum(shape[0] for shape in rule.hf_shapes), rule.hf_shapes[0][1])
        return (Matrix(first, rule.hf, shape, rule.adapts, rule.fused, rule.expert),)
    return tuple(
        Matrix(
            key.removesuffix(".weight"),
            (key,),
            shape,
            rule.adapts,
            (rule.fused or key).removesuffix(".weight"),
            None,
        )
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    )


def _targeted(matrices: list[Matrix], target: tuple[str, ...]) -> dict[str, Matrix]:
    """The matrices that the patterns select, by name, in the table's order."""
    keys: set[str] = set()
    modules: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        modules.setdefault(matrix.module, []).append(matrix)
    for pattern in target:  # whole names, of which a loaded adapter has hundreds, are looked up
        candidates = modules.get(pattern, matrices)
        targeted = {key for matrix in candidates for key in _matched(matrix, pattern)}
        if not targeted:
            raise nothing_matches("adapter.target", pattern, modules)
        keys |= targeted
    chosen: dict[str, Matrix] = {}
    for matrix in matrices:
        missing = [key for key in matrix.weights if key not in keys]
        if not missing:
            chosen[matrix.name] = matrix
        elif len(missing) < len(matrix.weights):
            raise ConfigError(
                f"adapter.target: {matrix.module} is one parameter of the model, whose gate and up "
                f"share an A; target both or neither, not all but {missing[0]}"
            )
    taken = {matrix.module for matrix in chosen.values()}
    for matrix in matrices:
        if matrix.module in taken and matrix.name not in chosen:
            raise ConfigError(
                f"adapter.target: {matrix.module} is one parameter for all experts of the layer; "
                f"target all of them or none, not all but {matrix.name}"
            )
    return chosen


def _matched(matrix: Matrix, pattern: str) -> tuple[str, ...]:
    """The base's tensors that a pattern takes of a matrix."""
    if pattern in _ALL:
        return matrix.weights if matrix.kind in _ALL[pattern] else ()
    match = matcher(pattern)
    if match(matrix.module) or match(matrix.name):
        return matrix.weights
    return tuple(key for key in matrix.weights if match(key.removesuffix(".weight")))


def _check_rank(matrix: Matrix, spec: AdapterSpec) -> None:
    if spec.rank > min(matrix.shape):
        raise ConfigError(
            f"adapter.rank={spec.rank} is larger than {matrix.module}, which is "
            f"{list(matrix.shape)}; take at most {min(matrix.shape)} or leave it out of "
            f"adapter.target"
        )


def _check_dora(matrix: Matrix, model: Model) -> None:
    if is_parameter(matrix, model):
        raise ConfigError(
            f"adapter.type=dora: PEFT cannot hold DoRA on {matrix.module}; take another type, or "
            f"adapter.target: [q_proj, k_proj, v_proj, o_proj]"
        )


def is_parameter(matrix: Matrix, model: Model) -> bool:
    """Whether PEFT names it in `target_parameters`, not in `target_modules`.

    The dense MLP in a mixture of experts too: there PEFT (0.20) takes gate_proj, up_proj and
    down_proj in `target_modules` for the experts'.
    """
    return matrix.kind in ("experts", "router") or (matrix.kind == "mlp" and model.moe is not None)
