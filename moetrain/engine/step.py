"""One pass over a global batch: micro-batches through Megatron's pipeline schedule, and the sums
that come out.

Legend: t tokens of a micro-batch, c = t/cp local tokens, v_local this tensor rank's vocabulary
    rows, k likeliest tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from moetrain.engine.context import gather, take_local
from moetrain.engine.layers.attention import segment_table
from moetrain.engine.layers.router import routers, sequence_table
from moetrain.engine.model import PackedGPT
from moetrain.engine.world import World
from moetrain.methods.base import Out
from moetrain.models import Model
from moetrain.models.sharding import padded_rows
from moetrain.ops.drawn import Drawn, drawn_of
from moetrain.ops.dropout import token_keys
from moetrain.ops.logprob import likeliest, token_logprobs
from moetrain.ops.packed import Packed, blank, concat, pad_to
from moetrain.ops.routes import unpack_routes
from moetrain.pulse import beat

# What a method makes of one micro-batch: (what to differentiate, what to keep). Runs on the last
# stage only.
Head = Callable[[Out, Packed], tuple[Tensor, dict[str, Any]]]


def micro_batches(packs: Sequence[Packed], size: int, world: World) -> list[Packed]:
    """Join `size` packs to a micro-batch and bring all to one length and one number on every rank.

    Pipelines exchange activations of one shape, and experts expect every rank to come: ranks with
    less data run blank micro-batches, which are all padding.
    """
    joined = [concat(packs[i : i + size]) for i in range(0, len(packs), size)]
    unit = world.plan.tp * 2 * world.plan.cp
    longest = max((p.num_tokens for p in joined), default=unit)
    num, t = world.max_counts(len(joined), -(-longest // unit) * unit)
    if world.plan.vpp > 1:  # interleaving deals micro-batches in rounds of the pipeline's size
        num = -(-num // world.plan.pp) * world.plan.pp
    out = [pad_to(p, t) for p in joined]
    return out + [blank(t, packs[0] if packs else None)] * (num - len(out))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank. Losses are global-batch means."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    tokens: int  # valid tokens of the global batch
    memory_gib: float
    router: dict[str, float] = field(default_factory=dict[str, float])


class Scored(NamedTuple):
    """What of a micro-batch's local tokens has a log-prob."""

    places: Tensor  # [m] int64, of c
    temperature: float | Tensor  # of the distributions: one for all, or [m] fp32
    drawn: Drawn | None  # what else the sampler made of them


