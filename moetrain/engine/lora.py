"""Low-rank adapters beside Megatron's own layers: W x + s B A x, attached without touching them.

A layer keeps its module and its names; the adapter is a child called `lora` whose output is added
by a forward hook, so that every backend, recomputation and checkpoint sees the layer it knows.
LoRA: arXiv 2106.09685, eq. 3; DoRA: arXiv 2402.09353, eq. 5.

Legend: t local tokens, r rank, P Hugging Face matrices fused in one weight (q, k, v: 3; gate, up:
    2), rows local output rows, e local experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moetrain.engine.dropout import Draws, Dropout, number_of
from moetrain.engine.model import PackedGPT
from moetrain.engine.world import World
from moetrain.models import Rule
from moetrain.models.adapter import AdapterSpec, AdapterTable, adapter_name, row_parts
from moetrain.ops.grouped import grouped_linear
from moetrain.ops.reduce import add_up


class Lora(nn.Module):
    """A [P r, in] and B [rows, r] of one linear layer, as this tensor-parallel rank holds them.

    `row_parts` names the matrix that each row of B belongs to, -1 for none; its rows of B then meet
    that matrix's rows of A alone.
    """

    A: nn.Parameter
    B: nn.Parameter
    part_mask: Tensor | None  # [rows, P] in B's dtype

    def __init__(self, num_in: int, num_rows: int, spec: AdapterSpec, like: Tensor):
        super().__init__()
        self.scale = spec.scale
        self.part_mask = None
        self.dropout: Dropout | None = None
        self.magnitude: nn.Parameter | None = None
        self.A = _parameter((spec.rank, num_in), like)
        self.B = _parameter((num_rows, spec.rank), like)
        if spec.dora:
            self.magnitude = _parameter((num_rows,), like)

    def split(self, parts_of_rows: Sequence[int], live: Sequence[bool]) -> None:
        """Make room for an A of each fused matrix; `live` says which of them have an adapter."""
        rank, num_in = self.A.shape
        self.A = _parameter((len(live) * rank, num_in), self.A)
        parts = torch.tensor(parts_of_rows, device=self.A.device)
        mask = parts[:, None] == torch.arange(len(live), device=self.A.device)
        mask &= torch.tensor(live, device=self.A.device)
        self.part_mask = mask.to(self.A.dtype)

    def up(self) -> Tensor:
        """B as it meets all of A: [rows, P r], 0 where row and part do not belong together."""
        if self.part_mask is None:
            return self.B
        return (self.part_mask[:, :, None] * self.B[:, None, :]).flatten(1)

    def delta(self) -> Tensor:
        """s B A [rows, in] fp32: what is added to the local weight."""
        return self.scale * (self.up().float() @ self.A.float())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> s B A x [..., rows]."""
        x = self.dropped(x)
        return self.scale * F.linear(self.middle(F.linear(x, self.A)), self.up())

    def dropped(self, x: Tensor) -> Tensor:
        """x as A sees it: in training with dropout, where there is one."""
        return self.dropout(x) if self.dropout is not None and self.training else x

    @property
    def drops(self) -> bool:
        return self.dropout is not None and self.training

    def middle(self, a: Tensor) -> Tensor:
        """What happens to A x between the two matrices: communication of r numbers per token."""
        return a

    def norm(self, weight: Tensor) -> Tensor:
        """[rows] fp32: the norm of each row of W + s B A; no gradient flows through it (section 4.3
        of the paper).
        """
        with torch.no_grad():
            return self.square_sum((weight.float() + self.delta()).square().sum(1)).sqrt()

    def square_sum(self, local: Tensor) -> Tensor:
        """Sums over the ranks that hold the other columns."""
        return local

    def stretch(self, weight: Tensor) -> Tensor:
        """[rows] fp32: DoRA's factor of each row, 1 for rows without an adapter."""
        assert self.magnitude is not None
        factor = self.magnitude.float() / self.norm(weight)
        if self.part_mask is not None:
            factor = torch.where(self.part_mask.any(1), factor, 1.0)
        return factor

    def merged(self, weight: Tensor) -> Tensor:
        """W with the adapter in it, in W's dtype."""
        total = weight.float() + self.delta()
        if self.magnitude is not None:
            total *= self.stretch(weight)[:, None]
        return total.to(weight.dtype)


