"""What keys of a recipe change in what is read, in an engine's steps, in what a run leaves, in how
it samples. tests/test_settings.py holds the others, and sees that none is left out.
"""

import copy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from data_helpers import LABELS, PAIRS, chat, questions, tokenizer_folder, write_jsonl
from settings_helpers import HF, laid, seen
from test_supervised import make_recipe, rows

from moetrain.config.load import load_recipe, recipe_from
from moetrain.data.demonstrations import demonstration_recipe
from moetrain.data.loader import RunData
from moetrain.errors import MoetrainError, RolloutError
from moetrain.loops import rl, supervised
from moetrain.observe.reporter import Reporter
from moetrain.observe.sinks import check_sinks
from moetrain.rollout import check_engine
from moetrain.rollout.opening import check_fleet, open_fleet
from moetrain.testing import footprint
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import save_model

# Data

CHAT: dict[str, Any] = laid({"data": {"seq_len": 64}, "train": {"steps": 2, "global_batch": 4}})
LOOSE = laid({"data": {"max_rejected": 0.5}}, CHAT)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@cache
def folder() -> Path:
    root = Path(tempfile.mkdtemp())
    write_jsonl(root / "chat.jsonl", [*questions(20), chat("Say it.", "yes " * 100)])
    write_jsonl(root / "more.jsonl", questions()[20:40])
    write_jsonl(root / "pairs.jsonl", [*PAIRS[:20]])
    write_jsonl(root / "labels.jsonl", LABELS[:20])
    write_jsonl(root / "bad.jsonl", [*questions(20), "{"])
    (root / "template").write_text(TEMPLATE)
    thought = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    (root / "thoughtful").write_text(TEMPLATE.replace("{{ m.content }}", thought) + asked)
    (root / "loud").write_text(TEMPLATE.replace(": {{", "{{ '!' if shout else ':' }} {{"))
    return root


def packs(content: dict[str, Any]) -> list[Any]:
    """All that a run reads, and says of it."""
    root = folder()
    data = content["data"]
    for key in ("train", "eval"):
        data[key] = [str(root / name) for name in data.get(key, [])]
    if "chat_template" in data:
        data["chat_template"] = str(root / data["chat_template"])
    content["model"]["tokenizer"] = content["model"].get("tokenizer") or str(tokenizer_folder())
    data["cache"] = data.get("cache") or str(root / "cache")
    content["run_dir"] = str(root / "run")
    recipe = recipe_from(content)
    prepared = RunData(recipe).prepare()
    found: list[Any] = [prepared.num_steps, prepared.lines]
    loader, held_out = RunData(recipe).loader(0, 1), RunData(recipe).eval_packs(0, 1)
    for group in (loader.next(), loader.next(), list(held_out or [])):
        found += [(pack.tokens.tolist(), pack.loss_mask.tolist(), pack.ids) for pack in group]
    return found


LOUD = {"data": {"chat_template": "loud"}}
DATA: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sft", {"data": {"train": ["more.jsonl"]}}, {}),
    ("sft", {"data": {"eval": ["more.jsonl"]}}, {}),
    ("sft", {"data": {"eval_share": 0.2}}, {}),
    ("sft", {"data": {"take": [5]}}, {}),
    ("sft", {"data": {"seq_len": 48}}, {}),
    ("sft", {"data": {"too_long": "keep_end"}}, {}),
    ("sft", {"data": {"too_long": "reject", "max_rejected": 0.5}}, {"data": {"max_rejected": 0.5}}),
    ("sft", {"data": {"max_rejected": 0.0}}, {"data": {"train": ["bad.jsonl"]}}),
    ("sft", {"data": {"pack": False}}, {}),
    ("sft", {"data": {"shuffle": False}}, {}),
    ("sft", {"data": {"chat_template": "template"}}, {}),
    ("sft", {"data": {"system": "Be brief."}}, {}),
    ("sft", {"data": {"empty_thoughts": False}}, {"data": {"chat_template": "thoughtful"}}),
    ("sft", {"data": {"chat_template_kwargs": {"shout": True}}}, LOUD),
    ("sft", {"seed": 7}, {}),
    ("sft", {"model": {"tokenizer": "builtin:stdlib-tokenizer"}}, {}),
    ("sft", {"train": {"global_batch": 2}}, {}),
    ("sft", {"train": {"steps": 4}}, {}),
    ("sft", {"train": {"steps": None, "epochs": 3}}, {}),
    ("sft", {"train": {"eval_packs": 1}}, {"data": {"eval": ["more.jsonl"]}}),
    ("dpo", {"data": {"share_prompt": False}}, {}),
    ("kto", {"data": {"share_prompt": False}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "over", "beside"), DATA, ids=str)
