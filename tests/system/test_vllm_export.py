"""vLLM stops at the end of a turn that a base model learned, from the exported folder alone."""

import json
import subprocess
from pathlib import Path

from export_helpers import END, TURNS, base_model, train, write_records

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"


def test_vllm_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    run = train(tmp_path / "run", base, *write_records(tmp_path), "checkpoint.export_hf=true")
    job = {"model": str(run / "hf"), "questions": [*TURNS]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [PYTHON, HERE / "vllm_turns.py", tmp_path / "job.json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    # vLLM leaves the token that ended an answer out of its text when it is the tokenizer's eos.
    wanted = {question: [answer, "stop"] for question, answer in TURNS.items()}
    assert {q: [text.removesuffix(END), why] for q, (text, why) in found.items()} == wanted
