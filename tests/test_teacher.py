"""A teacher that the ranks run: the same words at every layout, transformers' own, and where it is
told more, those of the longer prompt.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import questions, tokenizer_folder, write_jsonl
from test_scatter import groups

from moetrain.data import tokenizer as tokenizers
from moetrain.data.groups import Group, pack_groups
from moetrain.data.prompts import read_prompt
from moetrain.data.run_tokenizer import chat_of
from moetrain.data.same_vocabulary import check_same, difference
from moetrain.data.trajectories import Word
from moetrain.errors import ConfigError, DataError, LayoutError
from moetrain.layout.mesh import plan_mesh
from moetrain.layout.teacher import teacher_bytes
from moetrain.loops.store import Batch, Store
from moetrain.loops.teacher import check_teacher_prompts, check_words, teacher_prompts
from moetrain.ops.packed import from_tokens
from moetrain.run.dry_run import dry_run
from moetrain.run.inputs import missing
from moetrain.testing import command, taught
from moetrain.testing.gloo import Workers
from moetrain.testing.ranks import recipe_for
from moetrain.testing.tiny import save_model

Tiny = Callable[[str], tuple[str, Any]]
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "cp2": (2, {"cp": 2}),
}
FOUND = groups([1, 4, 9, 3], 3)
GKD = {"name": "gkd", "top_k": 3, "interpolation": 0.3}
DISTILL = {"name": "on_policy_distill"}


def sections(method: dict[str, Any], **teacher: Any) -> dict[str, Any]:
    return {
        "model": {"tokenizer": str(tokenizer_folder())},
        "method": method,
        "teacher": teacher,
        "rollout": {"max_tokens": 8},
    }


def close(found: Any, wanted: Any) -> bool:
    return torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=2e-5)


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", [GKD, DISTILL], ids=["gkd", "on_policy_distill"])
def test_the_words_of_another_model_at_every_layout(
    workers: Workers, tiny: Tiny, layout: str, method: dict[str, Any]
) -> None:
    """Of another family; each answer's once, and what is learned is the same."""
    size, parallel = LAYOUTS[layout]
    student, _ = tiny("qwen3_moe")
    folder, teacher = tiny("qwen2_moe")
    given = sections(method, path=folder)
    ((whole, loss, away),) = workers.run(1, taught.taught, student, {}, FOUND, given)
    assert sorted(whole) == list(range(12)) and abs(away) > 0.01
    answer = FOUND[1].answers[2].trajectory.branches[0]
    with torch.no_grad():
        ids = torch.tensor([[*FOUND[1].prompt.tokens, *answer.tokens.tolist()]])
        scores = teacher(ids).logits[0].float()
    k, place = int(method.get("top_k", 0)), 5  # the third answer to the second prompt
    vocab = min(scores.size(1), 256)
    logp = scores[:, :vocab].log_softmax(-1)[len(FOUND[1].prompt.tokens) - 1 : -1]
    labels, own, best, top = whole[place]
    assert labels == answer.tokens.tolist()
    assert close(own, logp.gather(1, ids[0, len(FOUND[1].prompt.tokens) :, None])[:, 0].tolist())
    wanted = logp.topk(k, -1) if k else None
    if wanted is not None:
        assert best == wanted.indices.tolist() and close(top, wanted.values.tolist())
    said = workers.run(size, taught.taught, student, parallel, FOUND, given)
    assert {place for found, _, _ in said for place in found} == set(whole)
    for found, its_loss, its_away in said:
        assert its_loss == pytest.approx(loss, abs=2e-5)
        assert its_away == pytest.approx(away, abs=2e-5)
        for place, (labels, own, best, top) in found.items():
            assert labels == whole[place][0] and best == whole[place][2]
            assert close(own, whole[place][1]) and close(top, whole[place][3])


# With a longer prompt than the student's