def test_a_key_of_the_data(method: str, over: dict[str, Any], beside: dict[str, Any]) -> None:
    name = {"dpo": "pairs", "kto": "labels"}.get(method, "chat")
    small = {"model": {"hf": HF}} if "tokenizer" not in str(over) else {}
    given = {"method": method, "data": {"train": [f"{name}.jsonl"], "max_rejected": 0.5}} | small
    base = laid(beside, laid(given, CHAT))
    assert seen(packs, laid(over, base)) != packs(copy.deepcopy(base))


CHORD: dict[str, Any] = {
    "method": {"name": "chord", "packs": 1}, "rollout": {}, "rewards": ["accuracy"],
    "data": {"train": ["chat.jsonl"], "demonstrations": ["chat.jsonl"], "max_rejected": 0.5},
}  # fmt: skip


def demonstrated(content: dict[str, Any]) -> list[Any]:
    """The worked answers of a step."""
    data = content["data"]
    data["demonstrations"] = [str(folder() / name) for name in data["demonstrations"]]
    data["cache"], content["model"]["tokenizer"] = str(folder() / "cache"), str(tokenizer_folder())
    own = demonstration_recipe(recipe_from(content))
    assert own is not None
    return [pack.tokens.tolist() for pack in RunData(own).loader(0, 1).next()]


@pytest.mark.parametrize(
    "over",
    [{"data": {"demonstrations": ["more.jsonl"]}}, {"method": {"packs": 2}}],
    ids=str,
)
def test_a_key_of_demonstrations(over: dict[str, Any]) -> None:
    base = laid(CHORD, CHAT)
    base["train"] = {"steps": 2}
    assert demonstrated(laid(over, base)) != demonstrated(copy.deepcopy(base))


def test_where_a_run_is(tmp_path: Path) -> None:
    """What its data's bad records are written to."""
    for name in ("one", "two"):
        content = laid(
            {"data": {"train": [str(folder() / "bad.jsonl")], "max_rejected": 0.5}}, CHAT
        )
        content["model"]["tokenizer"] = str(tokenizer_folder())
        content["data"]["cache"] = str(folder() / "cache")
        RunData(recipe_from(content | {"run_dir": str(tmp_path / name)})).prepare()
        assert (tmp_path / name / "rejected.jsonl").is_file()


# Two steps of an engine

