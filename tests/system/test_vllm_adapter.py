"""vLLM on the CPU takes an adapter of a dense model, and any model with its adapter merged into it.

A mixture of experts with an adapter, on attention alone too, stays unproven without a GPU: where
LoRA is on, vLLM 0.32 runs experts by Triton.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter import ATTENTION, EVERYTHING, exported, in_peft, model_in, spec_of

from moetrain.data import assets
from moetrain.testing.tiny import save_model
from moetrain.weights.derived import merge

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
TOKENS = [[(i * 37 + start * 11) % 1000 + 3 for i in range(24)] for start in range(2)]


@torch.no_grad()
def scored(model: Any) -> torch.Tensor:
    tokens = torch.tensor(TOKENS)
    logp = model.eval()(tokens).logits[:, :-1].log_softmax(-1)
    return logp.gather(2, tokens[:, 1:, None])[..., 0]


# Of the shape that vLLM's CPU kernels take.
DENSE = dict(vocab_size=1024, hidden_size=128, head_dim=32, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=256)  # fmt: skip


@pytest.mark.parametrize("merged", [False, True], ids=["attention", "merged"])
def test_log_probs_are_pefts(tmp_path: Path, merged: bool) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    if merged:  # a mixture of experts, with an adapter on everything
        base = Path(assets.resolve("builtin:qwen3-moe-tiny"))
        exported(base, spec_of("lora", *EVERYTHING), adapter)
        merge(base, adapter, tmp_path / "merged")
    else:
        save_model("qwen3", base, **DENSE)
        exported(base, spec_of("lora", *ATTENTION, rank=8), adapter)
    job = {"model": str(tmp_path / "merged" if merged else base), "tokens": TOKENS}
    job["adapter"] = "" if merged else str(adapter)
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [PYTHON, HERE / "vllm_logprobs.py", tmp_path / "job.json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = torch.tensor(json.loads((tmp_path / "out.json").read_text()))
    wanted, plain = scored(in_peft(base, adapter)), scored(model_in(base))
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
