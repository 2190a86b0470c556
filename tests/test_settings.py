"""Every key of a recipe changes something that is looked at here, or is refused: all sections, all
methods, all values of literals. TransformerConfig's fields are in test_megatron_fields.py.

What a key does is observed, each where it is cheapest: in the losses, in the learning rates, in a
dry run, and in tests/test_settings_runs.py in packs, in an engine's steps, in what a run leaves
behind, in how servers are started. The few that take more than that name the test that shows them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from settings_helpers import HF, REFUSED, laid, seen
from test_distill import STUDENT, TEACHER, pack_of
from test_methods import CASES, packed
from test_methods import computed as offline_loss
from test_online import Answer, answers
from test_settings_runs import DATA, RUNS, SAMPLED, SERVED, STEPS
from torch import Tensor

from moetrain.config.load import _models, recipe_from
from moetrain.config.method import MethodConfig
from moetrain.config.optim import OptimConfig
from moetrain.config.reads import RULES, SERVER_RULE, unread
from moetrain.config.recipe import Recipe
from moetrain.engine.optim import learning_rate
from moetrain.loops.batch_values import with_targets
from moetrain.methods import METHODS
from moetrain.methods.base import Out
from moetrain.ops.packed import DEMONSTRATION, concat
from moetrain.run.dry_run import dry_run


def literals(section: type[BaseModel], key: str) -> tuple[Any, ...]:
    """The values that a key may have, where they are few."""
    for kind in (
        section.model_fields[key].annotation,
        *get_args(section.model_fields[key].annotation),
    ):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


# Methods, by their losses and what they make of rewards

# field -> a value that is not the default
OTHER: dict[str, Any] = {
    "beta": 0.7, "reference": "base", "kl_budget": 3.0, "label_smoothing": 0.3, "rpo_alpha": 0.5,
    "desirable_weight": 2.0, "undesirable_weight": 2.0, "gamma": 0.5, "center_rewards": 0.5,
    "clip_low": 0.01, "clip_high": 5.0, "mismatch_cap": 1.01, "length": 7, "max_length": 6,
    "soft_length": 5, "max_rounds": 3, "lam": 0.3, "value_weight": 0.7,
    "value_clip": 0.01, "mu_peak": 0.5, "mu_valley": 0.2, "mu_warmup": 3, "mu_decay": 9,
    "missing_eos_penalty": 0.5, "reward_clip": 0.3, "kl_target": 3.0, "kl_horizon": 50,
    "loss_type": "apo_zero", "loss_weights": [0.5], "discopop_tau": 0.5, "ld_alpha": 0.5,
    "delta": 1.5, "mismatch_floor": 0.95,
    "entropy_coef": 0.5, "top_entropy_quantile": 0.4, "off_policy_mask_threshold": 0.01,
    "tau_pos": 3.0, "tau_neg": 3.0,
    "discount": 0.5, "reward_weight": 0.5, "interpolation": 0.4, "answer_weight": 0.5,
}  # fmt: skip
# What only a run shows, and the test that does: its source names the key.
SHOWN_BY: dict[str, str] = {
    "method.reference": "test_reference_start",
    "method.inner_steps": "test_settings_runs",
    "method.num_iterations": "test_settings_runs",
    "method.ref_model_sync_steps": "test_rl",
    "method.ref_model_mixup_alpha": "test_rl",
    "method.packs": "test_settings_runs",
    "method.truncated": "test_settings_runs",
    "method.top_k": "test_teacher",
    "teacher": "test_teacher",
    **{f"teacher.{key}": "test_teacher" for key in ("path", "system")},
    **{
        f"teacher.{key}": "system.test_vllm_teacher"
        for key in ("address", "model", "key_env", "concurrency", "seconds")
    },
    "rollout.steps_off": "test_rl",
    **{f"rollout.{key}": "test_oversample" for key in ("oversample", "partial", "max_staleness")},
    **{f"rollout.{key}": "test_drawn" for key in ("top_p", "top_k", "min_p", "stop")},
    "rollout.repetition_penalty": "test_drawn",
    "rollout.token_file": "test_settings_runs",
    **{f"rollout.{key}": "test_environments" for key in ("environment", "tools")},
    "data.cache": "test_settings_runs",
    "data.demonstrations": "test_settings_runs",
    "observe.progress": "test_settings_runs",
    "observe.wandb": "test_settings_runs",
    "adapter.path": "test_reference_start",
    "train.sample_prompts": "test_kill",
    "train.sample_tokens": "test_offline_runs",
    "run_dir": "test_settings_runs",
    "megatron": "test_megatron_fields",
    "rollout.engine": "test_settings_runs",
    "cluster.hang_seconds": "system.test_slurm",
    "cluster.prediction": "test_fit",
    "rollout.reward_workers": "system.test_slurm",
}
# These decide how fast, not what; or have one value.
SPEED = {"data.num_workers", "checkpoint.background", "model.backend", "method.name"}


def method_fields() -> Iterator[tuple[str, str]]:
    for kind in _models(Recipe.model_fields["method"].annotation):
        for key in kind.model_fields:
            if key != "name":
                yield str(kind.model_fields["name"].default), key


def what_a_method_makes(settings: dict[str, Any]) -> list[Any]:
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    method = METHODS[cfg.name]
    online = method.online
    if online is not None:
        cfg = cfg.within(12)  # tokens of the longest answer below
        settings = cfg.model_dump()
    found: list[Any] = [cfg.kl_limit, getattr(cfg, "rounds", 1)]
    if cfg.name == "distill":
        return [*found, taught_loss(settings)]
    if online is None:
        case = next(c for c in CASES if c["method"]["name"] == cfg.name)
        case = case | {"known": {"bco/shift": 0.1}}
        return [*found, offline_loss(case | {"method": settings}, [packed(case)])]
    rewards, group = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.2, 0.9]), torch.tensor([0, 0, 1, 1, 2, 2])
    sizes, cut = torch.tensor([3.0, 7.0, 1.0, 5.0, 12.0, 2.0]), torch.arange(6) == 4
    if online.shape is not None:
        found.append(online.shape(rewards, sizes, cut, cfg).tolist())
    if online.running is not None:
        rescaled, carried = online.running.rescale(rewards, cut, {}, cfg)
        found += [rescaled.tolist(), carried, online.running.steer(carried, 5.0, 6, cfg)]
    if online.drops is not None:
        found.append(online.drops(rewards, group, cfg).tolist())
    if online.shares is not None:
        found += [online.shares(step, cfg) for step in (1, 2, 5, 50, 500)]
    found += [online.whiten(cfg), online.advantages(rewards, group, cfg).tolist()]
    return [*found, terms_of(cfg, rewards, group)]


# Keys that do nothing where rewards are not learned from.
OF_REWARDS = (
    *("advantage_estimator", "scale_rewards", "dynamic_sampling", "max_rounds", "soft_length"),
    "max_length",
)


def taught_loss(settings: dict[str, Any]) -> float:
    """Of places where a teacher has said something, by all of a batch of one pack."""
    top, ids = TEACHER.log_softmax(-1).topk(3, -1)
    given = torch.cat([STUDENT.log_softmax(-1).gather(-1, ids), torch.zeros(3, 3)])
    out = Out(logp=given[:, 0], at_teacher=given)
    cfg: Any = TypeAdapter(MethodConfig).validate_python(settings)
    return float(METHODS[cfg.name].loss(out, pack_of(top, ids), cfg, {})[0]["loss"])


def clipped() -> list[Answer]:
    """Answers whose ratios are outside any clip on the side where it counts, and one of each on the
    other side.
    """
    found = answers()
    for i, answer in enumerate(found):
        answer.advantage = 1.0 - i % 2 * 2
        answer.logp = [old * (1.3 if i % 2 else 0.7) for old in answer.old]
        answer.logp[-1] = answer.old[-1] * (0.1 if i % 2 else 1.3)
    found[-1].logp = [old * 0.1 for old in found[-1].old]
    return found


def terms_of(cfg: Any, rewards: Tensor, group: Tensor) -> list[float]:
    """The terms of a pack of answers, the last of which is a demonstration where a method has
    them.
    """
    packs = [a.packed(1) for a in clipped()]
    method = METHODS[cfg.name]
    assert method.online is not None
    for i, pack in enumerate(packs):
        last = i == len(packs) - 1 and method.online.shares is not None
        own = torch.tensor([DEMONSTRATION if last else 1])
        pack.extras.update(role=own, share=torch.tensor([0.5]), place=torch.tensor([i]))
        pack.per_token["old_entropy"] = pack.per_token["value"] + 2
        pack.per_token["teacher_logp"] = pack.per_token["ref_logp"]
        pack.per_token["teacher_top"] = pack.per_token["ref_logp"][:, None]
    (pack,) = with_targets([concat(packs)], method.online, cfg, rewards, group, None)
    known = pack.per_token
    own = known["logp"]
    out = Out(own, known["old_entropy"], known["value"], at_teacher=own[:, None])
    terms, _ = method.loss(out, pack, cfg, {})
    counts = method.count(pack, cfg)
    return [float(terms[name] / counts[name]) for name in terms]


def method_cases() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(method, key, value, what must be set beside it)."""
    fields = {
        m.model_fields["name"].default: m for m in _models(Recipe.model_fields["method"].annotation)
    }
    for name, key in method_fields():
        if f"method.{key}" in SHOWN_BY:
            continue
        default = fields[name].model_fields[key].default
        flipped = (not default,) if isinstance(default, bool) else ()
        given = literals(fields[name], key) or flipped or (OTHER[key],)
        beside: dict[str, Any] = {}
        if name == "gkd":  # which has no reference and learns from no reward
            beside = {}
        elif key.startswith(("kl_", "use_bias")) and METHODS[name].online:
            beside = {"beta": 0.7}
        if key in ("discopop_tau", "reward_shift"):
            beside = {"loss_type": "discopop" if key == "discopop_tau" else "bco_pair"}
        if key in ("kl_target", "kl_horizon"):
            beside = {"beta": 0.7} | ({"kl_target": 3.0} if key == "kl_horizon" else {})
        if key in ("max_length", "max_rounds") and name != "gkd":
            beside = {"soft_length": 5} if key == "max_length" else {"dynamic_sampling": True}
        if name == "on_policy_distill" and key in OF_REWARDS:
            beside |= {"reward_weight": 0.5}
        if key == "soft_length" and name == "dapo":
            beside = {"max_length": 6}
        for value in given:
            if value != default and [value] != default:
                yield name, key, value, beside


