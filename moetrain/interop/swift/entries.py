"""Entries of the table in which several flags and several keys hang together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from moetrain.interop.swift.codecs import (
    LIST,
    NUMBER,
    TEXT,
    TRUTH,
    WHOLE,
    Codec,
    Entry,
    NotCarried,
    Note,
    Reading,
    Words,
    Writing,
)
from moetrain.interop.swift.policy import is_online

# The recipe's names of modules, and Megatron's, which ms-swift takes: rows are tried in turn.
type Names = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
TARGETS: Names = (
    (("all-router",), ("all-linear", "all-router")),
    (("all-linear",), ("all-linear",)),
    (("q_proj", "k_proj", "v_proj"), ("linear_qkv",)),
    (("o_proj",), ("linear_proj",)),
    (("gate_proj", "up_proj"), ("linear_fc1",)),
    (("down_proj",), ("linear_fc2",)),
    (("experts",), ("experts.linear_fc1", "experts.linear_fc2")),
    (("mlp.gate",), ("all-router",)),
)
PARTS: Names = (
    (("self_attn",), ("self_attention",)),
    (("mlp",), ("mlp",)),
    (("experts",), (r"mlp\.experts",)),
    (("mlp.gate",), (r"mlp\.router",)),
    (("q_proj", "k_proj", "v_proj"), ("linear_qkv",)),
    (("o_proj",), ("linear_proj",)),
    (("gate_proj", "up_proj"), ("linear_fc1",)),
    (("down_proj",), ("linear_fc2",)),
    (("embed_tokens",), ("word_embeddings",)),
    (("lm_head",), ("output_layer",)),
)
# Transformer Engine keeps the norm before a layer inside of it, where Hugging Face does not.
_PARTS_REGEX = r"^(?!.*layer_norm_weight).*\b({})\."


def renamed(words: Sequence[str], names: Names, *, to: int) -> list[str]:
    """Words of one side of `names` in those of the other (0 or 1). Raises NotCarried for a rest."""
    left, result = list(words), list[str]()
    for row in names:
        name, other = row[1 - to], row[to]
        if all(word in left for word in name):
            left = [word for word in left if word not in name]
            result += other
    if left:
        known = ", ".join(" ".join(row[1 - to]) for row in names)
        raise NotCarried(f"{' '.join(left)} has no counterpart; known: {known}")
    return result


def _read_modules(words: Words) -> list[str]:
    """Megatron's names in the recipe's. `swift` without Megatron has the recipe's already."""
    theirs = [name for row in TARGETS for name in row[1]]
    already = {name for row in TARGETS for name in row[0]} - {*theirs}
    rest = [word for word in words if word not in already]
    return renamed(rest, TARGETS, to=0) + [word for word in words if word in already]


def _read_parts(words: Words) -> list[str]:
    prefix, suffix = _PARTS_REGEX.split("{}")
    (regex,) = words
    if not (regex.startswith(prefix) and regex.endswith(suffix)):
        raise NotCarried("the recipe's trainable takes Hugging Face names, not Megatron's")
    return renamed(regex[len(prefix) : -len(suffix)].split("|"), PARTS, to=0)


def _show_parts(patterns: list[str]) -> Words:
    return (_PARTS_REGEX.format("|".join(renamed(patterns, PARTS, to=1))),)


MODULES = Codec[list[str]](
    "a list of modules",
    _read_modules,
    lambda target: tuple(renamed(target, TARGETS, to=1)),
)
TRAINED = Codec[list[str]]("a regular expression", _read_parts, _show_parts)


class Length(Entry):
    """How long a run is. With both numbers ms-swift takes the epochs."""

    def read(self, reading: Reading) -> None:
        epochs = reading.parse("num_train_epochs", NUMBER)
        steps = reading.parse("train_iters", WHOLE)
        if epochs is not None:
            reading.keys["train.epochs"] = epochs
            if steps is not None:
                reading.notes.append(
                    Note("implied", f"--train_iters {steps}", "num_train_epochs goes before it")
                )
        elif steps is not None:
            reading.keys["train.steps"] = steps

    def write(self, writing: Writing) -> None:
        steps, epochs = writing.keys.get("train.steps"), writing.keys.get("train.epochs")
        writing.covered |= {"train.steps", "train.epochs"}
        if steps is not None:
            writing.flags["train_iters"] = WHOLE.show(steps)
        elif epochs is not None and epochs == int(epochs):
            writing.flags["num_train_epochs"] = WHOLE.show(int(epochs))
        elif epochs is not None:
            writing.lost("train.epochs", "ms-swift counts whole epochs; set train.steps")


