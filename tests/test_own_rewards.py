"""Functions of one's own, called as TRL 1.16 calls them: shapes that its documentation and public
reward functions have run unchanged. And rewards that fail, files that are not there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.load import load_recipe
from moetrain.config.reward_files import check_reward_file
from moetrain.config.rewards import RewardConfig
from moetrain.data.samples import Prompt
from moetrain.errors import ConfigError, DataError
from moetrain.rewards import Completion, Grader, Verdict, check_columns
from moetrain.run.dry_run import check, dry_run

ROOT = Path(__file__).parents[1]

SHAPES = """
import asyncio, functools, math, re

def strings(completions, **kwargs):  # the standard format
    return [float(len(text)) for text in completions]

def messages(completions, **kwargs):  # the conversational format
    return [float(len(completion[0]["content"])) for completion in completions]

def against(completions, ground_truth, **kwargs):
    found = [re.search(r"\\\\boxed\\{(.*?)\\}", text) for text in completions]
    given = [match.group(1) if match else "" for match in found]
    return [1.0 if a == b else 0.0 for a, b in zip(given, ground_truth)]

def of_a_task(prompts, completions, task, **kwargs):  # None where it does not apply
    assert len(prompts) == len(completions) == len(task)
    texts = [completion[-1]["content"] for completion in completions]
    return [float("x" in one) if t == "code" else None for one, t in zip(texts, task)]

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions)]

def of_ids(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]