@pytest.mark.parametrize(("name", "key", "value", "beside"), method_cases())
def test_a_methods_key(name: str, key: str, value: Any, beside: dict[str, Any]) -> None:
    plain = what_a_method_makes({"name": name, **beside})
    given = {"name": name, **beside, key: value}
    assert seen(what_a_method_makes, given) != plain, f"method.{key}={value} of {name}"


@pytest.mark.parametrize("key", SHOWN_BY)
def test_where_a_run_shows_it(key: str) -> None:
    path = Path(__file__).parent / f"{SHOWN_BY[key].replace('.', '/')}.py"
    assert key.split(".")[-1] in path.read_text()


# Learning rates


def rates(optim: dict[str, Any]) -> list[float]:
    config = OptimConfig.model_validate(optim)
    return [learning_rate(step, config, 40) for step in range(1, 41)]


RATES: list[tuple[str, Any, dict[str, Any]]] = [
    ("lr", 0.5, {}),
    ("min_lr", 1e-5, {}),
    ("warmup", 5, {}),
    ("warmup", 0.25, {}),
    ("decay_steps", 7, {}),
    *(("schedule", v, {}) for v in literals(OptimConfig, "schedule") if v != "cosine"),
    *(("wsd_decay", v, {"schedule": "wsd", "decay_steps": 9})
      for v in literals(OptimConfig, "wsd_decay") if v != "linear"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "beside"), RATES)