class EvalPacks(Entry):
    """ms-swift counts batches of an evaluation, the recipe packs."""

    def read(self, reading: Reading) -> None:
        batches = reading.parse("eval_iters", WHOLE)
        if batches is not None and is_online(reading.keys):
            reading.lost("eval_iters", "rollout.eval_prompts counts held-out prompts")
        elif batches is not None and batches > 0:
            reading.keys["train.eval_packs"] = batches * reading.keys["train.global_batch"]
        elif batches == 0:
            reading.lost("eval_iters", "leave data.eval out to evaluate on nothing")

    def write(self, writing: Writing) -> None:
        packs, batch = writing.keys.get("train.eval_packs"), writing.keys["train.global_batch"]
        writing.covered.add("train.eval_packs")
        if packs is not None and packs % batch:
            writing.lost("train.eval_packs", f"ms-swift takes whole batches of {batch}")
        elif packs is not None:
            writing.flags["eval_iters"] = WHOLE.show(packs // batch)


class Keep(Entry):
    """Which checkpoints stay. ms-swift counts the best one among them, the recipe besides."""

    def read(self, reading: Reading) -> None:
        metric = reading.parse("metric_for_best_model", TEXT)
        limit = reading.parse("save_total_limit", WHOLE)
        held_out = reading.keys.get("data.eval") or reading.keys.get("data.eval_share")
        if metric is None and limit is not None and held_out:
            why = "ms-swift keeps the best of them too: set checkpoint.best=eval_loss for that"
            reading.notes.append(Note("changed", f"--save_total_limit {limit}", why))
        if metric is not None:
            name = "reward/mean" if metric == "reward" else metric.removeprefix("eval_")
            reading.keys["checkpoint.best"] = f"eval_{name}"
            reading.take_if("greater_is_better", str("loss" not in name).lower())
        if limit is not None:
            reading.keys["checkpoint.keep"] = max(limit - (metric is not None), 1)
        else:
            why = "without --save_total_limit ms-swift keeps every checkpoint"
            reading.notes.append(Note("changed", "checkpoint.keep", f"{why}, the recipe the last"))

    def write(self, writing: Writing) -> None:
        keep, best = (writing.keys.get(f"checkpoint.{name}") for name in ("keep", "best"))
        writing.covered |= {"checkpoint.keep", "checkpoint.best"}
        limit = (keep or 2) + (best is not None)
        if limit < 2:
            writing.lost("checkpoint.keep", "ms-swift keeps two at least")
        writing.flags["save_total_limit"] = WHOLE.show(max(limit, 2))
        if best is not None:
            name = best.removeprefix("eval_").replace("reward/mean", "reward")
            writing.flags["metric_for_best_model"] = (name,)
            writing.flags["greater_is_better"] = (str("loss" not in name).lower(),)


class Reports(Entry):
    """TensorBoard and Weights & Biases."""

    def read(self, reading: Reading) -> None:
        project = reading.parse("wandb_project", TEXT)
        name = reading.parse("wandb_exp_name", TEXT)
        # Before 4.0 the project alone turned Weights & Biases on.
        default = ["tensorboard", "wandb"] if project else ["tensorboard"]
        where = reading.parse("report_to", LIST) or default
        if "tensorboard" not in where:
            reading.keys["observe.tensorboard"] = False
        if "wandb" in where:
            named = {} if name is None else {"name": name}
            reading.keys["observe.wandb"] = {"project": project or "megatron-swift", **named}
        for other in sorted({*where} - {"tensorboard", "wandb"}):
            reading.notes.append(Note("not carried", f"--report_to {other}", "not known here"))

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        writing.covered |= {"observe.tensorboard", "observe.wandb"}
        board, wandb = keys.get("observe.tensorboard") is not False, keys.get("observe.wandb")
        if not board and wandb is None:
            writing.lost("observe.tensorboard", "ms-swift reports somewhere always")
        if wandb is None:
            return
        writing.flags["report_to"] = ("tensorboard", "wandb") if board else ("wandb",)
        settings = cast(dict[str, Any], wandb)
        for key, flag in (("project", "wandb_project"), ("name", "wandb_exp_name")):
            if key in settings:
                writing.flags[flag] = (str(settings[key]),)
        for key in sorted({*settings} - {"project", "name"}):
            writing.notes.append(
                Note("not carried", f"observe.wandb.{key}", "ms-swift has project and name")
            )


class Offload(Entry):
    """The optimizer's state on the host."""

    def read(self, reading: Reading) -> None:
        on = reading.parse("optimizer_cpu_offload", TRUTH)
        share = reading.parse("optimizer_offload_fraction", NUMBER)
        if on:
            reading.keys["optim.offload"] = 1.0 if share is None else share

    def write(self, writing: Writing) -> None:
        share = writing.keys.get("optim.offload")
        writing.covered.add("optim.offload")
        if share:
            writing.flags |= {
                "optimizer_cpu_offload": ("true",),
                "optimizer_offload_fraction": NUMBER.show(share),
                "use_precision_aware_optimizer": ("true",),
            }


class Nodes(Entry):
    """How many machines: the launcher's variables."""

    def read(self, reading: Reading) -> None:
        per_node = reading.parse("NPROC_PER_NODE", WHOLE)
        nodes = reading.parse("NNODES", WHOLE)
        if per_node is not None:
            reading.keys["cluster.gpus_per_node"] = per_node
        if nodes is not None:
            reading.keys["cluster.nodes"] = nodes
        elif per_node is not None and "NNODES?" not in reading.given:
            reading.keys["cluster.nodes"] = 1

    def write(self, writing: Writing) -> None:
        nodes = writing.keys.get("cluster.nodes")
        writing.covered |= {"cluster.nodes", "cluster.gpus_per_node"}
        writing.flags["NPROC_PER_NODE"] = WHOLE.show(writing.keys.get("cluster.gpus_per_node", 8))
        if nodes is None:
            writing.flags["NNODES"] = ("${NNODES:-1}",)
        elif nodes > 1:
            writing.flags["NNODES"] = WHOLE.show(nodes)
            writing.flags["NODE_RANK"] = ("$NODE_RANK",)
            writing.flags["MASTER_ADDR"] = ("$MASTER_ADDR",)


@dataclass(frozen=True)
class Weights(Entry):
    """Where weights come from: a Hugging Face folder, or Megatron's with a folder beside it."""

    def read(self, reading: Reading) -> None:
        hf, megatron = reading.parse("model", TEXT), reading.parse("mcore_model", TEXT)
        if megatron is not None:
            reading.keys["model.path"] = megatron
            why = "of another program: write a Hugging Face folder first (megatron export --to_hf)"
            reading.notes.append(Note("changed", f"--mcore_model {megatron}", why))
            if hf is not None:
                reading.keys["model.tokenizer"] = hf
        elif hf is not None:
            reading.keys["model.path"] = hf

    def write(self, writing: Writing) -> None:
        path = writing.keys.get("model.path")
        writing.covered.add("model.path")
        if writing.keys.get("model.tokenizer") == path:
            writing.covered.add("model.tokenizer")
        if path is None:
            writing.lost("model.hf", "ms-swift takes its sizes from a folder: give --model")
        elif str(path).startswith("builtin:"):
            writing.lost("model.path", "is moetrain's own: give --model a folder")
        else:
            writing.flags["model"] = (str(path),)


class RecomputedParts(Entry):
    """What `train.recompute` leaves open: how many layers at a time, and which parts of one."""

    PARTS = ("core_attn", "mlp", "layernorm")

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        more: dict[str, Any] = {}
        if keys.get("train.recompute") == "full":
            how = reading.parse("recompute_method", TEXT) or "uniform"
            layers = reading.parse("recompute_num_layers", WHOLE) or 1
            if (how, layers) != ("uniform", 1):
                more = {"recompute_method": how, "recompute_num_layers": layers}
        elif keys.get("train.recompute") == "selective":
            parts = reading.parse("recompute_modules", LIST) or ["core_attn"]
            others = [part for part in parts if part not in self.PARTS]
            if others:
                why = f"megatron.recompute_modules has {', '.join(self.PARTS)}"
                reading.lost("recompute_modules", why)
            parts = [part for part in parts if part in self.PARTS]
            if parts != ["core_attn"]:
                more = {"recompute_modules": parts}
        if more:
            keys["megatron"] = more | cast(dict[str, Any], keys.get("megatron") or {})

    def write(self, writing: Writing) -> None:
        """megatron_extra_kwargs has them."""


def is_hub_name(path: object) -> bool:
    """Whether this looks like `owner/name`, and not like a file."""
    name = re.fullmatch(r"[\w-][\w.-]*/([\w.-]+)(?::[\w/.-]+)?(?:#\d+)?", str(path))
    return name is not None and not re.search(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|bin)$", name[1])
