"""`moetrain sample`: several answers to each prompt, with their log-probs and rewards, in a file
that `moetrain pairs` chooses from.
"""

import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from moetrain import files
from moetrain.answers.file import AnswerFile, Answering, AnswerRow, Identity, prompts_key
from moetrain.config.answering import SAMPLE, keys_given
from moetrain.config.recipe import Recipe
from moetrain.data import assets
from moetrain.data.cache import cache_root
from moetrain.data.prompts import describe_repeats, read_prompts
from moetrain.data.rejects import check_rejects, noted, write_rejects
from moetrain.data.run_tokenizer import chat_of, tokenizer_of
from moetrain.data.samples import Prompt
from moetrain.data.turns import stop_ids
from moetrain.engine import Engine
from moetrain.engine.model import DTYPES
from moetrain.engine.on_disk import (
    model_digest,
    model_in,
    prompt_settings_of,
    recipe_for,
    sections_of,
)
from moetrain.engine.source import ModelSource, find_source
from moetrain.errors import plural
from moetrain.loops.dialogues import open_dialogues, with_environment
from moetrain.loops.rollouts import Drawing
from moetrain.loops.store import WHOLE
from moetrain.models import read_model
from moetrain.rewards import Grader, check_columns, gradable
from moetrain.rollout import open_engine
from moetrain.rollout.base import Sampling
from moetrain.run.stop import EXIT_STOPPED
from moetrain.weights.digest import file_digest
from moetrain.weights.transport import check_names


def sample(model: str, prompts: str, out: Path, num: int, overrides: Sequence[str] = ()) -> int:
    """Write `num` answers of `model` to each record of `prompts` into `out`. Started again, it goes
    on; what is finished stays. Returns the exit code.

    Raises MoetrainError in one line, before anything is drawn, for what cannot be.
    """
    sections: dict[str, Any] = {
        "method": "grpo",
        "data": {"train": [prompts]},
        "rollout": {},
        "rewards": ["accuracy"],
    }
    SAMPLE.check(keys_given(overrides))
    recipe = answering_recipe(model, out, overrides, sections)
    asked = _prompts(recipe, out)
    if "rewards" not in keys_given(overrides) and not gradable(recipe.rewards, asked):
        recipe = recipe.model_copy(update={"rewards": []})  # somebody wants to read answers
    elif note := check_columns(recipe.rewards, asked):
        print(note)
    notes = {"model": model, "data": prompts, "engine": rollout_of(recipe).engine}
    counts = answer_all(recipe, asked, out, num, notes, "answers", rollout_of(recipe).temperature)
    if counts is None:
        return EXIT_STOPPED
    summary = f"{plural(counts['answers'], 'answer')} to {plural(counts['prompts'], 'prompt')}"
    print(f"{out}: {summary}; {outcome(counts)}")
    return 0


def answering_recipe(
    model: str, out: Path, overrides: Sequence[str], sections: dict[str, Any]
) -> Recipe:
    """A recipe for answers of `model`: prompts and answers may be as long as it takes, and a run's
    model is asked as it was trained.
    """
    path, adapter = sections_of(model_in(model))
    longest = find_source(recipe_for(path, out.parent).model).hf.get("max_position_embeddings")
    data = {"seq_len": longest} if longest else {}
    adapters = [o.partition("=")[2] for o in overrides if o.startswith("adapter.path=")]
    trained = prompt_settings_of([model, *adapters][-1])
    if trained:
        print(f"asked as it was trained: {', '.join(f'data.{key}' for key in trained)} of its run")
    sections = adapter | sections | {"data": data | trained | sections["data"]}
    return recipe_for(path, out.parent, overrides, sections)


def rollout_of(recipe: Recipe) -> Any:
    """The section, which is there."""
    return recipe.sampling[1]


def prompt_room(recipe: Recipe) -> int:
    """Tokens that a prompt may have."""
    return recipe.data.seq_len - rollout_of(recipe).max_tokens


def _prompts(recipe: Recipe, out: Path) -> list[Prompt]:
    root = cache_root(recipe.data.cache)
    inputs = [assets.resolve(path, root) for path in recipe.data.train]
    chat = chat_of(recipe)
    prompts, rejects, notes = read_prompts(inputs, chat, prompt_room(recipe))
    if note := describe_repeats(prompts):
        print(f"{len(prompts)} prompts{note}")
    check_rejects(rejects, len(prompts) + len(rejects), recipe.data.max_rejected)
    for line in noted(chat.notes(), notes):
        print(line)
    path = out.with_name(out.stem + ".rejected.jsonl")
    write_rejects(path, rejects)
    if rejects:
        print(f"{plural(len(rejects), 'record')} cannot be used, see {path}")
    return prompts


