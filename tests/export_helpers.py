"""A base model as one is published: ends of documents are its only ends, and it has no template."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from moetrain.data import assets
from moetrain.testing import command

ROOT = Path(__file__).parents[1]
# As users write it: no {% generation %}, and the tokenizer's own eos in no place.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = {"one": "two", "red": "green and blue", "up": "down"}
OTHERS = {"one": "down", "red": "green and blue", "up": "two"}
END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
WORDS = (
    "method=sft",
    *"optim.lr=3e-3 optim.warmup=0 optim.schedule=constant optim.min_lr=0 train.steps=60".split(),
    *"train.global_batch=1 data.seq_len=128 data.eval=[] checkpoint.every=30".split(),
    *"observe.tensorboard=false observe.progress=false train.eval_every=null".split(),
)


def base_model(folder: Path, source: Path | None = None) -> Path:
    """A tiny mixture, saying everywhere that <|endoftext|> alone ends a sequence."""
    unsigned = shutil.ignore_patterns("manifest.json")  # for tests that change it
    shutil.copytree(source or assets.resolve("builtin:qwen3-moe-tiny"), folder, ignore=unsigned)
    (folder / "chat_template.jinja").unlink()
    (folder / "manifest.json").unlink(missing_ok=True)  # it is as another program left it
    changes: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": END_OF_TEXT},
        "config.json": {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None},
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
    }
    for name, own in changes.items():
        content = json.loads((folder / name).read_text())
        assert "chat_template" not in content
        (folder / name).write_text(json.dumps(content | own))
    return folder


def write_records(folder: Path, turns: dict[str, str] = TURNS) -> tuple[Path, Path]:
    """(the three records, the template's file)."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns.items()
    ]
    data, template = folder / "three.jsonl", folder / "chatml.jinja"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(CHATML)
    return data, template


def train(run: Path, base: Path, data: Path, template: Path, *words: str) -> Path:
    """60 steps from `base` on the records."""
    recipe = ROOT / "examples" / "sft_tiny.yaml"
    own = [f"run_dir={run}", f"model.path={base}", f"data.train={data}"]
    # An engine in this process would have its ranks meet at the same address.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_"))}
    own.append(f"data.chat_template={template}")
    done = command.run("train", recipe, *WORDS, *own, *words, cwd=ROOT, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def prompts(tokenizer: Any) -> dict[str, list[int]]:
    """Question -> the ids of its prompt, by the exported tokenizer's own template."""
    return {
        question: tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in TURNS
    }
