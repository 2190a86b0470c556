#!/usr/bin/env bash
# megatron-core 0.19.2 (torch 2.13.0, one CPU process, the local layer spec): moe_layer_freq=1, the default, and moe_layer_freq=[1, 1]
# build the same two layers with the same values, and save them under different keys: stacked, or each layer by its number.
# Input: a mixture of two layers, saved with one setting by dist_checkpointing.save, loaded with the other by dist_checkpointing.load.
# Expected: one model has one form of checkpoint; or the documentation of moe_layer_freq says that it chooses the form.
# Seen: neither reads the other's; a KeyError lists the keys of the file and names no setting. Nothing in the documentation of either.
#   same parameters: True
#   moe_layer_freq=1 saves ['decoder.layers.mlp.router.weight']
#     loaded with 1: <All keys matched successfully>
#     loaded with [1, 1]: KeyError: "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight from model not in state dict: ...
#   moe_layer_freq=[1, 1] saves ['decoder.layers.0.mlp.router.weight', 'decoder.layers.1.mlp.router.weight']
#     loaded with 1: KeyError: "decoder.layers.self_attention.linear_qkv.layer_norm_weight from model not in state dict: ...
#     loaded with [1, 1]: <All keys matched successfully>
# moetrain meets it where it writes checkpoints for Megatron-LM: their form has to follow the user's --moe-layer-freq.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.19.2 psutil==7.2.2
cat > "$work/run.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig

FREQS = (1, [1, 1])
# Saving asks for both, also where there is no GPU.
torch.cuda.synchronize = lambda: None
torch.cuda.current_device = lambda: "cpu"


def build(freq):
    torch.manual_seed(1)
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=2,
                               add_bias_linear=False, moe_layer_freq=freq, use_cpu_initialization=True)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    return GPTModel(config, spec, vocab_size=32, max_sequence_length=16)


def load(folder, freq):
    model = build(freq)
    try:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    except BaseException as error:  # torch's CheckpointException is no Exception
        assert "moe_layer_freq" not in str(error), "this has changed"
        line = [line for line in str(error).splitlines() if "KeyError:" in line][-1]
        return line[line.index("KeyError:"):][:110] + "..."
    return model.load_state_dict(state["model"])


if __name__ == "__main__":
    print("versions: megatron-core", version("megatron-core"), "torch", version("torch"))
    work = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    one, listed = (dict(build(freq).named_parameters()) for freq in FREQS)
    same = one.keys() == listed.keys() and all(torch.equal(one[name], listed[name]) for name in one)
    print("same parameters:", same)
    refused = []
    for saved in FREQS:
        folder = work / f"saved_{FREQS.index(saved)}"
        folder.mkdir()
        dist_checkpointing.save({"model": build(saved).sharded_state_dict()}, folder)
        keys = dist_checkpointing.load_tensors_metadata(folder)
        print(f"moe_layer_freq={saved} saves", sorted(key for key in keys if "router" in key))
        for freq in FREQS:
            result = load(folder, freq)
            print(f"  loaded with {freq}: {result}")
            refused.append("not in state dict" in str(result))
    assert same and refused == [False, True, True, False], "this has changed"
PY
PYTHONWARNINGS=ignore "$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