SYSTEM = "The answer is {answer}."


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a chat template."""
    folder = tmp_path_factory.mktemp("speaking")
    save_model("qwen3_moe", folder, vocab_size=512)
    shutil.copytree(tokenizer_folder(), folder, dirs_exist_ok=True)
    return str(folder)


def asked(recipe: Any) -> list[Group]:
    """The groups above, to prompts with messages and columns."""
    chat = chat_of(recipe)
    records = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(len(FOUND))]
    prompts = [read_prompt(record, chat)[0] for record in records]
    return [replace(one, prompt=p) for one, p in zip(FOUND, prompts, strict=True)]


@pytest.mark.gloo
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_words_of_a_teacher_with_a_longer_prompt(
    workers: Workers, speaking: str, layout: str
) -> None:
    """Those that it has behind the longer prompt, by the tokens of the student's answers."""
    size, parallel = LAYOUTS[layout]
    given = {"method": GKD, "rollout": {"max_tokens": 8}, "data": {"seq_len": 128}}
    secret = given | {"teacher": {"path": "start", "system": SYSTEM}}
    recipe = recipe_for(speaking, {}, **secret)
    groups, longer_prompts = asked(recipe), teacher_prompts(recipe)
    assert longer_prompts is not None
    longer = [replace(group, prompt=longer_prompts.of(group.prompt)) for group in groups]
    text = chat_of(recipe).tokenizer.decode(list(longer[2].prompt.tokens))
    assert "The answer is 3." in text and "2 + 1?" in text
    plain = given | {"teacher": {"path": speaking}}
    ((wanted, _, _),) = workers.run(1, taught.taught, speaking, {}, longer, plain)
    ((unlike, _, _),) = workers.run(1, taught.taught, speaking, {}, groups, plain)
    said = workers.run(size, taught.taught, speaking, parallel, groups, secret)
    assert not close(wanted[0][1], unlike[0][1])
    for found, _, away in said:
        assert away > 1e-4
        for place, (labels, own, best, top) in found.items():
            assert labels == wanted[place][0] and best == wanted[place][2]
            assert close(own, wanted[place][1]) and close(top, wanted[place][3])


