"""What tests run on every rank of a gloo group. Each function builds an engine, uses it, and
returns plain tensors.
"""

import threading
import time
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.load import recipe_from
from moetrain.data.groups import Group
from moetrain.engine import Engine
from moetrain.engine.checkpoint import Saving
from moetrain.engine.world import ROUND, open_world
from moetrain.errors import DataError
from moetrain.loops.demonstrations import open_demonstrations
from moetrain.loops.learn import Lessons
from moetrain.loops.outline import outline_of
from moetrain.loops.store import Batch
from moetrain.methods import METHODS
from moetrain.models.adapter import AdapterTable
from moetrain.ops.packed import ANSWER, Packed, concat, from_tokens
from moetrain.testing.gradients import gradients_of, keep_gradients
from moetrain.testing.saved_parts import check_saved_parts
from moetrain.weights.adapter_init import table_shapes
from moetrain.weights.reader import seeded
from moetrain.weights.sent import Sent

Lists = Sequence[Sequence[int]]


def recipe_for(model: str, parallel: dict[str, Any], /, **sections: Any) -> Any:
    """A recipe for a test: fp32, SFT, no clipping; `sections` are laid over it."""
    content: dict[str, Any] = {
        "run_dir": "/nonexistent",
        "model": {"path": model, "dtype": "fp32"},
        "parallel": parallel,
        "method": {"name": "sft"},
        "data": {"train": ["none"], "seq_len": 64},
        "optim": {"lr": 1e-3, "clip_grad": 0.0, "schedule": "constant"},
        "train": {"steps": 20} | ({} if "rollout" in sections else {"global_batch": 2}),
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    return recipe_from(content)


def _mine(packs: list[Packed], engine: Any) -> list[Packed]:
    return packs[engine.world.dp_rank :: engine.world.dp_size]


def packs_of(sequences: Lists, num_packs: int) -> list[Packed]:
    """Sequences dealt into `num_packs` packs in order."""
    singles = [from_tokens(s, id=f"sequence {i}") for i, s in enumerate(sequences)]
    return [concat(singles[i::num_packs]) for i in range(num_packs) if singles[i::num_packs]]


def first_slowly(parallel: dict[str, Any]) -> tuple[str, str]:
    """What every rank gets of work that takes longer than a round of waiting, and of such that
    fails.
    """
    world = open_world(recipe_for("/none", parallel).parallel, 1)

    def fail() -> str:
        raise DataError("not here")

    def work() -> str:
        time.sleep(ROUND + 0.2)
        return "done"

    try:
        done = world.first_slowly(work)
        return done, world.first_slowly(fail)
    except DataError as error:
        return "done", str(error)


def num_groups(parallel: dict[str, int]) -> tuple[int, int]:
    """How many process groups this rank is in, and how many sets of ranks they are of."""
    open_world(recipe_for("/none", parallel).parallel, 1)
    mine = [dist.get_process_group_ranks(group) for group in dist.distributed_c10d._world.pg_map]
    return len(mine), len(set(map(tuple, mine)))


def gradients(
    model: str, parallel: dict[str, Any], sequences: Lists, num_packs: int, sections: dict[str, Any]
) -> tuple[float, float, dict[str, Tensor]]:
    """(loss, gradient norm, {HF name: gradient}) of one step; gradients are returned by the first
    rank alone.
    """
    engine = Engine(recipe_for(model, parallel, **sections))
    keep_gradients(engine)
    result = engine.step(_mine(packs_of(sequences, num_packs), engine), METHODS["sft"])
    grads = gradients_of(engine)
    return result.loss, result.grad_norm, grads if engine.world.is_first else {}


def log_probs(
    model: str, parallel: dict[str, Any], sequences: Lists, num_packs: int
) -> list[Tensor]:
    """Log-probs [t] of each pack's labels, on every rank, for the same packs on every replica."""
    engine = Engine(recipe_for(model, parallel), train=False)
    return engine.logprobs(packs_of(sequences, num_packs))


def logits(model: str, parallel: dict[str, Any], tokens: Sequence[int]) -> Tensor | None:
    """[t, v] logits of one sequence from the last stage (None elsewhere)."""
    return logits_of(Engine(recipe_for(model, parallel), train=False), tokens)


def logits_of(engine: Any, tokens: Sequence[int]) -> Any:
    """[t, v] logits, gathered over tensor and context ranks; None before the last stage."""
    import torch.distributed as dist
    from torch.distributed import ProcessGroup

    from moetrain.engine.context import gather
    from moetrain.engine.step import Runner, micro_batches

    def all_columns(x: Tensor, group: ProcessGroup) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, -1)

    class LogitsRunner(Runner):
        def _finish(self, head: Any, pack: Any, scored: Tensor, model: Any, hidden: Tensor) -> Any:
            local = hidden.squeeze(1) @ model.head_weight().T
            columns = all_columns(local, self.world.tp_group)
            whole = gather(columns, self.world.cp_group, reduce_grad=False)
            return whole.sum(), torch.ones((), dtype=torch.int), {"logits": whole}

    runner = LogitsRunner(engine.chunks, engine.world, engine.model)
    for chunk in engine.chunks:
        chunk.eval()
    batches = micro_batches([from_tokens(tokens)], 1, engine.world)
    with torch.no_grad():
        results = runner(batches, None, forward_only=True)  # type: ignore[arg-type]
    return results[0]["logits"][: len(tokens), : engine.model.heads.vocab] if results else None


