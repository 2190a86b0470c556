"""Broken adapters under `convert merge`, `verify`, `hf2mcore` and `mcore2hf`, and broken models
under `convert expand`. What comes of each is what convert.py says of conversions.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert
import damages
import mutate
import numpy as np
import wholes
from convert import MEGATRON, Place

PLAIN, TOKENIZED = wholes.ADAPTERS
WEIGHTS = "adapter_model.safetensors"
MODULES = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts", "model.layers.0.mlp.gate",
    "model.layers.1.mlp.experts.base_layer", "model.layers.9.self_attn.q_proj", "lm_head", "score",
    "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.input_layernorm", "model.embed_tokens",
)  # fmt: skip

OTHER = (
    ("use_dora", True), ("init_lora_weights", "olora"), ("init_lora_weights", "pissa"),
    ("task_type", "SEQ_CLS"), ("bias", "all"), ("use_rslora", True),
)  # fmt: skip


def change_settings(rng: random.Random, folder: Path) -> str:
    path = folder / "adapter_config.json"
    value = json.loads(path.read_bytes())
    key = rng.choice(sorted(value))
    match rng.randrange(6):
        case 0:
            value[key] = rng.choice(mutate.NUMBERS)
        case 1:
            patterns = ("(a+)+$", "q_proj", ".*", "(", "a" * 3000, "[" * 500, "x{1,99999}", "(?i)q")
            number = rng.choice((*mutate.NUMBERS, 3, 2))
            value[rng.choice(("rank_pattern", "alpha_pattern"))] = {rng.choice(patterns): number}
        case 2:
            value["target_parameters"] = rng.choice(
                (["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj"], [], [1], "x", {"a": 1})
            )
        case 3:
            key, word = rng.choice(OTHER)
            value[key] = word
        case _:
            return damages.changed(rng, value, path.write_bytes, path.name)
    path.write_bytes(damages.dumped(value))
    return f"{path.name}: {key}"


def change_tensors(rng: random.Random, folder: Path) -> str:
    """Other keys and shapes in a file that is well made."""
    from safetensors.numpy import load_file, save_file

    path = folder / WEIGHTS
    tensors = dict(load_file(path))
    keys = sorted(tensors)
    name = rng.choice(keys)
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            old = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            tensors[name.replace(old, rng.choice(MODULES))] = tensors.pop(name)
        case 2:
            other = rng.choice((".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".x"))
            tensors[name.rpartition(".lora_")[0] + other] = tensors[name]
        case 3:
            shape = rng.choice(((0,), (), (1, 1), (0, 16), (2, 0), (3, 2, 2)))
            kind = rng.choice((np.float32, np.int64, np.float64, np.bool_))
            tensors[name] = np.zeros(shape, kind)
        case 4:
            tensors[name] = np.concatenate([tensors[name]] * rng.choice((2, 3)), rng.randrange(2))
        case _:
            tensors[name] = np.full_like(tensors[name], rng.choice((np.nan, np.inf, 3e38, 0)))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return f"{name}: {sorted(tensors.keys() ^ set(keys))} or another shape"


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "adapter-notes": change_settings,
    "adapter-tensors": change_tensors,
    "adapter-headers": damages.change_header,
    "adapter-sides": damages.change_side,
    "adapter-manifests": damages.change_manifest,
}


def run(bench: Any, made: tuple[str, int]) -> str:
    """Merged into a base by each command that does it."""
    place: Place = bench.conversions
    kind, rng = made[0], random.Random(made[1])
    name = TOKENIZED if kind == "adapter-sides" else PLAIN
    adapter, out = _fresh(place, name), place.work / "out"
    what = KINDS[kind](rng, adapter)
    kept = damages.after(rng, adapter, "manifests" if kind == "adapter-manifests" else kind)
    told = f"{kept}: {what}"
    before = convert.state(place.folder)
    assert convert.command("inspect", adapter) in (0, 2), told
    name = rng.choice(("plain", "sharded", "mcore"))
    base = place.whole(name)
    words: list[Any] = ["mcore2hf" if name in MEGATRON else "hf2mcore", base, out]
    words += ["--adapter", adapter]
    if name not in MEGATRON and rng.random() < 0.6:
        words = ["merge", base, adapter, out]
    code = convert.command(*words, "--workers", str(rng.choice((1, 3))))
    assert code in (0, 2), told
    compared = convert.command("verify", base, place.whole("plain"), "--adapter", adapter)
    assert compared in (0, 1, 2), told
    assert convert.state(place.folder) == before, f"{told}: something else was written"
    assert out.exists() == (code == 0), told
    if code:
        return "refused"
    assert compared != 2, f"{told}: merged, and not compared"
    assert convert.command("verify", out, base) in (0, 1), told
    assert convert.command("verify", base, out, "--adapter", adapter) == 0, (
        f"{told}: another result"
    )
    for path in out.rglob("*"):
        assert not path.is_file() or convert.SECRET not in path.read_bytes(), f"{told}: {path}"
    return "used"


def run_expand(bench: Any, made: tuple[str, int]) -> str:
    """A damaged model made deeper: its tensors under other names, and zeros."""
    from moetrain.weights import expand
    from moetrain.weights.opening import open_model
    from moetrain.weights.rows import num_rows

    place: Place = bench.conversions
    rng = random.Random(made[1])
    kind = rng.choice(("headers", "places", "configs", "manifests", "sides"))
    folders = [one for one in damages.KINDS[kind].folders if one in convert.HF]
    source, out = _fresh(place, rng.choice(folders)), place.work / "out"
    what = damages.KINDS[kind].change(rng, source)
    told = f"{damages.after(rng, source, kind)}: {what}"
    before = convert.state(place.folder)
    every = rng.choice((1, 1, 2, 3))
    code = convert.command("expand", source, out, "--every", str(every))
    assert code in (0, 2) and convert.state(place.folder) == before, told
    assert out.exists() == (code == 0), told
    if code:
        return "refused"
    old, new = open_model(source), open_model(out)
    for name, where in expand.sources(old.model, expand.plan(old.model.num_layers, every)).items():
        stop = num_rows(new.rows.shape(name))
        found = new.rows.rows(name, 0, stop)
        wanted = 0 if where.zero else old.rows.rows(where.old, 0, stop)
        assert (found == wanted).all(), f"{told}: {name} is not {where.old}"
    return "used"


def _fresh(place: Place, name: str) -> Path:
    shutil.rmtree(place.work)
    place.work.mkdir()
    shutil.copytree(place.whole(name), place.work / "in")
    return place.work / "in"


# name -> (weight, make, run)
ADAPTERS: dict[str, tuple[int, Any, Any]] = {
    **{name: (1, lambda rng, name=name: convert.make(name, rng), run) for name in KINDS},
    "expansions": (1, lambda rng: convert.make("expansions", rng), run_expand),
}
