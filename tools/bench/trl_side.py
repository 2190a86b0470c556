# pyright: reportPrivateImportUsage=false
"""TRL's half of against_trl.py, in TRL's environment:
trl_side.py sft|dpo SETTING MODEL DATA RECORDS_A_STEP

Prints one JSON line: seconds of all steps, their number, and the tokens of all records.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

# method -> what a user of TRL 1.16 can choose on a CPU; each makes the same steps from as many
# records. Its DPO falls back to padding where padding_free is asked for.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "sorted": {"train_sampling_strategy": "sequential"},
        "one by one": {"per_device_train_batch_size": 1},
        "padding-free": {"padding_free": True, "max_length": None},
    },
    "dpo": {
        "sorted": {"train_sampling_strategy": "sequential"},
        "one by one": {"per_device_train_batch_size": 1},
    },
}


class Clock(TrainerCallback):
    """From the first step's beginning to the last one's end."""

    started = ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


def conversation(row: dict[str, str]) -> dict[str, Any]:
    turns: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    for name in ("completion", "chosen", "rejected"):
        if name in row:
            turns[name] = [{"role": "assistant", "content": row[name]}]
    return turns


def length(row: dict[str, Any]) -> int:
    """In characters, of the longest text that a batch would be padded to."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return len(row["prompt"]) + max(map(len, answers))


def num_tokens(tokenizer: Any, row: dict[str, Any]) -> int:
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    texts = [tokenizer.apply_chat_template(row["prompt"] + a, tokenize=False) for a in answers]
    return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def main(method: str, setting: str, folder: str, data: str, records_a_step: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = sorted(load_dataset("json", data_files=data, split="train"), key=length, reverse=True)
    records = Dataset.from_list(rows).map(conversation)
    settings: dict[str, Any] = (
        dict(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=records_a_step,
            num_train_epochs=1,
            learning_rate=1e-4,
            max_length=1024,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        | SETTINGS[method][setting]
    )
    a_batch = settings["per_device_train_batch_size"]
    settings["gradient_accumulation_steps"] = records_a_step // a_batch
    clock = Clock()
    if method == "sft":
        args: Any = trl.SFTConfig(**settings, completion_only_loss=True)
        kind: Any = trl.SFTTrainer
    else:
        args = trl.DPOConfig(**settings, precompute_ref_log_probs=True)
        kind = trl.DPOTrainer
    trainer = kind(
        model=model,
        args=args,
        train_dataset=records,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    found = {
        "version": trl.__version__,
        "seconds": clock.ended - clock.started,
        "steps": trainer.state.global_step,
        "tokens": sum(num_tokens(tokenizer, row) for row in records),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