def steps(completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

def logs(completions, answer, log_extra=None, log_metric=None, **kwargs):
    right = [c[0]["content"] == a for c, a in zip(completions, answer)]
    if log_extra:
        log_extra("golden", answer)
    if log_metric:
        log_metric("accuracy", sum(right) / len(right))
    return right

def plain(completions):  # nothing else is asked for
    return [1.0 for _ in completions]

def named(prompt, completions):
    return [float(len(p)) for p in prompt]

def made(longest):
    def scaled(completions, solution, **kwargs):
        return [math.cos(min(1.0, len(c[0]["content"]) / longest) * math.pi) for c in completions]
    return scaled

cosine = made(10)
penalty = functools.partial(made(20), unused=1)

class Counted:
    __name__ = "counted"
    def __init__(self, most):
        self.most = most
    def __call__(self, completions, **kwargs):
        return [min(self.most, float(len(c))) for c in completions]

counted = Counted(2)

def tags(completions, **kwargs):  # counts, as public format rewards do
    def count(text):
        wanted = ("<think>\\n", "\\n</think>\\n", "\\n<answer>\\n", "\\n</answer>")
        return 0.25 * sum(text.count(tag) == 1 for tag in wanted)
    return [count(completion[0]["content"]) for completion in completions]

def shortest(completions, solution, **kwargs):  # compares within a batch
    lengths = [len(completion) for completion in completions]
    least, most = min(lengths), max(lengths)
    if least == most:
        return [0.0] * len(completions)
    return [0.5 - (length - least) / (most - least) for length in lengths]

def zipped(completions, **kwargs):  # a row of all that it is given for each completion
    rows = [dict(zip(kwargs.keys(), values)) for values in zip(*kwargs.values())]
    assert len(rows) == len(completions)
    return [float(row["id"]) for row in rows]

def nested(completions, verification_info, **kwargs):
    return [float(len(info["test_cases"])) for info in verification_info]

def seen(completions, **kwargs):
    return [float(len(completions))] * len(completions)

def unless_x(completions, **kwargs):
    if "x" in completions:
        raise ValueError("x is no text")
    return [float(len(completions))] * len(completions)

def too_few(completions, **kwargs):
    return [1.0]

def failing(completions, **kwargs):
    raise RuntimeError("no luck")
"""
ASKED = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "shapes.py"
    path.write_text(SHAPES)
    return path


def graded(
    file: Path,
    name: str,
    texts: list[str],
    more: dict[str, Any] | None = None,
    **columns: list[Any],
) -> tuple[list[Verdict], Grader]:
    """`more`: fields of every item, and of the reward's config."""
    more = dict(more or {})
    config = RewardConfig(name=f"{file}:{name}", batch_size=more.pop("batch_size", None))
    grader = Grader([config], num_workers=1, deadline_s=20)
    items = [
        Completion(i, text, {key: values[i] for key, values in columns.items()}, **more)
        for i, text in enumerate(texts)
    ]
    try:
        return grader.grade_completions(items), grader
    finally:
        grader.close()


@pytest.mark.parametrize(
    ("name", "texts", "columns", "wanted"),
    [
        ("strings", ["a", "bb"], {"prompt": ["q", "q"]}, [1, 2]),
        ("strings", ["a", "bb"], {}, [1, 2]),
        ("messages", ["a", "bb"], {"prompt": [ASKED] * 2}, [1, 2]),
        ("against", ["\\boxed{4}", "4"], {"ground_truth": ["4", "4"], "prompt": ["q"] * 2}, [1, 0]),
        ("of_a_task", ["x", "y"], {"task": ["code", "math"], "prompt": [ASKED] * 2}, [1, None]),
        ("later", ["a", "bb"], {"prompt": ["q", "qq"]}, [2, 4]),
        ("logs", ["4", "5"], {"answer": ["4", "4"], "prompt": [ASKED] * 2}, [1, 0]),
        ("plain", ["4", "5"], {"answer": ["4", "4"], "prompt": [ASKED] * 2}, [1, 1]),
        ("named", ["4", "5"], {"prompt": ["q", "qq"]}, [1, 2]),
        ("cosine", ["a" * 10, ""], {"solution": ["", ""], "prompt": [ASKED] * 2}, [-1, 1]),
        ("penalty", ["a" * 10], {"solution": [""], "prompt": [ASKED]}, [0]),
        ("counted", ["a", "bbbb"], {"prompt": ["q"] * 2}, [1, 2]),
        ("tags", ["<think>\na\n</think>\n<answer>\n4\n</answer>"], {"prompt": [ASKED]}, [1]),
        ("shortest", ["a", "bb", "ccc"], {"solution": [1, 2, 3]}, [0.5, 0, -0.5]),
        ("zipped", ["a", "b"], {"id": [3, 4], "prompt": [ASKED] * 2}, [3, 4]),
        ("nested", ["a"], {"verification_info": [{"test_cases": [1, 2]}], "prompt": [ASKED]}, [2]),
    ],
)  # fmt: skip
def test_a_shape_of_trl_runs_unchanged(
    file: Path, name: str, texts: list[str], columns: dict[str, Any], wanted: list[float | None]
) -> None:
    is_text = isinstance(columns.get("prompt", [""])[0], str)
    found, grader = graded(file, name, texts, {"is_text": is_text}, **columns)
    assert [one.reward for one in found] == pytest.approx(wanted, abs=1e-9), grader.said


def test_a_prompt_as_text_is_given_without_the_systems(file: Path) -> None:
    """As by TRL, and by `grade`: a record's `system` is a column."""
    asked = [[{"role": "system", "content": "Systems"}, *ASKED]]
    columns: dict[str, Any] = {"prompt": asked, "system": ["Systems"]}
    found, grader = graded(file, "named", ["a"], {"is_text": True}, **columns)
    assert [one.reward for one in found] == [1], grader.said


def test_what_comes_beside_the_columns(file: Path) -> None:
    more = {"tokens": (1, 2, 3), "step": 5, "last": 20}
    assert [one.reward for one in graded(file, "of_ids", ["a", "b"], more)[0]] == [-3, -3]
    assert [one.reward for one in graded(file, "steps", ["a", "b"], more)[0]] == [0.25, 0.25]
    columns: dict[str, Any] = {"answer": ["4", "4"], "prompt": [ASKED] * 2}
    found, grader = graded(file, "logs", ["4", "5"], **columns)
    assert [dict(one.extra) for one in found] == [{"golden": "4"}] * 2
    assert grader.take_metrics() == {"accuracy": 0.5} and grader.take_metrics() == {}


def test_a_batch_is_the_answers_to_one_prompt_or_as_many_as_the_recipe_says(file: Path) -> None:
    other = [{"role": "user", "content": "r"}]
    columns: dict[str, Any] = {"prompt": [ASKED] * 3 + [other] * 2}
    texts = list("abcde")
    assert [o.reward for o in graded(file, "seen", texts, **columns)[0]] == [3, 3, 3, 2, 2]
    four = graded(file, "seen", texts, {"batch_size": 4}, **columns)[0]
    assert [one.reward for one in four] == [4, 4, 4, 4, 1]
    with pytest.raises(ValueError, match=r"batch_size is for FILE\.py:FUNCTION"):
        RewardConfig.model_validate({"name": "accuracy", "batch_size": 4})


def test_a_batch_that_raises_costs_the_one_to_blame(file: Path) -> None:
    found, grader = graded(file, "unless_x", ["a", "b", "x", "c"])
    assert [one.reward is None for one in found] == [False, False, True, False]
    assert grader.counts == {"error": 1} and "x is no text" in grader.said
    found, grader = graded(file, "too_few", ["a", "b"])
    assert [one.reward for one in found] == [1, 1]  # alone, each has its own
    assert dict(found[0].parts) == {"too_few": 1}
    found, grader = graded(file, "failing", ["a", "b"])
    assert [one.reward for one in found] == [None, None]
    assert [dict(one.parts) for one in found] == [{"failing": None}] * 2
    assert grader.said == "failing: RuntimeError: no luck"


def test_the_prompts_thought_is_part_of_the_format() -> None:
    grader = Grader([RewardConfig(name="format"), RewardConfig(name="accuracy")], 1, 30)
    text = "so\n</think>\n<answer>4</answer>"
    items = [
        Completion(i, text, {"answer": "4"}, opened=opened)
        for i, opened in enumerate(["<think>\n", ""])
    ]
    items.append(
        Completion(2, "it is \\boxed{4}", {"answer": "4"}, opened="<think>\n")
    )  # it was cut
    found = grader.grade_completions(items)
    grader.close()
    assert [dict(one.parts) for one in found] == [
        {"format": 1, "accuracy": 1},
        {"format": 0, "accuracy": 1},
        {"format": 0, "accuracy": 0},
    ]


# What is not there


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "f", "is not a file"),
        ("def emojy(c): ...", "emoji", "has no function emoji. Did you mean 'emojy'?"),
        ("def f(:", "f", "cannot be run: SyntaxError"),
        ("x = 1", "f", "It has x."),
        ("def f(prompts, answer): ...", "f", "takes no `completions`, so it sees no answer"),
    ],
)
@pytest.mark.parametrize("refuse", [check, lambda recipe, _: dry_run(recipe, 1)])
def test_a_function_that_is_not_there_is_refused_before_anything(
    content: str | None,
    name: str,
    message: str,
    refuse: Callable[[Any, int], Any],
    tmp_path: Path,
) -> None:
    """By a dry run, by what doctor and submit check, and before a run starts a process."""
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    recipe = load_recipe(ROOT / "examples" / "grpo_tiny.yaml", [f"rewards=['{path}:{name}']"])
    with pytest.raises(ConfigError) as caught:
        refuse(recipe, 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "f = lambda completions: []",
        "from os import getcwd as f",
        "try:\n    import nothing\nexcept ImportError:\n    def f(completions): ...",
        "if True:\n    async def f(completions): ...",
        "class f: ...",
        "def f(**columns): ...",
        "def f(completion_ids): ...",
        "@wrapped\ndef f(x): ...",
        "a, (f, b) = 1, (2, 3)",
        "from os import *",
    ],
)
def test_what_names_a_function(content: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(content)
    check_reward_file(f"{tmp_path}/own.py:f")


# Sources


def prompts(source: str, *columns: dict[str, Any]) -> list[Prompt]:
    return [Prompt(f"{source}{i}", (1,), own, source=source) for i, own in enumerate(columns)]


def test_a_source_that_no_reward_can_grade_is_refused_by_its_name() -> None:
    accuracy, code = RewardConfig(name="accuracy"), RewardConfig(name="code")
    good = prompts("a.jsonl", {"answer": "1"}, {"solution": "2"})
    other = prompts("b.jsonl", {"reply": "1"}, {"reply": "2"})
    assert check_columns([accuracy], good) == ""
    with pytest.raises(
        DataError, match=r"b\.jsonl: no reward can grade.*answer or solution.*reply"
    ):
        check_columns([accuracy], good + other)
    with pytest.raises(DataError, match=r"b\.jsonl: no reward can grade"):
        check_columns([accuracy, code], good + other)
    told = check_columns([accuracy, RewardConfig(name="format")], good + other)
    assert told == (
        "accuracy cannot grade 2 of 2 in b.jsonl: they lack answer or solution."
        " For these, format is all"
    )
    assert check_columns([accuracy, RewardConfig(name="format")], good) == ""
    mixed = good + prompts("c.jsonl", {"tests": [{"input": "", "output": ""}]})
    assert check_columns([accuracy, code], mixed) == ""
    some = prompts("d.jsonl", {"answer": "1"}, {"answer": None})
    assert "1 of 2 in d.jsonl" in check_columns([accuracy], some)
