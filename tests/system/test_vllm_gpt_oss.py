"""gpt-oss in the real vLLM: sinks, windows, biases, and weights that its reload would leave out."""

import json
from pathlib import Path
from typing import Any

from test_vllm import ROOT, TIMEOUT, broken_python, steps

from moetrain.testing import command
from moetrain.testing.tiny import CONFIGS

# Sizes that vLLM's kernels for CPUs take. Whatever config.json says, vLLM 0.32 computes with
# rms_norm_eps, swiglu_alpha and swiglu_limit as published.
MODEL: dict[str, Any] = CONFIGS["gpt_oss"] | dict(
    architectures=["GptOssForCausalLM"],
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    head_dim=32,
    sliding_window=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)


def trained(folder: Path, **rollout: Any) -> list[dict[str, Any]]:
    """The steps of a run on two ranks, one half of the experts each."""
    rollout = (
        dict(
            engine="vllm",
            engine_args={"max_model_len": 512, "max_num_batched_tokens": 512},
            prompts_per_step=4,
            group_size=4,
            max_tokens=24,
            routing_replay=True,
        )
        | rollout
    )
    recipe = folder / "recipe.json"  # YAML, too
    recipe.write_text(
        json.dumps(
            dict(
                run_dir=str(folder / "run"),
                model=dict(hf=MODEL, tokenizer="builtin:qwen3-moe-tiny", dtype="fp32"),
                method=dict(name="grpo", beta=0.0),
                data=dict(train="builtin:checkable-prompts", seq_len=256),
                rollout=rollout,
                rewards=["exact"],
                optim=dict(lr=1e-2, weight_decay=0.1, warmup=0),
                router=dict(aux_loss=1e-2),
                train=dict(steps=2),
                observe=dict(tensorboard=False),
            )
        )
    )
    process = command.start("train", recipe, "--nproc", "2", "parallel.ep=2", cwd=ROOT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return steps(folder / "run")


def test_trainer_and_server_agree(tmp_path: Path) -> None:
    rows = trained(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["push/logprob_gap"] <= 1e-4 and row["push/reloads"] == 0
        assert row["mismatch/abs"] <= 1e-4


def test_weights_that_reach_no_loader_are_noticed(tmp_path: Path) -> None:
    """As vLLM 0.32 is without our mend: it keeps the experts and sinks that it had."""
    python = broken_python(
        tmp_path / "broken", lambda text: text.replace("\n_load_gpt_oss_by_loaders()\n", "\n")
    )
    rows = trained(tmp_path, python=str(python))
    assert sum(row.get("faults/server/refused", 0) for row in rows) >= 1
    assert all(row["push/logprob_gap"] <= 1e-4 for row in rows)  # of servers that start anew
