"""Weights through shards on real gloo ranks; the layouts are made by hand, without Megatron."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_helpers as helpers
from safetensors.torch import load_file
from weights_helpers import Spread

from moetrain.errors import WeightsError
from moetrain.testing import ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS, save_model
from moetrain.weights.compare import compare
from moetrain.weights.folder import INDEX

pytestmark = pytest.mark.gloo
Tiny = Callable[[str], tuple[str, Any]]

LAYOUTS: dict[str, tuple[int, Spread]] = {
    "one": (1, Spread()),
    "tp2": (2, Spread(tp=2)),
    "pp2": (2, Spread(pp=2)),
    "tp2-ep2": (2, Spread(tp=2, ep=2)),
    "dp2-tp2": (4, Spread(tp=2)),
    "pp2-ep2": (4, Spread(pp=2, ep=2)),
    "tp2-pp2-ep2": (4, Spread(tp=2, pp=2, ep=2)),
    "ep2-etp2": (4, Spread(ep=2, etp=2)),
}
# More tensor-parallel ranks than key/value heads; an embedding whose last rank is padding alone.
FEW_HEADS = {"num_key_value_heads": 1, "vocab_size": 100}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["moe", "few heads", "tied", "random"])
def test_shards_give_back_what_they_were_made_of(
    workers: Workers, tmp_path: Path, layout: str, model: str
) -> None:
    world, spread = LAYOUTS[layout]
    changes = FEW_HEADS if model == "few heads" else {"tie_word_embeddings": model == "tied"}
    hf = CONFIGS["qwen3_moe"] | changes
    if model == "random":
        folder = None
        _, reader = helpers.reader_of(hf, None)
        wanted = {
            name: reader.read(name, tuple(slice(0, n) for n in reader.shape(name)))
            for name in reader.names()
        }
    else:
        folder = tmp_path
        save_model("qwen3_moe", folder, **changes)
        wanted = load_file(folder / "model.safetensors")
    answers = workers.run(world, helpers.through_shards, hf, folder, spread)
    order = list(answers[0][0])
    for whole, _, num_read, num_held in answers:
        assert list(whole) == order
        assert whole.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(whole[name], tensor), name
        assert num_read <= num_held, "a rank read what it does not hold"
    owned = [name for _, names, _, _ in answers for name in names]
    assert sorted(owned) == sorted(wanted), "each has one owner"
    if layout in ("pp2", "pp2-ep2"):
        assert all(names for _, names, _, _ in answers), "writing is shared"


@pytest.mark.parametrize("layout", ["one", "tp2-ep2", "pp2-ep2", "ep2-etp2"])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_ranks_write_one_model(
    workers: Workers, tiny: Tiny, tmp_path: Path, layout: str, shard_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM

    folder, model = tiny("qwen3_moe")
    world, spread = LAYOUTS[layout]
    hf = CONFIGS["qwen3_moe"] | {"architectures": ["Qwen3MoeForCausalLM"]}
    out = tmp_path / "out"
    workers.run(world, helpers.rewrite, hf, Path(folder), out, spread, shard_bytes)
    assert list(compare(Path(folder), out)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = {path.name for path in out.iterdir()} - {"config.json", "generation_config.json", INDEX}
    files.remove("manifest.json")
    numbered = {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))}
    assert files == (numbered if (out / INDEX).exists() else {"model.safetensors"})
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("layout", ["tp2", "tp2-ep2", "pp2", "tp2-pp2-ep2"])
def test_one_rank_that_cannot_write_stops_all(
    workers: Workers, tiny: Tiny, tmp_path: Path, layout: str, failing: int
) -> None:
    """The others wait in a gather for a rank that gives up; none of them may wait for ever."""
    world, spread = LAYOUTS[layout]
    folder, out = Path(tiny("qwen3_moe")[0]), tmp_path / "out"
    hf = CONFIGS["qwen3_moe"]
    args = (hf, folder, out, spread, 60_000)
    workers.run(world, helpers.rewrite, *args)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    # on tp2 the second rank owns nothing, so it has nothing to fail at
    if (layout, failing) == ("tp2", 1):
        workers.run(world, helpers.rewrite, *args, failing)
    else:
        answers = workers.run(world, helpers.attempt, *args, failing, timeout=60)
        assert len(set(answers)) == 1, "every rank says the same"
        assert "File too large" in answers[0] and "\n" not in answers[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_wrong_model_is_refused_on_every_rank(workers: Workers, tiny: Tiny) -> None:
    hf = CONFIGS["qwen3_moe"] | {"vocab_size": 300}
    with pytest.raises(WeightsError, match=r"embed_tokens.weight is \[200, 48\].*\[300, 48\]"):
        workers.run(
            2, helpers.through_shards, hf, Path(tiny("qwen3_moe")[0]), Spread(tp=2), timeout=60
        )


def test_ranks_wait_for_the_first_in_rounds(workers: Workers) -> None:
    assert workers.run(2, ranks.first_slowly, {"ep": 2}) == [("done", "not here")] * 2
