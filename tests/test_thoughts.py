"""Thinking models, from the prompt's template to the text that rewards see."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from moetrain.config.builtin import MODELS
from moetrain.config.rewards import RewardConfig
from moetrain.data import assets
from moetrain.data import tokenizer as tokenizers
from moetrain.data.chat import Chat
from moetrain.data.prompts import read_prompt, read_prompts
from moetrain.data.samples import Prompt, Sample
from moetrain.data.trajectories import Trajectory
from moetrain.loops.rollouts import verdicts
from moetrain.rewards import Grader
from moetrain.rollout.base import Request, Sampling, text_of_answer
from moetrain.rollout.embedded import Embedded

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
OPENING = TURNS + "<think>\n{% endif %}"
CLOSED = TURNS + "<think>\n\n</think>\n\n{% endif %}"
PLAIN = TURNS + "{% endif %}"


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for which the marks of a thought are special tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(assets.resolve("builtin:stdlib-tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    folder = tmp_path_factory.mktemp("marked")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "opened"), [(OPENING, "<think>\n"), (CLOSED, ""), (PLAIN, "")]
)
def test_a_prompt_knows_what_its_template_began(template: str, opened: str, marked: Path) -> None:
    chat = Chat(tokenizers.load(marked), template)
    for record in ({"prompt": "6 * 7?"}, {"prompt": [{"role": "user", "content": "a <think>\n"}]}):
        prompt, _ = read_prompt(record, chat)
        assert prompt.opened == opened
        assert prompt.is_text == isinstance(record["prompt"], str)


def test_prompts_know_their_source_and_their_question(tmp_path: Path, marked: Path) -> None:
    for name, record in (("a", {"problem": "p", "solution": "1"}), ("b", {"prompt": "q"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    found = read_prompts(paths, Chat(tokenizers.load(marked), PLAIN)).prompts
    assert [prompt.source for prompt in found] == [str(path) for path in paths]
    assert found[0].columns["problem"] == "p" and found[0].columns["solution"] == "1"


def test_special_tokens_of_an_answer_are_not_lost(marked: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(marked)
    end = tokenizer.eos_token_id
    said = "<think>41</think>42"
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "4142"  # what rewards saw before
    assert text_of_answer(tokenizer, [*ids, end], [end]) == said
    assert text_of_answer(tokenizer, ids, [end]) == said
    assert text_of_answer(tokenizer, [end], [end]) == "" == text_of_answer(tokenizer, [], [end])


def test_an_engine_says_what_was_drawn(marked: Path, tmp_path: Path) -> None:
    """All tokens but the one that ended it, special ones too."""
    import torch

    hf = dict(MODELS["qwen3-moe-tiny"]) | {"vocab_size": len(AutoTokenizer.from_pretrained(marked))}
    engine = Embedded(hf, marked)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cast(Any, hf)))
    with torch.no_grad():  # it says what its output layer leans to: the marks, often
        marks = [engine.tokenizer.convert_tokens_to_ids(m) for m in ("<think>", "</think>")]
        model.lm_head.weight[marks] *= 30
    engine.push(model.state_dict().items(), 0)
    samples: list[Sample] = []
    sampling = Sampling(12, stop_ids=(int(engine.tokenizer.eos_token_id),))
    prompt = Prompt("p", (5, 6, 7), {})
    engine.generate([Request(prompt, i, i, sampling) for i in range(8)], samples.append)
    assert any("<think>" in sample.text or "</think>" in sample.text for sample in samples)
    for sample in samples:
        kept = sample.tokens[:-1] if sample.finish == "stop" else sample.tokens
        assert sample.text == engine.tokenizer.decode(kept, skip_special_tokens=False)


def test_an_answer_is_graded_behind_the_thought_that_its_prompt_began() -> None:
    def sample(text: str) -> Trajectory:
        return Trajectory.of(Sample("p", 0, (1,), (0.0,), text, "stop", 0))

    prompt = Prompt("p", (1,), {"answer": "42", "prompt": []}, opened="<think>\n")
    configs = [RewardConfig(name=name) for name in ("accuracy", "format", "exact")]
    texts = ("42 it is</think>\n<answer>42</answer>", "so \\boxed{42}", "hm</think>42")
    grader = Grader(configs, 1, 30)
    found = verdicts(grader, [(prompt, sample(text)) for text in texts])
    grader.close()
    assert [dict(one.parts) for one in found] == [
        {"accuracy": 1, "format": 1, "exact": 0},
        {"accuracy": 0, "format": 0, "exact": 0},
        {"accuracy": 1, "format": 0, "exact": 1},
    ]
