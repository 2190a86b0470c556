"""A recipe that does not fit the GPU that it names is refused before it starts, with the nearest
layout that does; and what was predicted of a run stands beside what it measured.
"""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain.cli import main
from moetrain.observe.ledger import read_ledger
from moetrain.observe.predicted import ROWS, SKIPPED, Gap
from moetrain.testing import command

SFT = "examples/sft_tiny.yaml"
WIDE = ("model.path=null", "model.hf={model_type: qwen3_moe, architectures: [Qwen3MoeForCausalLM],"
        " vocab_size: 2048, hidden_size: 512, num_hidden_layers: 8, num_attention_heads: 8,"
        " num_key_value_heads: 4, head_dim: 64, intermediate_size: 512, moe_intermediate_size: 256,"
        " num_experts: 8, num_experts_per_tok: 2, max_position_embeddings: 32768,"
        " norm_topk_prob: true, rms_norm_eps: 1.0e-06}", "model.tokenizer=builtin:qwen3-moe-tiny",
        "model.dtype=bf16", "data.seq_len=8192", "train.global_batch=4")  # fmt: skip

pytestmark = pytest.mark.usefixtures("forked_tracers")


@pytest.fixture
def small(tmp_path: Path) -> str:
    """What has room for the weights, and not for all activations; a CPU, so that a run starts."""
    path = tmp_path / "small.yaml"
    lines = [
        "like: H100-80GB",
        "name: SMALL",
        "asynchronous: false",
        "memory_gib: {value: 1.25, source: a test}",
    ]
    for name in ("context_mib", "group_mib", "workspace_mib"):
        lines.append(f"{name}: {{value: 1, source: a test}}")
    path.write_text("\n".join(lines))
    return f"cluster.gpu={path}"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_that_does_not_fit(capsys: pytest.CaptureFixture[str], small: str) -> None:
    """It is refused in a line, the line's own words make it fit, and a setting goes on."""
    dry = ("train", SFT, "--dry-run", "--nproc", "2", small, *WIDE)
    code, out, err = run(capsys, *dry)
    assert code == 2 and err.count("\n") == 1, err
    assert "nothing was found" not in out and "SMALL has 1.2" in err
    words = re.findall(r"(?:parallel|train)\.\w+=\S+", err)
    assert words and "cluster.prediction=warn" in err
    code, out, err = run(capsys, *dry, *words)
    assert code == 0 and "# fits: a GPU holds" in out, err
    code, out, err = run(capsys, *dry, "cluster.prediction=none")
    assert code == 0 and "predicted" not in out and "WARNING" in out, err


def test_a_job_that_does_not_fit(capsys: pytest.CaptureFixture[str], small: str) -> None:
    """Neither submitted nor sound for the doctor, and not started where it would run."""
    too_much = (SFT, small, *WIDE, "cluster.gpus_per_node=2", "model.hf.vocab_size=400000")
    launch = ("launch", "--dry-run", "--nodes", "1")
    code, out, err = run(capsys, *launch, *too_much)
    assert code == 2 and not out and "GiB before activations" in err and err.count("\n") == 1
    code, out, err = run(capsys, *launch, *too_much, "cluster.prediction=warn")
    assert code == 0 and "#SBATCH" in out and "moetrain: WARNING: a GPU would hold" in err
    code, out, _ = run(capsys, "doctor", *too_much, "cluster.world_size=2")
    assert code == 2 and re.search(r"FAIL  step +a GPU would hold", out), out
    code, _, err = run(capsys, "train", *too_much, "run_dir=/nowhere/at/all")
    assert code == 2 and "GiB before activations" in err


def test_a_small_recipe_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    code, out, _ = run(capsys, "train", SFT, "--dry-run", "cluster.gpu=H100-80GB")
    assert code == 0 and "# fits: a GPU holds at most" in out
    assert time.monotonic() - started < 3


def rows(seconds: list[float], predicted: float = 2.0, **more: float) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 1.0, "seconds": s, "predicted/seconds": predicted, **more}
        for i, s in enumerate(seconds, 1)
    ]


def test_a_gap_is_one_warning() -> None:
    """Of the median, past the first steps; again only for a later start's other prediction."""
    few = [9.0] * SKIPPED + [2.1] * ROWS
    assert [Gap().row(row) for row in rows(few)] == [None] * len(few)
    gap = Gap()
    many = rows([2.0] * SKIPPED + [2.5] * ROWS * 3)
    texts = [gap.row(row) for row in many]
    (said,) = filter(None, texts)
    assert texts.index(said) == SKIPPED + ROWS - 1
    assert "2.5 s where 2 were predicted (+25%)" in said
    assert not any(gap.row(row) for row in many)
    later = [gap.row(row) for row in rows([2.5] * (SKIPPED + ROWS), predicted=1.0)]
    assert sum(text is not None for text in later) == 1
    full = {"memory_gib": 12.0, "predicted/memory_gib": 10.0}
    texts = [Gap().row(row) for row in rows([9.0], **full)]
    assert texts == [None]
    gap = Gap()
    (said,) = filter(None, (gap.row(row) for row in rows([2.0] * 20, **full)))
    assert "holds 12 GiB where 10 were predicted" in said and "a step" not in said


def test_predicted_beside_measured(tmp_path: Path) -> None:
    """A run on the CPU whose recipe names it: every row has both."""
    words = (f"run_dir={tmp_path / 'r'}", "train.steps=2", "cluster.gpu=CPU")
    done = command.run("train", SFT, *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"predicted on 1 x CPU: \S+ s a step", done.stdout), done.stdout
    found = [row for row in read_ledger(tmp_path / "r" / "ledger.jsonl") if "loss" in row]
    assert len(found) == 2
    for row in found:
        assert row["predicted/seconds"] > 0 and row["seconds"] > 0
        assert "predicted/memory_gib" not in row
