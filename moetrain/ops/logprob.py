"""Log-probabilities of given tokens without the logits of all tokens at once.

Legend: t tokens, h hidden width, v vocabulary rows on this rank (local), c tokens of a chunk, m
labels of a token. Over a tensor-parallel group the vocabulary is split by rows: rank r holds the
global ids vocab_start .. vocab_start + v - 1. Rows at or past `vocab_size` are padding and take no
part in the softmax.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.ops.drawn import Drawn
from moetrain.ops.kinds import kind_of
from moetrain.ops.reduce import add_up, largest, side_by_side

ROWS = 16  # tokens of a chunk that are worked on at one time: what a cache holds


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    chunk: int = 1024,
    temperature: float | Tensor = 1.0,
    drawn: Drawn | None = None,
    with_entropy: bool = False,
    with_squares: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-prob of each label, and when asked the entropy of each distribution and the logarithm of
    the sum of its squared probabilities (no gradient flows through the last).

    hidden `[t, h]` of any dtype, the same on every rank of `group`; weight `[v, h]` local rows;
    labels `[t]` or `[t, m]` int64 global ids below `vocab_size`; temperature: what logits are
    divided by, one for all or `[t]` fp32; drawn: what else the sampler made of them, `[t]`. Returns
    logp, of the labels' shape, entropy and log sum p^2, `[t]`, in fp32, the same on every rank.

    The gradient of `hidden` is this rank's partial one: the caller sums it over `group`. That of
    `weight` is accumulated in fp32 and cast to the weight's dtype at the end. At most `[chunk, v]`
    logits exist at a time, in the backward too (twice that where the entropy has a gradient); those
    of a single chunk are kept for it, which is when they would be computed again.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and labels.shape[:1] == hidden.shape[:1]
    assert chunk > 0
    divisor: Tensor | None = None
    if isinstance(temperature, Tensor) or temperature != 1.0:
        divisor = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device)
        divisor = divisor.expand(hidden.shape[0])
    apply: Callable[..., tuple[Tensor, ...]] = _TokenLogprobs.apply  # pyright: ignore
    keep = torch.is_grad_enabled() and hidden.shape[0] <= chunk
    keep = keep and (drawn is None or drawn.penalty is None)  # its factor hangs on the logits
    split = (group, vocab_start, vocab_size)
    how = _How(divisor, drawn, vocab_start)
    asked = (with_entropy, with_squares)
    several = labels if labels.dim() == 2 else labels[:, None]
    logp, entropy, squares = apply(hidden, weight, several, *split, chunk, how, asked, keep)
    logp = logp.view(labels.shape)
    return logp, entropy if with_entropy else None, squares if with_squares else None


def _chunks(t: int, chunk: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk, t)) for i in range(0, t, chunk))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as fp32. CUDA keeps the fp32 accumulator; elsewhere a low-precision product is rounded
    to its dtype first.
    """
    if kind_of(a) == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@dataclass(frozen=True)
