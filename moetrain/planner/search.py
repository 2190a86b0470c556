"""The layout of a recipe on so many GPUs: all that divide, by closed forms; the best few traced, as
whole as a run is; and the closed forms scaled by what the traces say, until none that is left
promises more than the best.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Literal

from moetrain.config.recipe import Recipe
from moetrain.errors import MoetrainError
from moetrain.layout.activations import num_micro_batches
from moetrain.layout.memory import GIB
from moetrain.layout.mesh import plan_mesh
from moetrain.models import Model
from moetrain.models.lookup import model_of
from moetrain.planner.candidates import candidates, changed
from moetrain.planner.closed import Closed, Rough
from moetrain.planner.cost import Seconds, step_seconds
from moetrain.planner.extend import trace_fast
from moetrain.planner.gpu import Gpu
from moetrain.planner.offload import has_room, host_bytes, may_offload, offloaded
from moetrain.planner.teacher import Teacher
from moetrain.planner.trace import Trace, timeline, without_weights

Goal = Literal["speed", "memory"]
ROUNDS = 3  # of traces, at most
ROUND = 6  # layouts that are traced in one
NEAR = 8  # that are traced in search of the nearest that fits
LEAN = 0.8  # of the formula's bound on bytes: what a layout may turn out to hold


@dataclass(frozen=True)
class Planned:
    """A layout, with what it holds and takes."""

    recipe: Recipe
    peak_gib: float  # of the fullest GPU: tensors, what lies between them, CUDA and NCCL
    fullest: int  # rank
    first_rank_gib: float  # of tensors on rank 0: what its ledger has as memory_gib
    memory: dict[str, float]  # category -> GiB
    step_s: float
    fits: bool
    seconds: Seconds
    host_gib: float = 0.0  # of the optimizer on the host, for one GPU


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: the traced layouts that fit first, the best of them first."""

    layouts: list[Planned]
    considered: int
    seconds: float

    @property
    def best(self) -> Planned:
        return self.layouts[0]