def test_a_schedules_key(key: str, value: Any, beside: dict[str, Any]) -> None:
    assert rates(beside | {key: value}) != rates(beside)
    assert len({tuple(rates({"schedule": s})) for s in literals(OptimConfig, "schedule")}) == 4


# The plan


def plan(content: dict[str, Any]) -> str:
    text = dry_run(recipe_from(content), None)
    return text[text.index("\n# ") :]  # behind the recipe itself


PP = {"parallel": {"pp": 2}}
PLANS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"parallel": {k: 2}}, {}) for k in ("tp", "pp", "ep", "cp")),
    ({"parallel": {"etp": 2}}, {"parallel": {"tp": 2}}),
    ({"parallel": {"sp": False}}, {"parallel": {"tp": 2}, "router": {}}),
    ({"parallel": {"vpp": 2}}, PP),
    ({"parallel": {"first_stage_layers": 1}}, PP),
    ({"parallel": {"last_stage_layers": 1}}, PP),
    ({"model": {"dtype": "fp32"}}, {}),
    ({"model": {"hf": None, "path": "builtin:qwen3-moe-tiny"}}, {}),
    ({"model": {"hf": HF | {"num_hidden_layers": 2}}}, {}),
    ({"optim": {"grad_dtype": "bf16"}}, {}),
    ({"optim": {"offload": 0.5}}, {}),
    ({"optim": {"state_dtype": "bf16"}}, {}),
    ({"optim": {"state_dtype": "fp8"}}, {"optim": {"state_dtype": "bf16"}}),
    ({"adapter": {}}, {}),
    ({"adapter": {"rank": 3}}, {"adapter": {}}),
    ({"adapter": {"target": "all-router"}}, {"adapter": {}}),
    ({"adapter": {"type": "dora"}}, {"adapter": {}}),
    ({"trainable": ["self_attn"]}, {}),
    ({"cluster": {"gpus_per_node": 4}}, {"cluster": {"nodes": 2}}),
    ({"cluster": {"nodes": 2}}, {"cluster": {"nodes": 1}}),
    ({"cluster": {"world_size": 4}}, {}),
]


