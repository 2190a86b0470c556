"""Answers that are stopped, and go on by other weights, on any engine for rollouts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from moetrain.config.builtin import MODELS
from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Trajectory
from moetrain.loops.quota import Key, Quota
from moetrain.loops.rollouts import Drawing
from moetrain.rollout.base import RolloutEngine, Sampling

LEVEL = 1e-5  # between the logits of two experts: kernels differ by a tenth of it

CONFIG = dict(MODELS["qwen3-moe-tiny"])


def model_of(seed: int, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model, and its weights as a folder of Hugging Face has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    made.save_pretrained(folder)
    return made.eval(), load_file(folder / "model.safetensors")


def check_going_on(engine: RolloutEngine, folder: Path, num_stops: int, most: int) -> None:
    """Each token has the log-prob of the weights that drew it behind all before it, of what could
    be drawn; the routes of all of it are those of the last weights; and the random numbers of the
    rest are not those of the start. An answer has at most `most` tokens, and ends with one in
    `num_stops` of the vocabulary.
    """
    models = [model_of(seed, folder / str(seed)) for seed in (0, 1)]
    stops = tuple(range(300, 300 + num_stops))
    sampling = Sampling(most, top_k=500, stop_ids=stops, routes=True, kept=True)
    prompts = [Prompt(str(i), (5 + i, 6, 7), {}) for i in range(12)]
    engine.push(models[0][1].items(), 0)
    for seed in range(3, 9):  # a server may be through with all before it hears that it is to stop
        drawing = Drawing(engine, sampling, seed)
        held: dict[Key, Trajectory] = {}
        quota = Quota(prompts, 1, 1, held)
        drawing.draw(prompts, 1, held, lambda one: None, whole_batches=True, quota=quota)
        stopped = {key: one for key, one in held.items() if one.is_within}
        ended = {key: one for key, one in held.items() if not one.is_open}
        if len(stopped) >= 2 and ended:
            break
    else:
        raise AssertionError("nothing could be stopped")
    assert all(one.branches[0].routes is None for one in stopped.values())

    engine.push(models[1][1].items(), 1)
    done = dict(held)
    drawing.draw(prompts, 1, done, lambda one: None, whole_batches=True, held=held)
    assert all(done[key] is one for key, one in ended.items())
    repeated, gaps = 0, list[tuple[NDArray[np.bool_], NDArray[np.float64]]]()
    for key, before in stopped.items():
        one, num = done[key], len(before.tokens)
        assert one.tokens[:num] == before.tokens and not one.is_open
        assert one.logprobs[:num] == before.logprobs and one.num_tokens <= most
        versions = [0] * num + [1] * (one.num_tokens - num)
        assert one.branches[0].by_token.tolist() == versions
        gaps.append(_gaps(one, prompts[int(key[0])].tokens, [model for model, _ in models]))
        repeated += sum(map(int.__eq__, one.tokens[num:], before.tokens))
    num_sure = 0
    for sure, gap in gaps:
        assert gap[sure].max(initial=0) < 1e-4 and gap.max() < 0.05, (sure.sum(), gap)
        num_sure += int(sure.sum())
    assert num_sure >= 0.2 * sum(len(gap) for _, gap in gaps), "too little of it was compared"
    assert repeated <= len(stopped), "the same numbers draw much the same from flat distributions"


@torch.no_grad()
def _gaps(
    one: Trajectory, prompt: tuple[int, ...], models: list[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """[tokens]: which of them have no token before them whose experts are level, where two kernels
    may choose differently, and all behind it is then off; and [tokens] between what was said of
    each and what the weights that drew it say.
    """
    (branch,) = one.branches
    assert branch.kept is not None and branch.routes is not None
    assert len(branch.routes) == len(prompt) + len(branch.tokens) - 1
    ids = torch.tensor([[*prompt, *branch.tokens.tolist()]])
    edges = np.concatenate([[0], branch.kept.sizes.cumsum()])
    sure = np.zeros(len(branch.tokens), bool)
    gap = np.zeros(len(branch.tokens))
    for version, model in enumerate(models):
        out = model(ids, output_router_logits=True)
        logits = out.logits[0, len(prompt) - 1 : -1].float()
        best = torch.stack(out.router_logits).sort(dim=-1, descending=True).values
        num_chosen = model.config.num_experts_per_tok
        margins = (best[..., num_chosen - 1] - best[..., num_chosen]).min(dim=0).values
        until = margins.cummin(dim=0).values[len(prompt) - 1 : -1]
        for place in np.flatnonzero(branch.by_token == version):
            kept_ids = torch.tensor(branch.kept.ids[edges[place] : edges[place + 1]]).long()
            logp = logits[place, branch.tokens[place]] - logits[place, kept_ids].logsumexp(0)
            gap[place] = abs(float(logp) - float(branch.logprobs[place]))
            sure[place] = bool(until[place] > LEVEL)
    return sure, gap