class ColumnLora(Lora):
    """Beside a column-parallel layer: B is split by rows as the weight is, A is whole."""

    def __init__(self, *args: Any, sequence_parallel: bool, tp_size: int):
        super().__init__(*args)
        self.sequence_parallel = sequence_parallel
        self.tp_size = tp_size

    def mark(self) -> None:
        """Say to Megatron which parameters are split, and whose gradients are partial."""
        # With sequence parallelism each rank has seen its own tokens only.
        self.A.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        for split in (self.B, self.magnitude):
            if split is not None:
                _mark_split(split, 0, self.tp_size)

    def middle(self, a: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(a)
        return copy_to_tensor_model_parallel_region(a)


class RowLora(Lora):
    """Beside a row-parallel layer: A is split by columns as the weight is, B is whole."""

    def __init__(self, *args: Any, sequence_parallel: bool, tp_size: int, group: ProcessGroup):
        super().__init__(*args)
        self.sequence_parallel = sequence_parallel
        self.tp_size, self.group = tp_size, group

    def mark(self) -> None:
        """As ColumnLora.mark."""
        _mark_split(self.A, 1, self.tp_size)
        for whole in (self.B, self.magnitude):
            if whole is not None:
                whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def middle(self, a: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(a)
        return reduce_from_tensor_model_parallel_region(a)

    def square_sum(self, local: Tensor) -> Tensor:
        if self.tp_size > 1:
            add_up(local, self.group)
        return local


class RouterLora(Lora):
    """Beside the router, which every rank holds whole."""

    def __init__(self, *args: Any, sequence_parallel: bool):
        super().__init__(*args)
        self.sequence_parallel = sequence_parallel

    def mark(self) -> None:
        """As ColumnLora.mark."""
        for whole in (self.A, self.B):
            whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> s B A x [..., E] in the router's dtype, fp32."""
        a = F.linear(self.dropped(x).float(), self.A.float())
        return self.scale * F.linear(a, self.B.float())


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        return add_up(grad, ctx.group), None


class ExpertLora(nn.Module):
    """A [e, r, in] and B [e, out, r] of all local experts; `split` says which of the two the
    expert-tensor ranks share out, as they do the weight.
    """

    def __init__(self, weight: Tensor, spec: AdapterSpec, split: str, group: ProcessGroup):
        super().__init__()
        num_local, num_out, num_in = weight.shape
        self.scale, self.split, self.group = spec.scale, split, group
        self.dropout: Dropout | None = None
        self.A = _parameter((num_local, spec.rank, num_in), weight)
        self.B = _parameter((num_local, num_out, spec.rank), weight)
        for param in (self.A, self.B):
            param.allreduce = False  # type: ignore[attr-defined]  # as the experts' own weights
        _mark_split(self.A if split == "A" else self.B, 2 if split == "A" else 1, group.size())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [t, in] sorted by expert, ends [e] int32 where each expert's rows end -> [t, out]; a
        part of the sum over expert-tensor ranks where the layer's own output is one.
        """
        whole = self.B if self.split == "A" else self.A
        if self.group.size() > 1:
            whole = _SumGradient.apply(whole, self.group)  # type: ignore[assignment]
        if self.dropout is not None and self.training:
            x = self.dropout(x)
        first, second = (self.A, whole) if self.split == "A" else (whole, self.B)
        return self.scale * grouped_linear(grouped_linear(x, first, ends), second, ends)

    def merged(self, weight: Tensor) -> Tensor:
        """[e, out, in] with the adapters in it, in the weight's dtype."""
        delta = torch.bmm(self.B.float(), self.A.float())
        return (weight.float() + self.scale * delta).to(weight.dtype)


def _parameter(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))


def _mark_split(param: Tensor, dim: int, size: int) -> None:
    param.tensor_model_parallel = size > 1  # type: ignore[attr-defined]
    param.partition_dim, param.partition_stride = dim, 1  # type: ignore[attr-defined]


# Attaching


def _add(module: Any, args: Any, output: Any) -> Any:
    """The forward hook: (output, bias) or output, with the adapter's part added."""
    bias = None  # that Megatron adds later, which an adapter has no part in
    is_pair = isinstance(output, tuple)
    if is_pair:
        output, bias = output
    lora = module.lora
    added = lora(*args).to(output.dtype)
    if isinstance(lora, Lora) and lora.magnitude is not None:
        factor = lora.stretch(module.weight).to(output.dtype)
        whole = output  # W x, of which DoRA changes the length
        if lora.drops:  # as PEFT has it, the length of what A sees is changed alone
            whole = module.forward(lora.dropped(args[0]), *args[1:])
            whole = whole[0] if is_pair else whole
        # In the output already, and not to be stretched; TE has an empty one.
        inner = None if bias is not None else module.bias
        if inner is not None and inner.numel():
            whole = whole - inner
        added = added * factor + whole * (factor - 1)
    total = output + added
    return (total, bias) if is_pair else total


def attach(chunks: list[PackedGPT], adapters: AdapterTable, world: World) -> None:
    """Put an adapter beside every targeted weight of this rank, zero until it is loaded, and freeze
    all else.
    """
    dropout = adapters.spec.dropout
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            # A new head is trained with its adapter.
            param.requires_grad = name in adapters.model.heads.added
        for layer in chunk.decoder.layers:
            draws = Draws(dropout, world.tp_rank, world.plan.tp) if dropout else None
            if draws is not None:
                layer.register_forward_pre_hook(draws.hear, with_kwargs=True)
            for base in adapters.of_layer(layer.layer_number - 1):
                module = layer.get_submodule(base.module)
                if base.expert is None:
                    module.lora = _make_lora(module, base, adapters, world)
                else:
                    split = "A" if base.sharding.dim == 1 else "B"
                    module.lora = ExpertLora(module.weight, adapters.spec, split, world.etp_group)
                if draws is not None:
                    module.lora.dropout = _before(module.lora, base, draws, layer, world)
                if base.adapts != "router":  # the router adds its own, before the choice
                    module.register_forward_hook(_add)


def _before(lora: Lora | ExpertLora, base: Rule, draws: Draws, layer: Any, world: World) -> Dropout:
    """The dropout before an A; experts of a layer have one."""
    is_expert = base.expert is not None
    if is_expert:
        layer.mlp.draws = draws
    rank = world.etp_rank if is_expert else world.tp_rank
    first = rank * lora.A.size(-1) if base.sharding.dim == 1 else 0
    return Dropout(draws, number_of(base.name), first, is_expert)


def _make_lora(module: Any, base: Rule, adapters: AdapterTable, world: World) -> Lora:
    """The adapter of one linear layer, by how tensor-parallel ranks split it."""
    spec, tp_size = adapters.spec, world.plan.tp
    parallel = bool(module.config.sequence_parallel)
    num_rows, num_in = module.weight.shape
    arguments = (num_in, num_rows, spec, module.weight)
    lora: ColumnLora | RowLora | RouterLora
    if base.sharding.dim is None:
        lora = RouterLora(*arguments, sequence_parallel=parallel)
    elif base.sharding.dim == 1:
        lora = RowLora(
            *arguments, sequence_parallel=parallel, tp_size=tp_size, group=world.tp_group
        )
    else:
        lora = ColumnLora(*arguments, sequence_parallel=parallel, tp_size=tp_size)
        if len(base.hf) > 1:
            live = adapters.parts(adapter_name(base.name, "lora_A"))
            lora.split(row_parts(base, world.tp_rank, tp_size), live)
    lora.mark()
    return lora
