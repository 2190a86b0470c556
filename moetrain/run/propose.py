"""`moetrain init`: a first recipe for a job, from a look into model and data."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.load import recipe_from
from moetrain.config.method import SECTIONS
from moetrain.config.recipe import Recipe
from moetrain.data.preview import Preview, epoch_of, preview
from moetrain.errors import ConfigError, DataError, one_line
from moetrain.models import Model
from moetrain.run.ahead import look_ahead
from moetrain.run.dry_run import check, world_size
from moetrain.run.inputs import check_inputs

FEW = 32  # records that say which jobs data fit
STEPS = 60  # a run should have, for a schedule and a curve that say something
LARGEST_BATCH = 64
LONGEST_ANSWER = 512
HELD_OUT = 16  # records, where there are enough


@dataclass(frozen=True)
class Job:
    """What a method is for, and the learning rates that one starts with: of all weights, of an
    adapter.
    """

    text: str
    lr: float
    adapter_lr: float
    epochs: float = 1
    setting: str = ""  # of the method, as it stands there


BETA = "  beta: 0.1\t# how strongly it is held to the model it starts from"
JOBS: dict[str, Job] = {
    "pretrain": Job("Train a model from scratch on a corpus.", 3e-4, 3e-4),
    "cpt": Job("Train a model further on a corpus.", 2e-5, 1e-4),
    "sft": Job("Fine-tune on conversations: what the assistant says is learned.", 1e-5, 1e-4, 2),
    "dft": Job("Fine-tune, each token weighted by how likely it is already.", 1e-5, 1e-4, 2),
    "chord_sft": Job("Fine-tune, weighting tokens by p (1 - p).", 1e-5, 1e-4, 2),
    "dpo": Job("Prefer chosen answers to rejected ones.", 1e-6, 1e-5, 1, BETA),
    "ipo": Job("Prefer chosen answers to rejected ones, by a squared loss.", 1e-6, 1e-5, 1, BETA),
    "hinge": Job("Prefer chosen answers to rejected ones, by a hinge.", 1e-6, 1e-5, 1, BETA),
    "robust": Job("Prefer chosen answers, some of which are not.", 1e-6, 1e-5, 1, BETA),
    "kto": Job("Learn from single answers that are labelled good or bad.", 1e-6, 1e-5, 1, BETA),
    "orpo": Job("Fine-tune and prefer in one, without a reference.", 5e-6, 5e-5),
    "simpo": Job("Prefer chosen answers, without a reference.", 1e-6, 1e-5),
    "reward": Job("Train a reward model on pairs.", 1e-5, 1e-4),
    "grpo": Job("Learn by trying: answers to a prompt are compared by their rewards.", 1e-6, 1e-5),
    "dr_grpo": Job("GRPO without its normalisations.", 1e-6, 1e-5),
    "dapo": Job("GRPO with wider clipping, drawing prompts until groups differ.", 1e-6, 1e-5),
    "gspo": Job("GRPO with ratios of whole answers.", 1e-6, 1e-5),
    "cispo": Job("GRPO whose ratios are weights, so that no token is left out.", 1e-6, 1e-5),
    "sapo": Job("GRPO with a soft gate in place of the clip.", 1e-6, 1e-5),
    "rloo": Job("Learn by trying: an answer against the mean of the others.", 1e-6, 1e-5),
    "reinforce_pp": Job("Learn by trying, rewards scaled over the batch.", 1e-6, 1e-5),
    "reinforce_pp_baseline": Job("The same, against the mean of a prompt's answers.", 1e-6, 1e-5),
    "ppo": Job("Learn by trying, with a value head.", 1e-6, 1e-5),
    "distill": Job("Learn a teacher's distributions over given answers.", 1e-5, 1e-4, 2),
    "on_policy_distill": Job("Answer, and learn what a teacher finds likelier.", 1e-6, 1e-5),
    "gkd": Job("Answer, and learn a teacher's distributions over that.", 1e-6, 1e-5),
    "chord": Job("Learn by trying, and from demonstrations too.", 1e-6, 1e-5),
}

WAYS = {
    "--reward": " (accuracy, or FILE.py:FUNCTION)",
    "--teacher": " (a folder, or http://.../v1)",
}


@dataclass(frozen=True)
class Wanted:
    """What the command line says."""

    job: str
    model: str
    data: tuple[str, ...]
    eval: tuple[str, ...] = ()
    adapter: bool = False
    rewards: tuple[str, ...] = ()
    demonstrations: tuple[str, ...] = ()
    teacher: str | None = None


@dataclass
class Found:
    """What a look into model and data comes to."""

    model: Model
    seq_len: int
    global_batch: int
    steps: int
    epochs: float
    on_gpu: bool
    max_tokens: int = LONGEST_ANSWER
    eval_share: float = 0.02
    notes: list[str] = field(default_factory=list[str])


def propose(wanted: Wanted) -> str:
    """The text of the recipe. Raises MoetrainError for what does not fit together."""
    if wanted.job not in JOBS:
        raise ConfigError(f"init: {wanted.job} is no job. There are {', '.join(JOBS)}.")
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    for flag, given, is_read in (
        ("--reward", wanted.rewards, _is_graded(wanted.job)),
        ("--demonstrations", wanted.demonstrations, wanted.job == "chord"),
        ("--teacher", wanted.teacher, SECTIONS[wanted.job].taught),
    ):
        if bool(given) != is_read:
            needs = "needs" if is_read else "does not read"
            ways = WAYS.get(flag, "") if is_read else ""
            raise ConfigError(f"init: {wanted.job} {needs} {flag}{ways}.")
    recipe = recipe_from(_content(wanted, on_gpu), source="init")
    check_inputs(recipe)
    model = check(recipe, world_size(recipe, None))
    longest = min(model.max_positions, 32768)
    answer = min(LONGEST_ANSWER, longest // 2)
    recipe = recipe_from(_content(wanted, on_gpu, longest, answer), source="init")
    train, warnings = preview(recipe, "train"), list[str]()
    if train is not None:
        _check_fit(wanted, recipe, train)
        warnings = [line for line in look_ahead(recipe) if line.startswith("WARNING")]
    sized = _sized(recipe, model, train, on_gpu, answer)
    sized.notes += warnings
    return text(wanted, sized)


def _content(
    wanted: Wanted, on_gpu: bool, seq_len: int = 1024, max_tokens: int = 256
) -> dict[str, Any]:
    """The recipe as far as it is needed to look into the data."""
    content: dict[str, Any] = {
        "run_dir": f"runs/{wanted.job}",
        "model": {"path": wanted.model, "dtype": "bf16" if on_gpu else "fp32"},
        "method": wanted.job,
        "data": {"train": list(wanted.data), "eval": list(wanted.eval), "seq_len": seq_len},
        "train": {"steps": 1},
    }
    if _samples(wanted.job):
        content["rollout"] = {"max_tokens": max_tokens}
        content["rewards"] = list(wanted.rewards) or ["format"] * _is_graded(wanted.job)
    if wanted.job == "pretrain":
        content["model"]["init"] = "random"
    if wanted.adapter:
        content["adapter"] = {}
    if wanted.teacher:
        content["teacher"] = _teacher(wanted.teacher)
    if wanted.demonstrations:
        content["data"]["demonstrations"] = list(wanted.demonstrations)
    return content


def _samples(job: str) -> bool:
    return SECTIONS[job].samples


def _is_graded(job: str) -> bool:
    return _samples(job) and SECTIONS[job]().needs_rewards


def _teacher(given: str) -> dict[str, str]:
    """A server's address, or a folder."""
    return {"address" if given.startswith(("http://", "https://")) else "path": given}


