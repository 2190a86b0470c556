"""Group-relative policy optimisation and two of its kin, by how tokens are averaged:

l_t = -w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + beta KL_t, with r_t = pi / pi_old and A from
the rewards of the answers to one prompt. grpo (arXiv 2402.03300, eq. 3): mean over answers of the
mean over tokens, A = (r - mean) / std. dr_grpo (arXiv 2503.20783, eq. 4): sums over tokens divided
by a constant, A = r - mean. dapo (arXiv 2503.14476, eq. 8): mean over all tokens, with a higher
upper bound, dynamic sampling and a penalty for answers near the longest allowed.
"""

from torch import Tensor

from moetrain.config.online import DapoMethod, DrGrpoMethod, LossKlMethod
from moetrain.methods.base import Known, Method, Metrics, Online, Out, Terms
from moetrain.methods.online import (
    Tokens,
    answer_mask,
    broadcast_advantage,
    centred,
    clipped,
    lengths,
    loss_kl,
    normalised,
    online_metrics,
    overlong,
    spread,
    tokens_of,
    truncated,
    without_signal,
)
from moetrain.ops.packed import ANSWER, Packed

NEEDS = frozenset({"logp", "entropy"})


def token_losses(out: Out, batch: Packed, cfg: LossKlMethod, own: Tokens) -> Tensor:
    """[t], zero outside answers."""
    losses = own.weight * clipped(own.ratio, own.advantage, cfg)
    if cfg.beta:
        losses = losses + cfg.beta * loss_kl(out, batch, cfg, own)
    return losses * own.mask


def num_answers(batch: Packed) -> Tensor:
    """fp32 scalar."""
    return (batch.extras["role"] == ANSWER).sum().float()


def grpo(out: Out, batch: Packed, cfg: LossKlMethod, known: Known) -> tuple[Terms, Metrics]:
    """Each answer counts the same, however long."""
    own = tokens_of(out, batch, cfg)
    share = spread(batch, 1 / lengths(batch, own.mask))
    total = (token_losses(out, batch, cfg, own) * share).sum()
    return {"loss": total}, online_metrics(out, batch, cfg, own)


def per_token(out: Out, batch: Packed, cfg: LossKlMethod, known: Known) -> tuple[Terms, Metrics]:
    """Each token counts the same."""
    own = tokens_of(out, batch, cfg)
    total = token_losses(out, batch, cfg, own).sum()
    return {"loss": total}, online_metrics(out, batch, cfg, own)


def count_answers(batch: Packed, cfg: object) -> Terms:
    """Number of answers."""
    return {"loss": num_answers(batch)}


def count_constant(batch: Packed, cfg: DrGrpoMethod) -> Terms:
    """Answers times the constant length."""
    assert cfg.length is not None, "a recipe says what the constant is"
    return {"loss": num_answers(batch) * cfg.length}


def count_answer_tokens(batch: Packed, cfg: object) -> Terms:
    """Tokens of all answers."""
    return {"loss": answer_mask(batch).sum()}


def shape_dapo(rewards: Tensor, length: Tensor, truncated: Tensor, cfg: DapoMethod) -> Tensor:
    """Rewards with the soft penalty of long answers."""
    if not cfg.soft_length:
        return rewards
    assert cfg.max_length is not None, "a recipe says where the penalty is"
    return rewards + overlong(length, cfg.max_length, cfg.soft_length)


def drops_dapo(rewards: Tensor, group: Tensor, cfg: DapoMethod) -> Tensor:
    """Groups of equal rewards, unless dynamic sampling is off."""
    return without_signal(rewards, group, cfg) & cfg.dynamic_sampling


GRPO = Method(
    "grpo",
    grpo,
    count_answers,
    NEEDS,
    online=Online(normalised, targets=broadcast_advantage, truncated=truncated),
)
DR_GRPO = Method(
    "dr_grpo",
    per_token,
    count_constant,
    NEEDS,
    online=Online(centred, targets=broadcast_advantage, truncated=truncated),
)
DAPO = Method(
    "dapo",
    per_token,
    count_answer_tokens,
    NEEDS,
    online=Online(normalised, shape_dapo, drops_dapo, broadcast_advantage, truncated=truncated),
)
