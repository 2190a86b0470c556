"""What a training method is: pure functions from token log-probs to sums, and the counts that the
sums are divided by.

Legend: t tokens of the batch, n sequences. A method returns sums; the engine divides each once by
its count over all ranks and micro-batches, so that accumulation, data and context parallelism and
packing cannot change the result. Methods never import megatron.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moetrain.ops.packed import Packed

Terms = dict[str, Tensor]
"""term of the loss -> fp32 scalar: its sum over the batch, or what that sum is divided by."""

Metrics = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count), both scalars; reported as the global sum over the global count."""

COUNTED = {"rewards/accuracies": "rewards/graded"}
"""A rate -> the name in the ledger of how many answers or pairs it is a share of."""

Known = Mapping[str, float]
"""Global numbers: means that `Method.estimate` asked for, and what `Method.carried` made of the
steps before; empty for methods without either.
"""


@dataclass(frozen=True)
class Out:
    """What the model gives for a batch, aligned with its labels."""

    logp: Tensor  # [t] fp32, log-prob of each label; 0 where the loss mask is 0
    entropy: Tensor | None = None  # [t] fp32; for methods that need it
    value: Tensor | None = None  # [t] fp32, the scalar head's at every token; where it is needed
    log_squares: Tensor | None = None  # [t] fp32, no gradient: log sum p^2; where it is needed
    # [t, k] fp32, log-probs of the tokens in the batch's teacher_ids; where they are needed.
    at_teacher: Tensor | None = None
    likeliest: Tensor | None = None  # [t, k] int64: then the tokens that `at_teacher` is of


@dataclass(frozen=True)
class Estimate:
    """Global means that a loss needs before its gradient is taken.

    The engine runs the sequences of `select` (batch, cfg) -> [n] bool without a gradient, means
    `values` over the global batch, and trains on the other sequences alone. It does no more than
    leave them out where they are not `wanted` (cfg).
    """

    select: Callable[[Packed, Any], Tensor]
    values: Callable[[Out, Packed, Any], Metrics]
    wanted: Callable[[Any], bool] = lambda cfg: True


def _no_targets(batch: Packed, cfg: Any) -> dict[str, Tensor]:
    return {}


def _nothing_carried(known: Known, seen: Mapping[str, float], cfg: Any) -> dict[str, float]:
    return {}


Carried = Mapping[str, float]
"""Numbers of a run that its batches move, by name; a part of checkpoints."""


@dataclass(frozen=True)
class Running:
    """What a method's settings become as its batches go by.

    rescale(rewards [n], truncated [n] bool, carried, cfg) -> (rewards, carried), before `shape`.
    adapted(cfg, carried) -> cfg, as a batch begins.
    steer(carried, nats an answer to the reference, answers, cfg) -> carried, as it ends.
    """

    rescale: Callable[[Tensor, Tensor, Carried, Any], tuple[Tensor, dict[str, float]]]
    adapted: Callable[[Any, Carried], Any]
    steer: Callable[[Carried, float, int, Any], dict[str, float]]


@dataclass(frozen=True)
class Online:
    """What a method makes of graded answers before it learns from them. Pure functions; n answers
    of a batch, `group` [n] int64 says to which prompt each belongs.

    advantages(rewards [n], group, cfg) -> [n] fp32.
    shape(rewards [n], lengths [n], truncated [n] bool, cfg) -> rewards [n]; None: as they are.
    drops(rewards [n], group, cfg) -> [n] bool: answers that teach nothing, to be replaced by others
    before the step; None: keep all.
    targets(batch, cfg) -> values per token to add to a pack whose `per_token` has old_logp,
    rollout_logp and, for methods that ask for them, ref_logp and old_value; extras have the
    advantage and the reward.
    whiten(cfg) -> whether `advantage` is brought to mean 0 and deviation 1 over the tokens of the
    global batch after that.
    truncated(cfg) -> what becomes of answers that were cut: "reward" (nothing), "mask" (they are
    left out), "bootstrap" (one more token, which is not scored, stands behind each).
    penalised(cfg) -> whether method.beta times the sum of log(pi_old / ref) over an answer is taken
    off its reward before the advantages are taken.
    shares(step, cfg) -> (weight of a step's answers, of data.demonstrations beside them), steps
    from 1, given to each sequence as extras["share"]; None: there are answers alone.
    running: what its batches move; None: nothing.
    """

    advantages: Callable[[Tensor, Tensor, Any], Tensor]
    shape: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None
    drops: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    targets: Callable[[Packed, Any], dict[str, Tensor]] = _no_targets
    whiten: Callable[[Any], bool] = lambda cfg: False
    truncated: Callable[[Any], str] = lambda cfg: "reward"
    penalised: Callable[[Any], bool] = lambda cfg: False
    shares: Callable[[int, Any], tuple[float, float]] | None = None
    running: Running | None = None


@dataclass(frozen=True)
class Method:
    """A training method.

    loss(out, batch, cfg, known) -> (terms, metrics): what is minimised is the sum over terms of
    global sum / global count. count(batch, cfg) -> those counts under the same names, a function of
    the batch alone, so that the engine knows them before the first backward.
    also_needs(cfg) -> what the recipe's settings ask for beside `needs`: log_squares, at_teacher.
    carried(known, metrics of a step, cfg) -> numbers for the `known` of the next; a part of
    checkpoints.
    """

    name: str
    loss: Callable[[Out, Packed, Any, Known], tuple[Terms, Metrics]]
    count: Callable[[Packed, Any], Terms]
    needs: frozenset[str] = frozenset({"logp"})  # of logp, entropy, value, ref_logp
    estimate: Estimate | None = None
    also_needs: Callable[[Any], frozenset[str]] = lambda cfg: frozenset()
    carried: Callable[[Known, Mapping[str, float], Any], dict[str, float]] = _nothing_carried
    online: Online | None = None  # for methods that learn from rollouts


def count_tokens(batch: Packed, cfg: object) -> Terms:
    """Number of tokens that the loss mask keeps."""
    return {"loss": batch.loss_mask.sum()}
