"""The te backend on the meta device: what its parameters are, beside the weight table, Megatron's
own modules and the torch backend.

Legend: a box is a part of a checkpoint's global tensor: (key, global shape, start, shape, replica).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from moetrain.engine import Engine
from moetrain.engine import engine as engine_module
from moetrain.engine import model as model_module
from moetrain.engine.contents import contents
from moetrain.engine.params import canonical, coordinates
from moetrain.engine.world import meta_world
from moetrain.testing.layouts import instead
from moetrain.testing.ranks import recipe_for

type Box = tuple[Any, ...]
type Case = tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]
"""(config.json, world, parallel, other sections)."""


def check(cases: Sequence[Case]) -> tuple[int, list[str]]:
    """(parameters looked at, what is wrong) at every rank of every case."""
    num, problems = 0, list[str]()
    for hf, size, parallel, sections in cases:
        for rank in range(size):
            num_here, found = _check_rank(hf, size, parallel, sections, rank)
            num += num_here
            problems += [f"{parallel} {sections}, rank {rank}: {each}" for each in found]
    return num, problems


WRONG = {
    "experts are marked where Megatron does": (model_module.experts, "mark"),
    "norms are not marked": (sys.modules[__name__], "_mark_norms"),
}


def check_wrong(cases: Sequence[Case]) -> dict[str, bool]:
    """Whether each of WRONG is noticed."""
    found: dict[str, bool] = {}
    for wrong, (owner, name) in WRONG.items():
        with instead(owner, name, lambda *args: None):
            found[wrong] = bool(check(cases)[1])
    with instead(model_module, "_default_fields", _added_afterwards(model_module._default_fields)):
        found["gradients are added afterwards"] = bool(check(cases)[1])
    return found


def _added_afterwards(fields: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *args: fields(*args) | {"gradient_accumulation_fusion": False}


def _check_rank(
    hf: dict[str, Any], size: int, parallel: dict[str, Any], sections: dict[str, Any], rank: int
) -> tuple[int, list[str]]:
    recipe = recipe_for(
        "-", parallel, model={"path": None, "hf": hf, "dtype": "bf16"},
        **{"train": {"global_batch": 4 * size}} | sections,
    )  # fmt: skip
    engines: dict[str, Engine] = {}
    for backend in ("torch", "te"):
        engine_module.choose_backend = lambda wanted, device, chosen=backend: chosen
        engines[backend] = Engine(recipe, meta_world(recipe.parallel, rank, size, "cuda"))
    engine = engines["te"]
    _mark_norms(engine)
    problems = [*_shapes(engine), *_fused(engine)]
    marks = {backend: dict(_marks(each)) for backend, each in engines.items()}
    problems += _differ("marks", marks["te"], marks["torch"])
    boxes = {backend: set(_boxes(_saved(each))) for backend, each in engines.items()}
    problems += _differ("saved", dict.fromkeys(boxes["te"]), dict.fromkeys(boxes["torch"]))
    if engine.adapters is None:
        problems += _beside_megatron(engine, boxes["te"])
    return len(marks["te"]), problems


def _mark_norms(engine: Engine) -> None:
    """As Transformer Engine's RMSNorm does when it fills its weight, which on meta it does not."""
    for chunk in engine.chunks:
        for module in chunk.modules():
            if type(module).__name__ == "RMSNorm" and module.sequence_parallel is not None:
                module.weight.sequence_parallel = module.sequence_parallel  # type: ignore[union-attr]


def _differ(what: str, found: dict[Any, Any], wanted: dict[Any, Any]) -> Iterator[str]:
    for key in sorted(found.keys() | wanted.keys(), key=str):
        if (one := found.get(key, "absent")) != (other := wanted.get(key, "absent")):
            yield f"{what} of {key}: {one}, and not {other}"


