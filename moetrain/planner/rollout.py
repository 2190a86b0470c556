"""Sampling by vLLM: what a server holds, by vLLM's own rules (0.32), and how long it takes for its
share of a step's answers, by the same table of a GPU that training is predicted from. Imports no
torch.

Decoding is bound by memory: a step reads the weights that its tokens meet, and the keys and values
of all sequences. Reading prompts is bound by computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import MoetrainError
from moetrain.layout.memory import GIB, static_bytes
from moetrain.layout.mesh import check_layout, plan_mesh
from moetrain.models import Model
from moetrain.planner.gpu import MIB, Gpu, pick

BLOCK = 16  # tokens whose keys and values lie together
# What vLLM takes where rollout.engine_args says nothing: a server of ours opens its engine without
# a usage context, so that the larger defaults of vLLM's own server do not hold.
MOST_SEQUENCES, MOST_TOKENS = 128, 2048
KERNELS = 12  # of a layer in a decoding step, at least
PIECES = 64  # of the time in which a batch runs out


@dataclass(frozen=True)
class Lengths:
    """Tokens in the mean."""

    prompt: float
    answer: float

    @classmethod
    def of(cls, recipe: Recipe, answer: int | None) -> "Lengths":
        """Half of the room that the recipe gives, where nothing else is said."""
        _, rollout = recipe.sampling
        room = max(1, recipe.data.seq_len - rollout.max_tokens)
        return cls(room / 2, answer or rollout.max_tokens / 2)


@dataclass(frozen=True)
class Server:
    """What a server of `gpus` GPUs holds; bytes of each of them."""

    gpus: int
    weights: int
    kv_cache: int
    kv_tokens: int  # that the cache has room for
    most: int  # sequences at once, by vLLM's max_num_seqs

    def concurrent(self, lengths: Lengths) -> int:
        """Sequences at once, half-way through their answers in the mean."""
        held = ceil((lengths.prompt + lengths.answer / 2) / BLOCK) * BLOCK
        return max(1, min(self.most, self.kv_tokens // held))


def has_servers(recipe: Recipe) -> bool:
    """Whether the recipe's answers come from vLLM."""
    rollout = recipe.rollout
    return rollout is not None and rollout.engine == "vllm" and rollout.replay is None


def server_nodes(recipe: Recipe) -> int:
    """Nodes that are servers' alone: one a server, as `moetrain launch` asks for them."""
    rollout = recipe.rollout
    if rollout is None or not has_servers(recipe) or rollout.push == "ipc":
        return 0
    return len(rollout.address) or rollout.num_servers