SEQUENCES = [[3, 14, 15, 92, 65, 35, 89], [79, 32, 38, 46], [26, 43, 38, 32, 79, 50], [1, 2, 3, 4]]
ROUTED = {"router": {"aux_loss": 0.01, "z_loss": 0.01}}
LORA = {"adapter": {"type": "lora", "rank": 4, "alpha": 8.0, "target": ["q_proj", "o_proj"]}}
STEPS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "optim": ({"optim": {"lr": 1e-2, "weight_decay": 0.1}}, [
        {"optim": {"lr": 2e-2}}, {"optim": {"beta1": 0.5}}, {"optim": {"beta2": 0.5}},
        {"optim": {"eps": 1e-2}}, {"optim": {"weight_decay": 0.5}}, {"optim": {"clip_grad": 0.01}},
        {"optim": {"groups": [{"match": ["mlp.gate"], "lr_scale": 0.5}]}},
    ]),
    "muon": ({"optim": {"name": "muon", "lr": 1e-2}}, [
        {"optim": {"muon_momentum": 0.5}}, {"optim": {"muon_nesterov": False}},
        {"optim": {"muon_num_ns_steps": 2}}, {"optim": {"muon_scale_mode": "shape_scaling"}},
        {"optim": {"muon_scale_mode": "unit_rms_norm"}}, {"optim": {"name": "adamw"}},
        {"optim": {"muon_extra_scale_factor": 1.0}},
        {"optim": {"groups": [{"match": ["mlp.gate"], "name": "adamw"}]}},
    ]),
    "train": ({}, [
        {"train": {"micro_batch": 2}}, {"train": {"deterministic": True}},
        {"train": {"overlap": False}}, {"train": {"recompute": "selective"}},
        {"train": {"recompute": "full"}}, {"model": {"dtype": "bf16"}},
        {"optim": {"grad_dtype": "bf16"}, "model": {"dtype": "bf16"}},
    ]),
    "router": (ROUTED, [
        {"router": {"aux_loss": 0.5}}, {"router": {"z_loss": 0.5}}, {"router": {"freeze": True}},
        {"router": {"balance": "global"}},
        {"model": {"init": "random"}}, {"trainable": ["self_attn"]}, LORA,
    ]),
    "weights made here": ({"model": {"init": "random"}}, [
        {"seed": 7}, {"model": {"init_std": 0.2}},
    ]),
    "adapter": (LORA, [
        *({"adapter": {"type": kind}} for kind in ("rslora", "olora", "dora", "pissa")),
        {"adapter": {"rank": 3}}, {"adapter": {"alpha": 3.0}}, {"adapter": {"target": ["v_proj"]}},
        {"adapter": {"loraplus_lr_ratio": 16.0}}, {"adapter": {"dropout": 0.3}},
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    made: Path = tmp_path_factory.mktemp("mixed")
    save_model("qwen3_moe", made, num_hidden_layers=2, decoder_sparse_step=2)
    return str(made)


@pytest.mark.gloo
@pytest.mark.parametrize("part", STEPS)
def test_a_key_of_the_engine(workers: Workers, model: str, part: str) -> None:
    base, others = STEPS[part]
    base = {"train": {"global_batch": 4}} | base
    found = workers.run(1, footprint.differences, model, SEQUENCES, base, others)[0]
    for over, changed in zip(others, found, strict=True):
        assert changed, f"{over} changed nothing"


# What a run leaves behind

RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"checkpoint": {"every": 3}}, {}),
    ({"checkpoint": {"keep": 1}}, {}),
    ({"checkpoint": {"best": "eval_loss"}}, {"checkpoint": {"keep": 1}, "optim": {"lr": 0.3}}),
    ({"checkpoint": {"export_hf": True}}, {}),
    ({"checkpoint": {"save_optimizer": False}}, {}),
    ({"observe": {"tensorboard": True}}, {}),
    ({"train": {"eval_every": 1}}, {}),
    ({"train": {"eval_packs": 1}}, {}),
]  # fmt: skip


