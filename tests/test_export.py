"""What an export says of templates and of ends of answers, and that programs heed it: a base model
that learned turns stops at the end of one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import CHATML, END, OTHERS, TURNS, base_model, prompts, train, write_records

from moetrain import cli
from moetrain.data.samples import read_lines
from moetrain.errors import CheckpointError, ConfigError
from moetrain.loops.score import score
from moetrain.weights.folder import NAMED
from moetrain.weights.side_files import SideFiles, side_files_of_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains every weight."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder / "run", base, *write_records(folder), "checkpoint.export_hf=true")


@pytest.fixture(scope="module")
def second_base(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows something, or an adapter would have nothing to go on from."""
    return base_model(tmp_path_factory.mktemp("base") / "base", whole / "hf")


@pytest.fixture(scope="module")
def adapted(second_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains an adapter for other answers, and exports no merged model."""
    folder = tmp_path_factory.mktemp("adapted")
    records = write_records(folder, OTHERS)
    words = [
        "adapter.rank=16",
        "optim.lr=4e-3",
        "train.steps=90",
        f"data.eval={records[0]}",
        "train.eval_every=30",
    ]
    return train(folder / "run", second_base, *records, *words, "checkpoint.best=eval_loss")


def answers_in(folder: Path) -> dict[str, str]:
    """Question -> what `generate` gives without arguments, special tokens too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, str] = {}
    for question, ids in prompts(tokenizer).items():
        out = model.generate(torch.tensor([ids]))[0]
        found[question] = tokenizer.decode(out[len(ids) :])
    return found


def ended(turns: dict[str, str]) -> dict[str, str]:
    return {question: answer + END for question, answer in turns.items()}


def sampled(model: Path, folder: Path) -> list[tuple[str, str]]:
    """(text, finish) of the answers of `moetrain sample`."""
    asked, own = folder / "asked.jsonl", folder / "own.py"
    asked.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in TURNS))
    own.write_text("def f(completions, **columns):\n    return [1.0 for _ in completions]\n")
    out = folder / "answers.jsonl"
    settings = ["rollout.max_tokens=16", f"rewards=[{own}:f]", "rollout.temperature=0.01"]
    command = ["sample", str(model), str(asked), "--out", str(out), "-k", "1", *settings]
    assert cli.main(command) == 0
    return [(row["answers"][0]["text"], row["answers"][0]["finish"]) for row in read_lines(out)]


def stopped(turns: dict[str, str]) -> list[tuple[str, str]]:
    return [(answer, "stop") for answer in turns.values()]