@dataclass
class Runner:
    """Runs micro-batches through the model chunks of this rank."""

    models: Sequence[Any]  # PackedGPT, or Megatron's DDP around it
    world: World
    model: Model
    chunk: int = 1024  # tokens whose logits exist at one time
    asked: frozenset[str] = frozenset({"logp"})  # of Method.needs
    salt: tuple[int, ...] = ()  # of this pass's dropout; empty: nothing is dropped
    most_tokens: int | None = None  # of the vocabulary that are looked at; None: all
    num_likeliest: int = 0  # how many tokens `likeliest` is to name, where it is asked for

    def __call__(
        self, batches: Sequence[Packed], head: Head, *, forward_only: bool
    ) -> list[dict[str, Any]]:
        """Run all micro-batches; returns what `head` kept of each, on the last stage, else []."""
        iterators: list[Iterator[Packed]] = [iter(batches) for _ in self.models]
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=partial(self._forward, head),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(self.models) if len(self.models) > 1 else self.models[0],
            num_microbatches=len(batches),
            seq_length=batches[0].num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    @torch.no_grad()
    def unscored(self, batches: Sequence[Packed]) -> None:
        """A forward pass of all micro-batches for what the layers see: no token is scored."""

        def head(out: Out, pack: Packed) -> tuple[Tensor, dict[str, Any]]:
            return out.logp.sum(), {}

        blanks = [replace(b, loss_mask=torch.zeros_like(b.loss_mask)) for b in batches]
        self(blanks, head, forward_only=True)

    def _forward(
        self, head: Head, data: Iterator[Packed], model: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        beat()
        on_host = next(data)
        # Logits exist for scored tokens alone: prompts and padding cost no vocabulary.
        scored = self._scored(on_host)
        pack = on_host.to(self.world.device)
        ids = pack.sequence_ids.to(self.world.device).masked_fill(~pack.valid, -1)
        keys = None
        if self.salt:
            keys = self._mine(token_keys(on_host, self.salt).to(self.world.device))
        sequences = sequence_table(
            self._mine(ids),
            pack.num_sequences,
            keys,
            self._routes(pack, model),
        )
        hidden = model(
            self._mine(pack.tokens), self._mine(pack.position_ids), segment_table(pack), sequences
        )
        return hidden, partial(self._finish, head, pack, scored, model)

    def _mine(self, x: Tensor) -> Tensor:
        return take_local(x, self.world.cp_rank, self.world.plan.cp)

    def _routes(self, pack: Packed, model: Any) -> Tensor | None:
        """[c, l, k] the choices for the MoE layers of this chunk, where the pack has some: those of
        all layers, or of this rank's alone.
        """
        routes = pack.per_token.get("routes")
        if routes is None:
            return None
        first, of_rank, num = next(
            place for one, place in zip(self.models, self._routed, strict=True) if one is model
        )
        if routes.size(1) != sum(self.model.moe_layers):
            first = of_rank
        return unpack_routes(self._mine(routes[:, first : first + num]), self.model.num_experts)

    @cached_property
    def _routed(self) -> list[tuple[int, int, int]]:
        """Of each chunk: how many MoE layers the model has before it, how many of those this rank,
        and how many it has itself.
        """
        places: list[tuple[int, int, int]] = []
        of_rank = 0
        for chunk in self.models:
            modules = routers(chunk)
            before = sum(self.model.moe_layers[: modules[0].layer_number - 1]) if modules else 0
            places.append((before, of_rank, len(modules)))
            of_rank += len(modules)
        return places

    def _scored(self, on_host: Packed) -> Scored:
        """A sequence says its temperature in extras; others have 1."""
        places = self._mine(on_host.loss_mask).nonzero()[:, 0]
        device = self.world.device
        whole = self._mine(torch.arange(on_host.num_tokens))[places]
        drawn = drawn_of(on_host, whole)
        temperatures = on_host.extras.get("temperature")
        # 0: nothing of it is scored.
        if temperatures is None or bool(((temperatures == 1) | (temperatures == 0)).all()):
            return Scored(places.to(device), 1.0, drawn and drawn.to(device))
        temperature = temperatures[on_host.sequence_ids[whole]].to(device)
        return Scored(places.to(device), temperature, drawn and drawn.to(device))

    def _finish(
        self, head: Head, pack: Packed, scored: Scored, model: Any, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """hidden [c, 1, h] of the last stage -> (loss, 1, kept): Megatron divides by nothing,
        `head` has done so.
        """
        gpt: PackedGPT = get_attr_wrapped_model(model, "head_weight", return_model_obj=True)
        if self.model.heads.scalar:
            out = self._value(gpt, hidden)
        else:
            out = self._logp(gpt, hidden, pack, scored)
        loss, outputs = head(out, pack)
        return loss, torch.ones((), dtype=torch.int, device=loss.device), outputs

    def _value(self, gpt: PackedGPT, hidden: Tensor) -> Out:
        """What a scalar head says at every token; there are no log-probs then."""
        value = gather(gpt.scores(hidden.squeeze(1)), self.world.cp_group, reduce_grad=False)
        return Out(logp=torch.zeros_like(value), value=value)

    def _logp(self, gpt: PackedGPT, hidden: Tensor, pack: Packed, scored: Scored) -> Out:
        """Log-probs of the labels under the loss mask, and what is asked of the distributions."""
        given, weight = hidden.squeeze(1)[scored.places], gpt.head_weight()
        labels, others = self._mine(pack.labels)[scored.places], None
        if "likeliest" in self.asked:
            others, _ = likeliest(
                given,
                weight,
                self.num_likeliest,
                temperature=scored.temperature,
                **self._vocabulary,
            )
        elif "at_teacher" in self.asked:
            others = self._mine(pack.per_token["teacher_ids"])[scored.places].long()
        if others is not None:
            labels = torch.cat([labels[:, None], others], dim=1)
        logp, entropy, squares = token_logprobs(
            given,
            weight,
            labels,
            **self._vocabulary,
            temperature=scored.temperature,
            drawn=scored.drawn,
            with_entropy="entropy" in self.asked,
            with_squares="log_squares" in self.asked,
        )
        size = hidden.size(0)

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else self._spread(values, scored.places, size)

        value = None
        if self.model.heads.value:
            # Of every token: what follows a cut answer has no label.
            value = gather(gpt.values(hidden.squeeze(1)), self.world.cp_group, reduce_grad=False)
        whole = self._spread(logp, scored.places, size)
        rest = (spread(entropy), value, spread(squares))
        if others is None:
            return Out(whole, *rest)
        return Out(whole[:, 0], *rest, whole[:, 1:], spread(others))

    @property
    def _vocabulary(self) -> dict[str, Any]:
        """Of `token_logprobs`: which part of the vocabulary is here, and how many tokens' logits
        exist at a time.
        """
        plan, vocab = self.world.plan, self.model.heads.vocab
        return {
            "group": self.world.tp_group if plan.tp > 1 else None,
            "vocab_start": self.world.tp_rank * padded_rows(vocab, plan.tp) // plan.tp,
            "vocab_size": min(vocab, self.most_tokens or vocab),
            "chunk": self.chunk,
        }

    def _spread(self, values: Tensor, scored: Tensor, size: int) -> Tensor:
        """Values [m, ...] of this rank's scored tokens -> [t, ...] on every context rank, 0
        elsewhere.
        """
        local = values.new_zeros(size, *values.shape[1:]).index_copy(0, scored, values)
        return gather(local, self.world.cp_group, reduce_grad=False)