class _How:
    """What becomes of logits before the softmax."""

    divisor: Tensor | None  # [c] fp32
    drawn: Drawn | None
    vocab_start: int

    def part(self, part: slice) -> "_How":
        divisor = None if self.divisor is None else self.divisor[part]
        return _How(divisor, self.drawn and self.drawn.part(part), self.vocab_start)

    def logits(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """[c, v] fp32, and what their gradient is multiplied with where that is not 1 / divisor."""
        logits = _matmul(hidden, weight.t())
        factor = self.drawn and self.drawn.penalise(logits, self.vocab_start)
        if self.divisor is not None:
            logits.div_(self.divisor[:, None])
        if self.drawn is not None:
            self.drawn.leave_out(logits, self.vocab_start)
        return logits, factor


def _add(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a @ b in fp32; `fresh`: whatever it held counts as 0."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if fresh else 1)
    elif fresh:
        total.copy_(_matmul(a, b))
    else:
        total += _matmul(a, b)


def _local_labels(labels: Tensor, vocab_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Row of each label on this rank `[c, m]` (0 where it is elsewhere) and whether it is here
    `[c, m]` bool.
    """
    rows = labels - vocab_start
    here = (rows >= 0) & (rows < num_rows)
    return rows.masked_fill(~here, 0), here


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    how: _How,
    asked: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Over this rank's rows, `[4 + m, t]` fp32: the largest logit, sums of e = exp(l - largest), of
    (l - largest) e and of e^2 where asked, and the logits of the labels (0 if elsewhere); and e of
    the last chunk `[c, v]`.
    """
    t, num_rows = hidden.shape[0], weight.shape[0]
    stats = torch.zeros(4 + labels.size(1), t, dtype=torch.float32, device=hidden.device)
    exps = stats.new_zeros(0, num_rows)
    if num_rows == 0:
        stats[0] = -torch.inf
        return stats, exps
    for part in _chunks(t, chunk):
        del exps
        logits, _ = how.part(part).logits(hidden[part].to(weight.dtype), weight)
        rows, here = _local_labels(labels[part], how.vocab_start, num_rows)
        stats[4:, part] = logits.gather(1, rows).mul_(here).t()
        for some in _chunks(len(logits), chunk if kind_of(logits) == "cuda" else ROWS):
            _exp_(logits[some], stats[:, part][:, some], *asked)
        exps = logits
    return stats, exps


def _exp_(logits: Tensor, stats: Tensor, with_entropy: bool, with_squares: bool) -> None:
    """exp(l - largest) of rows `[c, v]` in place, and their sums as `_statistics` has them."""
    stats[0] = logits.amax(dim=1)
    logits.sub_(stats[0, :, None])
    if with_entropy:
        exps = logits.exp()
        stats[2] = logits.mul_(exps).sum(dim=1)
        logits.copy_(exps)
    else:
        logits.exp_()
    stats[1] = logits.sum(dim=1)
    if with_squares:
        stats[3] = torch.linalg.vector_norm(logits, dim=1).square_()  # pyright: ignore


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        chunk: int,
        how: _How,
        asked: tuple[bool, bool],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows = min(max(vocab_size - vocab_start, 0), weight.shape[0])
        stats, exps = _statistics(hidden, weight[:num_rows], labels, chunk, how, asked)
        top = stats[0].clone()
        sums = stats[1:]
        if group is not None and group.size() > 1:
            largest(top, group)
            # A rank with padding rows only has m = -inf and zero sums: its scale is 0 and its shift
            # must not be -inf * 0.
            shift = (stats[0] - top).clamp_min(torch.finfo(torch.float32).min)
            scale = shift.exp()
            sums[1] = scale * (sums[1] + shift * sums[0])
            sums[0] *= scale
            sums[2] *= scale.square()
            add_up(sums, group)
        lse = top + sums[0].log()
        entropy = sums[0].log() - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.set_materialize_grads(False)
        # Given up by the backward as it reads it, hence no saved tensor.
        ctx.kept = (exps, (stats[0] - lse).exp()) if keep else None
        ctx.vocab_start, ctx.num_rows = vocab_start, num_rows
        ctx.chunk, ctx.how = chunk, how
        squares = sums[2].log() - 2 * sums[0].log()
        ctx.mark_non_differentiable(squares)
        return (sums[3:] - lse).t().contiguous(), entropy, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        live: Tensor = weight[: ctx.num_rows]
        grad_logp = lse.new_zeros(labels.shape) if grads[0] is None else grads[0].float()
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        saved, ctx.kept = ctx.kept, None
        for part in _chunks(hidden.shape[0], ctx.chunk) if ctx.num_rows else ():
            inputs, how = hidden[part].to(weight.dtype), ctx.how.part(part)
            factor: Tensor | None = None
            if saved is None:
                logits, factor = how.logits(inputs, live)
                exps = logits.sub_(lse[part, None]).exp_()
                scale = torch.ones_like(lse[part])
            else:
                exps, scale = saved
            # d logp / d logits = onehot - p, and p = exps * scale
            shares = _divided(grad_logp[part], how.divisor)
            share = shares.sum(1)
            rows, here = _local_labels(labels[part], ctx.vocab_start, ctx.num_rows)
            if grads[1] is None:
                grad = exps.mul_((-share * scale)[:, None])
            else:
                grad_part = _divided(grads[1][part].float(), how.divisor)
                grad = _with_entropy(exps.mul_(scale[:, None]), share, grad_part, entropy[part])
            grad.scatter_add_(1, rows, shares * here)
            if factor is not None:
                grad.mul_(factor)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = _matmul(grad, live).to(hidden.dtype)
            if grad_weight is not None:
                _add(grad_weight[: ctx.num_rows], grad.t(), inputs, fresh=part.start == 0)
        if grad_weight is not None:
            grad_weight[ctx.num_rows if len(hidden) else 0 :] = 0
        cast = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, cast, *[None] * 8


def _divided(grad: Tensor, divisor: Tensor | None) -> Tensor:
    """[c] or [c, m], over [c]."""
    return grad if divisor is None else (grad.t() / divisor).t()


def _with_entropy(p: Tensor, of_logp: Tensor, of_entropy: Tensor, entropy: Tensor) -> Tensor:
    """[c, v], in place of p: what both gradients [c] give the logits, but for the label's own:
    d H / d logits = -p (log p + H), which is 0 where p is.
    """
    surprise = torch.xlogy(p, p)
    p.mul_((-of_logp - of_entropy * entropy)[:, None])
    return p.sub_(surprise.mul_(of_entropy[:, None]))


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    weight: Tensor,
    num: int,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    chunk: int = 1024,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """The `num` likeliest tokens in falling order: global ids `[t, num]` int64 and log-probs
    `[t, num]` fp32, the same on every rank; arguments as `token_logprobs` has them.
    """
    assert num <= vocab_size
    live = weight[: min(max(vocab_size - vocab_start, 0), weight.shape[0])]
    divisor = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device)
    how = _How(divisor.expand(hidden.shape[0]), None, vocab_start)
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    shape = (size, hidden.shape[0])
    sums = torch.full(shape, -torch.inf, dtype=torch.float32, device=hidden.device)
    best = sums[..., None].repeat(1, 1, num)
    ids = torch.zeros(*shape, num, dtype=torch.int64, device=hidden.device)
    for part in _chunks(hidden.shape[0], chunk) if len(live) else ():
        logits, _ = how.part(part).logits(hidden[part].to(weight.dtype), live)
        sums[rank, part] = logits.logsumexp(1)
        here = min(num, len(live))
        best[rank, part, :here], places = logits.topk(here, 1)
        ids[rank, part, :here] = places + vocab_start
    if group is not None and size > 1:
        sums, best, ids = (side_by_side(x[rank : rank + 1], group) for x in (sums, best, ids))
    every = ids.transpose(0, 1).flatten(1)
    values, places = best.transpose(0, 1).flatten(1).topk(num, 1)
    return every.gather(1, places), values - sums.logsumexp(0)[:, None]
