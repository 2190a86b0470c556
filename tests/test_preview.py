"""What a dry run says of data, against what a run makes of it."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import LABELS, PAIRS, chat, questions, recipe, write_jsonl

from moetrain.config.recipe import Recipe
from moetrain.data import preview as previews
from moetrain.data.loader import RunData
from moetrain.data.preview import Preview, lengths, preview
from moetrain.data.sources import find_sources
from moetrain.errors import DataError
from moetrain.run.ahead import look_ahead
from moetrain.run.inputs import missing

# Some cut, some rejected, a blank line, one that is no JSON.
MIXED = [*questions(), chat("a", "b " * 50), chat("a " * 50, "b"), "", '{"messages": [', {"x": 1}]


def of_train(given: Recipe) -> Preview:
    found = preview(given, "train")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("method", "records", "data"),
    [
        ("sft", MIXED, {"max_rejected": 1.0}),
        ("sft", MIXED, {"max_rejected": 1.0, "pack": False}),
        ("sft", MIXED, {"max_rejected": 1.0, "too_long": "reject"}),
        ("sft", questions(), {"take": [10]}),
        ("dpo", PAIRS, {"seq_len": 96}),
        ("kto", LABELS, {"seq_len": 96}),
    ],
)
def test_a_whole_sample_is_the_set(
    method: str, records: list[Any], data: dict[str, Any], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records)
    given = recipe(
        tmp_path,
        method={"name": method},
        data={"train": [str(path)], **data},
        train={"epochs": 3, "global_batch": 4},
    )
    found, made = of_train(given), RunData(given).packed(held_out=False)
    assert made is not None
    assert found.num_records == made.stats.num_records
    (line,) = lengths(given, [found])
    prepared = RunData(given).prepare()
    if "take" not in data:
        assert found.is_whole
        assert (len(found.rejects), found.num_cut) == (
            made.stats.num_rejected,
            made.stats.num_truncated,
        )
        assert f"an epoch: {prepared.num_packs} pack" in line
        assert line.endswith(f"train.epochs=3: {prepared.num_steps} steps")


def test_a_sample_of_many_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by length, as files often are: the sample is spread over the file."""
    records = [chat("say", "word " * (1 + i // 40)) for i in range(1200)]
    given = recipe(tmp_path, data={"train": [str(write_jsonl(tmp_path / "a.jsonl", records))]})
    found = of_train(given)
    assert found.num_records == 1200 and 200 < found.num_seen < 320
    assert not found.is_whole
    assert found.num_packs(64) == pytest.approx(RunData(given).prepare().num_packs, rel=0.05)
    assert "about" in lengths(given, [found])[0]
    monkeypatch.setattr(previews, "COUNTED", 10_000)
    monkeypatch.setattr(previews, "WHOLE", 5_000)
    (source,) = find_sources([tmp_path / "a.jsonl"])
    counted = previews._Counted(time.monotonic() + 60)
    assert counted.count(source) > 1200 and not counted.is_exact  # the first ones are short
    monkeypatch.setattr(previews, "SECONDS", 0.0)
    assert of_train(given).num_seen == previews.CHUNK


def test_what_a_sample_lacks_is_a_warning(tmp_path: Path) -> None:
    """Others may have the column that no record of a sample has; a run looks at all."""
    rows = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "4"}] * previews.RECORDS
    path = write_jsonl(tmp_path / "a.jsonl", rows)  # every other one is looked at
    given = recipe(
        tmp_path,
        method={"name": "grpo"},
        data={"train": [str(path)], "seq_len": 64},
        rollout={"max_tokens": 8},
        rewards=["accuracy"],
    )
    assert any("WARNING: of a sample: " in line for line in look_ahead(given))


def test_too_many_rejected_and_a_reward_that_cannot_be_called(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", MIXED)
    with pytest.raises(DataError, match=r"of 69 records were rejected .*a\.jsonl:\d+: "):
        look_ahead(recipe(tmp_path, data={"train": [str(path)], "max_rejected": 0.01}))
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"question": "2 + 2", "answer": "4"}] * 3)
    (tmp_path / "own.py").write_text(
        "def good(completions, answer, log_extra, size=1): ...\n"
        "def bad(completions, *, solution, prompts): ...\n"
    )
    for name in ("good", "bad"):
        given = recipe(
            tmp_path,
            method={"name": "grpo"},
            data={"train": [str(prompts)]},
            rollout={"max_tokens": 8},
            rewards=[f"{tmp_path}/own.py:{name}"],
        )
        if name == "good":
            assert "an epoch: 3 prompts" in look_ahead(given)[-1]
            continue
        with pytest.raises(DataError, match=r"cannot be called without solution, .*answer, prompt"):
            look_ahead(given)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"train": ["/none.jsonl"]}}, "data.train: /none.jsonl does not exist"),
        ({"data": {"eval": ["/none"]}}, "data.eval: /none does not exist"),
        ({"data": {"chat_template": "/none.jinja"}}, "data.chat_template=/none.jinja is not a"),
        ({"model": {"tokenizer": "/none"}}, "model.tokenizer=/none is no tokenizer folder"),
        ({"model": {"tokenizer": None}}, "model.hf has no tokenizer"),
        ({"method": {"name": "dpo", "reference": "/none"}}, "method.reference=/none is not there"),
        ({"method": {"name": "dpo", "reference": "HERE"}}, "holds no resolved.yaml and no config"),
        ({"adapter": {"path": "/none"}}, "adapter.path=/none is not there"),
        ({"adapter": {"path": "HERE"}}, "holds no adapter_config.json"),
        (
            {"method": {"name": "pretrain"}, "data": {"train": ["/none"]}},
            "/none.idx does not exist",
        ),
        ({"method": {"name": "dpo"}, "data": {"reference": "/none"}}, "data.reference=/none"),
        (
            {
                "method": {"name": "grpo"},
                "rollout": {"replay": "/none"},
                "rewards": [{"name": "reward_model", "options": {"path": "/none"}}],
            },
            "rewards: reward_model: path=/none is not there.*rollout.replay=/none is not there",
        ),
        (
            {"model": {"hf": None, "path": "models/Qwen3-30B-A3B", "tokenizer": None}},
            "model.path=models/Qwen3-30B-A3B is not on this machine",
        ),
    ],
)
def test_what_is_not_there(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    def here(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: here(one) for key, one in value.items()}
        return str(tmp_path) if value == "HERE" else value

    path = write_jsonl(tmp_path / "a.jsonl", questions())
    data = {"train": [str(path)]} | sections.get("data", {})
    given = recipe(tmp_path, **here(sections) | {"data": here(data)})
    lines = "\n".join(map(str, missing(given)))
    assert re.search(said, lines, re.DOTALL), lines
    assert not list(missing(recipe(tmp_path, data={"train": [str(path)]})))
    hub = recipe(tmp_path, data={"train": [str(path)]}, model={"tokenizer": "Qwen/Qwen3-30B-A3B"})
    assert not list(missing(hub))
