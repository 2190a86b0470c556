"""A tokenizer that transformers reads otherwise than its tokenizer.json says is refused, with what
helps.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import questions, recipe, tokenizer_folder, write_jsonl

from moetrain.data import tokenizer
from moetrain.data.loader import RunData
from moetrain.data.tokenizer_check import check_for_export
from moetrain.errors import DataError
from moetrain.rollout.embedded import Embedded
from moetrain.rollout.fleet import Fleet


def written(folder: Path, config: dict[str, Any], model_type: str | None = None) -> Path:
    """A byte-level tokenizer that takes up to three digits together, as Llama-3's does."""
    shutil.copytree(tokenizer_folder(), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert split["Regex"].count(r"|\p{N}|") == 1
    split["Regex"] = split["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    first = 1 + max(*vocab.values(), *(token["id"] for token in content["added_tokens"]))
    for i, (a, b) in enumerate([("1", "2"), ("12", "3"), ("6", "7"), ("67", "8")]):
        vocab[a + b] = first + i
        merges.append([a, b])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    change(folder, **config)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def change(folder: Path, **config: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_a_distilled_models_tokenizer_loses_its_spaces_and_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "t", {"tokenizer_class": "LlamaTokenizerFast"}, "llama")
    with pytest.raises(DataError) as caught:
        tokenizer.load(folder)
    said = str(caught.value)
    assert "LlamaTokenizer" in said and "'Helloworld'" in said and "\n" not in said
    with pytest.raises(DataError, match=r"tokenizer.json says"):
        Embedded({}, folder)
    with pytest.raises(DataError, match=r"tokenizer.json says"):
        Fleet([], tmp_path, {}, folder, 1.0, None)
    remedy = re.search(r'Write "tokenizer_class": "(\w+)" into its tokenizer_config.json', said)
    assert remedy is not None
    change(folder, tokenizer_class=remedy[1])
    loaded = tokenizer.load(folder)
    assert loaded.decode(loaded("Hello 123 x")["input_ids"]) == "Hello 123 x"
    assert len(loaded("123")["input_ids"]) == 1


def test_digits_cut_by_a_model_type_are_refused(tmp_path: Path) -> None:
    """No `tokenizer_class` helps beside qwen2's config.json; a folder without it does."""
    folder = written(tmp_path / "t", {"tokenizer_class": "PreTrainedTokenizerFast"}, "qwen2")
    with pytest.raises(
        DataError, match=r"Qwen2Tokenizer.*copy the tokenizer's files into a folder"
    ):
        tokenizer.load(folder)
    (folder / "config.json").unlink()
    assert len(tokenizer.load(folder)("123")["input_ids"]) == 1


def test_tokenizers_that_are_read_as_written(tmp_path: Path) -> None:
    assert tokenizer.load(tokenizer_folder()) is not None
    own = written(tmp_path / "a", {"tokenizer_class": "PreTrainedTokenizerFast"}, "qwen3_moe")
    assert tokenizer.load(own) is not None
    # The class is wrong, and beside this model_type not used.
    other = written(tmp_path / "b", {"tokenizer_class": "LlamaTokenizerFast"}, "mixtral")
    assert tokenizer.load(other) is not None


def test_an_export_is_looked_at_before_the_run(tmp_path: Path) -> None:
    """The tokenizer lies elsewhere until the export puts it beside the model."""
    folder = written(tmp_path / "a", {"tokenizer_class": "LlamaTokenizerFast"}, "mixtral")
    assert check_for_export(folder, "mixtral") is None
    with pytest.raises(DataError, match='"tokenizer_class": "PreTrainedTokenizerFast"'):
        check_for_export(folder, "qwen3_moe")
    plain = written(tmp_path / "b", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert check_for_export(plain, "qwen3_moe") is None
    data = {"train": str(write_jsonl(tmp_path / "a.jsonl", questions()))}
    hf = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 512}
    for kind, lines in (("qwen3_moe", 1), ("qwen2", 2)):
        model = {"tokenizer": str(plain), "hf": hf | {"model_type": kind}}
        said = RunData(recipe(tmp_path, data=data, model=model)).prepare().lines
        assert len(said) == lines
    assert said[1].startswith("note: ") and said[1].endswith(f"export with --tokenizer {plain}")


def test_a_tokenizer_without_a_token_for_what_is_unknown(tmp_path: Path) -> None:
    """tokenizers raises a bare Exception at the first text."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    with pytest.raises(DataError, match=r"cannot encode every text.*unk_token") as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
