"""Turns between a model and an environment, with the real engine for small models and real
processes: what is drawn, what becomes of faults, and how a killed draw goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moetrain.answers.file import AnswerFile
from moetrain.config.builtin import MODELS
from moetrain.config.rollout import RolloutConfig
from moetrain.data import tokenizer as tokenizers
from moetrain.data.assets import resolve
from moetrain.data.chat import Chat
from moetrain.data.prompts import read_prompt
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory, from_json, to_json
from moetrain.data.turns import stop_ids
from moetrain.environments.calls import TurnReader
from moetrain.environments.service import EnvironmentService
from moetrain.errors import DataError
from moetrain.loops.dialogues import Dialogues, with_environment
from moetrain.loops.rollouts import Drawing
from moetrain.rollout.base import Request, Sampling
from moetrain.rollout.embedded import Embedded
from moetrain.rollout.follow_ups import FollowUps

# Forgets what the model thought in earlier turns, as Qwen3's does behind a user's message.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if"
    " m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENVIRONMENT = """
import os
import time


class Rude:
    '''Says back how often it has been spoken to; what a record asks for happens in turn two.'''

    tools = ()

    def reset(self, record):
        return []

    def reply(self, record, messages):
        turns = sum(message["role"] == "assistant" for message in messages)
        what = record["what"]
        if turns == 2 and what == "hangs":
            time.sleep(100)
        if turns == 2 and what == "dies":
            os._exit(3)
        if turns == 2 and what == "raises":
            raise ValueError("no such luck")
        if turns == 3 and what != "goes on":
            return None
        return [{"role": "user", "content": f"that was {turns}" * (99 if what == "talks" else 1)}]
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for which the marks of a thought are special tokens."""
    made: Any = AutoTokenizer.from_pretrained(resolve("builtin:stdlib-tokenizer"))
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    folder = tmp_path_factory.mktemp("marked")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tokenizer: Path) -> Embedded:
    """A random model that thinks now and then."""
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    hf = dict(MODELS["qwen3-moe-tiny"]) | {"vocab_size": size}
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cast(Any, hf)))
    found = Embedded(hf, tokenizer)
    with torch.no_grad():
        marks = ("<think>", "</think>")
        made.lm_head.weight[[found.tokenizer.convert_tokens_to_ids(m) for m in marks]] *= 30
    found.push(made.state_dict().items(), 0)
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnvironmentService]:
    own = tmp_path_factory.mktemp("environment") / "rude.py"
    own.write_text(ENVIRONMENT)
    found = EnvironmentService(
        RolloutConfig(environment=f"{own}:Rude", environment_seconds=2.0, environment_workers=2)
    )
    yield found
    found.close()


@pytest.fixture(scope="module")
def chat(tokenizer: Path) -> Chat:
    return Chat(tokenizers.load(tokenizer))


def dialogues_of(service: EnvironmentService, chat: Chat, **more: Any) -> Dialogues:
    stops = stop_ids(chat, {})
    made = Dialogues(service, chat, stops, TurnReader(None), 4, 200, 100)
    return replace(made, **more)


def drawn(
    engine: Embedded,
    dialogues: Dialogues,
    whats: list[str],
    done: dict[tuple[str, int], Trajectory] | None = None,
    num: int = 3,
    stop: tuple[str, ...] = tuple("eaio"),
) -> tuple[dict[tuple[str, int], Trajectory], list[Trajectory], list[Prompt]]:
    """(trajectories, all that was kept on the way, prompts): `num` for a prompt of each kind."""
    records = [{"prompt": f"Speak {what}.", "what": what} for what in whats]
    prompts = [read_prompt(record, dialogues.chat)[0] for record in records]
    prompts = with_environment(prompts, dialogues)
    sampling = Sampling(30, stop_ids=dialogues.stop_ids, stop=stop)
    done, kept = {} if done is None else done, list[Trajectory]()
    Drawing(engine, sampling, 7, dialogues).draw(prompts, num, done, kept.append)
    return done, kept, prompts


def asked(prompts: list[Prompt], one: Trajectory) -> str:
    """What its prompt's record asked for."""
    return next(p.columns["what"] for p in prompts if p.id == one.prompt_id)