def server_of(recipe: Recipe, model: Model, gpu: Gpu) -> Server:
    """Raises MoetrainError where weights leave no room, LayoutError where heads do not divide."""
    _, rollout = recipe.sampling
    n = rollout.tensor_parallel
    parallel = ParallelConfig(tp=n, etp=n)
    check_layout(model, parallel, n * BLOCK)
    plain = recipe.model_copy(update={"parallel": parallel, "adapter": None})
    weights = static_bytes(model, plan_mesh(parallel, n), plain)[0].weights
    most = _argument(rollout.engine_args, "max_num_seqs", MOST_SEQUENCES)
    tokens = _argument(rollout.engine_args, "max_num_batched_tokens", MOST_TOKENS)
    asked = rollout.gpu_memory * gpu.memory_gib.value * GIB
    room = asked - weights - _beside(model, n, tokens, most) - _fixed(gpu, n)
    block = BLOCK * kv_bytes(model, n)
    if room < block:
        raise MoetrainError(
            f"A server of rollout.tensor_parallel={n} holds {weights / GIB:.1f} GiB of weights a"
            f" GPU, and rollout.gpu_memory={rollout.gpu_memory:g} of {gpu.name} is"
            f" {asked / GIB:.1f} GiB: nothing is left for keys and values. Raise"
            " rollout.tensor_parallel."
        )
    blocks = int(room // block)
    return Server(n, weights, blocks * block, blocks * BLOCK, most)


def _argument(given: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = given.get(name)
    return value if isinstance(value, int) and value > 0 else otherwise


def kv_bytes(model: Model, gpus: int) -> int:
    """Of a token on each of the GPUs, in bf16: a KV head is on several where there are fewer."""
    attention = model.attention
    heads = max(1, attention.groups // gpus)
    return model.num_layers * 2 * heads * attention.head_dim * 2


def _beside(model: Model, gpus: int, tokens: int, sequences: int) -> int:
    """Of the pass that vLLM measures with: activations of so many tokens, logits of so many
    sequences.
    """
    wide = 4 * model.hidden
    if model.moe is not None:
        wide += model.moe.experts.top_k * (model.hidden + 3 * model.moe.experts.ffn // gpus)
    return 2 * tokens * wide + 2 * 4 * sequences * model.heads.vocab


def _fixed(gpu: Gpu, gpus: int) -> float:
    """Of libraries; the context is there before vLLM looks."""
    return MIB * (gpu.workspace_mib.value + (gpu.group_mib.value if gpus > 1 else 0))


@dataclass(frozen=True)
class Decoder:
    """Seconds of a server's steps."""

    model: Model
    gpu: Gpu
    server: Server

    @property
    def _rate(self) -> float:
        """Bytes a second of memory."""
        return self.gpu.memory_gbps.value * 1e9 * self.gpu.memory["stream"].at(1e8)

    def step(self, sequences: float, held: float) -> float:
        """Of one more token for so many sequences, of `held` tokens each in the mean."""
        model, gpus = self.model, self.server.gpus
        moved = self.server.weights * self._met(sequences)
        moved += sequences * held * kv_bytes(model, gpus)
        compute = self._compute(sequences, sequences * held)
        least = model.num_layers * KERNELS * self.gpu.kernel_us.value / 1e6
        return max(moved / self._rate, compute, least) + self._between(sequences)

    def prefill(self, prompts: float, tokens: float) -> float:
        """Of reading so many prompts of so many tokens; their answers share what was read."""
        num = prompts * tokens
        return self._compute(num, num * tokens / 2) + self._between(num)

    def _met(self, sequences: float) -> float:
        """Share of the weights that a step reads: experts are drawn by each sequence."""
        moe = self.model.moe
        if moe is None:
            return 1.0
        met = 1 - (1 - moe.experts.top_k / self.model.num_experts) ** sequences
        return 1 - self._experts * (1 - met)

    @cached_property
    def _experts(self) -> float:
        """Share of the weights that is in experts."""
        rules = self.model.table.values()
        experts = sum(rule.num_params for rule in rules if rule.expert is not None)
        return experts / sum(rule.num_params for rule in rules)

    def _compute(self, tokens: float, pairs: float) -> float:
        flops = self.model.flops(round(tokens), round(pairs)) / self.server.gpus
        share = pick(self.gpu.gemm, "bf16").at(max(1.0, min(tokens, self.model.hidden)))
        return flops / (self.gpu.peak("bf16") * share)

    def _between(self, tokens: float) -> float:
        """Of two sums a layer over the server's GPUs, which share a node."""
        n = self.server.gpus
        if n == 1:
            return 0.0
        rate = self.gpu.nvlink_gbps.value * 1e9 * pick(self.gpu.nvlink_share, "allreduce").value
        sent = 2 * (n - 1) / n * tokens * self.model.hidden * 2
        return 2 * self.model.num_layers * (self.gpu.collective_us.value / 1e6 + sent / rate)

    def sample(self, prompts: float, group: int, lengths: Lengths) -> float:
        """Seconds for all answers to so many prompts. Their lengths are spread evenly from 0 to
        twice the mean, so that a batch runs out slowly.
        """
        answers = prompts * group
        at_once = min(answers, self.server.concurrent(lengths))
        held = lengths.prompt + lengths.answer / 2
        seconds = self.prefill(prompts, lengths.prompt)
        # In the long run those that are being answered have two thirds of the mean before them.
        waits = answers > at_once
        left = at_once * lengths.answer * (2 / 3 if waits else 1)
        steps = max(0.0, answers * lengths.answer - left) / at_once
        seconds += steps * self.step(at_once, held)
        for piece in range(PIECES):
            done = (piece + 0.5) / PIECES
            alive = at_once * ((1 - done) ** 2 if waits else 1 - done)
            held = lengths.prompt + 2 * lengths.answer * done
            seconds += 2 * lengths.answer / PIECES * self.step(max(alive, 1.0), held)
        return seconds
