"""Seconds of a step that learns from rollouts, by phase, and how many GPUs should train
and serve. Imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moetrain.config.recipe import Recipe
from moetrain.layout.memory import GIB
from moetrain.models import Model
from moetrain.planner.gpu import Gpu, pick
from moetrain.planner.rollout import Decoder, Lengths, Server, server_of

if TYPE_CHECKING:
    from moetrain.planner.search import Planned

WORTH = 0.97  # of a step: another split is no news above it


@dataclass(frozen=True)
class Phases:
    """Seconds. What rewards take is not known, and counted as nothing."""

    sample: float
    log_probs: float
    train: float
    push: float

    def step(self, steps_off: int) -> float:
        """Of a step: a batch that is sampled ahead is sampled beside the learning."""
        learn = self.log_probs + self.train + self.push
        return max(self.sample, learn) if steps_off else self.sample + learn


@dataclass(frozen=True)
class Split:
    """GPUs that train, and servers beside them."""

    trainers: int
    servers: int  # each on a node
    phases: Phases
    step_s: float


@dataclass(frozen=True)
class Sampled:
    """The whole step."""

    server: Server
    lengths: Lengths
    concurrent: int  # answers at once on a server
    split: Split
    splits: list[Split]  # all; the trainers' seconds of the others are estimates
    colocated: Split | None  # every node trains, then serves
    steps_off: int
    tokens: float  # of a step's answers

    @property
    def better(self) -> Split | None:
        """A faster way to share the same GPUs, where there is one."""
        best = min(self.splits, key=lambda split: split.step_s, default=self.split)
        return best if best.step_s < WORTH * self.split.step_s else None

    @property
    def tokens_per_s(self) -> float:
        """Of a server."""
        return self.tokens / self.split.phases.sample / self.split.servers


class RlStep:
    """Of a recipe whose servers are like its trainers' GPUs."""

    def __init__(self, recipe: Recipe, served: Model, gpu: Gpu, lengths: Lengths):
        self.recipe, self.gpu, self.lengths = recipe, gpu, lengths
        self.server = server_of(recipe, served, gpu)
        self.served = served
        self.decoder = Decoder(served, gpu, self.server)

    @property
    def node(self) -> int:
        return self.recipe.cluster.gpus_per_node

    def sample(self, servers: int) -> float:
        """Seconds of sampling by so many servers."""
        _, rollout = self.recipe.sampling
        prompts = rollout.prompts_per_step / servers
        return self.decoder.sample(prompts, rollout.group_size, self.lengths)

    def push(self, *, here: bool) -> float:
        """Seconds: weights are gathered by the first rank and sent on from it; `here`: to servers
        on the trainers' own GPUs.
        """
        width = 4 if self.recipe.model.dtype == "fp32" else 2
        size = width * sum(rule.num_params for rule in self.served.table.values())
        share = pick(self.gpu.network_share, "allgather").value
        return (1 if here else 2) * size / (self.gpu.network_gbps.value * 1e9 * share)

    def of(self, planned: "Planned", size: int, servers: int) -> Split:
        """With `planned` on the GPUs that it was traced on."""
        seconds = planned.seconds
        phases = Phases(
            self.sample(servers), seconds.before, seconds.total - seconds.before,
            self.push(here=False),
        )  # fmt: skip
        return self._split(size, servers, phases)

    def _split(self, size: int, servers: int, phases: Phases) -> Split:
        _, rollout = self.recipe.sampling
        return Split(size, servers, phases, phases.step(rollout.steps_off))

    def splits(self, planned: Split, trainers: Callable[[int], float | None]) -> Iterator[Split]:
        """All ways to share the GPUs of `planned`, node by node.

        trainers: as `Search.estimate`.
        """
        total = planned.trainers + planned.servers * self.node
        for servers in range(1, total // self.node):
            size = total - servers * self.node
            if size == planned.trainers:
                yield planned
            elif (seconds := trainers(size)) is not None:
                yield self._scaled(planned, size, servers, seconds)

    def _scaled(
        self, planned: Split, size: int, servers: int, seconds: float, *, here: bool = False
    ) -> Split:
        """With trainers that take so many seconds, in the same parts."""
        before = planned.phases
        scale = seconds / (before.log_probs + before.train)
        phases = Phases(
            self.sample(servers), before.log_probs * scale, before.train * scale,
            self.push(here=here),
        )  # fmt: skip
        return self._split(size, servers, phases)

    def whole(
        self, planned: "Planned", size: int, servers: int, trainers: Callable[[int], float | None]
    ) -> Sampled:
        """All there is to say of `planned` on `size` GPUs beside so many servers.

        trainers: as `Search.estimate`.
        """
        _, rollout = self.recipe.sampling
        split = self.of(planned, size, servers)
        total = size + servers * self.node
        together = None
        if (seconds := trainers(total)) is not None:  # what serves does not train meanwhile
            together = self._scaled(split, total, total // self.node, seconds, here=True)
            together = replace(together, step_s=together.phases.step(0))
        tokens = rollout.prompts_per_step * rollout.group_size * self.lengths.answer
        return Sampled(
            self.server,
            self.lengths,
            self.server.concurrent(self.lengths),
            split,
            list(self.splits(split, trainers)),
            together,
            rollout.steps_off,
            tokens,
        )


def with_answers(recipe: Recipe, lengths: Lengths) -> Recipe:
    """The recipe as training is traced: its packs have answers of the mean length."""
    assert recipe.rollout is not None
    tokens = max(1, round(lengths.answer))
    rollout = recipe.rollout.model_copy(update={"max_tokens": tokens})
    return recipe.model_copy(update={"rollout": rollout})


def as_json(sampled: Sampled) -> dict[str, Any]:
    """As docs/planning.md says."""
    server = sampled.server
    return {
        "answer_tokens": sampled.lengths.answer,
        "prompt_tokens": sampled.lengths.prompt,
        "steps_off": sampled.steps_off,
        "server": {
            "gpus": server.gpus,
            "weights_gib": round(server.weights / GIB, 3),
            "kv_cache_gib": round(server.kv_cache / GIB, 3),
            "kv_tokens": server.kv_tokens,
            "concurrent": sampled.concurrent,
            "tokens_per_s": sampled.tokens_per_s,
        },
        **_row(sampled.split),
        "splits": [_row(split) for split in sampled.splits],
        "colocated": None if sampled.colocated is None else _row(sampled.colocated),
    }


def _row(split: Split) -> dict[str, Any]:
    return {
        "trainer_gpus": split.trainers,
        "servers": split.servers,
        "step_s": split.step_s,
        "phases": {"score": 0.0} | vars(split.phases),
    }
