"""The router: Megatron's top-k choice, with balance losses that do not depend on how a batch is
cut, and load counts.

Legend: c local tokens (t over context and sequence-parallel ranks), n sequences of the pack, E
    experts, k experts a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from moetrain.engine.device import numbers
from moetrain.engine.world import World
from moetrain.ops.reduce import add_up


@dataclass
class RouterMonitor:
    """What all routers of one model share: the coefficients, the step's token count, and sums for
    the ledger.

    `num_tokens` is the number of valid tokens in the whole global batch, set before the forward
    pass, so that each rank's partial sums divided by it add up to the mean whatever the
    micro-batches, packs and ranks.
    """

    num_layers: int
    num_experts: int
    aux_coeff: float
    z_coeff: float
    num_tokens: float = 1.0
    # With a balance over all tokens of the step: their choices [num_layers, E], counted before.
    load: Tensor | None = None
    counting: bool = False  # a pass for these alone
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def start_step(self, num_tokens: float) -> None:
        self.num_tokens, self.load = num_tokens, None
        self.sums = {
            "load": torch.zeros(self.num_layers, self.num_experts, dtype=torch.float64),
            "aux_loss": torch.zeros(self.num_layers, dtype=torch.float64),
            "z_loss": torch.zeros(self.num_layers, dtype=torch.float64),
        }

    @contextmanager
    def counted(self, world: World) -> Iterator[None]:
        """Inside, forward passes count what is chosen; afterwards `load` has the sums of all ranks.
        Each token is on one tensor rank, since experts go with sequence parallelism.
        """
        self.load, self.counting = torch.zeros(self.num_layers, self.num_experts), True
        try:
            yield
        finally:
            self.counting = False
        self.load = world.sum(self.load.to(world.device))

    def count(self, layer: int, load: Tensor) -> None:
        """Add the choices [E] of one micro-batch of one layer (0-based, global)."""
        assert self.load is not None
        self.load = self.load.to(load.device)
        self.load[layer] += load

    def add(self, layer: int, load: Tensor, aux: Tensor, z: Tensor) -> None:
        """Add one micro-batch of one layer (0-based, global): load [E] token counts, aux and z as
        shares of the mean.
        """
        if self.sums["load"].device != load.device:
            self.sums = {name: value.to(load.device) for name, value in self.sums.items()}
        self.sums["load"][layer] += load
        self.sums["aux_loss"][layer] += aux.detach()
        self.sums["z_loss"][layer] += z.detach()

    def summary(self, is_moe: Sequence[bool], world: World) -> dict[str, float]:
        """Figures of the step over all ranks, of the layers where `is_moe` [num_layers]: losses
        averaged over layers, load as max/mean per layer, dead experts.
        """
        moe_layers = [layer for layer, moe in enumerate(is_moe) if moe]
        flat = torch.cat(
            [self.sums[name].flatten() for name in ("load", "aux_loss", "z_loss")]
        ).float()
        flat = torch.tensor(numbers(world.sum(flat)))
        size = self.num_layers * self.num_experts
        load = flat[:size].view(self.num_layers, self.num_experts)[moe_layers]
        imbalance = load.amax(1) / load.mean(1).clamp(min=1e-9)
        out = {
            "aux_loss": flat[size : size + self.num_layers][moe_layers].mean().item(),
            "z_loss": flat[size + self.num_layers :][moe_layers].mean().item(),
            "load_max_over_mean": imbalance.max().item(),
            "dead_experts": float((load == 0).sum().item()),
        }
        for i, layer in enumerate(moe_layers):
            out[f"layer{layer}/load_max_over_mean"] = imbalance[i].item()
            out[f"layer{layer}/dead_experts"] = float((load[i] == 0).sum().item())
        return out


class Replay:
    """Choices made elsewhere (arXiv 2510.11370), as megatron-core asks for them: `get_replay_topk`
    is the one method of its RouterReplay that a forward pass calls. Upstream's own keeps a list per
    layer for recomputation, which pipelining empties out of order; here the choices travel with the
    micro-batch.
    """

    def __init__(self, chosen: Tensor):
        self.chosen = chosen  # [c, k] int64, experts from 1; 0: the router chooses by itself

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [c, E] -> (their values there [c, k], the choices [c, k])."""
        assert default_compute_topk is not None
        _, top = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = torch.where(self.chosen == 0, top, self.chosen - 1)
        return scores.gather(1, chosen), chosen