def _of_corpus(job: str) -> bool:
    return SECTIONS[job].learns_from == "corpus"


def _check_fit(wanted: Wanted, recipe: Recipe, train: Preview) -> None:
    """Raises DataError where most records are of another job, and says of which."""
    if len(train.rejects) <= train.num_seen / 2:
        return
    first = train.rejects[0]
    fits: list[str] = []
    for job in ("sft", "dpo", "kto", "grpo"):
        other = Wanted(job, wanted.model, wanted.data)
        longest = recipe.data.seq_len
        sample = preview(recipe_from(_content(other, False, longest, longest // 2)), "train", FEW)
        if sample is not None and len(sample.rejects) < sample.num_seen / 2:
            fits.append(job)
    fit = f" It fits {' and '.join(fits)}." if fits else ""
    raise DataError(
        f"init {wanted.job}: {', '.join(wanted.data)} does not fit: {first.file}:{first.line}:"
        f" {first.reason}.{fit} docs/data.md has the forms that are read."
    )


def _sized(recipe: Recipe, model: Model, train: Preview | None, on_gpu: bool, answer: int) -> Found:
    """Length, batch and epochs that the data suggest."""
    job = JOBS[recipe.method.name]
    most = min(model.max_positions, 4096 if on_gpu else 1024)
    notes: list[str] = []
    seq_len = most
    if train is not None and train.sizes:
        notes = train.lines(recipe.data.seq_len)
        sizes = sorted(train.sizes)
        need = sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)))]
        if recipe.method.samples:
            answer = answer if on_gpu else min(answer, 256)
            need += answer
            most = need
        else:
            most = max(need, min(most, 4 * need))  # several records a pack, where they are short
        seq_len = min(model.max_positions, -(-most // 64) * 64)
    fitted = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": seq_len})})
    packs = _packs(fitted, train)
    steps, batch = STEPS, 8
    if packs:
        wanted = packs * job.epochs / STEPS
        batch = min(LARGEST_BATCH, max(1, 2 ** math.floor(math.log2(max(wanted, 1)))))
        steps = max(1, math.floor(packs * job.epochs / batch))
        notes += [f"about {packs} packs of {seq_len} tokens an epoch"]
    share = 0.02 if train is None else min(0.2, max(0.02, HELD_OUT / max(train.num_records, 1)))
    return Found(model, seq_len, batch, steps, job.epochs, on_gpu, answer, round(share, 2), notes)


def _packs(recipe: Recipe, train: Preview | None) -> int:
    if recipe.method.samples or (train is None and recipe.method.learns_from != "corpus"):
        return 0
    if train is not None:
        return train.num_packs(recipe.data.seq_len)
    return epoch_of(recipe, None)[0]


def _value(value: Any) -> str:
    """YAML of a text or a list of texts."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    return json.dumps(value, ensure_ascii=False)


def text(wanted: Wanted, found: Found) -> str:
    """The recipe, with comments."""
    job = JOBS[wanted.job]
    lr = job.adapter_lr if wanted.adapter else job.lr
    model_name = Path(wanted.model.removeprefix("builtin:")).name
    name = re.sub(r"[^\w.+-]+", "-", f"{wanted.job}-{model_name}")
    every = max(1, found.steps // 5)
    lines = [
        f"# {job.text}",
        "# `moetrain recipe KEY` says what a key means and what else it may be.",
        *(f"# {one_line(note)}" for note in found.notes),
        f"run_dir: runs/{name}\t# all that the run writes; the same command resumes it",
        "model:",
        f"  path: {_value(wanted.model)}",
        "  init: random\t# of the folder its config alone is taken" * (wanted.job == "pretrain"),
        "  dtype: bf16" if found.on_gpu else "  dtype: fp32\t# bf16 on a GPU",
        "method:",
        f"  name: {wanted.job}",
        job.setting,
        *_data(wanted, found),
        *_adapter(wanted),
        *_rollout(wanted, found),
        *_taught(wanted),
        "optim:",
        f"  lr: {lr:g}\t# the first thing to try others of",
        "  warmup: 0.05\t# share of the steps",
        "train:",
        *_length(wanted, found),
        f"  eval_every: {every}\t# steps" * (bool(wanted.eval) or not _of_corpus(wanted.job)),
        "checkpoint:",
        f"  every: {every}\t# steps; a killed run goes on from the last",
        "  export_hf: true\t# a Hugging Face folder at the end: run_dir/hf",
    ]
    return "".join(_aligned(line) + "\n" for line in lines if line)


def _aligned(line: str) -> str:
    """Its comment, after a tab, in the column of all comments."""
    setting, tab, comment = line.partition("\t")
    return f"{setting:<27} {comment}" if tab else line


def _data(wanted: Wanted, found: Found) -> list[str]:
    lines = ["data:", f"  train: {_value(wanted.data)}"]
    if wanted.eval:
        lines.append(f"  eval: {_value(wanted.eval)}")
    elif not _of_corpus(wanted.job):
        lines.append(f"  eval_share: {found.eval_share:g}\t# of the records, to evaluate on")
    if wanted.demonstrations:
        lines.append(f"  demonstrations: {_value(wanted.demonstrations)}")
    what = "a prompt and its answer" if _samples(wanted.job) else "a pack, and the longest record"
    return [*lines, f"  seq_len: {found.seq_len}\t# tokens of {what}"]


def _adapter(wanted: Wanted) -> list[str]:
    if not wanted.adapter:
        return []
    return [
        "adapter:\t# LoRA: small matrices are trained, the weights stay",
        "  rank: 16",
        "  alpha: 32",
        "  target: all-linear\t# attention, MLP and every expert",
    ]


def _rollout(wanted: Wanted, found: Found) -> list[str]:
    if not _samples(wanted.job):
        return []
    engine = "vllm\t# servers" if found.on_gpu else "embedded\t# in this process; vllm for servers"
    return [
        "rollout:",
        f"  engine: {engine}",
        "  prompts_per_step: 8",
        "  group_size: 8\t# answers to each prompt, which are compared",
        f"  max_tokens: {found.max_tokens}\t# of an answer",
        *["rewards:"][: len(wanted.rewards)],
        *(f"  - {_value(reward)}" for reward in wanted.rewards),
    ]


def _taught(wanted: Wanted) -> list[str]:
    if wanted.teacher is None:
        return []
    ((key, value),) = _teacher(wanted.teacher).items()
    return ["teacher:\t# a model with the same tokenizer", f"  {key}: {_value(value)}"]


def _length(wanted: Wanted, found: Found) -> list[str]:
    if _samples(wanted.job):
        return [f"  steps: {found.steps}"]
    length = f"  epochs: {found.epochs:g}\t# passes over the data: about {found.steps} steps"
    return [
        length if found.notes else f"  steps: {found.steps}",
        f"  global_batch: {found.global_batch}\t# packs that one step learns from",
    ]
