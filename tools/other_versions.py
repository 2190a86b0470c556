"""Folders that other versions of transformers and PEFT write, read here; and what is written here,
loaded by them. THERE is a Python with those versions and torch; `.venv` is this project's.

    PYTHONPATH=. THERE tools/other_versions.py write DIR            models and adapters, with logits
    PYTHONPATH=. .venv/bin/python tools/other_versions.py read DIR  by the engine; converted, merged
    PYTHONPATH=. THERE tools/other_versions.py load DIR             what was converted and merged

Each prints the largest distance of logits (fp32), or of a reward model's number, and exits with 1
where one is above 1e-4.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOKENS = [17, 3, 120, 199, 4, 55, 90, 2, 13, 13, 77, 150, 8, 33, 101, 42, 5, 66, 180, 9]
BOUND = 1e-4


def scaled(rope_type: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, "factor": 8.0, **more}}


YARN = scaled("yarn", original_max_position_embeddings=64)
LLAMA3 = scaled(
    "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True}
# name: (family, changes of its config, arguments of save_pretrained)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, llama3 rope": ("llama", LLAMA3, {}),
    "llama, biases": ("llama", BIASED, {}),
    "llama, tied": ("llama", TIED, {}),
    "qwen2, linear rope": ("qwen2", scaled("linear"), {}),
    "qwen3, yarn": ("qwen3", YARN, {}),
    "qwen3_moe, yarn": ("qwen3_moe", YARN, {}),
    "qwen3_moe, biases": ("qwen3_moe", BIASED, {}),
    "qwen3_moe, tied": ("qwen3_moe", TIED, {}),
    "qwen3_moe, dense layers": ("qwen3_moe", {"decoder_sparse_step": 2}, {}),
    "qwen2_moe, yarn": ("qwen2_moe", YARN, {}),
    "mixtral, yarn": ("mixtral", YARN, {}),
    "gpt_oss, no biases": ("gpt_oss", {"attention_bias": False}, {}),
}
for _family in ("qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss"):
    MODELS[f"{_family}, shards"] = (_family, {}, {"max_shard_size": "60KB"})
    MODELS[f"{_family}, as in memory"] = (_family, {}, {"save_original_format": False})
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name: (family, fields of LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("qwen3_moe", {"target_modules": "all-linear"}),
    "rslora, experts": (
        "qwen3_moe",
        {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "use_rslora": True},
    ),
    "router": ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "transformers 4's names": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "dora": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "pissa": ("qwen3", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "olora": ("qwen3", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    "mica": ("qwen3", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "ranks": (
        "qwen3",
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 8, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"o_proj": 12, "layers.1.self_attn.q_proj": 3},
        },
    ),
    "reward": ("rewards, qwen3_moe", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
}


def answer(model: Any) -> list[Any]:
    """[t, v] logits of TOKENS; of a reward model [t, 1], its head at every token."""
    import torch

    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.no_grad():
        ids = torch.tensor([TOKENS])
        if hasattr(whole, "score"):
            return whole.score(whole.model(ids).last_hidden_state)[0].tolist()
        return model(ids).logits[0].tolist()


def opened(folder: Path) -> Any:
    """In fp32. SystemExit where a weight is missing or left over."""
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind: Any = getattr(transformers, architecture)
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {key: names for key, names in info.items() if names}
    if left:
        raise SystemExit(f"{folder}: {left}")
    return model.eval()


def write(root: Path) -> None:
    from moetrain.testing.tiny import CONFIGS, save_model, save_reward_model

    root.mkdir(parents=True)
    plain: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        family: (family, {}, {}) for family in CONFIGS
    }
    for name, (family, changes, saving) in {**plain, **MODELS}.items():
        model = save_model(family, root / "first", **changes)
        model.save_pretrained(root / name, **saving)
        keep(root / name, answer(opened(root / name)))
    for family in CONFIGS:
        save_reward_model(family, root / f"rewards, {family}")
        keep(root / f"rewards, {family}", answer(opened(root / f"rewards, {family}")))
    for name, (family, fields) in ADAPTERS.items():
        write_adapter(root / f"adapter, {name}", root / family, fields)


def write_adapter(folder: Path, base: Path, fields: Mapping[str, Any]) -> None:
    """One that is not at its first values."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    model: Any = get_peft_model(opened(base), LoraConfig(r=4, lora_alpha=6, **fields))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param += torch.randn_like(param) * 0.05
    model.save_pretrained(folder)
    (folder / "base").write_text(base.name)
    keep(folder, answer(PeftModel.from_pretrained(opened(base), str(folder)).eval()))


def keep(folder: Path, logits: list[Any]) -> None:
    (folder / "logits").write_text(json.dumps(logits))


def each(root: Path, found: Callable[[Path], list[Any]]) -> bool:
    """Whether all are near what was written; says it of each."""
    import torch

    near = True
    for folder in sorted(path.parent for path in root.glob("*/logits")):
        wanted = torch.tensor(json.loads((folder / "logits").read_text()))
        got = torch.tensor(found(folder))
        gap = (got - wanted[-len(got) :]).abs().max().item()
        near &= gap <= BOUND
        print(f"{gap:.1e}  {folder.name}", flush=True)
    return near


def read(root: Path) -> bool:
    """By the engine; into DIR.out what conversions write."""
    from moetrain import cli
    from moetrain.testing import ranks
    from moetrain.testing.gloo import Workers
    from moetrain.testing.scored import scored

    out = root.with_name(root.name + ".out")
    out.mkdir()
    pool = Workers()

    def convert(*words: str | Path) -> None:
        code = cli.main(["convert", *map(str, words)])
        if code:
            raise SystemExit(code)

    def found(folder: Path) -> list[Any]:
        model, target = folder, out / folder.name
        if (folder / "base").is_file():
            convert("merge", root / (folder / "base").read_text(), folder, target)
            model = target
        else:
            convert("hf2mcore", folder, out / "mcore")
            convert("mcore2hf", out / "mcore", target)
            convert("verify", folder, target)
            shutil.rmtree(out / "mcore")
        if "score" in " ".join(opened(target).state_dict()):
            return pool.run(1, scored, str(model), [], [[TOKENS]])[0]
        return pool.run(1, ranks.logits, str(model), {}, TOKENS)[0].tolist()

    near = each(root, found)
    pool.close()
    return near


def load(root: Path) -> bool:
    out = root.with_name(root.name + ".out")
    return each(root, lambda folder: answer(opened(out / folder.name)))


def main(words: list[str]) -> int:
    if len(words) != 2 or words[0] not in ("write", "read", "load"):
        print(__doc__)
        return 2
    root = Path(words[1])
    if words[0] == "write":
        write(root)
        return 0
    return 0 if {"read": read, "load": load}[words[0]](root) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
