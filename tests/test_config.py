"""Recipes: what is resolved, what is refused, and in which words. No torch."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from moetrain.config import foreign
from moetrain.config.builtin import MODELS
from moetrain.config.load import (
    dump_recipe,
    load_recipe,
    recipe_from,
    recipe_hash,
    sections_below,
)
from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import ConfigError
from moetrain.models import read_model

BASE = """
run_dir: runs/x
model: {path: "builtin:qwen3-moe-tiny"}
method: sft
data: {train: a.jsonl}
train: {steps: 3}
"""


def load(folder: Path, *overrides: str, text: str = BASE) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refusal(folder: Path, *overrides: str, text: str = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, text=text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_shorthands(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.method.name == "sft"
    assert recipe.data.train == ["a.jsonl"]
    assert recipe.data.eval == []
    assert recipe.parallel.etp == 1
    assert recipe.parallel.sp is False


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.train=[a, b]", "data.train", ["a", "b"]),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=2.E-5", "optim.lr", 2e-5),
        ("method={name: cpt}", "method.name", "cpt"),
        ("method.name=pretrain", "method.name", "pretrain"),
        ("observe.wandb.project=x=y", "observe.wandb", {"project": "x=y"}),
        ("megatron.moe_permute_fusion=true", "megatron", {"moe_permute_fusion": True}),
        ("parallel={pp: 2, vpp: 1}", "parallel.vpp", None),  # no interleaving
    ],
)
def test_override(tmp_path: Path, override: str, key: str, value: Any) -> None:
    found: Any = load(tmp_path, override)
    for name in key.split("."):
        found = vars(found)[name]
    assert found == value


@pytest.mark.parametrize("tp", ["2", "2.0", "'2'"])
def test_sequence_parallel_follows_tp(tmp_path: Path, tp: str) -> None:
    """However YAML writes the number: an sp that stays off where tp is on trains another layout."""
    assert load(tmp_path, f"parallel.tp={tp}").parallel.sp is True
    assert load(tmp_path, f"parallel.tp={tp}", "parallel.sp=null").parallel.sp is True
    assert load(tmp_path, f"parallel.tp={tp}", "parallel.sp=false").parallel.sp is False
    assert ParallelConfig(tp=2).sp is True


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    recipe = load(tmp_path, "run_dir=~/run", "model.path=~/m", "data.train=[~/a]", "data.cache=~/c")
    assert recipe.run_dir == Path("/h/run")
    assert recipe.model.path == "/h/m"
    assert recipe.data.train == ["/h/a"]
    assert recipe.data.cache == Path("/h/c")


def test_empty_section_has_its_defaults(tmp_path: Path) -> None:
    text = BASE + "optim:\n#  lr: 1\n"
    assert load(tmp_path, text=text) == load(tmp_path)
    assert load(tmp_path, "optim.lr=2", text=text).optim.lr == 2


def bomb(nest: str, alias: str) -> str:
    """Nine lines of YAML that come to 9**8 values."""
    lines = ["a: &a {x: 1, y: 2}"]
    for above, name in pairwise("abcdefghi"):
        lines.append(f"{name}: &{name} {nest % ', '.join([alias % above] * 9)}")
    return "{" + ", ".join(lines) + "}"


def deep_alias() -> str:
    """No part is deep by itself."""
    return "{a: &a " + "[" * 60 + "]" * 60 + ", b: " + "[" * 60 + "*a" + "]" * 60 + "}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "Did you mean 'optim.lr'?", "warmup"]),
        ("train.lr=1", ["'train.lr'", "Did you mean 'optim.lr'?", "global_batch"]),
        ("method.gamma=1", ["'method.gamma'. It is a key of simpo, ppo. Allowed there: "]),
        ("tp=2", ["'tp'", "Did you mean 'parallel.tp'?"]),
        ("modle.path=x", ["'modle'", "Did you mean 'model'?"]),
        ("method.beta=1", ["'method.beta'", "name"]),
        ("method=dpoo", ["'dpoo'", "dpo", "pretrain", "cpt", "sft"]),
        ("method.name=[1]", ["method.name", "pretrain"]),
        ("method=5", ["'method.name' is 5", "pretrain, cpt, sft"]),
        ("method={}", ["'method.name' is None", "pretrain, cpt, sft"]),
        ("method.sft.x=2", ["unknown key 'method.sft'"]),
        ("method={name: dpo, betta: 1}", ["'method.betta'", "'method.beta'", "beta, discopop_tau"]),
        ("method=grpo", ["method grpo learns from rollouts", "give rollout"]),
        (
            "megatron.moe_router_enable_expert_bias=true",
            ["would do nothing here", "router.balance=global", "e_score_correction_bias"],
        ),
        ("megatron.num_layers=3", ["megatron.num_layers is set by moetrain", "Remove it"]),
        ("parallel=3", ["'parallel' is 3, not a section", "etp"]),
        ("data.train=[1]", ["'data.train.0' is 1", "string"]),
        ("train.steps=1.5", ["'train.steps' is 1.5", "integer"]),
        ("observe.progress=maybe", ["'observe.progress' is 'maybe'", "boolean"]),
        ("train.epochs=1", ["train.steps", "train.epochs"]),
        ("train.steps=null", ["train.steps", "train.epochs"]),
        ("train.steps=0", ["'train.steps'", "0", "greater than or equal to 1"]),
        ("train.micro_batch=3", ["train.global_batch=8", "train.micro_batch=3"]),
        ("model.hf={}", ["model.path", "model.hf"]),
        ("model.path=null", ["model.path", "model.hf"]),
        ("parallel.vpp=2", ["parallel.vpp=2", "parallel.pp > 1"]),
        ("parallel.sp=true", ["parallel.sp", "parallel.tp > 1"]),
        ("parallel.tp=0", ["'parallel.tp'", "0"]),
        ("parallel.tp=two", ["'parallel.tp'", "'two'"]),
        ("optim.lr=.nan", ["'optim.lr'", "finite"]),
        ("optim.lr=.inf", ["'optim.lr'", "finite"]),
        ("optim.offload=2", ["'optim.offload'", "less than or equal to 1"]),
        ("optim.schedule=cosin", ["'optim.schedule'", "'cosine'", "'wsd'"]),
        ("megatron.moe_permute_fuzion=true", ["not a TransformerConfig", "'moe_permute_fusion'"]),
        ("megatron.recompute_modules=[moe]", ["'moe'", "train.recompute=full"]),
        ("data.train=[]", ["'data.train'"]),
        ("data.weights=[1, 2]", ["2 numbers for 1"]),
        ("run_dir=null", ["'run_dir' is missing"]),
        ("optim.lr", ["'optim.lr'", "key=value"]),
        ("=1", ["key=value"]),
        ("seed.x=1", ["'seed'", "a value, not a section"]),
        ("optim.lr=[1", ["override optim.lr", "not YAML"]),
        ("optim.\udcff=1", ["not UTF-8 text"]),
        ("seed=" + "[" * 20000, ["seed", "nested too deeply (more than 100 levels)"]),
        ("seed=" + "{a: " * 20000, ["seed", "nested too deeply (more than 100 levels)"]),
        ("seed=-1", ["'seed' is -1", "greater than or equal to 0"]),
        ("seed=4294967296", ["'seed'", "less than 4294967296"]),
        ("seed=0b" + "1" * 5000, ["seed", "too long (more than 1,000 digits)"]),
        ("seed=" + "1:" * 4000 + "1", ["seed", "too long (more than 1,000 digits)"]),
        ('run_dir="a\\0b"', ["run_dir", "column 1", "'\\x00'", "no path"]),
        ('data.train="a\\ud800b"', ["data.train", "'\\ud800'", "no path"]),
        ('model.path={"a\\0b": 1}', ["model.path", "'\\x00'"]),
        ("model.hf=!!binary /w==", ["model.hf", "could not determine a constructor"]),
        ("model.hf=&a {b: *a}", ["model.hf", "the alias *a is inside of what it refers to"]),
        ("model.hf=" + bomb("[%s]", "*%s"), ["too many values (more than 100,000"]),
        ("model.hf=" + bomb("{<<: [%s]}", "*%s"), ["too many values (more than 100,000"]),
        ("model.hf=" + deep_alias(), ["nested too deeply (more than 100 levels)"]),
        ("seed=" + "x" * 2_000_001, ["seed", "2,000,001 characters", "at most 2,000,000"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_refused_override(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, override, text=BASE + "seed: 1\n")
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["mapping"]),
        ("- a\n", ["mapping"]),
        (BASE + "seed: 1\nseed: 2\n", ["line 8", "'seed'", "twice"]),
        (BASE + "optim: {lr: 1, lr: 2}\n", ["line 7", "'lr'", "twice"]),
        (BASE + "x: [\n", ["line 8", "not YAML"]),
        (BASE + "x: \0\n", ["not YAML"]),
        (BASE + "x: 2026-13-45\n", ["not YAML"]),
        (BASE + "1: 2\n", ["unknown key '1'"]),
        (BASE.replace("model:", "modle:"), ["'modle'", "Did you mean 'model'?"]),
        (BASE.replace("method: sft", ""), ["'method' is missing"]),
    ],
)
def test_refused_file(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text=text)
    assert "r.yaml" in message
    assert not [word for word in words if word not in message], message


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file.*examples/"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"embedded null byte.*examples/"):
        load_recipe(tmp_path / "a\0b.yaml")
    (tmp_path / "b.yaml").write_bytes(b"run_dir: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 9"):
        load_recipe(tmp_path / "b.yaml")


def test_merge_keys_still_work(tmp_path: Path) -> None:
    text = BASE + "optim: &o {lr: 1}\nobserve: {wandb: {<<: *o, a: 2}}\n"
    assert load(tmp_path, text=text).observe.wandb == {"lr": 1, "a": 2}


@settings(max_examples=50, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
    | st.sampled_from(["1e5", "12e45", "1.e-3", "no", "null", "~x", "0x1f", "1:30", "2026-01-01"]),
    lr=st.floats(0, 1, allow_nan=False),
)
def test_dump_is_read_back(tmp_path_factory: pytest.TempPathFactory, name: str, lr: float) -> None:
    """Also strings that our loader would take for numbers, such as a W&B run id."""
    content = {
        "run_dir": "r",
        "model": {"hf": {"k": name}},
        "method": "sft",
        "data": {"train": ["a"]},
        "train": {"epochs": 0.5},
        "optim": {"lr": lr},
        "observe": {"wandb": {"id": name}},
    }
    recipe = recipe_from(content)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert recipe_hash(load_recipe(path)) == recipe_hash(recipe)


def test_every_key_is_described() -> None:
    """docs/recipes.md is made of these."""
    keys = _leaves(Recipe)
    assert len(keys) > 60
    assert not [key for key, described in keys.items() if not described]


def _leaves(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        below = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        for kind in below:
            found |= _leaves(kind, f"{prefix}{name}:{kind.__name__}.")
        if not below:
            found[prefix + name] = bool(field.description)
    return found


def test_overrides_are_laid_in_order(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").seed == 2
    given = load(tmp_path, "method=cpt", "method.name=pretrain", "optim={lr: 1}", "optim.eps=1e-6")
    assert given.method.name == "pretrain"
    assert (given.optim.lr, given.optim.eps) == (1, 1e-6)


def test_hash_sees_every_key(tmp_path: Path) -> None:
    assert recipe_hash(load(tmp_path)) == recipe_hash(load(tmp_path, "parallel.sp=false"))
    assert recipe_hash(load(tmp_path)) != recipe_hash(load(tmp_path, "data.seq_len=1"))


def test_builtin_model_is_of_a_known_family() -> None:
    models = {name: read_model(hf) for name, hf in MODELS.items()}
    tiny = models["qwen3-moe-tiny"]
    assert tiny.moe is not None
    assert (tiny.num_experts, tiny.moe.router.top_k, tiny.attention.head_dim) == (8, 2, 32)
    assert tiny.attention.head_dim != tiny.hidden // tiny.attention.heads


# Rewards

GRPO = """
run_dir: runs/x
model: {path: "builtin:qwen3-moe-tiny"}
method: grpo
data: {train: a.jsonl}
train: {steps: 3}
rollout: {}
rewards: [accuracy, {name: format, weight: 0.2}, "./own.py:emoji"]
"""


def test_rewards_are_resolved(tmp_path: Path) -> None:
    more = "rewards=[exact,{name: length, options: {target: 9}},{name: ./o.py:f, options: {k: 1}}]"
    rewards = load(tmp_path, text=GRPO).rewards
    assert [(r.label, r.weight) for r in rewards] == [
        ("accuracy", 1.0),
        ("format", 0.2),
        ("emoji", 1.0),
    ]
    rewards = load(tmp_path, more, text=GRPO).rewards
    assert [r.options for r in rewards] == [{}, {"target": 9}, {"k": 1}]
    judge = "{name: judge, label: strict, options: {url: http://h/v1, model: m}}"
    recipe = load(tmp_path, f"rewards=[code,{judge}]", text=GRPO)
    assert [r.label for r in recipe.rewards] == ["code", "strict"]
    assert recipe.rewards[0].options["scoring"] == "pass_fail"
    again = load(tmp_path, text=dump_recipe(recipe))
    assert again.rewards == recipe.rewards


SERVED = "name: reward_model, options: {path: p"
AT = "address: 'http://h:1'"
JUDGE = "name: judge, options: {model: m, url: http://h/v1"


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[acuracy]", "'acuracy' is not known.*Did you mean 'accuracy'"),
        ("[my_rewards.py]", "FILE.py:FUNCTION"),
        ("[exact, exact]", "two are called 'exact'"),
        ("[a.py:f, b.py:f]", "two are called 'f'"),
        ("[{name: length, options: {traget: 3}}]", "no option 'traget'.*Did you mean 'target'"),
        ("[{name: length, options: {target: 0}}]", "length: option target: .*greater"),
        ("[{name: exact, options: {x: 1}}]", "exact has no option 'x'.*It has: none"),
        ("[{name: format, options: {pattern: '('}}]", "is not a regular expression"),
        ("[{name: format, options: {pattern: 'x{99999999999}'}}]", "is not a regular expression"),
        ("[{name: tag_count, options: {tags: ['<plan>']}}]", "'<plan>': give names without"),
        ("[{name: tag_count, options: {tags: []}}]", "option tags: "),
        ("[{name: language, options: {script: klingon}}]", "option script: .*'JAPANESE'"),
        ("[{name: code, options: {sandbox: docker}}]", "option sandbox: .*'bubblewrap'"),
        ("[{name: code, options: {sandbox: piston}}]", "piston and url go together"),
        ("[{name: code, options: {languages: []}}]", "option languages: "),
        ("[{name: code, options: {test_batch_size: 0}}]", "is 0: give 1 or more, or -1"),
        ("[{name: code, options: {compare: bytes}}]", "option compare: .*'words'"),
        ("[{name: cosine, options: {unit: words}}]", "option unit: .*'tokens'"),
        ("[{name: repetition_penalty, options: {max_penalty: 1}}]", "option max_penalty: "),
        ("[{name: len_reward, options: {target: 9}}]", "len_reward has no option 'target'"),
        ("[cf_code]", "'cf_code' is not known.*Here it is code with compare: words"),
        ("[{name: soft_overlong_punishment}]", "'soft_overlong_punishment' .*Here it is "),
        ("[judge]", "judge needs the option"),
        ("[reward_model]", "reward_model needs the option 'path'"),
        (f"[{{{SERVED}, address: h}}}}]", "option address: .*'h' is not an address"),
        (f"[{{{SERVED}, concurrency: 3}}}}]", "concurrency does nothing without address"),
        (f"[{{{SERVED}, model: m}}}}]", "model does nothing without address"),
        (f"[{{{SERVED}, key_env: K}}}}]", "key_env does nothing without address"),
        (f"[{{{SERVED}, {AT}, device: cpu}}}}]", "device does nothing with address"),
        (f"[{{{SERVED}, {AT}, dtype: bf16}}}}]", "dtype does nothing with address"),
        (f"[{{{SERVED}, {AT}, batch_size: 3}}}}]", "batch_size does nothing with address"),
        (f"[{{{SERVED}, {AT}, start_seconds: 3}}}}]", "start_seconds does nothing with address"),
        ("[{name: judge, options: {model: m, url: h}}]", "'h' is not an address"),
        (f"[{{{JUDGE}, pattern: x}}}}]", "one group"),
        (f"[{{{JUDGE}, pattern: '('}}}}]", "not a regular expression"),
        (f"[{{{JUDGE}, pattern: '(x{{99999999999}})'}}}}]", "not a regular expression"),
        (f"[{{{JUDGE}, prompt: hello}}}}]", "must have {completion} in it"),
        (f"[{{{JUDGE}, low: 1, high: 1}}}}]", "must differ"),
    ],
)
def test_rewards_are_refused(tmp_path: Path, rewards: str, message: str) -> None:
    assert re.search(message, refusal(tmp_path, f"rewards={rewards}", text=GRPO))


# Names of other trainers


def test_every_foreign_name_leads_to_a_key() -> None:
    """And none hides a key of a recipe's own."""
    sections = sections_below(Recipe)
    known = {*sections} | {f"{name}.{leaf}" for name, below in sections.items() for leaf in below}
    assert not {*foreign.KEYS.values()} - known
    assert not {*foreign.ADVICE} - {*foreign.KEYS}
    leaves = {leaf for below in sections.values() for leaf in below}
    homes = {name: key.rpartition(".")[2] for name, key in foreign.KEYS.items() if name in leaves}
    others = {name for name, own in homes.items() if name != own}
    assert others <= {"max_length", "loss_type"}  # dapo's; dpo's and kto's
    assert not leaves & {*foreign.NOTHING}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1e-5", "Here it is 'optim.lr'."),
        ("learning-rate=1e-5", "Here it is 'optim.lr'."),
        ("gradient_accumulation_steps=4", "Here it is 'train.global_batch' (it counts the packs"),
        ("train.per_device_train_batch_size=2", "Here it is 'train.micro_batch' (packs in one"),
        ("train.num_train_epochs=3", "Here it is 'train.epochs'."),
        ("data.max_length=9", "Here it is 'data.seq_len'."),
        ("lora_rank=8", "Here it is 'adapter.rank'."),
        ("cutoff_len=8", "Here it is 'data.seq_len'."),
        ("logging_steps=1", "There is none here: every step is written to ledger.jsonl."),
        (
            "actor_rollout_ref={model: {x: 1}, actor: {kl_loss_coef: 0.1}}",
            "Of actor_rollout_ref.actor.kl_loss_coef: Here it is 'method.beta'.",
        ),
        ("method.length=3", "It is a key of dr_grpo."),
    ],
)
def test_a_name_of_another_trainer(tmp_path: Path, override: str, said: str) -> None:
    message = refusal(tmp_path, override)
    assert message.startswith(f"override {override}: unknown key '")
    assert said in message


@pytest.mark.parametrize(
    ("overrides", "text", "start"),
    [
        (["seed=1", "optim.lr=x"], "", "override optim.lr=x: 'optim.lr' is 'x'"),
        (["train.epochs=2"], "", "override train.epochs=2: train.steps=3 and train.epochs=2 both"),
        (["seed=1", "parallel.vpp=2"], "", "override seed=1 parallel.vpp=2: parallel.vpp=2 needs"),
        (["seed=1"], "optim: {lrr: 1}\n", "r.yaml: unknown key 'optim.lrr'"),
        (["optim.lx=1"], "optim: {lrr: 1}\n", "r.yaml: unknown key 'optim.lrr'"),
        (["optim.lr=x"], "model.x: 1\n", "r.yaml: unknown key 'model.x'"),
    ],
)
def test_who_is_to_blame(tmp_path: Path, overrides: list[str], text: str, start: str) -> None:
    message = refusal(tmp_path, *overrides, text=BASE + text)
    assert message.removeprefix(f"{tmp_path}/").startswith(start)


def test_two_lengths_say_the_mend(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.epochs=2")
    mend = message.partition("null (")[2].rstrip(")").split()
    assert load(tmp_path, *mend).train.epochs == 2