def test_every_turn_is_what_the_model_saw_and_wrote(
    engine: Embedded, service: EnvironmentService, chat: Chat
) -> None:
    """The ids are those of the whole conversation as the template renders it, and the log-probs
    those of the model behind them; three turns, then the environment is done.
    """
    dialogues = dialogues_of(service, chat)
    done, kept, prompts = drawn(engine, dialogues, ["well"], num=6)
    ended = [one for one in done.values() if one.finish == "stop"]
    assert len(ended) >= 3 and len(kept) > len(done)
    for one in ended:
        (branch,), (prompt,) = one.branches, prompts
        assert [turn.author for turn in one.turns] == ["model", "reply"] * 2 + ["model"]
        assert len(one.messages) == 5 and one.messages[1]["content"] == "that was 1"
        whole = [*prompt.tokens, *branch.tokens.tolist()]
        text = str(dialogues.chat.tokenizer.decode(whole))
        for message in one.messages[1::2]:
            assert f"<|im_start|>user\n{message['content']}<|im_end|>\n" in text
        assert text.count("<|im_start|>assistant\n") == 3
        logits = engine.model(torch.tensor([whole])).logits[0].float()
        logp = torch.log_softmax(logits, -1)[len(prompt.tokens) - 1 : -1]
        ours = logp.gather(1, torch.tensor(branch.tokens)[:, None].long())[:, 0]
        mask = torch.from_numpy(branch.written)
        gap = (ours - torch.from_numpy(branch.logprobs))[mask].abs().max()
        assert gap < 1e-4 and not branch.logprobs[~branch.written].any()


def test_a_fault_costs_one_trajectory(
    engine: Embedded, service: EnvironmentService, chat: Chat
) -> None:
    """Each has the name of its ending, and no other is the worse for it."""
    dialogues = dialogues_of(service, chat)
    whats = ["well", "hangs", "dies", "raises", "goes on", "talks"]
    done, _, prompts = drawn(engine, dialogues, whats)
    endings = {what: "stop" for what in whats} | {
        "hangs": "timeout",
        "dies": "crash",
        "raises": "error",
        "goes on": "turns",
        "talks": "length",
    }
    found: dict[str, set[str]] = {what: set() for what in whats}
    for one in done.values():
        cut = any(turn.finish == "length" for turn in one.turns)
        found[asked(prompts, one)].add("cut" if cut else one.finish)
    for what, ways in found.items():
        assert endings[what] in ways and ways <= {endings[what], "cut"}
    (raised,) = {one.detail for one in done.values() if one.finish == "error"}
    assert "no such luck" in raised


def test_a_killed_draw_goes_on_where_it_was(
    engine: Embedded, service: EnvironmentService, chat: Chat
) -> None:
    """From the last turn that is on disk: nothing is drawn twice."""
    dialogues = dialogues_of(service, chat)
    whole, kept, _ = drawn(engine, dialogues, ["well"], num=4)
    journal = [from_json(to_json(one)) for one in kept]
    firsts = {(one.prompt_id, one.index): one for one in journal if len(one.written) == 1}
    assert sum(one.finish == "open" for one in firsts.values()) >= 2
    done = dict(firsts)
    again, later, _ = drawn(engine, dialogues, ["well"], done, num=4)
    assert all(len(one.written) > 1 for one in later)
    for key, one in whole.items():
        assert again[key].tokens == one.tokens and again[key].finish == one.finish


