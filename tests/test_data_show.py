"""`moetrain data show`: what is shown is what a run learns."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import recipe, tokenizer_folder, write_jsonl

from moetrain import cli
from moetrain.commands.common import parse
from moetrain.data.encode import Encoder, Spec
from moetrain.data.loader import KINDS
from moetrain.data.prompts import prepare_prompts
from moetrain.data.rejects import read_rejects
from moetrain.data.show import View
from moetrain.data.sources import find_sources, read_rows
from moetrain.errors import DataError

RECORDS: list[Any] = [
    {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning": "one and one"},
            {"role": "user", "content": "and 2 + 2?"},
            {"role": "assistant", "content": "4 " * 80},
        ],
        "images": ["a.png"],
    },
    {"messages": [{"role": "user", "content": "hi"}]},
    "{broken",
    {"question": "3 + 3?", "answer": "6"},
]


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, **sections: Any) -> Any:
    """What the command prints for a recipe with these sections; with --json, its rows."""
    made = recipe(folder, **sections)
    path = folder / "r.yaml"
    path.write_text(made.model_dump_json(exclude_unset=True))
    assert cli.main(["data", "show", str(path), *more]) == 0
    out = capsys.readouterr().out
    return [json.loads(line) for line in out.splitlines()] if "--json" in more else out


def test_json_is_what_the_encoder_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    data = {"train": [str(path)], "seq_len": 80}
    rows = shown(tmp_path, capsys, "--json", data=data)
    assert [(row["file"], row["line"]) for row in rows] == [(str(path), i) for i in (1, 2, 3, 4)]
    assert rows[1]["rejected"] == "there is no assistant turn to learn from"
    assert "malformed JSON" in rows[2]["rejected"]
    first, last = rows[0], rows[3]
    assert first["learned_text"][0] == "<think>\none and one\n</think>\n\n2<|im_end|>"
    assert (
        first["truncated"]
        and first["tokens"] == 80
        and "<|im_end|>" not in first["learned_text"][1]
    )
    assert last["learned_text"] == ["6<|im_end|>"] and "truncated" not in last
    spec = Spec((), tokenizer_folder(), 80, "truncate", 1)
    rows_read = [row for source in find_sources([path]) for row in read_rows(source)]
    groups = [g for r in Encoder(KINDS["chat"], spec)(rows_read) for g in r.groups]
    for row, group in zip((first, last), groups, strict=True):
        (sequence,) = group.sequences
        assert row["tokens"] == sequence.tokens.size
        assert row["learned_tokens"] == int(sequence.mask[1:].sum())
        for (start, end), text in zip(row["learned"], row["learned_text"], strict=True):
            assert row["text"][start:end] == text


def test_pairs_labels_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"system": "Be brief.", "prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    path = write_jsonl(tmp_path / "a.jsonl", [pair, pair | {"rejected": "2"}])
    data = {"train": [str(path)]}
    rows = shown(tmp_path, capsys, "--json", data=data, method={"name": "dpo"})
    assert [row.get("answer") for row in rows] == ["chosen", "rejected", None]
    assert [row.get("learned_text") for row in rows[:2]] == [["2<|im_end|>"], ["3<|im_end|>"]]
    assert all("Be brief." in row["text"] for row in rows[:2])
    assert rows[2]["rejected"] == "chosen and rejected are identical"
    online = {"rollout": {"max_tokens": 8}, "rewards": ["accuracy"], "method": {"name": "grpo"}}
    (row,) = shown(tmp_path, capsys, "--json", "--rows", "1:2", data=data, **online)
    assert row["learned"] == [] and row["text"].endswith("<|im_start|>assistant\n")


CHORD: dict[str, Any] = {
    "rollout": {"max_tokens": 8},
    "rewards": ["accuracy"],
    "method": {"name": "chord"},
}


def test_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What chord learns beside its own answers is shown, as a run reads it; its rejects and what
    of them is not rendered are the run's.
    """
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1?", "answer": "2"}])
    worked = write_jsonl(tmp_path / "worked.jsonl", RECORDS)
    given = {"train": [str(path)], "demonstrations": [str(worked)], "take": [1], "seq_len": 400}
    rows = shown(tmp_path, capsys, "--json", "--demonstrations", data=given, **CHORD)
    assert [(row["file"], row["line"]) for row in rows] == [(str(worked), i) for i in (1, 2, 3, 4)]
    assert rows[3]["learned_text"] == ["6<|im_end|>"] and "rejected" in rows[1]
    out = shown(tmp_path, capsys, data=given, **CHORD)
    assert "1 + 1?" in out and "3 + 3?" not in out and "--demonstrations shows it" in out
    with pytest.raises(DataError, match=r"sft learns from no demonstrations"):
        View(recipe(tmp_path, data={"train": [str(path)]}), demonstrations=True)
    own = recipe(tmp_path, data=given | {"max_rejected": 0.5}, **CHORD)
    lines = prepare_prompts(own).lines
    assert any(line.startswith("demonstrations: 4 records, 2 sequences") for line in lines)
    assert "note: the column images is not read (1 record)" in lines
    rejects = read_rejects(own.run_dir / "rejected.jsonl")
    assert [(r.file, r.line) for r in rejects] == [(str(worked), 2), (str(worked), 3)]


def test_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    out = shown(tmp_path, capsys, data={"train": [str(path)], "seq_len": 400})
    assert "\u27e66<|im_end|>\u27e7" in out and "rejected: there is no assistant turn" in out
    assert "2 texts, 2 records rejected; 1 pack of 400" in out
    assert "note: the column images is not read (1 record)" in out


def test_a_range_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["data", "show", "r.yaml", "--rows", "3"], cli.COMMANDS)
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert shown(tmp_path, capsys, "--json", "--rows", "9:", data={"train": [str(path)]}) == []