def losses(
    model: str,
    parallel: dict[str, Any],
    steps: Sequence[Lists],
    num_packs: int,
    sections: dict[str, Any],
) -> list[tuple[float, float, dict[str, float]]]:
    """(loss, gradient norm, router figures) of successive steps, the weights exported between the
    first two.
    """
    engine = Engine(recipe_for(model, parallel, **sections))
    out: list[tuple[float, float, dict[str, float]]] = []
    for sequences in steps:
        if len(out) == 1:
            for _ in engine.export():
                pass
        result = engine.step(_mine(packs_of(sequences, num_packs), engine), METHODS["sft"])
        out.append((result.loss, result.grad_norm, result.router))
    return out


def stepped(
    model: str, sequences: Lists, sections: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after a step."""
    engine = Engine(recipe_for(model, {}, **sections))
    before = {name: w.clone() for name, w in engine.export()}
    engine.step(packs_of(sequences, 1), METHODS["sft"])
    return before, {name: w.clone() for name, w in engine.export()}


def names_on_disk(model: str) -> set[str]:
    """What a checkpoint calls the weights."""
    from moetrain.engine.checkpoint import model_state

    engine = Engine(recipe_for(model, {}), train=False)
    parts = model_state(engine.chunks, engine.model, engine.world)["model0"].values()
    return {part.key for part in parts}


def round_trip(model: str, parallel: dict[str, Any]) -> dict[str, Tensor]:
    """{HF name: weight} loaded into live shards and exported again; returned by the first rank
    alone.
    """
    engine = Engine(recipe_for(model, parallel), train=False)
    check_saved_parts(engine)
    weights = {name: w.clone() for name, w in engine.export()}
    return weights if engine.world.is_first else {}


def mutated_logits(
    model: str, tokens: Sequence[int], mutation: str, sections: dict[str, Any] | None = None
) -> tuple[Tensor, bool]:
    """(logits [t, v], whether the round trip is bit-exact) under a wrong weight table."""
    from moetrain.testing.mutations import DENSE_MUTATIONS, MUTATIONS

    engine = Engine(recipe_for(model, {}, **(sections or {})), train=False)
    before = {name: w.clone() for name, w in engine.export()}
    wrong = copy(engine.model)
    vars(wrong)["table"] = (MUTATIONS | DENSE_MUTATIONS)[mutation](engine.model.table)
    engine.model = wrong
    engine.load(engine.source.reader(engine.recipe, engine.model))
    exact = all(torch.equal(before[name], w) for name, w in engine.export())
    return logits_of(engine, tokens), exact


class Noise:
    """A reader of random values for an adapter's table, the same at every layout: no tensor is 0,
    so that no mistake can hide behind one.
    """

    def __init__(self, table: AdapterTable):
        self.table, self.shapes = table, table_shapes(table)

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        shape = self.shapes[name]
        place = self.table.places[name]
        if not place.live:
            return torch.zeros(shape)[slices]
        noise = torch.empty(shape).normal_(0, 0.1, generator=seeded(7, name))
        return (noise.abs() + 0.5 if place.tensors == "lora_magnitude" else noise)[slices]


def adapter_gradients(
    model: str, parallel: dict[str, Any], sequences: Lists, num_packs: int, sections: dict[str, Any]
) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """One step with a random adapter: (loss, gradient norm, {name: gradient}, {name: adapter},
    {name: merged weight}); the dictionaries are returned by the first rank alone.
    """
    engine = Engine(recipe_for(model, parallel, **sections))
    assert engine.adapters is not None
    engine.load_adapter(Noise(engine.adapters))
    keep_gradients(engine)
    merged = {name: w.clone() for name, w in engine.export()}
    values = {name: w.clone() for name, w in engine.export_adapter()}
    result = engine.step(_mine(packs_of(sequences, num_packs), engine), METHODS["sft"])
    grads = gradients_of(engine)
    if not engine.world.is_first:
        return result.loss, result.grad_norm, {}, {}, {}
    return result.loss, result.grad_norm, grads, values, merged


def trained_adapter(
    model: str, parallel: dict[str, Any], sequences: Lists, folder: Path, sections: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Three steps, a checkpoint and a PEFT folder in `folder`: (logits [t, v] of the first sequence
    from the last stage, None elsewhere; merged weights; on the first rank those before the first
    step, and what moved since).
    """
    engine, sent = Engine(recipe_for(model, parallel, **sections)), Sent()
    before = {name: w.clone() for name, w in engine.export("first", sent)}
    assert not list(engine.export("first", sent)), "nothing has moved"
    for _ in range(3):
        engine.step(_mine(packs_of(sequences, 2), engine), METHODS["sft"])
    engine.save(folder / "checkpoint", {})
    engine.export_peft(folder / "peft")
    merged = {name: w.clone() for name, w in engine.export()}
    moved = {name: w.clone() for name, w in engine.export("first", sent)}
    return logits_of(engine, sequences[0]), merged, before, moved


def restored_adapter(
    model: str, parallel: dict[str, Any], tokens: Sequence[int], folder: Path, sections: Any
) -> Tensor | None:
    """Logits [t, v] of what `trained_adapter` saved, at another layout."""
    engine = Engine(recipe_for(model, parallel, **sections))
    engine.restore(folder / "checkpoint")
    return logits_of(engine, tokens)


def continued_adapter(
    model: str, parallel: dict[str, Any], tokens: Sequence[int], folder: Path, sections: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Logits [t, v] after going on from its PEFT folder: of the base, lent for a while, and then of
    what the run starts from.
    """
    sections = sections | {"adapter": {"path": str(folder / "peft")}}
    engine = Engine(recipe_for(model, parallel, **sections))
    with engine.as_base():
        base = logits_of(engine, tokens)
    return base, logits_of(engine, tokens)


def trained_and_resumed(
    model: str, parallel: dict[str, Any], sequences: Lists, folder: Path, sections: dict[str, Any]
) -> tuple[dict[str, Tensor], ...]:
    """Weights before and after three steps, and after two, a checkpoint and one more; the snapshot
    of those before, saved beside the checkpoint, comes back with it.
    """

    def weights(engine: Any) -> dict[str, Tensor]:
        return {name: w.clone() for name, w in engine.export()}

    engine = Engine(recipe_for(model, parallel, **sections))
    packs = _mine(packs_of(sequences, 2), engine)
    before, start = weights(engine), engine.snapshot()
    for step in range(3):
        if step == 2:
            engine.begin_save(folder / "checkpoint", {}, reference=start).finish()
        engine.step(packs, METHODS["sft"])
    after = weights(engine)
    second = Engine(recipe_for(model, parallel, **sections))
    restored = {name: torch.zeros_like(value) for name, value in start.items()}
    second.restore(folder / "checkpoint", restored)
    assert all(torch.equal(restored[name], value) for name, value in start.items())
    second.step(packs, METHODS["sft"])
    return before, after, weights(second)


def saved_in_the_background(
    model: str, parallel: dict[str, Any], sequences: Lists, folder: Path
) -> tuple[bool, dict[str, Tensor], dict[str, Tensor]]:
    """(whether the save still wrote after another step, weights when it began, weights restored).
    A snapshot lies beside them.

    Nothing is written before that step is done, so what is written is what was copied.
    """
    cls: Any = Saving
    write, go = cls._write, threading.Event()

    def write_later(*args: Any) -> None:
        assert go.wait(60)
        write(*args)

    cls._write = write_later
    try:
        engine = Engine(recipe_for(model, parallel))
        packs, start = _mine(packs_of(sequences, 2), engine), engine.snapshot()
        engine.step(packs, METHODS["sft"])
        before = {name: w.clone() for name, w in engine.export()}
        saving = engine.begin_save(folder / "checkpoint", {}, reference=start)
        engine.step(packs, METHODS["sft"])
        is_writing = not saving.is_written
        go.set()
        saving.finish()
    finally:
        cls._write = write
    restored = {name: torch.zeros_like(value) for name, value in start.items()}
    engine.restore(folder / "checkpoint", restored)
    assert all(torch.equal(restored[name], value) for name, value in start.items())
    return is_writing, before, {name: w.clone() for name, w in engine.export()}


def gradients_of_packs(
    model: str, parallel: dict[str, Any], packs: Sequence[Packed], sections: dict[str, Any]
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, {HF name: gradient}) of one step of the recipe's method over `packs`;
    gradients are returned by the first rank alone.
    """
    recipe = recipe_for(model, parallel, **sections)
    engine = Engine(recipe)
    keep_gradients(engine)
    result = engine.step(_mine(list(packs), engine), METHODS[recipe.method.name])
    grads = gradients_of(engine)
    return result.loss, result.metrics, grads if engine.world.is_first else {}


def trained(recipe: str, settings: Sequence[str]) -> int:
    """The exit code of a run of `recipe`, by whichever loop its method takes."""
    from moetrain.config.load import load_recipe
    from moetrain.loops import rl, supervised

    loaded = load_recipe(Path(recipe), [*settings, "observe.progress=false"])
    return (rl if loaded.method.samples else supervised).train(loaded)


def lessons(
    model: str, parallel: dict[str, Any], groups: Sequence[Group], sections: dict[str, Any]
) -> dict[int, float]:
    """The advantage of each answer that a step learns from, by its number of tokens."""
    engine = Engine(recipe_for(model, parallel, **sections), train=False)
    made = Lessons(engine.recipe, engine, None, open_demonstrations(engine.recipe, engine.world))
    advantages: dict[int, float] = {}
    batch = Batch(1, tuple(groups), 0)
    given = replace(outline_of(batch), batch=batch)
    for pack in (pack for part in made.packs(given) for pack in part):
        for n in range(pack.num_sequences):
            start, end = pack.cu_seqlens[n : n + 2].tolist()
            scored = pack.loss_mask[start:end] > 0
            if scored.any() and int(pack.extras["role"][n]) == ANSWER:
                advantages[int(scored.sum())] = float(
                    pack.per_token["advantage"][start:end][scored][0]
                )
    return advantages