def answer_all(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    out: Path,
    num: int,
    notes: Mapping[str, Any],
    name: str,
    temperature: float,
) -> Counter[str] | None:
    """Fill `out` with `num` graded answers to each prompt; what came of them, None when a signal
    came before the end.
    """
    rollout = rollout_of(recipe)
    source = find_source(recipe.model)
    folder = tokenizer_of(recipe)
    chat = chat_of(recipe)
    stops = stop_ids(chat, source.hf)
    sampling = Sampling.of(rollout, temperature, stops)
    identity = _identity(recipe, source, prompts, sampling)
    try:
        with ExitStack() as stack:
            stack.enter_context(stopping_on_signals())
            stack.enter_context(files.named(out))
            file = stack.enter_context(AnswerFile(out, identity, num, notes))
            if any(prompt.id not in file.finished for prompt in prompts):
                grader = Grader(recipe.rewards, rollout.reward_workers, rollout.reward_seconds)
                stack.callback(grader.close)
                engine = open_engine(recipe, source.hf, folder)
                stack.callback(engine.close)
                engine.push(weights_of(recipe, source), 0)
                dialogues = open_dialogues(recipe, chat, stops, stack)
                drawing = Drawing(engine, sampling, recipe.seed, dialogues)
                asked = with_environment(prompts, dialogues)
                Answering(drawing, grader, num).run(asked, file, name)
                if grader.said:
                    print(f"the last fault of a reward: {grader.said}")
            counts = counted(file.rows())
            file.finish(counts)
            return counts
    except KeyboardInterrupt:
        print(f"stopped: what is finished is in {out}; the same command goes on")
        return None


def _identity(
    recipe: Recipe, source: ModelSource, prompts: Sequence[Prompt], sampling: Sampling
) -> Identity:
    rewards = [reward.model_dump(mode="json") for reward in recipe.rewards]
    plain = {
        "model.dtype": recipe.model.dtype,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": recipe.seed,
    }
    drawn = {name: getattr(sampling, name) for name in (*WHOLE, "stop")}
    plain |= {name: value for name, value in drawn.items() if value and value != WHOLE.get(name)}
    rollout = rollout_of(recipe)
    if rollout.environment != "single":
        names = ("environment", "environment_options", "tools", "max_turns", "reply_chars")
        plain |= {name: getattr(rollout, name) for name in names}
    adapter = recipe.adapter.path if recipe.adapter else None
    digests = [file_digest(part) for part in sorted(adapter.glob("adapter_*"))] if adapter else []
    named = f"{recipe.model.path} with {adapter}" if adapter else str(recipe.model.path)
    return {
        "model": ([model_digest(recipe, source), digests or None], named),
        "prompts": (prompts_key(prompts), f"({len(prompts)} of {', '.join(recipe.data.train)})"),
        "rewards": (rewards, ", ".join(reward.name for reward in recipe.rewards)),
        **{name: (value, str(value)) for name, value in plain.items()},
    }


def weights_of(recipe: Recipe, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of the recipe's model; straight from its files where they
    have these names.
    """
    if source.megatron is not None or recipe.adapter is not None:
        engine = Engine(recipe, train=False)
        yield from engine.export()
        engine.close()
        return
    model = read_model(source.hf)
    reader = source.reader(recipe, model)
    dtype = DTYPES[recipe.model.dtype]
    check_names((), model.table, reader, model)
    for rule in model.table.values():
        for name in rule.hf:
            whole = tuple(slice(0, size) for size in reader.shape(name))
            yield name, reader.read(name, whole).to(dtype)


def counted(rows: Iterable[AnswerRow]) -> Counter[str]:
    """What came of answers."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts["prompts"] += 1
        for answer in row["answers"]:
            counts["answers"] += 1
            counts["tokens"] += len(answer["tokens"])
            counts["truncated"] += answer["finish"] == "length"
            counts["without a reward"] += answer["reward"] is None
            counts["graded"] += answer["reward"] is not None
            if answer.get("fault"):
                counts[f"fault: {answer['fault']}"] += 1
            counts["right"] += (answer["reward"] or 0) >= 1
    return counts


def outcome(counts: Mapping[str, int]) -> str:
    """Counts in words."""
    num = max(1, counts["answers"])
    parts = [f"{counts['tokens'] / num:.0f} tokens each", f"{counts['truncated']} cut at the limit"]
    if counts["graded"]:
        parts.append(f"{counts['right']} with a reward of 1 or more")
    if counts["without a reward"]:
        parts.append(f"{counts['without a reward']} without a reward")
    parts += [f"{n} {name}" for name, n in counts.items() if name.startswith("fault: ")]
    return ", ".join(parts)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 interrupt as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