def left(workers: Workers, folder: Path, over: dict[str, Any]) -> list[Any]:
    """The files of a run, their sizes, and its ledger."""
    made = make_recipe(folder, "run", **over)
    assert workers.run(1, supervised.train, made) == [0]
    files = {str(path.relative_to(made.run_dir)) for path in made.run_dir.rglob("*")}
    names = sorted({name.split("tfevents")[0] for name in files})
    sizes = sorted(path.stat().st_size // 4096 for path in made.run_dir.rglob("*.distcp"))
    return [names, sizes, rows(made)]


@pytest.mark.gloo
def test_a_key_of_a_run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> None:
    plain: dict[str, list[Any]] = {}
    for over, beside in RUNS:
        if (base := repr(beside)) not in plain:
            plain[base] = left(workers, tmp_path_factory.mktemp("plain"), beside)
        found = left(workers, tmp_path_factory.mktemp("other"), laid(over, beside))
        assert found != plain[base], over


def test_a_progress_display_and_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        made = make_recipe(tmp_path, str(shown), observe={"progress": shown})
        made.run_dir.mkdir()
        with Reporter(made, 3, 0, speaks=True) as report:
            report.say("a line")
        assert ("a line" in capsys.readouterr().out) == shown
    asked = make_recipe(tmp_path, observe={"wandb": {"project": "x"}})
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(MoetrainError, match="wandb is not installed"):
            check_sinks(asked)


def test_where_the_cache_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        packs(laid({"data": {"train": ["chat.jsonl"], "cache": str(tmp_path / name)}}, LOOSE))
        assert [path.name for path in (tmp_path / name).iterdir()]


# How servers are started

ROLLOUT = Path(__file__).parents[1] / "examples" / "grpo_tiny.yaml"
SERVED: list[tuple[str, Any]] = [
    ("python", "/nonexistent/python"),
    ("address", ["http://127.0.0.1:1"]),
    ("num_servers", 2),
    ("tensor_parallel", 2),
    ("host", "0.0.0.0"),
    ("gpu_memory", 0.5),
    ("max_queue", 7),
    ("engine_args", {"max_model_len": 64}),
    ("routing_replay", True),
    ("timeout", 3.0),
    ("start_timeout", 3.0),
    ("push", "nccl"),
    ("push", "ipc"),
]


def served(folder: Path, **rollout: Any) -> Any:
    """How the servers of a recipe would be started."""
    content = load_recipe(ROLLOUT).model_dump(mode="json")
    content |= {"run_dir": str(folder)}
    # Nothing is started: any interpreter stands for vLLM's.
    content["rollout"] |= {"engine": "vllm", "python": sys.executable} | rollout
    recipe = recipe_from(content)
    check_fleet(recipe)
    fleet = open_fleet(recipe, {"a": 1}, tokenizer_folder())
    shown = [vars(server) | {"launch": None} for server in fleet.servers]
    launches = [server.launch.settings | {"base": ""} for server in fleet.servers]  # type: ignore[attr-defined]
    return repr((shown, launches, rollout.get("token_file") and fleet.servers))


@pytest.mark.parametrize(("key", "value"), SERVED, ids=str)
def test_a_key_of_the_servers(tmp_path: Path, key: str, value: Any) -> None:
    plain = served(tmp_path / "plain")
    found = seen(lambda given: served(tmp_path / "other", **given), {key: value})
    assert found != plain


def test_who_answers() -> None:
    """The servers' interpreter is looked at where they answer, and is of no use elsewhere."""
    content = load_recipe(ROLLOUT).model_dump(mode="json", exclude_unset=True)
    check_engine(recipe_from(laid({"rollout": {"engine": "embedded"}}, content)))
    servers = {"rollout": {"engine": "vllm", "python": "/nonexistent/python"}}
    with pytest.raises(RolloutError, match=r"rollout\.python=/nonexistent/python is no program"):
        check_engine(recipe_from(laid(servers, content)))


def test_the_token_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-token-of-a-file")
    (tmp_path / "token").chmod(0o600)
    content = load_recipe(ROLLOUT).model_dump(mode="json")
    content["rollout"] |= {
        "engine": "vllm",
        "python": sys.executable,  # nothing is started
        "token_file": str(tmp_path / "token"),
    }
    content["run_dir"] = str(tmp_path)
    fleet = open_fleet(recipe_from(content), {}, tokenizer_folder())
    assert "secret-token-of-a-file" in repr([vars(s)["launch"].token for s in fleet.servers])


# What sampling gives

SAMPLED: list[dict[str, Any]] = [
    {"rollout": {"prompts_per_step": 3}},
    {"rollout": {"group_size": 3}},
    {"rollout": {"max_tokens": 5}},
    {"rollout": {"temperature": 0.3}},
    {"rollout": {"eval_prompts": 1}},
    {"rollout": {"eval_temperature": 1.5}},
    {"rollout": {"tolerance": 1e-12}},
    {"rollout": {"reward_seconds": 1e-6}},
    {"rollout": {"replay": "plain/rollouts"}},
    {"train": {"eval_packs": 1}},
    {"method": {"inner_steps": 2}},
    {"method": {"num_iterations": 2}},
    {"method": {"truncated": "mask"}},
    {"rewards": [{"name": "length", "options": {"target": 4}}]},
]


def sampled(workers: Workers, folder: Path, over: dict[str, Any]) -> Any:
    """The ledger of one step."""
    few = [
        "train.steps=1",
        "data.seq_len=128",
        "data.take=[64]",
        "observe.tensorboard=false",
        "observe.progress=false",
    ]
    few += ["rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_tokens=12"]
    few += [
        "observe.progress=false",
        "rollout.eval_prompts=6",
        "rewards=[{name: length, options: {target: 40}}]",
    ]
    content = load_recipe(ROLLOUT, few).model_dump(mode="json") | {"run_dir": str(folder)}
    if "replay" in over.get("rollout", ()):
        over = {"rollout": {"replay": str(folder.parent / over["rollout"]["replay"])}}
    made = recipe_from(laid(over, content))
    assert workers.run(1, rl.train, made) == [0]
    return rows(made)


@pytest.mark.gloo
def test_a_key_of_the_rollouts(workers: Workers, tmp_path: Path) -> None:
    plain = sampled(workers, tmp_path / "plain", {})
    for number, over in enumerate(SAMPLED):
        found = seen(lambda given: sampled(workers, tmp_path / str(number), given), over)  # noqa: B023
        assert found != plain, over