def test_what_cannot_be_told_is_said_before_the_run(speaking: str) -> None:
    given = {"method": GKD, "rollout": {"max_tokens": 8}}
    for teacher, words in (
        ({"path": "start", "system": "It is {solution}."}, "no such column; it has answer, prompt"),
        ({"path": "start", "system": "Think. " * 60}, "Raise data.seq_len, or tell less"),
    ):
        recipe = recipe_for(speaking, {}, **given, teacher=teacher)
        prompts = [group.prompt for group in asked(recipe)]
        with pytest.raises(DataError, match=words):
            check_teacher_prompts(recipe, prompts)
            longer_prompts = teacher_prompts(recipe)
            assert longer_prompts is not None
            longer_prompts.of(prompts[0])
    chat = chat_of(recipe)
    rendered, _ = read_prompt({"prompt": "as it is", "templated": True}, chat)
    with pytest.raises(DataError, match="rendered already"):
        check_teacher_prompts(recipe, [rendered])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"method": "gkd"}, "give teacher.path or teacher.address"),
    "not both": (
        {"method": "gkd", "teacher": {"path": "a", "address": "http://b"}},
        "exactly one of teacher.path and teacher.address",
    ),
    "not for others": (
        {"method": "grpo", "teacher": {"path": "a"}, "rewards": ["length"]},
        "teacher does nothing with method grpo",
    ),
    "itself": ({"method": "gkd", "teacher": {"path": "start"}}, "teaches nothing by itself"),
    "of servers": (
        {"method": "gkd", "teacher": {"path": "a", "concurrency": 3}},
        "teacher.concurrency does nothing with teacher.path",
    ),
    "no address": ({"method": "gkd", "teacher": {"address": "host:8000"}}, "begin with http://"),
    "hot": (
        {"method": "gkd", "teacher": {"path": "a"}, "rollout": {"temperature": 0.7}},
        "rollout.temperature=0.7: gkd compares",
    ),
    "no rewards": (
        {"method": {"name": "on_policy_distill", "reward_weight": 1}, "teacher": {"path": "a"}},
        "needs rewards",
    ),
    "idle": (
        {"method": {"name": "on_policy_distill", "scale_rewards": "group"},
         "teacher": {"path": "a"}},
        "scale_rewards does nothing without method.reward_weight",
    ),
    "one scale": (
        {"method": {"name": "on_policy_distill", "advantage_estimator": "reinforce_plus_plus"},
         "teacher": {"path": "a"}},
        "Take grpo or rloo",
    ),
    "no ratios": (
        {"method": {"name": "gkd", "mismatch": "tis"}, "teacher": {"path": "a"}},
        "Leave mismatch out",
    ),
    "in a game": (
        {"method": "gkd", "teacher": {"path": "start", "system": "x"},
         "rollout": {"environment": "game"}},
        "writes prompts itself",
    ),
    "offline": (
        {"method": "distill", "teacher": {"path": "a", "system": "x"}},
        "take on_policy_distill",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_teacher_can_do_is_refused_in_a_line(case: str) -> None:
    content, words = REFUSED[case]
    online = content["method"] != "distill"
    content = ({"rollout": {"max_tokens": 8}} if online else {}) | content
    with pytest.raises(ConfigError, match=words) as found:
        recipe_for("/none", {}, **content)
    assert "\n" not in str(found.value)


def test_a_teacher_that_is_not_there_is_missed_before_the_queue(
    speaking: str, tmp_path: Path
) -> None:
    recipe = recipe_for(speaking, {}, **sections(GKD, path=str(tmp_path / "none")))
    problems = [str(one) for one in missing(recipe)]
    assert any(one.startswith("teacher.path=") and "is not there" in one for one in problems)


def test_a_dry_run_counts_the_teacher_and_refuses_what_does_not_divide_it(
    speaking: str, tmp_path: Path
) -> None:
    """Its weights beside the student's: of all ranks, those of the whole model."""
    teacher = tmp_path / "teacher"
    model = save_model("qwen3", teacher, vocab_size=512)
    size = 4 * sum(p.numel() for p in model.parameters())
    given = sections(GKD, path=str(teacher))
    recipe = recipe_for(speaking, {"tp": 2}, **given)
    (held,) = teacher_bytes(recipe, plan_mesh(recipe.parallel, 2))
    assert size / 2 <= held <= size / 2 * 1.1  # norms are on both
    assert "the teacher's weights" in dry_run(recipe, 2)
    offline = recipe_for(speaking, {}, method={"name": "distill"}, teacher={"path": str(teacher)})
    assert teacher_bytes(offline, plan_mesh(offline.parallel, 1)) == [0]
    save_model(
        "qwen3", tmp_path / "odd", vocab_size=512, num_attention_heads=3, num_key_value_heads=3
    )
    odd = recipe_for(speaking, {"tp": 2}, **sections(GKD, path=str(tmp_path / "odd")))
    with pytest.raises(LayoutError, match=r"^teacher\.path has the student's layout"):
        dry_run(odd, 2)


@pytest.mark.parametrize("method", ["distill", "gkd", "on_policy_distill"])
def test_a_step_with_a_teacher_is_planned(speaking: str, tmp_path: Path, method: str) -> None:
    """A trace of it, which packs without a teacher's word would end."""
    recipe = tmp_path / "recipe.yaml"
    more = "" if method == "distill" else "rollout: {max_tokens: 8}"
    recipe.write_text(
        f"""
run_dir: {tmp_path}/run
model: {{path: {speaking}, dtype: bf16}}
method: {method}
teacher: {{path: {speaking}}}
data: {{train: none.jsonl, seq_len: 64}}
train: {{steps: 2}}
{more}
"""
    )
    done = command.run("plan", recipe, "--gpus", "2", "--gpu", "H100-80GB", "--as-is", "--json")
    assert done.returncode == 0, done.stderr
    (layout,) = json.loads(done.stdout)["layouts"]
    assert layout["traced"] and layout["step_s"] > 0


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    """By the first token that differs; more tokens on one side are no difference."""
    ours = tokenizers.load(tokenizer_folder()).get_vocab()
    assert difference(ours, ours) is None
    assert difference(ours, ours | {"<|extra|>": 900}) is None
    assert difference(ours | {"<|extra|>": 900}, ours) is None
    a, b = (token for token, number in ours.items() if number in (300, 301))
    swapped = difference(ours, ours | {a: ours[b], b: ours[a]})
    assert swapped is not None and "token 300" in swapped
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder(), other)
    check_same(tokenizer_folder(), str(other))
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    first, second = list(vocab)[290:292]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="need one vocabulary"):
        check_same(tokenizer_folder(), str(other))


# What is kept


def with_words(k: int) -> list[Group]:
    """The groups above with a teacher's word in each branch."""
    rng = np.random.default_rng(k)

    def word(t: int) -> Word:
        return Word(
            rng.normal(size=t).astype(np.float32),
            rng.integers(0, 200, (t, k)).astype(np.int32),
            rng.normal(size=(t, k)).astype(np.float32),
        )

    def answer(one: Any) -> Any:
        made = one.trajectory
        branches = tuple(replace(b, word=word(len(b.tokens))) for b in made.branches)
        return replace(one, trajectory=replace(made, branches=branches))

    return [replace(group, answers=tuple(map(answer, group.answers))) for group in FOUND]


