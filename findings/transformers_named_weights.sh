#!/usr/bin/env bash
# transformers 5.19.0 (torch 2.13.0): where config.json has "transformers_weights", from_pretrained reads the file that it names and not
# model.safetensors beside it, without a line. Added by huggingface/transformers#38152; the help of neither class names the key.
# Input: a folder of save_pretrained, in which config.json names a second valid file of the folder.
# Expected: model.safetensors, as without the key; or a line that says which file was taken.
# Seen: the other file's weights, and no warning. save_pretrained removes the key; a tool that copies config.json and writes its own
# model.safetensors beside it keeps it, and its weights are not the ones that are loaded.
#   loaded is model.safetensors: False
#   loaded is the file that config.json names: True
#   the help of PreTrainedConfig or from_pretrained names the key: False
#   lines about it: none
# moetrain meets it in folders that it is given: it refuses one whose config.json names another file (docs/methods.md).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0
"$work/env/bin/python" - "$work" <<'PY' 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

print("versions: transformers", version("transformers"), "torch", version("torch"))
folder = Path(sys.argv[1], "model")
config = Qwen3Config(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
base, tuned = (AutoModelForCausalLM.from_config(config) for _ in range(2))
base.save_pretrained(folder)
(folder / "model.safetensors").rename(folder / "base.safetensors")
tuned.save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(saved | {"transformers_weights": "base.safetensors"}))
loaded = AutoModelForCausalLM.from_pretrained(folder)


def equal(model):
    return all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())


seen = {
    "loaded is model.safetensors": equal(tuned),
    "loaded is the file that config.json names": equal(base),
    "the help of PreTrainedConfig or from_pretrained names the key": any(
        "transformers_weights" in (thing.__doc__ or "") for thing in (PreTrainedConfig, PreTrainedModel.from_pretrained)
    ),
}
for what, result in seen.items():
    print(f"{what}: {result}")
assert list(seen.values()) == [False, True, False], "this has changed"
PY
if grep -e base.safetensors -e transformers_weights "$work/stderr"; then
    echo "this has changed"
    exit 1
fi
echo "lines about it: none"
