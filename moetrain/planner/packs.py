"""Packs as a method gets them, full, without data: what is computed depends on their lengths."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moetrain.config.recipe import Recipe
from moetrain.layout.activations import PROMPT, answers_of_a_pack
from moetrain.methods import METHODS
from moetrain.methods.pairs import CHOSEN, MISMATCHED, REJECTED
from moetrain.ops.packed import ANSWER, Packed, concat, pack_one


def pack_of(recipe: Recipe) -> Packed:
    """A full pack of the method that the recipe names."""
    method, size = METHODS[recipe.method.name], recipe.data.seq_len
    match recipe.method.learns_from:
        case "corpus" | "chat":
            pack = _sequence(size)
            return replace(pack, per_token=_word(recipe, size))
        case "pairs":
            pack = _answers(size, (CHOSEN, REJECTED), shared=recipe.data.share_prompt)
        case "labels":
            half = size // 2
            pack = concat(
                [_answers(part, (role, MISMATCHED), shared=False)
                 for part, role in ((half, CHOSEN), (size - half, REJECTED))]
            )  # fmt: skip
        case "prompts":
            return _rollouts(recipe, size)
    if "ref_logp" in method.needs:
        zeros = torch.zeros(pack.num_sequences)
        pack = replace(pack, extras=pack.extras | {"ref_logp": zeros})
    return pack


def _sequence(size: int, prompt: int = 0, **given: Any) -> Packed:
    """One sequence, whose first `prompt` tokens are not scored."""
    tokens = torch.arange(size) % 2
    mask = torch.ones(size)
    mask[: max(0, prompt - 1)] = 0
    mask[-1] = 0
    return pack_one(tokens, tokens, mask, **given)


def _answers(size: int, roles: Sequence[int], *, shared: bool) -> Packed:
    """Answers of these roles to one prompt, which stands before them once or in each."""
    num = len(roles)
    prompt = int(size * PROMPT) if shared else int(size / num * PROMPT)
    room = size - prompt if shared else size
    parts = [_sequence(room // num + (i < room % num), 0 if shared else prompt) for i in range(num)]
    if shared and prompt:
        head = _sequence(prompt)
        head = replace(head, loss_mask=torch.zeros(prompt))
        parts = [head, *(replace(p, position_ids=p.position_ids + prompt) for p in parts)]
    pack = concat(parts)
    before = len(parts) - num
    prefix = torch.zeros(len(parts), dtype=torch.int32)
    prefix[0] = -1
    extras = {"role": torch.tensor([0] * before + list(roles))}
    return replace(pack, extras=extras, prefix=prefix if before else None)


def _word(recipe: Recipe, size: int) -> dict[str, torch.Tensor]:
    """What a teacher says of a pack's tokens, where the method has one."""
    if not recipe.method.taught:
        return {}
    k = recipe.method.teacher_tokens
    return {
        "teacher_logp": torch.zeros(size),
        "teacher_ids": torch.zeros(size, k, dtype=torch.int32),
        "teacher_top": torch.zeros(size, k),
    }


def _rollouts(recipe: Recipe, size: int) -> Packed:
    """A prompt and as many whole answers as fit."""
    cfg, rollout = recipe.sampling
    method = METHODS[recipe.method.name]
    assert method.online is not None
    pack = _answers(size, (ANSWER,) * answers_of_a_pack(recipe), shared=True)
    zeros = torch.zeros(pack.num_sequences)
    extras = {"advantage": zeros, "reward": zeros, "temperature": zeros + rollout.temperature}
    if method.online.shares is not None:
        extras["share"] = zeros + 1
    names = {"old_logp", "rollout_logp"}
    names |= {"ref_logp"} if cfg.beta else set()
    names |= {"old_value"} if cfg.value_head else set()
    per_token = {name: torch.zeros(size) for name in sorted(names)} | _word(recipe, size)
    pack = replace(pack, extras=pack.extras | extras, per_token=per_token)
    targets = method.online.targets(pack, cfg)
    return replace(pack, per_token=pack.per_token | targets)