class PackedRouter(TopKRouter):
    """Top-k router over packs. `sequence_ids`, `routes` and `monitor` are set by the layer and the
    model that hold it.
    """

    monitor: RouterMonitor
    sequence_ids: Tensor  # [t/cp] int64: the sequence of each token, -1 in the padding tail
    num_sequences: int
    routes: Tensor | None = None  # [t/cp, k] int64: choices to replay, experts from 1
    place: int  # among the routers of its model chunk

    def __init__(self, *args: Any, biased: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if biased:  # Megatron has one there only where all linear layers have
            self.bias = nn.Parameter(
                torch.empty(
                    self.config.num_moe_experts, dtype=self.weight.dtype, device=self.weight.device
                )
            )
            self.bias.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: Tensor) -> Tensor:
        """[c, 1, h] -> logits [c, 1, E] fp32, with the adapter's part where there is one."""
        logits: Tensor = super().gating(input)
        adapter = self._modules.get("lora")
        return logits if adapter is None else logits + adapter(input)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [c, 1, E] -> probabilities and choices, both [c, E]."""
        logits = logits.view(-1, self.config.num_moe_experts)
        learns = self.training and torch.is_grad_enabled()
        seen = learns or self.monitor.counting
        ids = self._local(self.sequence_ids, logits) if seen else None
        replay = None if self.routes is None else Replay(self._local(self.routes, logits))
        z = logits.new_zeros(())
        if learns and ids is not None:
            # ST-MoE, arXiv 2202.08906, eq. 5, over the valid tokens of the global batch.
            z = (torch.logsumexp(logits, -1).square() * (ids >= 0)).sum() / self.monitor.num_tokens
            if self.monitor.z_coeff:
                logits = MoEAuxLossAutoScaler.apply(logits, z * self.monitor.z_coeff)
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            fused=self.config.moe_router_fusion,
            router_replay=replay,  # type: ignore[arg-type]
        )
        if ids is None:
            return probs, chosen
        load = (chosen & (ids >= 0).unsqueeze(-1)).sum(0)
        if not learns:
            self.monitor.count(self.layer_number - 1, load)
            return probs, chosen
        aux = self._aux_loss(logits, chosen, ids)
        if self.monitor.aux_coeff:
            probs = MoEAuxLossAutoScaler.apply(probs, aux * self.monitor.aux_coeff)
        self.monitor.add(self.layer_number - 1, load, aux, z)
        return probs, chosen

    def _local(self, values: Tensor, logits: Tensor) -> Tensor:
        """This rank's rows of values [t/cp, ...], as sequence parallelism cuts them."""
        if self.config.sequence_parallel:
            values = values.chunk(self.tp_group.size())[self.tp_group.rank()]
        assert values.size(0) == logits.size(0)
        return values

    def _aux_loss(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        """This rank's share of the balance loss of the step."""
        if self.monitor.load is None:
            return self._sequence_aux_loss(logits, chosen, ids)
        # E/(k T) sum_e c_e * (1/T) sum_i p_ie over the T tokens of the step: Switch, as below, with
        # c of the whole batch (arXiv 2501.11873, eq. 3).
        load = self.monitor.load[self.layer_number - 1].to(logits)
        scale = chosen.size(1) / (self.topk * self.monitor.num_tokens**2)
        return (torch.softmax(logits, -1) * (ids >= 0).unsqueeze(-1) * load).sum() * scale

    def _sequence_aux_loss(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        """This rank's share of the balance loss, averaged over the global batch's tokens.

        For a sequence of m tokens, E/(k m) sum_e c_e * (1/m) sum_i p_ie (Switch, arXiv 2101.03961,
        eq. 4, per sequence as in DeepSeek-V3, arXiv 2412.19437, eq. 17), weighted by m. Sequences
        may be split over tensor and context ranks.
        """
        n = self.num_sequences
        valid = ids >= 0
        slot = torch.where(valid, ids, n)
        counts = logits.new_zeros(n + 1, chosen.size(1)).index_add(0, slot, chosen.to(logits.dtype))
        if self.tp_cp_group.size() > 1:
            add_up(counts, self.tp_cp_group)
        probs = torch.softmax(logits, -1)
        length = counts.sum(-1, keepdim=True).clamp(min=1) / self.topk
        weight = counts[:n] / length[:n]  # [n, E]
        scale = chosen.size(1) / (self.topk * self.monitor.num_tokens)
        return (weight[ids.clamp(min=0)] * probs * valid.unsqueeze(-1)).sum() * scale


def watch(chunks: Sequence[nn.Module], monitor: RouterMonitor) -> None:
    """Give the routers of a model what they share, and their place in their chunk."""
    for chunk in chunks:
        for place, router in enumerate(routers(chunk)):
            router.monitor, router.place = monitor, place


def routers(chunk: nn.Module) -> list[PackedRouter]:
    """Of a model chunk, in the order of its layers."""
    return [module for module in chunk.modules() if isinstance(module, PackedRouter)]


def sequence_table(
    ids: Tensor, num_sequences: int, keys: Tensor | None = None, routes: Tensor | None = None
) -> Tensor:
    """[n, 2, t/cp] int64 for Megatron's `padding_mask`: the sequence of each token (-1 in the
    tail), and the keys [t/cp] of its dropout. With routes [t/cp, l, k] of the l MoE layers of a
    chunk (experts from 1, 0 where the router chooses), [n, 2 + l k, t/cp].

    n is the pack's number of sequences, the same on context ranks that see different ones. It is a
    size, of a dimension that is repeated without memory, because reading a value would make the
    host wait for the device in every layer. A tensor, since recomputation saves tensors only.
    """
    table = torch.stack([ids, torch.zeros_like(ids) if keys is None else keys])
    if routes is not None:
        table = torch.cat([table, routes.flatten(1).T.to(table.dtype)])
    return table.expand(num_sequences, *table.shape)