@dataclass
class Search:
    """One recipe on `size` GPUs.

    load: tokens of the fullest expert-parallel rank over the mean.
    pool: what `tracers` gives, to share it with other searches.
    """

    recipe: Recipe
    size: int
    gpu: Gpu
    goal: Goal = "speed"
    load: float = 1.0
    pool: ProcessPoolExecutor | None = None
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = without_weights(self.recipe)
        self.model = model_of(self.recipe)

    @cached_property
    def _closed(self) -> Closed:
        return Closed(self.recipe, self.model, self.gpu)

    @cached_property
    def _teacher(self) -> Teacher | None:
        return Teacher.of(self.recipe, self.model)

    def candidates(self, size: int) -> Iterator[Recipe]:
        """The recipe in every layout of so many GPUs that it and its teacher take."""
        for recipe in candidates(self.recipe, self.model, size):
            if self._teacher is None or self._teacher.divides(recipe):
                yield recipe

    def _tracers(self) -> AbstractContextManager[ProcessPoolExecutor]:
        return tracers() if self.pool is None else nullcontext(self.pool)

    def as_is(self) -> SearchResult:
        """The recipe's own layout."""
        start = time.monotonic()
        with self._tracers() as run:
            layouts = self._traced([self.recipe], run)
        return SearchResult(layouts, 1, time.monotonic() - start)

    def best(self, report: Callable[[str], None]) -> SearchResult:
        """Of all layouts. Raises MoetrainError where none divides."""
        start = time.monotonic()
        closed = self._closed
        rough = [(recipe, closed.rough(recipe, self.size)) for recipe in self.candidates(self.size)]
        if not rough:
            raise MoetrainError(
                f"no layout of {self.size} GPUs divides this model, its batch of"
                f" {self.recipe.train.global_batch} packs and data.seq_len="
                f"{self.recipe.data.seq_len}. Give another --gpus or train.global_batch."
            )
        if self.goal == "speed":
            rough += self._on_host(rough)
        report(f"{len(rough)} layouts divide; tracing the best")
        done = self._rounds(rough, report)
        if self.goal != "speed" and not any(planned.fits for planned in done.values()):
            rough += self._on_host(rough)
            done |= self._rounds(rough, report, done)
        layouts = sorted(done.values(), key=self._key)
        if layouts[0].fits and not layouts[0].recipe.optim.offload:
            layouts = [each for each in layouts if not each.recipe.optim.offload]
        return SearchResult(layouts, len(rough), time.monotonic() - start)

    def _on_host(self, rough: Sequence[tuple[Recipe, Rough]]) -> list[tuple[Recipe, Rough]]:
        """Layouts that may not fit, with the optimizer on the host; where one fits as it is, that
        would only cost.
        """
        if not may_offload(self.recipe, self.gpu):
            return []
        limit = self.gpu.memory_gib.value * GIB
        others = [offloaded(recipe) for recipe, estimate in rough if estimate.bytes > limit]
        estimates = [(recipe, self._closed.rough(recipe, self.size)) for recipe in others]
        return [
            (recipe, estimate) for recipe, estimate in estimates if estimate.bytes * LEAN <= limit
        ]

    def _rounds(
        self,
        rough: Sequence[tuple[Recipe, Rough]],
        report: Callable[[str], None],
        known: Mapping[int, Planned] | None = None,
    ) -> dict[int, Planned]:
        """Places in `rough` -> the layouts there that were traced, the most promising of each kind
        in each round.
        """
        done = dict(known or {})
        with self._tracers() as run:
            for _ in range(ROUNDS):
                chosen = self._next(rough, done)
                if not chosen:
                    break
                traced = self._traced([rough[i][0] for i in chosen], run)
                done |= dict(zip(chosen, traced, strict=True))
                report(f"{len(done)} traced")
        return done

    def traced(self, recipes: Sequence[Recipe]) -> list[Planned]:
        """These layouts, as they are."""
        with self._tracers() as run:
            return self._traced(recipes, run)

    def estimate(self, planned: Planned, size: int) -> float | None:
        """Seconds of a step on so many GPUs, of the layout that the formulas find fastest of those
        that should fit, by what they said of `planned`; None where none does.
        """
        closed = self._closed
        limit = self.gpu.memory_gib.value * GIB
        seconds = [
            rough.seconds
            for recipe in self.candidates(size)
            if (rough := closed.rough(recipe, size)).bytes * LEAN <= limit
        ]
        scale = planned.step_s / closed.rough(planned.recipe, self.size).seconds
        return min(seconds) * scale if seconds else None

    def timeline(self, planned: Planned) -> list[dict[str, int]]:
        """What the fullest rank holds over a step: category -> bytes. Traced with all layers."""
        with self._tracers() as run:
            points = run.submit(timeline, planned.recipe, planned.fullest, self.size).result()
        teacher = round(planned.memory.get("teacher", 0) * GIB)
        return [point | {"teacher": teacher} for point in points] if teacher else points

    def nearest(self) -> Planned | None:
        """The layout that fits with the fewest keys changed; of those, what the formulas are surest
        of and find fastest. None where none of the first few fits.
        """
        closed = self._closed
        limit = self.gpu.memory_gib.value * GIB
        near: list[tuple[int, bool, float, int]] = []
        layouts = list(self.candidates(self.size))
        layouts += self._near_on_host(layouts)
        for i, recipe in enumerate(layouts):
            rough = closed.rough(recipe, self.size)
            num = len(changed(self.recipe, recipe))
            if num and rough.bytes * LEAN <= limit:
                near.append((num, rough.bytes > limit, rough.seconds, i))
        near = sorted(near)[:NEAR]
        at_once = _num_tracers()
        with self._tracers() as run:
            for start in range(0, len(near), at_once):
                some = [layouts[i] for *_, i in near[start : start + at_once]]
                fitting = [planned for planned in self._traced(some, run) if planned.fits]
                if fitting:
                    return fitting[0]
        return None

    def _near_on_host(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """The recipe itself and what changes one key of it, with the optimizer on the host."""
        if not may_offload(self.recipe, self.gpu):
            return []
        near = [recipe for recipe in recipes if len(changed(self.recipe, recipe)) == 1]
        return [offloaded(recipe) for recipe in (self.recipe, *near)]

    def _key(self, planned: Planned) -> tuple[bool, float]:
        value = planned.step_s if self.goal == "speed" else planned.peak_gib
        return not planned.fits, value if planned.fits else planned.peak_gib

    def _next(self, rough: Sequence[tuple[Recipe, Rough]], done: dict[int, Planned]) -> list[int]:
        """The most promising that are not traced yet, of each kind of layout, by estimates scaled
        as the traces of their kind say.
        """
        limit = self.gpu.memory_gib.value * GIB
        scales = {
            kind: _Scale.of([(done[i], rough[i][1]) for i in done if _kind(rough[i][0]) == kind])
            for kind in {_kind(recipe) for recipe, _ in rough}
        }
        best = min((self._key(p) for p in done.values()), default=(True, float("inf")))
        first: dict[Kind, tuple[tuple[bool, float], int]] = {}
        for i, (recipe, estimate) in enumerate(rough):
            scale = scales[_kind(recipe)]
            size = estimate.bytes * scale.bytes
            fits = size <= limit
            value = estimate.seconds * scale.seconds if self.goal == "speed" else size
            promise = not fits, value if fits else size / GIB
            if i not in done and promise < min(best, first.get(_kind(recipe), (best, 0))[0]):
                first[_kind(recipe)] = promise, i
        return [i for _, i in sorted(first.values())[:ROUND]]

    def _traced(self, recipes: Sequence[Recipe], run: ProcessPoolExecutor) -> list[Planned]:
        wanted = [run.submit(trace_fast, r, self._ranks(r), self.size) for r in recipes]
        return [
            self._planned(recipe, each.result())
            for recipe, each in zip(recipes, wanted, strict=True)
        ]

    def _ranks(self, recipe: Recipe) -> list[int]:
        """One of the first stage, and one of the last."""
        pp = recipe.parallel.pp
        return [0] if pp == 1 else [0, (pp - 1) * self.size // pp]

    def _planned(self, recipe: Recipe, traces: Sequence[Trace]) -> Planned:
        plan = plan_mesh(recipe.parallel, self.size)
        num = num_micro_batches(recipe, plan)
        fused = recipe.model.backend != "torch" and self.gpu.asynchronous
        seconds = step_seconds(
            *(recipe, self.size, traces, self.gpu, self.model),
            num_micro=num,
            load=self.load,
            fused=fused,
        )
        taught = [0] * plan.pp
        if self._teacher is not None:
            seconds = self._teacher.asked(seconds, recipe.data.seq_len)
            taught = self._teacher.bytes_of(recipe, self.size)
        fullest = max(traces, key=lambda t: t.profile.reserved + taught[t.stage])
        held = {name: size / GIB for name, size in fullest.profile.at_peak.items()}
        held["between tensors"] = max(0.0, fullest.profile.reserved / GIB - sum(held.values()))
        if taught[fullest.stage]:
            held["teacher"] = taught[fullest.stage] / GIB
        groups = {kind.group for kind in fullest.profile.collectives if kind.ranks > 1}
        held["CUDA and NCCL"] = self.gpu.fixed_bytes(len(groups)) / GIB
        peak = sum(held.values())
        away = max(t.profile.on_host for t in traces)
        fits = peak <= self.gpu.memory_gib.value and has_room(self.gpu, away)
        first, host = (traces[0].profile.peak + taught[0]) / GIB, host_bytes(away) / GIB
        return Planned(recipe, peak, fullest.rank, first, held, seconds.total, fits, seconds, host)


type Kind = tuple[int, bool, bool]


def _kind(recipe: Recipe) -> Kind:
    """Layouts whose estimates are wrong in the same way."""
    p = recipe.parallel
    return p.pp, p.ep > 1, p.tp > 1


@dataclass(frozen=True)
class _Scale:
    """What traces say over what closed forms say. Those of memory are bounds, so that less is
    expected where nothing is known.
    """

    seconds: float = 1.0
    bytes: float = LEAN

    @classmethod
    def of(cls, pairs: Sequence[tuple[Planned, Rough]]) -> "_Scale":
        if not pairs:
            return cls()
        return cls(
            median(planned.step_s / estimate.seconds for planned, estimate in pairs),
            median(planned.peak_gib * GIB / estimate.bytes for planned, estimate in pairs),
        )


def _num_tracers() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


@contextmanager
def tracers() -> Iterator[ProcessPoolExecutor]:
    """Processes that trace: a process that has traced trains nothing afterwards. An interrupt of
    the terminal ends them without a word, and so does the end of this process.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_num_tracers(), context, _begin) as run:
        try:
            yield run
        except BaseException:
            run.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """In a tracer. Python's pools wait for ever for a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
