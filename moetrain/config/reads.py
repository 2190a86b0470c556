"""Keys that a recipe's own method, model or engine would not read: they are refused, since whoever
wrote them expects something.

What depends on the model's layers and on the machine is in moetrain.layout.passed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from moetrain.config.method import ReferencedMethod

if TYPE_CHECKING:
    from moetrain.config.recipe import Recipe

SERVERS = (
    "python address token_file num_servers tensor_parallel host gpu_memory max_queue engine_args"
    " push timeout start_timeout"
).split()
TURNS = (
    "environment_options call_format max_turns reply_chars environment_workers environment_seconds"
).split()


@dataclass(frozen=True)
class Rule:
    """Keys, when they are read, and what to say where they are not."""

    keys: tuple[str, ...]
    are_read: Callable[["Recipe"], bool]
    instead: str


def _has_records(recipe: "Recipe") -> bool:
    method = recipe.method
    return method.learns_from != "corpus" and (not method.samples or method.demonstrated)


def _evaluates(recipe: "Recipe") -> bool:
    # An empty data.eval says that there is no evaluation, whatever the file has for one.
    return "eval" in recipe.data.model_fields_set or recipe.data.eval_share > 0


def _makes_weights(recipe: "Recipe") -> bool:
    model, method = recipe.model, recipe.method
    loaded = model.path is not None and model.init != "random"
    return not loaded or method.scalar_head or method.value_head


RULES = (
    Rule(
        ("rollout", "rewards"),
        lambda r: r.method.samples,
        "only methods that sample read it, such as grpo",
    ),
    Rule(
        ("teacher",),
        lambda r: r.method.taught,
        "only methods that distil read it, such as on_policy_distill",
    ),
    Rule(
        ("data.weights",),
        lambda r: r.method.learns_from == "corpus",
        "pretrain and cpt blend corpora by it; data.take says how many records of each path",
    ),
    Rule(
        ("data.document_mask", "data.eod_mask_loss"),
        lambda r: r.method.learns_from == "corpus",
        "records are sequences of their own always; corpora alone have documents inside a sample",
    ),
    Rule(
        ("data.take", "data.eval_share"),
        lambda r: r.method.learns_from != "corpus",
        "it chooses records, and pretrain and cpt read corpora",
    ),
    Rule(
        ("data.too_long", "data.pack", "data.empty_thoughts"),
        _has_records,
        "it is about records with answers, which corpora and prompts are not",
    ),
    Rule(
        (
            "data.chat_template",
            "data.chat_template_kwargs",
            "data.system",
            "data.max_rejected",
            "data.special_tokens_in_text",
        ),
        lambda r: r.method.learns_from != "corpus",
        "a corpus has no records; `moetrain data index` has --max-rejected",
    ),
    Rule(
        ("data.shuffle",),
        lambda r: r.method.learns_from != "corpus",
        "megatron-core shuffles corpora always",
    ),
    Rule(
        ("data.share_prompt",),
        lambda r: r.method.learns_from in ("pairs", "labels"),
        "preference methods alone have two answers to a prompt in a record",
    ),
    Rule(
        ("data.reference",),
        lambda r: isinstance(r.method, ReferencedMethod),
        "methods with method.reference alone have log-probs of one",
    ),
    Rule(
        ("trainable",),
        lambda r: r.adapter is None,
        "with adapter nothing else is trained; adapter.target says where",
    ),
    Rule(
        tuple(
            f"optim.muon_{name}"
            for name in "momentum nesterov num_ns_steps scale_mode extra_scale_factor".split()
        ),
        lambda r: r.optim.name == "muon",
        "optim.name=muon reads it",
    ),
    Rule(
        ("router.balance",),
        lambda r: r.router.aux_loss > 0,
        "it says over what router.aux_loss balances",
    ),
    Rule(
        ("optim.name",),
        lambda r: r.adapter is None,
        "muon is for whole matrices, and an adapter's factors are none: adamw trains them",
    ),
    Rule(
        ("optim.offload", "optim.state_dtype"),
        lambda r: r.optim.name == "adamw",
        "muon's momentum is fp32 and beside the main weights",
    ),
    Rule(("optim.wsd_decay",), lambda r: r.optim.schedule == "wsd", "optim.schedule=wsd reads it"),
    Rule(
        ("optim.decay_steps", "optim.min_lr"),
        lambda r: r.optim.schedule != "constant",
        "optim.schedule=constant does not decay",
    ),
    Rule(
        ("train.global_batch",),
        lambda r: not r.method.samples,
        "a step learns from rollout.prompts_per_step x rollout.group_size answers",
    ),
    Rule(
        ("train.eval_packs", "rollout.eval_prompts", "rollout.eval_temperature"),
        _evaluates,
        "there is nothing to evaluate on without data.eval or data.eval_share",
    ),
    Rule(
        ("train.eval_every",),
        lambda r: _evaluates(r) or r.train.sample_prompts is not None,
        "there is nothing to evaluate on without data.eval, data.eval_share or"
        " train.sample_prompts",
    ),
    Rule(
        ("train.sample_prompts",),
        lambda r: _has_records(r) and not r.method.samples and not r.method.scalar_head,
        "methods that sample keep their answers to data.eval, a reward model says nothing, and a"
        " corpus has no prompts",
    ),
    Rule(
        ("train.sample_tokens",),
        lambda r: r.train.sample_prompts is not None,
        "it is the length of answers to train.sample_prompts",
    ),
    Rule(
        ("rollout.reply_chars",),
        lambda r: r.rollout is None or r.rollout.environment not in ("single", "agents"),
        "what agents say is theirs: nothing is cut",
    ),
    Rule(
        tuple(f"rollout.{name}" for name in TURNS),
        lambda r: r.rollout is None or r.rollout.environment != "single",
        "rollout.environment=single replies nothing",
    ),
    Rule(
        ("rollout.partial",),
        lambda r: r.rollout is None or r.rollout.oversample > 1,
        "with rollout.oversample=1 no answer is stopped; 1.5 draws half as much again",
    ),
    Rule(
        ("rollout.max_staleness",),
        lambda r: r.rollout is None or r.rollout.partial,
        "without rollout.partial no token is older than rollout.steps_off",
    ),
    Rule(
        ("model.init_std",),
        _makes_weights,
        "all weights are loaded; model.init=random makes them here",
    ),
)

# `moetrain serve` reads them too, whatever the engine; so a run looks when it starts.
SERVER_RULE = Rule(
    tuple(f"rollout.{name}" for name in SERVERS),
    lambda r: r.rollout is None or r.rollout.engine == "vllm",
    "rollout.engine=embedded has no servers; vllm has",
)


def unread(recipe: "Recipe", rules: tuple[Rule, ...] = RULES) -> Iterator[tuple[str, str]]:
    """(key, why) of each key that is given and would do nothing."""
    for rule in rules:
        if rule.are_read(recipe):
            continue
        for key in rule.keys:
            if _given(recipe, key):
                yield key, f"does nothing with method {recipe.method.name} here: {rule.instead}"


def leave_out(found: Mapping[str, str]) -> str:
    """One line of all keys that would do nothing and why."""
    return "; ".join(f"{key} {why}" for key, why in found.items()) + ". Leave out what does nothing"


def _given(recipe: "Recipe", key: str) -> bool:
    """Whether a key has another value than it has by itself."""
    section: BaseModel | None = recipe
    *parents, leaf = key.split(".")
    for name in parents:
        section = vars(section)[name]
        if section is None:
            return False
    default: Any = type(section).model_fields[leaf].get_default(call_default_factory=True)
    return vars(section)[leaf] != default
