"""`convert verify --logits`: whether two models answer alike, a layer at a time."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain import cli
from moetrain.errors import ConfigError, DataError
from moetrain.testing.tiny import save_model
from moetrain.weights import logits
from moetrain.weights.convert import Options, hf2mcore
from moetrain.weights.one_layer import embedded, outputs
from moetrain.weights.opening import Opened, open_model
from moetrain.weights.quantise import quantize
from moetrain.weights.reader import RowsReader

type Tensors = dict[str, Tensor]

LAYER, NUM = 2, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")

    def model(family: str, **changes: Any) -> Path:
        path = folder / f"{family}{len(changes)}"
        if not path.exists():
            save_model(family, path, **changes)
        return path

    return model


def changed(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **hf: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | hf))
    return folder


def swapped(tensors: Tensors) -> Tensors:
    """Gate and up of all experts of one layer."""
    at = f"layers.{LAYER}."
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {
        re.sub("gate_proj|up_proj", lambda m: other[m[0]], name) if at in name else name: tensor
        for name, tensor in tensors.items()
    }


def rounded(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def places(out: str) -> dict[str, tuple[float, float, float]]:
    """Place -> largest, mean and alone, as they are printed."""
    rows = re.findall(r"^(embedding|layer \d+|output) +(\S+) +(\S+) +(\S+)$", out, re.M)
    return {place: (float(x), float(y), float(z)) for place, x, y, z in rows}


def hidden_states(source: Opened, ids: list[list[int]]) -> Iterator[list[Tensor]]:
    reader = RowsReader(source.rows)
    hidden = embedded(reader, ids, torch.float32)
    yield hidden
    for number in range(source.model.num_layers):
        hidden = outputs(logits.layer(source, reader, number), hidden)
        yield hidden


PLACES = ["embedding", *(f"layer {i}" for i in range(4)), "output"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_a_layer_at_a_time_is_transformers(
    models: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    """Hidden states bit for bit; what the answers say of two models, from their whole log-probs."""
    from transformers import AutoModelForCausalLM

    path = models(family, **changes)
    loader: Any = AutoModelForCausalLM
    whole = loader.from_pretrained(str(path), dtype=torch.float32).eval()
    if family != "llama":
        whole.set_experts_implementation("eager")
    torch.manual_seed(2)
    ids = torch.randint(0, 200, (2, 24))
    source = open_model(path)
    with torch.inference_mode():
        out = whole(ids[1:], output_hidden_states=True)
        states = list(hidden_states(source, ids.tolist()))
        assert len(states) == 5
        for hidden, wanted in zip(states[:-1], out.hidden_states[:-1], strict=True):
            assert torch.equal(hidden[1], wanted[0])
        x = states[-1][1]
        for_two = whole(ids[:1, :2], output_router_logits=True) if family != "llama" else None
        *_, last = logits.compare(source, source, ids[:1, :2].tolist())
        y = x + 0.1 * torch.randn_like(x)
        p, q = (whole.lm_head(whole.model.norm(h)).log_softmax(-1) for h in (x, y))
    assert isinstance(last, logits.Answers)
    met = [r.topk(2, -1).indices.unique() for r in for_two.router_logits] if for_two else []
    assert last.unmet == sum(6 - len(experts) for experts in met)
    assert torch.equal(p, out.logits[0].log_softmax(-1))
    logits_rows, logits.ROWS = logits.ROWS, 64  # which 200 words are not a multiple of
    try:
        found = logits.answers(source, source, x, y)
    finally:
        logits.ROWS = logits_rows
    assert found.largest == pytest.approx(float((p - q).abs().max()), abs=1e-5)
    assert found.num == 24 and found.agreeing == int((p.argmax(-1) == q.argmax(-1)).sum()) < 24
    spread = p.std(-1, correction=0), (p - q).std(-1, correction=0)
    assert found.distance.mean == pytest.approx(float((spread[1] / spread[0]).mean()), rel=1e-4)


def test_the_same_values_in_other_formats(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Itself and Megatron's styles: nothing differs. In bf16 every tensor does, the answers not."""
    source = models("qwen3_moe", hidden_size=128, head_dim=32, moe_intermediate_size=128)
    hf2mcore(source, tmp_path / "mcore")
    hf2mcore(source, tmp_path / "mlm", Options(style="megatron-lm"))
    for other in (source, tmp_path / "mcore", tmp_path / "mlm"):
        capsys.readouterr()
        assert cli.main(["convert", "verify", str(other), str(source), "--logits", f"{NUM}"]) == 0
        out = capsys.readouterr().out
        assert places(out) == dict.fromkeys(PLACES, (0.0, 0.0, 0.0))
        assert "hold the same weights" in out and "answer alike" in out
        assert f"differ by up to 0; the most likely next token is the same after {NUM} of" in out

    changed(source, tmp_path / "bf16", rounded, dtype="bfloat16")
    quantize(tmp_path / "bf16", tmp_path / "fp8", "fp8-block")
    for name, most in (("bf16", 0.02), ("fp8", 0.2)):
        words = ["convert", "verify", str(source), str(tmp_path / name), "--logits", f"{NUM}"]
        code = cli.main(words)
        out = capsys.readouterr().out
        alone = [part for _, _, part in places(out).values()]
        assert code == (name == "fp8") and most / 10 < max(alone) < most, out
        assert "F32 against BF16" in out and "; the first 10 are shown" in out
    assert cli.main([*words, "--tolerance", "0.2"]) == 0


