"""Which files of a folder are records, and which of them are for training."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import chat, questions, recipe, tokenizer_folder, write_jsonl

from moetrain.cluster.doctor import files as doctor
from moetrain.cluster.doctor.base import Level, Planned, Subject
from moetrain.data.chat import ChatOptions
from moetrain.data.loader import RunData
from moetrain.data.prompts import read_prompts
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError


def lay(folder: Path, *names: str) -> Path:
    """Files of one record that says their name; prose and metadata as they come from the Hub."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": [name]}), path)
        elif path.suffix == ".jsonl":
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(json.dumps({"default": {"splits": {}}}, indent=2))
    return folder


def read(*inputs: Path | str, held_out: bool = False) -> list[str]:
    sources = find_sources(inputs, held_out=held_out)
    return [
        row.value["text"] if isinstance(row, Record) else row.reason
        for source in sources
        for row in read_rows(source)
    ]


HUB = (
    "README.md",
    "LICENSE.txt",
    "dataset_infos.json",
    ".gitattributes",
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002-0123456789abcdef.parquet",
    "data/validation-00000-of-00001.parquet",
    "data/test-00000-of-00001.parquet",
)


def test_a_hub_folder_gives_its_train_split(tmp_path: Path) -> None:
    folder = lay(tmp_path, *HUB)
    assert read(folder) == [HUB[4], HUB[5]]
    assert read(folder, held_out=True) == [HUB[6]]
    assert read(folder / "data/test-*.parquet") == [HUB[7]]
    assert read(folder / HUB[7]) == [HUB[7]]


def test_several_train_splits_are_asked_about(tmp_path: Path) -> None:
    """As ultrafeedback_binarized has them."""
    names = [
        f"data/{s}_{k}-00000-of-00001.parquet" for s in ("train", "test") for k in ("pf", "sft")
    ]
    folder = lay(tmp_path, *names, "data/train_sft-00001-of-00001.parquet", "README.md")
    with pytest.raises(DataError) as caught:
        read(folder)
    said = str(caught.value)
    assert "several splits to train on: data/train_pf, data/train_sft" in said
    assert "test" not in said.split(": ", 1)[1].replace(str(tmp_path), "")
    for pattern in said.rsplit(": ", 1)[1].removesuffix(".").split(", "):
        assert all("train" in text for text in read(pattern))
    assert len(read(f"{folder}/data/train_sft-*.parquet")) == 2
    with pytest.raises(DataError, match="several held-out splits: data/test_pf, data/test_sft"):
        read(folder, held_out=True)


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        # names, what is trained on, what is held out; a text is a part of the error
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["a.jsonl", "dev.jsonl"], ["a.jsonl"], ["dev.jsonl"]),
        (["gsm8k_train.jsonl", "gsm8k_eval.jsonl"], ["gsm8k_train.jsonl"], ["gsm8k_eval.jsonl"]),
        (["train_1.jsonl", "train_2.jsonl"], ["train_1.jsonl", "train_2.jsonl"], "no held-out"),
        (["train/x.jsonl", "train/y/z.jsonl", "val/x.jsonl"], ["train/x.jsonl", "train/y/z.jsonl"],
         ["val/x.jsonl"]),
        (["test.jsonl"], "holds held-out data alone", ["test.jsonl"]),
        (["train.jsonl", "extra.jsonl"], "several splits to train on", "no held-out split"),
        (["main/train.jsonl", "socratic/train.jsonl"], "main/train, socratic/train", "no held-out"),
        (["pretrain.jsonl", "contest.jsonl"], ["contest.jsonl", "pretrain.jsonl"],
         ["contest.jsonl", "pretrain.jsonl"]),
        (["train_test.jsonl", "more.jsonl"], ["more.jsonl"], ["train_test.jsonl"]),
        # Names without a separator
        (["gsm8kTrain.jsonl", "gsm8kTest.jsonl"], ["gsm8kTrain.jsonl"], ["gsm8kTest.jsonl"]),
        (["GSM8KTRAIN.jsonl", "GSM8KTEST.jsonl"], ["GSM8KTRAIN.jsonl"], ["GSM8KTEST.jsonl"]),
        (["trainset.jsonl", "testset.jsonl"], ["trainset.jsonl"], ["testset.jsonl"]),
        (["mathtrain.jsonl", "mathtest.jsonl"], ["mathtrain.jsonl"], ["mathtest.jsonl"]),
        (["trainmath1.jsonl", "trainmath2.jsonl", "evalmath.jsonl"],
         ["trainmath1.jsonl", "trainmath2.jsonl"], ["evalmath.jsonl"]),
        (["mathtrain/x.jsonl", "mathdev/x.jsonl"], ["mathtrain/x.jsonl"], ["mathdev/x.jsonl"]),
        (["math.jsonl", "mathtest.jsonl"], "holds mathtest, which may be held-out data or not. "
         "Name what is meant.*/math.jsonl, ", "mathtest, which may be"),
        (["a.jsonl", "devmath.jsonl"], "holds devmath, which may be", "holds devmath"),
        *(([f"{name}.jsonl", "a.jsonl"], sorted([f"{name}.jsonl", "a.jsonl"]),
           sorted([f"{name}.jsonl", "a.jsonl"]))
          for name in ("latest", "protest", "evaluate", "retrieval", "values", "developer",
                       "trainer", "strain", "interval", "testimony", "hottest", "upheld")),
        # What describes records
        (["a.jsonl", "metadata.json", "b.manifest.json", "sub/dataset_info.json"], ["a.jsonl"],
         ["a.jsonl"]),
    ],
)  # fmt: skip
def test_names_say_what_is_held_out(
    tmp_path: Path, names: list[str], train: list[str] | str, held_out: list[str] | str
) -> None:
    folder = lay(tmp_path / "tests", *names, "README.md")  # the folder's own name says nothing
    for wanted, flag in ((train, False), (held_out, True)):
        if isinstance(wanted, str):
            with pytest.raises(DataError, match=wanted):
                read(folder, held_out=flag)
        else:
            assert read(folder, held_out=flag) == wanted