@pytest.mark.parametrize("k", [0, 4])
def test_words_come_back_from_disk_and_into_packs(tmp_path: Path, k: int) -> None:
    wanted = with_words(k)
    store = Store(tmp_path)
    store.write(Batch(3, tuple(wanted), 0))
    batch = store.read(3)
    assert batch is not None
    for ours, theirs in zip(wanted, batch.groups, strict=True):
        for a, b in zip(ours.answers, theirs.answers, strict=True):
            (one,), (other,) = a.trajectory.branches, b.trajectory.branches
            assert one.word is not None and other.word is not None
            assert all(map(np.array_equal, one.word, other.word))
    recipe = recipe_for("/none", {}, **sections(GKD | {"top_k": max(k, 1)}, path="x"))
    packs = pack_groups(batch.groups, {}, seq_len=64, min_packs=2)
    if k:
        check_words(recipe, packs)
    else:
        with pytest.raises(DataError, match=r"Give teacher\.path"):
            check_words(recipe, packs)
    with pytest.raises(DataError, match=r"Give teacher\.path"):
        check_words(recipe, [from_tokens([1, 2, 3])])
    said = [
        [branch.word for a in group.answers for branch in a.trajectory.branches] for group in wanted
    ]
    flat = [word for group in said for word in group if word is not None]
    for pack in packs:
        ids, starts = pack.extras["item"].tolist(), pack.cu_seqlens.tolist()
        for item, begin, end in zip(ids, starts, starts[1:], strict=False):
            own = pack.per_token["teacher_logp"][begin:end]
            want = np.zeros(end - begin) if item < 0 else flat[item].logp
            assert np.allclose(own.numpy(), want)
            if k and item >= 0:
                assert np.array_equal(pack.per_token["teacher_ids"][begin:end], flat[item].ids)
                assert np.allclose(pack.per_token["teacher_top"][begin:end], flat[item].top)


# Offline


@pytest.mark.gloo
def test_offline_words_are_asked_for_once_and_are_the_same_at_every_layout(
    speaking: str, tmp_path: Path
) -> None:
    """By whole runs: the words on disk at two layouts, and a second run that finds them."""
    teacher, records = tmp_path / "teacher", tmp_path / "records.jsonl"
    save_model("qwen3", teacher, vocab_size=512)
    write_jsonl(records, questions()[:12])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{path: {speaking}, dtype: fp32}}
method: {{name: distill, top_k: 4, answer_weight: 0.25}}
teacher: {{path: {teacher}}}
data: {{train: {records}, eval: {records}, seq_len: 64, max_rejected: 1.0}}
train: {{steps: 2, global_batch: 2}}
observe: {{tensorboard: false, progress: false}}
"""
    )
    made: list[dict[str, Any]] = []
    seen: set[int] = set()  # when words were written
    for number, more in enumerate(([], [], ["--nproc", "2", "parallel.tp=2"], ["--nproc", "2"])):
        cache = tmp_path / ("again" if number == 1 else f"cache{number}")
        if number == 1:
            (tmp_path / "cache0").rename(cache)
        run = tmp_path / f"run{number}"
        done = command.run("train", recipe, *more, f"run_dir={run}", f"data.cache={cache}")
        assert done.returncode == 0, done.stderr
        (words,) = (cache / "words").glob("*[0-9a-f]")
        written = (words / "ids.npy").stat().st_mtime_ns
        assert (written in seen) == (number == 1)
        seen.add(written)
        rows = [json.loads(row) for row in (run / "ledger.jsonl").read_text().splitlines()]
        found = {name: np.load(words / f"{name}.npy") for name in ("starts", "ids", "top")}
        made.append(found | {"loss": [row["loss"] for row in rows if "loss" in row]})
        assert rows[0]["eval_kl/teacher"] > 0 and rows[0]["eval_teacher/covered"] < 1
    assert made[0]["loss"] == made[1]["loss"]
    for other in made[2:]:
        assert np.array_equal(other["starts"], made[0]["starts"])
        assert np.array_equal(other["ids"], made[0]["ids"])
        assert np.allclose(other["top"], made[0]["top"], atol=2e-5)
        assert other["loss"] == pytest.approx(made[0]["loss"], abs=2e-5)