@pytest.mark.parametrize(("over", "beside"), PLANS, ids=str)
def test_a_key_of_the_plan(over: dict[str, Any], beside: dict[str, Any]) -> None:
    base = laid(beside)
    assert seen(plan, laid(over, base)) != plan(base)


def test_the_gpu_is_what_a_dry_run_warns_about() -> None:
    big = HF | {"hidden_size": 8192, "vocab_size": 600_000}
    none = {"prediction": "none"}
    warned = ["WARNING" in plan(laid({"model": {"hf": big}, "cluster": {"gpu": gpu} | none}))
              for gpu in ("A100-40GB", "B200-180GB")]  # fmt: skip
    assert warned == [True, False]


# Keys that a method would not read


def names() -> list[str]:
    return [
        str(kind.model_fields["name"].default)
        for kind in _models(Recipe.model_fields["method"].annotation)
    ]


GIVEN: dict[str, Any] = {
    "rewards": ["accuracy"], "teacher": {"path": "t"},
    "data.weights": [1.0], "data.too_long": "reject", "data.pack": False,
    "data.chat_template": "t", "data.max_rejected": 0.5,
    "data.share_prompt": False, "data.reference": "r", "trainable": ["self_attn"],
    "data.take": [1], "data.eval_share": 0.5, "data.system": "s",
    "data.special_tokens_in_text": "keep",
    "data.chat_template_kwargs": {"a": 1}, "data.empty_thoughts": False, "data.shuffle": False,
    "train.global_batch": 4, "train.eval_every": 1, "train.eval_packs": 1,
    "router.balance": "global", "data.document_mask": True, "data.eod_mask_loss": True,
    "optim.muon_momentum": 0.5, "optim.muon_nesterov": False, "optim.muon_num_ns_steps": 2,
    "optim.muon_scale_mode": "unit_rms_norm", "optim.muon_extra_scale_factor": 1.0,
    "optim.name": "muon", "optim.offload": 0.5, "optim.state_dtype": "bf16",
    "train.sample_prompts": "p.jsonl", "train.sample_tokens": 7,
    "rollout.eval_prompts": 1, "rollout.eval_temperature": 0.5, "optim.min_lr": 1e-6,
    "rollout": {"group_size": 4}, "optim.wsd_decay": "cosine", "optim.decay_steps": 2,
    "model.init_std": 0.5, "rollout.python": "p", "rollout.address": ["http://h:1"],
    "rollout.token_file": "t", "rollout.num_servers": 2, "rollout.tensor_parallel": 2,
    "rollout.host": "0.0.0.0", "rollout.gpu_memory": 0.5, "rollout.max_queue": 4,
    "rollout.engine_args": {"a": 1}, "rollout.push": "file", "rollout.timeout": 3.0,
    "rollout.start_timeout": 3.0,
    "rollout.environment_options": {"low": 2}, "rollout.call_format": "xml",
    "rollout.max_turns": 2, "rollout.reply_chars": 9, "rollout.environment_workers": 1,
    "rollout.environment_seconds": 1.0, "rollout.partial": True, "rollout.max_staleness": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_a_key_that_a_method_does_not_read(name: str) -> None:
    """For every rule one of them, at least, does not; and where it is read it is taken."""
    method: Any = next(m for m in _models(Recipe.model_fields["method"].annotation)
                       if m.model_fields["name"].default == name)  # fmt: skip
    base = laid({"method": name})
    if method.samples:
        base |= {"rollout": {}, "rewards": ["accuracy"], "train": {"steps": 3}}
    if method.taught:
        base["teacher"] = {"path": "t"}
    if method.demonstrated:
        base["data"]["demonstrations"] = ["d.jsonl"]
    recipe = recipe_from(base)
    for rule in RULES:
        for key in rule.keys:
            section, _, leaf = key.rpartition(".")
            over = {section: {leaf: GIVEN[key]}} if section else {leaf: GIVEN[key]}
            if section == "rollout" and not method.samples:
                continue  # the section itself is refused
            read = rule.are_read(recipe)
            found = seen(lambda content: recipe_from(content) is not None, laid(over, base))
            assert found == (True if read else REFUSED), f"{key} with {name}"


@pytest.mark.parametrize("engine", ["embedded", "vllm"])
def test_an_engine_without_servers_takes_no_keys_of_them(engine: str) -> None:
    base = laid({"method": "grpo", "rollout": {"engine": engine}, "rewards": ["accuracy"]})
    base["train"] = {"steps": 3}
    for key in SERVER_RULE.keys:
        _, _, leaf = key.rpartition(".")
        recipe = recipe_from(laid({"rollout": {leaf: GIVEN[key]}}, base))
        unread_keys = [name for name, _ in unread(recipe, (SERVER_RULE,))]
        assert unread_keys == [key] * (engine == "embedded")


# That nothing is left out


def test_every_key_is_here() -> None:
    """A key that is new has to be put into one of the tables above."""
    known = SPEED | set(GIVEN) | SHOWN_BY.keys() | {f"optim.{key}" for key, _, _ in RATES}
    known |= (
        {"cluster.gpu"}
        | {f"method.{key}" for _, key in method_fields()}
        | {f"rollout.{key}" for key, _ in SERVED}
    )
    laid_over = [over for over, _ in [*PLANS, *RUNS]] + [over for _, over, _ in DATA] + SAMPLED
    for over in [*laid_over, *(o for base, others in STEPS.values() for o in (base, *others))]:
        for name, value in over.items():
            known |= {f"{name}.{leaf}" for leaf in value} if isinstance(value, dict) else {name}
    missing = set(_keys()) - known
    assert not missing, f"nothing looks at what {sorted(missing)} change"


def _keys() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        models = _models(field.annotation)
        for section in models:
            yield from (f"{name}.{leaf}" for leaf in section.model_fields)
        if not models:
            yield name
