#!/usr/bin/env bash
# transformers 5.19.0 (torch 2.13.0) with a checkpoint that nvidia-modelopt 0.47.0 exported in FP8: it warns that it does not know the
# quantisation and "will skip" it, reports the scales as unexpected, and returns a model of the bare FP8 numbers, without their scales.
# Input: a tiny Qwen3, quantised with FP8_DEFAULT_CFG, exported by export_hf_checkpoint, loaded by from_pretrained.
# Expected: an error; or weights times their scales, which are within rounding of the original.
# Seen: a model that answers, with other log-probs; the same without quantization_config, the deletion of which the warning proposes.
#   14 matrices are stored in FP8; the loaded ones are their bare numbers: True
#   largest difference of log-probs to the original: 0.79
#   the same without quantization_config in config.json: True
#   once each is multiplied by its scale: 0.02
#   Unknown quantization type, got modelopt
#   Hence, we will skip the quantization. To remove the warning, you can delete the quantization_config attribute in config.json
# moetrain meets it in `convert quantize`, whose folders are for vLLM, and where it checks them: it multiplies by the scales itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.19.0 nvidia-modelopt==0.47.0 accelerate==1.15.0 requests==2.34.2
cat > "$work/run.py" <<'PY'
import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

print("versions:", *(f"{name} {version(name)}" for name in ("transformers", "nvidia-modelopt", "torch")))
folder = Path(sys.argv[1], "fp8")
torch.manual_seed(1)
config = Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"])
original = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
tokens = torch.randint(0, 64, (4, 32))


@torch.no_grad()
def log_probs(model):
    return model(tokens).logits.float().log_softmax(-1)


exact = log_probs(original)
quantised = mtq.quantize(copy.deepcopy(original), copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda model: model(tokens))
export_hf_checkpoint(quantised, export_dir=folder)

loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
stored = load_file(folder / "model.safetensors")
bare = {name: weight for name, weight in stored.items() if weight.dtype == torch.float8_e4m3fn}
weights = loaded.state_dict()
equal = all(torch.equal(weights[name].float(), weight.float()) for name, weight in bare.items())
print(f"{len(bare)} matrices are stored in FP8; the loaded ones are their bare numbers: {equal}")
away = (log_probs(loaded) - exact).abs().max().item()
print(f"largest difference of log-probs to the original: {away:.2f}")
config_file = folder / "config.json"
config_file.write_text(json.dumps({k: v for k, v in json.loads(config_file.read_text()).items() if "quant" not in k}))
deleted = torch.equal(log_probs(AutoModelForCausalLM.from_pretrained(folder).eval()), log_probs(loaded))
print("the same without quantization_config in config.json:", deleted)
for name, weight in bare.items():
    weights[name].copy_(weight.float() * stored[name + "_scale"].float())
scaled = (log_probs(loaded) - exact).abs().max().item()
print(f"once each is multiplied by its scale: {scaled:.2f}")
assert equal and deleted and away > 0.5 and scaled < 0.1, "this has changed"
PY
PYTHONWARNINGS=ignore "$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
grep -o "Unknown quantization type, got modelopt" "$work/stderr"
grep -o "Hence, we will skip the quantization.*" "$work/stderr"