def test_a_base_model_stops_at_the_end_of_its_turn(whole: Path, tmp_path: Path) -> None:
    config, generation, tokenizer = (
        json.loads((whole / "hf" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert config["eos_token_id"] == 2 and generation["eos_token_id"] == [2, 0]
    assert tokenizer["eos_token"] == END
    assert (whole / "hf" / "chat_template.jinja").read_text() == CHATML
    assert answers_in(whole / "hf") == ended(TURNS)
    assert sampled(whole, tmp_path) == stopped(TURNS)


def test_so_does_the_export_of_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    step = whole / "checkpoints" / "step_00000060"
    assert cli.main(["convert", "mcore2hf", str(step), str(tmp_path / "hf")]) == 0
    own, other = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "hf", whole / "hf")
    )
    assert own == other


def test_an_adapters_checkpoint_is_sampled_written_and_merged(
    second_base: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No merged model was exported; the best checkpoint is one of those that are there."""
    assert not (adapted / "hf").exists()
    assert sampled(adapted, tmp_path) == stopped(OTHERS)
    best = adapted / "checkpoints" / "best"
    name = json.loads((adapted / "checkpoints" / "best.json").read_text())["name"]
    for source, number in ((best, 0), (best.with_name(name), 1)):
        assert cli.main(["convert", "adapter", str(source), str(tmp_path / f"peft{number}")]) == 0
        assert name in capsys.readouterr().out
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / f"peft{i}").iterdir()} for i in (0, 1)
    )
    assert first == second
    assert first["chat_template.jinja"].decode() == CHATML
    assert json.loads(first["tokenizer_config.json"])["eos_token"] == END
    for number, source in enumerate((tmp_path / "peft0", best)):
        dst = tmp_path / f"merged{number}"
        assert cli.main(["convert", "merge", str(second_base), str(source), str(dst)]) == 0
    assert answers_in(tmp_path / "merged0") == ended(OTHERS)
    for words in ((best, tmp_path / "merged0"), (tmp_path / "merged1", best)):
        assert cli.main(["convert", "verify", *map(str, words)]) == 0
    assert cli.main(["convert", "verify", str(adapted), str(second_base)]) == 1
    capsys.readouterr()
    assert cli.main(["convert", "inspect", str(adapted), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 90 and found["adapter"] == {"base": str(second_base)}
    more = ["--adapter", str(tmp_path / "peft0")]
    assert cli.main(["convert", "verify", str(best), str(second_base), *more]) == 2
    assert "has an adapter already" in capsys.readouterr().err
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / f"merged{i}").iterdir()} for i in (0, 1)
    )
    assert first == second
    # The run's last adapter is the checkpoint of its last step.
    last = adapted / "checkpoints" / "step_00000090"
    assert cli.main(["convert", "adapter", str(last), str(tmp_path / "last")]) == 0
    for path in (adapted / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "last" / path.name).read_bytes(), path.name


def test_an_adapter_run_is_scored(
    second_base: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its base with the adapter, which the ranks of a job would each write."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"tokens": [5, 6, 7, 8]}\n')
    found: list[str] = []
    with_adapter = f"adapter.path={adapted / 'adapter'}"
    for model, more in ((adapted, []), (second_base, [with_adapter]), (second_base, [])):
        out = tmp_path / f"{len(found)}.jsonl"
        assert cli.main(["score", str(model), str(rows), "--out", str(out), *more]) == 0
        found.append(out.read_text())
    assert found[0] == found[1] != found[2]
    with pytest.raises(ConfigError, match=r"moetrain score does not read data\.system"):
        score(str(second_base), rows, tmp_path / "out.jsonl", ["data.system=Be kind."])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match=r"give the base with adapter\.path="):
        score(str(adapted), rows, tmp_path / "out.jsonl")


def test_an_adapter_run_is_evaluated(adapted: Path, tmp_path: Path) -> None:
    """And the scores lie in the run, where the report looks."""
    asked = tmp_path / "asked.jsonl"
    rows = [{"prompt": question, "answer": answer} for question, answer in OTHERS.items()]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = tmp_path / "bench.yaml"
    bench.write_text(
        f"name: words\ndata: {asked}\nquestion: prompt\nanswer: answer\nscorer: exact\n"
        "rollout: {max_tokens: 16}\n"
    )
    step = adapted / "checkpoints" / "step_00000090"
    out = tmp_path / "answers.jsonl"
    assert cli.main(["eval", str(step), str(bench), "--out", str(out)]) == 0
    scores = json.loads((adapted / "evals" / "words.json").read_text())["scores"]
    assert next(iter(scores.values()))["score"] == 1.0


def test_an_adapter_of_no_run_is_refused_in_one_line(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "moetrain.json").write_text('{"hf": {}, "adapter_of": "x"}')
    for words in (["adapter", str(alone)], ["merge", "x", str(alone)]):
        assert cli.main(["convert", *words, str(tmp_path / "dst")]) == 2
        said = capsys.readouterr().err
        assert "is in no run" in said and len(said.splitlines()) == 1
    assert (
        cli.main(["convert", "mcore2hf", str(adapted / "checkpoints" / "step_00000090"), "x"]) == 2
    )
    said = capsys.readouterr().err
    assert "holds an adapter of" in said and "tools/convert adapter" in said


# What is beside weights, in detail


def files_of(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_text(text)
    return folder


def written(side_files: SideFiles, folder: Path, hf: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    side_files.write(folder, hf)
    return {
        path.name: json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
        for path in folder.iterdir()
    }


def test_what_has_nothing_new_is_copied_as_it_is(tmp_path: Path) -> None:
    text = '{"eos_token_id":[7, 8],\n"temperature": 0.6}'
    source = files_of(
        tmp_path / "source",
        generation_config_json=text,
        tokenizer_config_json='{"eos_token":\n"</s>"}',
        chat_template_jinja="{{ x }}",
        optimizer_bin="not this",
    )
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    hf = {"eos_token_id": 7, "vocab_size": 9}
    (tmp_path / "out").mkdir()
    SideFiles.of(source).write(tmp_path / "out", hf)
    for path in source.rglob("*"):
        copied = tmp_path / "out" / path.relative_to(source)
        assert copied.exists() == (path.name != "optimizer.bin")
        assert not path.is_file() or not copied.exists() or copied.read_text() == path.read_text()
    assert SideFiles.of(source).config(hf) == hf
    already = SideFiles(source, source, ends={8: "<e>", 7: "<t>"})
    assert already.config({"eos_token_id": [7, 8, 9]}) == {"eos_token_id": [7, 8, 9]}


def test_ends_and_template_stand_in_every_place(tmp_path: Path) -> None:
    tokenizer = files_of(
        tmp_path / "tokenizer",
        tokenizer_json="{}",
        tokenizer_config_json={
            "eos_token": {"content": "</s>", "special": True},
            "chat_template": "old",
            "auto_map": {"AutoTokenizer": ["code.T", None]},
        },
        special_tokens_map_json={"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
        chat_template_json='{"chat_template": "older"}',
        generation_config_json={"eos_token_id": 5, "temperature": 9.0},
    )
    model = files_of(
        tmp_path / "model",
        generation_config_json={"eos_token_id": 1, "top_p": 0.9, "_from_model_config": True},
    )
    side_files = SideFiles(tokenizer, model, template="new", ends={3: "<|eot|>", 4: "<|eom|>"})
    hf = {"eos_token_id": 1, "bos_token_id": 0, "auto_map": {"AutoModel": "code.M"}, NAMED: "x"}
    assert side_files.config(hf) == {"eos_token_id": [3, 4], "bos_token_id": 0}
    assert written(side_files, tmp_path / "out", hf) == {
        "tokenizer.json": {},
        "tokenizer_config.json": {"eos_token": "<|eot|>"},
        "special_tokens_map.json": {"eos_token": "<|eot|>", "bos_token": "<s>"},
        "chat_template.jinja": "new",
        "generation_config.json": {"eos_token_id": [3, 4, 1], "top_p": 0.9},
    }
    # A model without a generation_config.json has what its config says.
    alone = SideFiles(tokenizer, None, ends={3: "<|eot|>"})
    found = written(alone, tmp_path / "alone", hf | {"pad_token_id": 2})
    assert found["generation_config.json"] == {
        "eos_token_id": [3, 1],
        "bos_token_id": 0,
        "pad_token_id": 2,
    }
    assert found["chat_template.json"] == {"chat_template": "older"}
    assert found["tokenizer_config.json"] == {"eos_token": "<|eot|>", "chat_template": "old"}


def test_an_adapter_without_a_tokenizer_leaves_the_bases(base: Path, tmp_path: Path) -> None:
    assert side_files_of_adapter(base, tmp_path) == SideFiles(base, base)
