"""What newer versions of others' packages write, in small folders made by hand in their form.

Each was compared with what that version writes: datasets 5.2.0, PEFT 0.21.2, huggingface_hub 2.4.0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import write_jsonl
from safetensors.torch import save_file

from moetrain.data.formats import to_conversation
from moetrain.data.rejects import Reject
from moetrain.data.sources import Record, find_sources, read_rows
from moetrain.errors import DataError, WeightsError
from moetrain.weights.peft_config import read_config
from moetrain.weights.side_files import SideFiles, check_exported

Fields = dict[str, Any]


def read(path: Path) -> list[Any]:
    rows: list[Record | Reject] = [row for s in find_sources([path]) for row in read_rows(s)]
    return [row.value if isinstance(row, Record) else row.reason for row in rows]


def conversations(records: Sequence[Any]) -> list[Any]:
    return [to_conversation(record) for record in records]


def stored(path: Path, records: Sequence[Fields]) -> Path:
    """The records as parquet in which each `content` is JSON, as `datasets` stores uneven ones:
    what is JSON already, or is to its parser, as it stands, other texts in quotation marks, what is
    missing as null.
    """

    def raw(content: Any) -> str | None:
        if content is None or content in LENIENT:
            return content
        try:
            json.loads(content)
        except (TypeError, ValueError):
            return json.dumps(content)
        return content

    message = pa.struct(
        {"role": pa.string(), "content": pa.json_(), "tool_calls": pa.list_(pa.string())}
    )
    contents = [raw(m["content"]) for r in records for m in r["messages"]]
    roles = [m["role"] for r in records for m in r["messages"]]
    offsets = [0]
    for record in records:
        offsets.append(offsets[-1] + len(record["messages"]))
    json_array = pa.ExtensionArray.from_storage(pa.json_(), pa.array(contents, pa.string()))
    none = pa.nulls(len(roles), pa.list_(pa.string()))
    items = pa.StructArray.from_arrays(
        [pa.array(roles), json_array, none], fields=[message.field(i) for i in range(3)]
    )
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays(offsets, items)}), path)
    return path


def message(role: str, content: Any) -> Fields:
    return {"role": role, "content": content}


PARTS = [{"type": "text", "text": "q"}]
LENIENT = ("007", "1.", "-")
TEXTS = ("a", "42", "1.50", "true", "[2]", '{"a": 1}', "two words", "NaN is none", *LENIENT)


def test_a_text_that_is_json_stays_a_text_in_a_table(tmp_path: Path) -> None:
    """Whatever its neighbours are; to the letter (`1.50`)."""
    records = [
        {"messages": [message("user", PARTS if i == 0 else "q"), message("assistant", text)]}
        for i, text in enumerate(TEXTS)
    ]
    found = read(stored(tmp_path / "a.parquet", records))
    assert found == records
    assert conversations(found) == conversations(records)


def test_values_of_arguments_and_answers_in_a_table_stay_values(tmp_path: Path) -> None:
    """`content` and `value` are names of a message's text beside a role alone."""
    kind = pa.struct({"value": pa.json_(), "content": pa.json_()})
    storage = pa.StructArray.from_arrays(
        [
            pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))
            for values in (["1", '"x"'], ["[2]", "false"])
        ],
        fields=list(kind),
    )
    answers = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["7", '"seven"'], pa.string()))
    pq.write_table(pa.table({"arguments": storage, "answer": answers}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"arguments": {"value": 1, "content": [2]}, "answer": 7},
        {"arguments": {"value": "x", "content": False}, "answer": "seven"},
    ]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def tool(name: str, **schema: Any) -> Fields:
    parameters = {"type": "object", **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


UNEVEN: dict[str, list[Fields]] = {
    "no content beside parts": [
        {
            "messages": [
                message("user", PARTS) | {"tool_calls": None},
                message("assistant", None) | {"tool_calls": [CALL]},
                message("tool", "r") | {"tool_calls": None},
                message("assistant", "null and void") | {"tool_calls": None},
            ]
        }
    ],
    "schemas": [
        {
            "messages": [message("user", "q"), message("assistant", "a")],
            "tools": [tool(name, properties={name: kind}, required=[name])],
        }
        for name, kind in (
            ("a", {"type": "string", "enum": ["x", None]}),
            ("items", {"type": ["integer", "null"], "default": None}),
            ("type", {"type": "array", "items": {"type": "string"}}),
        )
    ],
    "settings": [
        {
            "messages": [message("user", "q"), message("assistant", "a")],
            "chat_template_kwargs": kwargs,
        }
        for kwargs in ({"thinking": True}, {"thinking": True, "tags": [1]}, None)
    ],
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", UNEVEN)
def test_what_datasets_rewrites(tmp_path: Path, kind: str, form: str) -> None:
    """By the version that is installed: 4.8 writes texts of JSON into JSONL, 5.2 what they say."""
    import datasets

    datasets.disable_progress_bars()
    path = write_jsonl(tmp_path / "a.jsonl", UNEVEN[kind])
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    again = tmp_path / f"b.{form}"
    (loaded.to_json if form == "jsonl" else loaded.to_parquet)(str(again))
    wanted = conversations(UNEVEN[kind])
    assert conversations(read(again)) == wanted
    five = write_jsonl(tmp_path / "five.jsonl", loaded)  # what 5.2's to_json writes: the values
    assert conversations(read(five)) == wanted


def test_texts_that_are_json_to_datasets_alone(tmp_path: Path) -> None:
    """They stand among texts of JSON, in which the others are in quotation marks."""
    import datasets

    datasets.disable_progress_bars()
    records = [
        {"messages": [message("user", PARTS if i == 0 else "q"), message("assistant", text)]}
        for i, text in enumerate(TEXTS)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.to_json(str(tmp_path / "b.jsonl"))
    assert '"007"' in (tmp_path / "b.jsonl").read_text(), "datasets no longer does this"
    assert conversations(read(tmp_path / "b.jsonl")) == conversations(records)
    loaded.save_to_disk(str(tmp_path / "c"))
    assert conversations(read(tmp_path / "c")) == conversations(records)


def test_parts_alone_show_what_a_column_is(tmp_path: Path) -> None:
    """JSONL as 4.8.4 writes it, in which no content has quotation marks; and texts of JSON that
    somebody meant, which are neither parts of a content nor beside such.
    """
    turns = [message("user", json.dumps(PARTS)), message("assistant", "null")]
    turns[1]["tool_calls"] = [CALL]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [*turns, message("user", "42")]}])
    wanted = [message("user", PARTS), turns[1] | {"content": None}, message("user", "42")]
    assert read(path) == [{"messages": wanted}]
    found = json.dumps([{"type": "person", "text": "Bob"}])
    own = [
        {"messages": [message("user", "[1]"), message("assistant", found)]},
        {"messages": [message("user", "[2]"), message("assistant", "null")]},
    ]
    assert read(write_jsonl(tmp_path / "b.jsonl", own)) == own
    outputs = [{"prompt": "q", "completion": json.dumps(PARTS)}]
    assert read(write_jsonl(tmp_path / "c.jsonl", outputs)) == outputs