def test_a_folder_of_texts_has_no_splits(tmp_path: Path) -> None:
    for name in ("README.md", "train.txt", "test_it.py", "eval/a.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["README.md", "eval/a.rst", "test_it.py", "train.txt"]


def test_splits_of_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    def save(name: str, *splits: str) -> Path:
        own = {split: datasets.Dataset.from_list([{"text": split}]) for split in splits}
        datasets.DatasetDict(own).save_to_disk(str(tmp_path / name))  # pyright: ignore[reportArgumentType]
        return tmp_path / name

    datasets.disable_progress_bars()
    both = save("both", "train", "test", "extra")
    assert (read(both), read(both, held_out=True)) == (["train"], ["test"])
    assert read(both / "test") == ["test"]
    assert read(save("one", "all")) == ["all"]
    with pytest.raises(DataError, match="held-out data alone"):
        read(save("held", "test"))
    with pytest.raises(DataError, match="several splits: a, b"):
        read(save("odd", "a", "b"))
    with pytest.raises(DataError, match="several splits to train on: train_pf, train_sft"):
        read(save("many", "train_pf", "train_sft", "test_sft"))


def test_a_pattern_means_what_is_there(tmp_path: Path) -> None:
    lay(tmp_path, "a1.jsonl", "a2.jsonl", "b.jsonl")
    assert read(f"{tmp_path}/a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    with pytest.raises(DataError, match="means no file"):
        read(f"{tmp_path}/c*.jsonl")


def test_a_run_trains_on_train_and_evaluates_on_the_rest(tmp_path: Path) -> None:
    """With one folder for both, in every command that reads records for a run."""
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train-00000-of-00001.jsonl", questions(40))
    write_jsonl(folder / "test-00000-of-00001.jsonl", [chat("held out?", "yes")] * 7)
    (folder / "README.md").write_text("# A card")
    both = {"train": str(folder), "eval": [str(folder)], "pack": False}
    made = recipe(tmp_path, data=both)
    assert len(RunData(made).loader(0, 1).packs) == 40
    held_out = RunData(made).eval_packs(0, 1)
    assert held_out is not None and len(held_out) == 7
    asked: Any = [
        {prompt.columns["prompt"][0]["content"] for prompt in prompts}
        for prompts, _, _ in (
            read_prompts([folder], ChatOptions().open(tokenizer_folder()), held_out=flag)
            for flag in (False, True)
        )
    ]
    assert len(asked[0]) == 40 and asked[1] == {"held out?"}
    subject = Subject(Planned(made, 1))
    assert doctor.data(subject).level == Level.OK, doctor.data(subject)
