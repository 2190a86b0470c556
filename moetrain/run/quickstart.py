"""`moetrain quickstart`: from Python's own sources to a model that answers, on two cores.

Tokenizer and corpus, pretraining and fine-tuning on two processes each, Hugging Face weights,
answers from transformers, one table. Started again, it goes on where it was.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

import moetrain
from moetrain import files
from moetrain.data import assets
from moetrain.engine import device
from moetrain.errors import MoetrainError
from moetrain.observe.plot import plot_figures
from moetrain.observe.summary import print_summaries, summarise
from moetrain.run.folder import check_place

STAGES = ("pretrain", "sft")
NUM_PROCESSES = 2
ASSETS = (
    "stdlib-tokenizer",
    "stdlib-corpus",
    "stdlib-corpus-eval",
    "checkable-sft",
    "checkable-sft-eval",
)
MAX_ANSWER = 24  # tokens


@dataclass(frozen=True)
class HeldOutAnswer:
    """A held-out instruction, its right answer and the model's."""

    question: str
    right: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given.strip() == self.right.strip()


def main(folder: Path = Path("runs/quickstart"), overrides: Sequence[str] = ()) -> int:
    """Run all stages under `folder`; `overrides` go to both training recipes. Returns the exit
    code.
    """
    started = time.monotonic()
    check_place(folder, "--out")  # data and two processes come before the first run says so
    device.prepare()  # before megatron-core, which indexes the corpus, is imported
    console = Console(highlight=False)
    console.rule("1/4 tokenizer and data")
    for name in track(ASSETS, "building", console=console):
        console.print(f"builtin:{name}: {assets.resolve(f'builtin:{name}')}", soft_wrap=True)
    for number, stage in enumerate(STAGES, start=2):
        console.rule(f"{number}/4 {stage}, {NUM_PROCESSES} processes")
        code = _train(stage, folder, overrides)
        if code:
            return code
    model = folder / "sft" / "hf"
    console.rule("4/4 answers from transformers")
    answers = list(_answer(model, console))
    num_right = sum(answer.is_right for answer in answers)
    rows = [vars(a) | {"is_right": a.is_right} for a in answers]
    files.write_text(folder / "answers.json", json.dumps(rows, indent=1))
    for answer in answers[:8]:
        mark = "right" if answer.is_right else f"wrong, {answer.right}"
        console.print(f"{answer.question}  ->  {answer.given}  ({mark})", markup=False)
    picture = folder / "loss.png"
    ledgers = {stage: (folder / stage / "ledger.jsonl", ("loss",)) for stage in STAGES}
    plot_figures(ledgers, picture)
    print_summaries(
        [summarise(s, folder / s, files=str(folder / s / "hf")) for s in STAGES], console
    )
    console.print(f"held-out instructions answered right: {num_right} of {len(answers)}")
    console.print(f"loss curves: {picture}   answers: {folder / 'answers.json'}", soft_wrap=True)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def _train(stage: str, folder: Path, overrides: Sequence[str]) -> int:
    """Train one stage in processes of its own; returns their exit code."""
    recipe = (
        Path(moetrain.__file__).resolve().parents[1] / "examples" / "quickstart" / f"{stage}.yaml"
    )
    if not recipe.is_file():
        raise MoetrainError(
            f"{recipe} is missing: the quickstart runs from a clone. Clone the repository, then"
            " `make quickstart`."
        )
    command = [
        sys.executable,
        "-m",
        "moetrain",
        "train",
        str(recipe),
        "--nproc",
        str(NUM_PROCESSES),
    ]
    command.append(f"run_dir={folder / stage}")
    if stage == "sft":
        command.append(f"model.path={folder / 'pretrain' / 'hf'}")
    threads = max(1, (os.cpu_count() or 1) // NUM_PROCESSES)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run([*command, *overrides], env=environment, check=False).returncode


def _answer(model: Path, console: Console) -> Iterator[HeldOutAnswer]:
    """Load the exported weights in transformers and answer the held-out instructions greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moetrain.data.sources import Record, find_sources, read_rows

    tokenizer = AutoTokenizer.from_pretrained(str(model), padding_side="left")
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    sources = find_sources([assets.resolve("builtin:checkable-sft-eval")])
    rows = [
        row.value["messages"] for s in sources for row in read_rows(s) if isinstance(row, Record)
    ]
    for messages in track(list(batched(rows, 50)), "answering", console=console):
        prompts = [
            tokenizer.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True)
            for m in messages
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = loaded.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for m, text in zip(messages, texts, strict=True):
            yield HeldOutAnswer(m[-2]["content"], m[-1]["content"], text)