def test_texts_that_no_schema_is_read_in_stay() -> None:
    from moetrain.data.parsing import with_parsed_schemas

    own = {"description": '{"a": 1}', "default": {"items": "[1]", "type": '"x"'}, "enum": ["[1]"]}
    tools = [tool("f", properties={"a": {"type": "string", **own}})]
    assert with_parsed_schemas(tools) == tools


def test_a_feature_that_is_not_known_here_says_the_way_out(tmp_path: Path) -> None:
    """datasets 5 has Mesh, BioSequence and BioStructure."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "set"))
    info = tmp_path / "set" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["features"]["x"] = {"decode": True, "_type": "Mesh"}
    info.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"'Mesh' not found.*save it there as parquet"):
        read(tmp_path / "set")


# What PEFT 0.21.2 writes for a plain LoRA, but for the names of modules.
PEFT_021 = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
VARIANTS: dict[str, Any] = {
    "kasa_config": {"beta": 0.0001, "gamma": 0.001},
    "monteclora_config": {"num_samples": 4},
    "velora_config": {"rank": 4},
    "use_bdlora": {"nblocks": 2},
    "use_something_of_tomorrow": True,
}


def config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(PEFT_021 | changes))
    return path


@pytest.mark.parametrize("first", [True, "gaussian", "orthogonal", "mica"])
def test_a_config_of_peft_021_is_read(tmp_path: Path, first: Any) -> None:
    """MiCA, too, leaves the base as it is: its A begins at 0."""
    found = read_config(config(tmp_path, init_lora_weights=first))
    assert (found.rank, found.alpha, found.init) == (4, 6.0, "lora")


@pytest.mark.parametrize("key", VARIANTS)
def test_a_variant_of_lora_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(WeightsError, match=f"{key} = .* not (held|known) here"):
        read_config(config(tmp_path, **{key: VARIANTS[key]}))


def test_experts_that_have_no_adapter_here_are_said_to_have_none(tmp_path: Path) -> None:
    """PEFT adapts gpt-oss's experts, whose matrices lie as [in, out]."""
    from weights_helpers import reader_of

    from moetrain.testing.tiny import save_model
    from moetrain.weights.peft_reader import PeftReader

    base = tmp_path / "base"
    save_model("gpt_oss", base, num_hidden_layers=1)
    config(tmp_path, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{stem}A.weight": torch.zeros(24, 28), f"{stem}B.weight": torch.zeros(48, 24)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model, reader = reader_of(json.loads((base / "config.json").read_text()), base)
    with pytest.raises(WeightsError, match=r"experts\.down_proj, which has no adapter here"):
        PeftReader(tmp_path, model, reader)


# What huggingface_hub 1.33.0 and 2.4.0 keep of a repository whose large files came by Xet.


def cached(root: Path, *, marked: bool) -> Path:
    """A snapshot: small files in blobs of their repository, the large one in those of the cache."""
    snapshot = root / "models--a--b" / "snapshots" / "1234"
    blobs, store = root / "models--a--b" / "blobs", root / "blobs" / "ab"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    if marked:
        (root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    (store / "ab12").write_text("{}")
    (blobs / "etag").symlink_to("../../blobs/ab/ab12")
    (blobs / "small").write_text('{"eos_token": "</s>"}')
    (snapshot / "tokenizer.json").symlink_to("../../blobs/etag")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/small")
    return snapshot


def test_a_snapshot_whose_files_lie_in_the_whole_caches_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", marked=True)
    (tmp_path / "made").mkdir()
    SideFiles.of(snapshot).write(tmp_path / "made", {})
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "made" / "tokenizer.json").is_symlink()


def test_blobs_that_are_not_the_caches_are_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="outside of its folder"):
        check_exported(cached(tmp_path / "hub", marked=False))