def _named(engine: Engine) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(canonical name, the parameter or an expert of it, the parameter)."""
    for chunk in engine.chunks:
        for name, param in chunk.named_parameters():
            for full, tensor in canonical(name, param, chunk, engine.world):
                yield full, tensor, param


def _shapes(engine: Engine) -> Iterator[str]:
    """Every parameter has one rule and its shape."""
    seen = set[str]()
    table = {**engine.model.table, **engine.trained_rules}
    for full, tensor, _ in _named(engine):
        rule = table.get(full)
        if rule is None or full in seen:
            yield f"{full}: {'no rule' if rule is None else 'a second parameter'}"
            continue
        seen.add(full)
        tp_rank, tp_size, _ = coordinates(full, engine.world)
        if (wanted := rule.local_shape(tp_rank, tp_size)) != tuple(tensor.shape):
            yield f"{full}: {tuple(tensor.shape)}, and not {wanted}"
        split = rule.sharding.dim
        given = getattr(tensor, "partition_dim", split)
        if tp_size > 1 and split is not None and tensor.dim() == 2 and given != split:
            yield f"{full}: split along {given}, and not {split}"


def _marks(engine: Engine) -> Iterator[tuple[str, Any]]:
    """What optimizer and reduction read off a trained parameter: whether its gradient is a dense
    weight's or an expert's, whether tensor ranks sum it, and whether each of them has a part of it.
    """
    for full, _, param in _named(engine):
        if param.requires_grad:
            is_split = coordinates(full, engine.world)[1] > 1
            yield (
                full,
                (
                    bool(getattr(param, "allreduce", True)),
                    bool(getattr(param, "sequence_parallel", False)),
                    bool(getattr(param, "tensor_model_parallel", False)) and is_split,
                ),
            )


def _fused(engine: Engine) -> Iterator[str]:
    """Layers of Transformer Engine add into the buffer, which every trained parameter has."""
    for chunk in engine.chunks:
        for name, module in chunk.named_modules():
            if hasattr(module, "fuse_wgrad_accumulation") and not module.fuse_wgrad_accumulation:
                yield f"{name}: gradients are not accumulated in the matmul"
        for name, param in chunk.named_parameters():
            if param.requires_grad != hasattr(param, "main_grad"):
                yield f"{name}: trained {param.requires_grad}, has a buffer otherwise"


def _saved(engine: Engine) -> dict[str, Any]:
    saved, _ = contents(engine.chunks, engine.model, engine.adapters, engine.world, None)
    return {f"{part} {name}": each for part in saved for name, each in saved[part].items()}


def _boxes(parts: dict[str, Any]) -> Iterator[Box]:
    """Experts that are one tensor as many boxes."""
    for part in parts.values():
        for one in part.build() if hasattr(part, "build") else [part]:
            for each in one if isinstance(one, list) else [one]:
                yield from _cut(each)


def _cut(part: Any) -> Iterator[Box]:
    start, shape = tuple(part.global_offset), tuple(part.local_shape)
    lead = part.prepend_axis_num
    whole = (1,) * lead + shape
    if ".experts." not in part.key:
        yield part.key, part.global_shape, start, whole, part.replica_id
        return
    for expert in range(whole[0]):
        place = (start[0] + expert, *start[1:])
        yield part.key, part.global_shape, place, (1, *whole[1:]), part.replica_id


def _beside_megatron(engine: Engine, ours: set[Box]) -> Iterator[str]:
    """What Megatron's modules of Transformer Engine would save is what we save, names of norms and
    experts included, but for `_extra_state`, where they keep what fp8 needs. Sinks and experts with
    biases are not Megatron's modules under either backend.
    """
    moe = engine.model.moe
    own = ("softmax_offset", *([".experts."] if moe and not moe.experts.fits_te else []))

    def megatrons(boxes: set[Box]) -> dict[Box, None]:
        return dict.fromkeys(box for box in boxes if not any(word in box[0] for word in own))

    theirs = set[Box]()
    for chunk in engine.chunks:
        saved = chunk.sharded_state_dict()
        weights = {name for name, _ in chunk.named_parameters()}
        extra = {name for name in saved if name not in weights}
        if not all("_extra_state" in name for name in extra):
            yield f"Megatron saves {sorted(n for n in extra if '_extra_state' not in n)[:3]} too"
        theirs |= set(_boxes({name: part for name, part in saved.items() if name in weights}))
    yield from _differ("boxes", megatrons(ours), megatrons(theirs))