class Stopping:
    """The engine, where every second turn is stopped halfway, and what the turns had then."""

    def __init__(self, engine: Embedded):
        self.engine, self.cut = engine, list[Sample]()
        self._num = 0

    def generate(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        follow_ups: FollowUps | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        begun = {(r.prompt.id, r.index): r.begun for r in requests}

        def take(sample: Sample) -> None:
            self._num += 1
            before = begun.pop((sample.prompt_id, sample.index), None)
            there = 0 if before is None else len(before.tokens)
            half = (there + len(sample.tokens)) // 2
            if self._num % 2 and half > there:
                tokens, logprobs = sample.tokens[:half], sample.logprobs[:half]
                sample = replace(sample, tokens=tokens, logprobs=logprobs, finish="open")
                self.cut.append(sample)
            on_sample(sample)

        self.engine.generate(requests, take, follow_ups)


@pytest.mark.parametrize("template", [None, FORGETS], ids=["as it is", "forgets"])
def test_a_turn_that_was_stopped_goes_on(
    engine: Embedded, service: EnvironmentService, chat: Chat, template: str | None
) -> None:
    """In whichever turn, by other weights: what was drawn stays, the rest is drawn behind all that
    the model saw, and only then it is replied to.
    """
    chat = chat if template is None else Chat(chat.tokenizer, template)
    stop = tuple("eaio") if template is None else ("</think>",)
    dialogues = dialogues_of(service, chat, max_turns=3)
    stopping = Stopping(engine)
    done: dict[tuple[str, int], Trajectory] = {}
    for version in range(4):
        engine.version, before = version, dict(done)
        _, kept, prompts = drawn(cast(Any, stopping), dialogues, ["goes on"], done, 8, stop)
        again = {(one.prompt_id, one.index) for one in kept} & before.keys()
        assert all(before[key].is_open for key in again), "what has ended is not drawn again"
    assert {sum(turn.author == "model" for turn in one.turns) for one in done.values()} & {2, 3}
    _, kept, prompts = drawn(engine, dialogues, ["goes on"], done, 8, stop)
    engine.version = 0
    assert len(stopping.cut) > 8 and not any(one.is_open for one in done.values())
    for sample in stopping.cut:
        tokens = done[sample.prompt_id, sample.index].tokens
        num = len(sample.tokens)
        assert any(tuple(tokens[i : i + num]) == sample.tokens for i in range(len(tokens)))
    for one in done.values():
        versions = np.concatenate([own.by_token for own in one.branches])
        assert (np.diff(versions) >= 0).all() and not any(t.finish == "open" for t in one.turns)
        for branch in one.branches:
            context = prompts[0].tokens if branch.context is None else branch.context.tolist()
            whole = [*context, *branch.tokens.tolist()]
            logits = engine.model(torch.tensor([whole])).logits[0].float()
            logp = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
            ours = logp.gather(1, torch.tensor(branch.tokens)[:, None].long())[:, 0]
            gap = (ours - torch.from_numpy(branch.logprobs))[torch.from_numpy(branch.written)]
            assert gap.abs().max() < 1e-4


def test_sample_draws_again_what_a_fault_took(tmp_path: Path) -> None:
    """And goes on with what is open; what has ended stays."""
    ways: list[Any] = ["stop", "timeout", "open", "length"]
    made = [
        replace(Trajectory.of(Sample("p", i, (5,), (-0.5,), "t", "stop", 0)), finish=how)
        for i, how in enumerate(ways)
    ]
    with AnswerFile(tmp_path / "a.jsonl", {}, 4, {}) as file:
        file.partial(0, made).close()
    with AnswerFile(tmp_path / "a.jsonl", {}, 4, {}) as file:
        found = {key[1]: one.finish for key, one in file.waiting.items()}
    assert found == {0: "stop", 2: "open", 3: "length"}


def test_where_the_template_forgets_thoughts_a_segment_begins(
    engine: Embedded, service: EnvironmentService, chat: Chat
) -> None:
    """With the conversation as the model then sees it; what was sampled stays as it was."""
    dialogues = dialogues_of(service, Chat(chat.tokenizer, FORGETS), max_turns=3)
    done, _, prompts = drawn(engine, dialogues, ["goes on"], num=24, stop=("</think>",))
    split = [one for one in done.values() if len(one.branches) > 1]
    assert split, [(one.finish, one.detail, one.written[0].text) for one in done.values()]
    for one in split:
        for before, branch in zip(one.branches, one.branches[1:], strict=False):
            assert branch.context is not None and "</think>" in before.turns[-1].text
            text = str(dialogues.chat.tokenizer.decode(branch.context.tolist()))
            assert "</think>" not in text and text.endswith("<|im_start|>assistant\n")
            prompt = str(dialogues.chat.tokenizer.decode(list(prompts[0].tokens)))
            assert text.startswith(prompt[:-22])


def test_a_prompt_that_the_environment_makes_too_long_is_named(
    service: EnvironmentService, chat: Chat
) -> None:
    prompt, _ = read_prompt({"prompt": "word " * 40, "what": "well"}, chat)
    with pytest.raises(DataError, match=r"has \d+ tokens with what the environment says, of 30"):
        with_environment([prompt], dialogues_of(service, chat, max_prompt=30))
