#!/usr/bin/env bash
# datasets 5.2.0 with teich 0.3.6: load_dataset("json") takes chat records for sessions of an agent when they have the five columns id,
# source, model, system_prompt and messages, and says nothing. (Without teich it is an ImportError that tells to install it.)
# Input: JSONL of 100 short chats with these columns, the same with the column called `system`, and one column more, `split`.
# Expected: the columns of the file, as with `system`, or a line that says otherwise.
# Seen: system_prompt and split are gone and are in no message, in their place come columns of traces, and each row's `trace` is the
# whole file: the table grows with the square of the records.
#   columns of the file, called system: True
#   columns of the file, called system_prompt: False
#   the system prompt is in messages or metadata: False
#   a row's trace is the whole file: True
#   with parse_agent_traces=False the columns of the file: True
#   the help of load_dataset names parse_agent_traces: False
#   bytes of the tables: 8270 and 2285014 (names of temporary files are in it)
# moetrain reads JSONL by itself, and a record's system_prompt with it; it meets what users load and save again before they train.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 teich==0.3.6
HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/env/bin/python" - "$work" <<'PY'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import datasets

print("versions: datasets", version("datasets"), "teich", version("teich"))
datasets.disable_progress_bars()


def load(column, **options):
    records = [
        {"id": str(i), "source": "wiki", "model": "m", column: "answer in French", "split": "a",
         "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(100)
    ]
    path = Path(sys.argv[1], f"{column}.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=f"{sys.argv[1]}/{column}{len(options)}", **options
    )
    return loaded, set(loaded.column_names) == set(records[0]), path.read_text()


plain, same, _ = load("system")
traces, same_too, text = load("system_prompt")
first = traces[0]
seen = {
    "columns of the file, called system": same,
    "columns of the file, called system_prompt": same_too,
    "the system prompt is in messages or metadata": "French" in json.dumps([first["messages"], first.get("metadata")]),
    "a row's trace is the whole file": first.get("trace") == text,
    "with parse_agent_traces=False the columns of the file": load("system_prompt", parse_agent_traces=False)[1],
    "the help of load_dataset names parse_agent_traces": "parse_agent_traces" in (datasets.load_dataset.__doc__ or ""),
}
for what, result in seen.items():
    print(f"{what}: {result}")
print(f"bytes of the tables: {plain.data.nbytes} and {traces.data.nbytes}")
assert list(seen.values()) == [True, False, False, True, True, False], "this has changed"
assert len(plain) == len(traces) == 100, "this has changed"
PY
