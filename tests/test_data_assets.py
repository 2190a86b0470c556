"""What every machine can make for itself: tokenizer, corpus, instructions, a random model."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moetrain.config.recipe import ModelConfig
from moetrain.data import assets, checkable, indexing, tokenizer
from moetrain.data.cache import build_once
from moetrain.data.run_tokenizer import locate
from moetrain.engine.source import find_source
from moetrain.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_instructions_are_the_same_everywhere_and_right() -> None:
    made = checkable.records(300, seed=1)
    assert made == checkable.records(300, seed=1) != checkable.records(300, seed=2)
    sums = 0
    for record in made:
        messages = record["messages"]
        assert isinstance(messages, list)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            words = question["content"].rstrip("?.").split()
            if "plus" in words:
                assert answer["content"] == str(int(words[2]) + int(words[4]))
                sums += 1
            if words[0] == "Reverse":
                assert answer["content"] == words[-1][::-1]
    assert sums > 20


def test_held_out_questions_are_not_taught(root: Path) -> None:
    taught = assets.resolve("builtin:checkable-sft", root).read_text().splitlines()
    asked = assets.resolve("builtin:checkable-sft-eval", root).read_text().splitlines()
    assert (len(taught), len(asked)) == (50000, 200)
    kept = checkable.questions([json.loads(line) for line in asked])
    assert not kept & checkable.questions([json.loads(line) for line in taught])


@pytest.mark.slow
def test_the_corpus_and_its_tokenizer(root: Path) -> None:
    loaded = tokenizer.load(assets.resolve("builtin:stdlib-tokenizer", root))
    assert len(loaded) == tokenizer.vocab_of(loaded) == 2048
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "def f(x):\n    return 'héllo', 12345, '日本語'\n"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    train = assets.resolve("builtin:stdlib-corpus", root)
    held_out = assets.resolve("builtin:stdlib-corpus-eval", root)
    stats = [
        indexing.IndexStats(**json.loads(Path(f"{p}.json").read_text())) for p in (train, held_out)
    ]
    assert stats[0].num_tokens > 1_000_000 > stats[1].num_tokens > 50_000
    assert sorted(p.suffix for p in train.parent.iterdir()) == [".bin", ".idx", ".json"]


@pytest.mark.slow
def test_a_model_with_random_weights_loads(root: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = assets.resolve("builtin:qwen3-moe-tiny", root)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.load(folder)("What is 1 plus 1?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert bool(model(ids).logits.isfinite().all())
    names = {p.name for p in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["num_experts"] == 8
    assert model.config.num_experts == 8
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names


def test_an_unknown_name_lists_the_known(root: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'stdlib-corpus'"):
        assets.resolve("builtin:stdlib-corpu", root)
    assert assets.resolve("some/path", root) == Path("some/path")


def test_a_failed_build_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(tmp_path / "a", fail)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    made: list[Path] = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "whole").write_text("x")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build_once(tmp_path / "a", build), range(8)))
    assert len(made) == 1 and set(found) == {tmp_path / "a"}
    assert (tmp_path / "a" / "whole").is_file()


def test_offline_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE, as the Hub's client reads it when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no/such-tokenizer is no folder here and cannot be had"):
        locate("no/such-tokenizer")
    # Nor is an export left without a tokenizer that it cannot have.
    model = ModelConfig.model_validate(
        {"hf": {"model_type": "x"}, "tokenizer": "no/such-tokenizer"}
    )
    with pytest.raises(DataError, match="no/such-tokenizer is no folder here and cannot be had"):
        find_source(model)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    with pytest.raises(DataError, match="cannot be loaded"):
        tokenizer.load(tmp_path)
    assert not marker.exists()


def test_a_tokenizer_from_the_command_line(tmp_path: Path) -> None:
    from moetrain import cli

    (tmp_path / "a.txt").write_text("the quick brown fox " * 50)
    out = tmp_path / "made"
    assert (
        cli.main(["tokenizer", "train", str(tmp_path), "--vocab-size", "270", "--out", str(out)])
        == 0
    )
    loaded = tokenizer.load(out)
    assert tokenizer.vocab_of(loaded) == 270
    assert loaded.decode(loaded("the fox")["input_ids"]) == "the fox"