def test_the_first_layer_that_differs_is_named(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models("qwen3_moe")
    other = changed(source, tmp_path / "other", swapped)
    assert cli.main(["convert", "verify", str(source), str(other), "--logits", f"{NUM}"]) == 1
    out = capsys.readouterr().out
    assert f"model.layers.{LAYER}.mlp.experts.0.gate_proj.weight: " in out
    found = places(out)
    assert list(found) == PLACES
    for place in PLACES[: LAYER + 1]:
        assert found[place] == (0, 0, 0)
    for place in PLACES[LAYER + 1 :]:
        assert found[place][0] >= found[place][1] > 0.05
    assert found[f"layer {LAYER}"][2] > 0.1 and found[f"layer {LAYER + 1}"][2] == 0
    assert f"in 1 place, the first: layer {LAYER}\n" in out


@pytest.mark.parametrize(
    ("change", "hf", "first"),
    [
        (lambda t: t, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, "layer 0"),
        (lambda t: t | {"lm_head.weight": t["lm_head.weight"].roll(1, 0)}, {}, "output"),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"] * torch.nan}, {}, "output"),
    ],
    ids=["config", "head", "nan"],
)
def test_what_tensors_do_not_say(
    models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensors], Tensors],
    hf: dict[str, Any],
    first: str,
) -> None:
    """Equal tensors under another config answer otherwise; a head alone; what is not a number."""
    source = models("llama")
    other = changed(source, tmp_path / "other", change, **hf)
    assert cli.main(["convert", "verify", str(source), str(other), "--logits", f"{NUM}"]) == 1
    assert f"the first: {first}\n" in capsys.readouterr().out


def test_texts_of_a_file(models: Callable[..., Path], tmp_path: Path) -> None:
    source, file = open_model(models("llama")), tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"tokens": [i] * 5}) + "\n" for i in (1, 2, 3)))
    assert logits._sequences(source, source, 7, file) == [[1] * 5, [2] * 2]
    with pytest.raises(ConfigError, match="has 15 tokens, --logits asks for 16"):
        logits._sequences(source, source, 16, file)
    file.write_text('{"tokens": [200]}\n')
    with pytest.raises(DataError, match=r"data.jsonl:1: its tokens are no ids of a vocabulary"):
        logits._sequences(source, source, 1, file)


@pytest.mark.parametrize(
    ("hf", "words", "message"),
    [
        ({}, ["--logits", "257"], "--logits 257 is more than the 256 positions.*at most 256"),
        ({}, ["--tolerance", "0.1"], "--tolerance is of --logits: give --logits N too"),
        ({}, ["--data", "x"], "--data is of --logits"),
        ({"vocab_size": 201}, ["--logits", "8"], "vocab_size 200, .* has 201. verify without"),
        ({"num_hidden_layers": 3}, ["--logits", "8"], "has num_hidden_layers 4, .* has 3"),
        ({"model_type": "qwen2"}, ["--logits", "8"], "has architecture Llama.*, .* has Qwen2"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ["--logits", "8"],
            "has a head of one number, no logits",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hf: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    source, other = models("llama"), tmp_path / "other"
    save_model(str(hf.get("model_type", "llama")), other, **hf)
    if "architectures" in hf:
        weights = load_file(other / "model.safetensors")
        weights["score.weight"] = weights.pop("lm_head.weight")[:1].clone()
        save_file(weights, other / "model.safetensors")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | hf))
    capsys.readouterr()
    assert cli.main(["convert", "verify", str(source), str(other), *words]) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err) and len(err.splitlines()) == 1 and "layer 0" not in out


def anonymous() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


def test_memory_does_not_grow_with_layers_nor_with_experts(tmp_path: Path) -> None:
    """6 layers of 50 MB in fp32: less than the experts of one on top of what there was."""
    sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=16, num_hidden_layers=6)
    save_model("qwen3_moe", tmp_path / "m", **sizes)
    source = open_model(tmp_path / "m")
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    for steps in logits.compare(source, source, [[1, 2]]):  # what is imported and allocated once
        del steps
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for found in logits.compare(source, source, [list(range(64))]):
            assert found == found
    finally:
        done.set()
        thread.join()
    assert 0 < peak - before < 20 << 20, f"{(peak - before) / 1e6:.0f} MB"  # a layer: 50 MB
