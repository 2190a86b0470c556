"""The report's trajectories: what is laid out of their turns, what a page would act on, how much it
is of how much, and the filters in a browser.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.groups import GradedAnswer, Group
from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Branch, Finish, Trajectory, Turn
from moetrain.loops.store import Batch, Store
from moetrain.observe import report
from moetrain.observe.report_trajectories import CHARACTERS, STEPS, TRAJECTORIES, section
from moetrain.observe.runs import Run
from moetrain.observe.trajectories import _Place, choose, spread
from tests.browser import OVER, in_browser

HOSTILE = "</pre><script>alert(1)</script><!-- TRAJECTORIES --><!-- RUNS -->\"'\x1b[31m\u202e\ud800"


class Page(HTMLParser):
    """Tags and, by trajectory, what stands in its blocks."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[dict[str, Any]] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        kind = dict(attrs).get("class") or ""
        if tag == "details":
            self.rows.append({**dict(attrs), "head": "", "blocks": []})
        elif tag == "summary":
            self._open = "head"
        elif kind.startswith(("turn", "line")):
            self.rows[-1]["blocks"].append("")
            self._open = "blocks"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("summary", "details"):
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "head":
            self.rows[-1]["head"] += data + " "
        elif self._open:
            self.rows[-1]["blocks"][-1] += data


def branch_of(*turns: Turn) -> Branch:
    num = sum(turn.num_tokens for turn in turns)
    return Branch(turns, np.zeros(num, np.int32), np.zeros(num, np.float32))


def trajectory(index: int, finish: Finish = "stop") -> Trajectory:
    """A call, its result, a turn; then the template rewrote it all, and the model spoke again."""
    call = {"function": {"name": "multiply", "arguments": {"a": 3, "b": "</b>"}}}
    messages = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "12"},
        {"role": "assistant", "content": "Twelve?", "malformed": ["a call is no JSON"]},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "12"},
    )
    first = branch_of(
        Turn("model", 5, "<tool_call>raw</tool_call>", "stop", 7),
        Turn("reply", 4, "<|tool|>12", version=7),
        Turn("model", 3, "Twelve?", "stop", 7),
    )
    again = branch_of(Turn("model", 2, "12", "stop", 8))
    counts = {"tools/calls": 2.0, "tools/errors": 1.0}
    return Trajectory("q", index, (first, again), finish, messages, counts)


def write(folder: Path, step: int, answers: Sequence[tuple[Trajectory, float]]) -> Run:
    """A batch, as a run writes it."""
    prompt = Prompt("q", (1,), {"prompt": [{"role": "user", "content": "3 * 4"}], "answer": "12"})
    graded = tuple(GradedAnswer(one, reward, {"exact": reward}) for one, reward in answers)
    Store(folder / "rollouts").write(Batch(step, (Group(prompt, graded),), 1))
    return Run(folder.name, folder, "finished")


def test_turns_are_laid_out_as_they_were_written(tmp_path: Path) -> None:
    """Who wrote what, which of it is learned, what was read in it, where all was rendered anew."""
    run = write(tmp_path, 3, [(trajectory(0), 0.5)])
    (row,) = Page(section([run])).rows
    assert (row["data-step"], row["data-ending"], row["data-reward"]) == ("3", "stop", "0.5")
    head = " ".join(row["head"].split())
    assert head == ("step 3 reward 0.500 stop 3 turns, 10 tokens, 2 calls, 1 error user: 3 * 4")
    assert row["blocks"] == [
        "prompt context: not learned\nuser: 3 * 4",
        'record answer "12"',
        "model 5 tokens, learned, version 7 of the weights\n<tool_call>raw</tool_call>",
        'read as multiply(a=3, b="</b>")',
        "tool multiply 4 tokens, context: not learned\n12",
        "model 3 tokens, learned, version 7 of the weights\nTwelve?",
        "cannot be read a call is no JSON",
        "user context: not learned\nGo on.",
        " What stood before was rendered anew; from here the model saw that.",
        "model 2 tokens, learned, version 8 of the weights\n12",
        "verdict reward 0.500 (exact 0.500); stop: the model ended it, and the environment had no"
        " more to say; tools/calls 2; tools/errors 1",
    ]


def test_what_an_agent_has_put_in(tmp_path: Path) -> None:
    """Words of its own in front, and in the model's mouth, are no turns of the model."""
    system = {"role": "system", "content": "You add."}
    given = {"role": "assistant", "content": "I said 4.", "given": True}
    one = trajectory(0)
    one = replace(one, messages=(system, *one.messages[:2], given, *one.messages[2:]))
    (row,) = Page(section([write(tmp_path, 1, [(one, 0.0)])])).rows
    said = [block.split("\n") for block in row["blocks"] if "\n" in block]
    assert [(who.split()[0], text) for who, text in said] == [
        ("prompt", "user: 3 * 4"),
        ("system", "You add."),
        ("model", "<tool_call>raw</tool_call>"),
        ("tool", "12"),
        ("assistant", "I said 4."),
        ("model", "Twelve?"),
        ("user", "Go on."),
        ("model", "12"),
    ]


def test_what_was_cut_and_masked_is_not_called_learned(tmp_path: Path) -> None:
    run = write(tmp_path, 1, [(trajectory(0, "length"), 0.0), (trajectory(1), 0.0)])
    run.settings["method.truncated"] = "mask"
    cut, whole = Page(section([run])).rows
    said = [block.split("\n")[0] for block in (cut["blocks"][2], whole["blocks"][2])]
    assert [", learned" in text for text in said] == [False, True]
    assert "not learned (method.truncated: mask)" in said[0]


def test_old_rollouts_of_one_turn(tmp_path: Path) -> None:
    """All in one JSONL, as 0.1 wrote them, with a line that a kill cut short."""
    one = {"text": "Yes.", "tokens": [5, 6], "logprobs": [0.0, 0.0], "finish": "stop",
           "version": 0, "reward": None, "parts": {}, "fault": "late"}  # fmt: skip
    row = {"prompt": {"id": "q", "tokens": [1], "columns": {"prompt": "Is it?"}}, "answers": [one]}
    path = tmp_path / "rollouts" / "00000002.jsonl"
    path.parent.mkdir()
    path.write_text('{"cursor": 1}\n' + json.dumps(row) + "\n" + json.dumps(row)[:50])
    (found,) = Page(section([Run("old", tmp_path, "stopped")])).rows
    assert found["data-reward"] == ""
    assert found["blocks"] == [
        "prompt context: not learned\nIs it?",
        "model 2 tokens, learned, version 0 of the weights\nYes.",
        "verdict no reward; stop: the model ended it, and the environment had no more to say; late",
    ]


_texts = st.one_of(st.text(max_size=30), st.just(HOSTILE))
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)
    ),
    max_leaves=6,
)
_FIELDS = ("text", "messages", "branches", "finish", "reward", "parts", "counts", "extra", "fault")
_turns = st.fixed_dictionaries(
    {"author": st.sampled_from(["model", "reply", HOSTILE]), "text": _texts},
    optional={name: _values for name in ("num_tokens", "version", "finish")},
)
_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "tool", HOSTILE])},
    optional={name: _values for name in ("content", "name", "tool_calls", "malformed")},
)
_answers = st.fixed_dictionaries(
    {"text": _texts},
    optional={name: _values for name in _FIELDS[3:]}
    | {"branches": st.one_of(_values, st.lists(st.lists(_turns, max_size=4), max_size=3))}
    | {"messages": st.one_of(_values, st.lists(_messages, max_size=4))},
)


@settings(deadline=None, max_examples=100)
@given(answers=st.lists(_answers, min_size=1, max_size=3), columns=_values)
def test_no_file_of_rollouts_says_anything_to_a_page(
    tmp_path_factory: pytest.TempPathFactory, answers: list[Any], columns: Any
) -> None:
    """Whatever stands in it: the page has the tags of an honest one, and none of its characters
    that a browser acts on.
    """
    folder = tmp_path_factory.getbasetemp() / "hostile"
    path = folder / "rollouts" / "00000001.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": {"columns": columns}, "answers": answers}
    path.write_text(json.dumps({"cursor": 1}) + "\n" + json.dumps(row) + "\n")
    page = section([Run(HOSTILE, folder, "finished"), Run(HOSTILE, folder, "finished")])
    parsed = Page(page)
    assert len(parsed.rows) == 2 * len(answers)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == tags.count("style") == tags.count("section") == 1
    assert set(tags) <= {"style", "section", "div", "h2", "label", "select", "option", "span", "p",
                         "input", "code", "br", "details", "summary", "b", "pre", "button",
                         "script"}  # fmt: skip
    names = {name for tag, attributes in parsed.tags if tag == "details" for name in attributes}
    assert names == {"data-run", "data-step", "data-ending", "data-reward"}
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page
    )
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)")


def test_the_page_is_bounded_and_says_of_how_many(tmp_path: Path) -> None:
    """The first and the newest of many steps, and the whole of the sampled ones is counted."""
    (tmp_path / "rollouts").mkdir()
    long = {"text": "<word> " * 20_000, "finish": "stop", "tokens": 9, "parts": {}, "reward": 0.0}
    rows = [json.dumps({"cursor": 1})]
    for i in range(8):
        answers = [long | {"reward": i + j / 8} for j in range(4)]
        prompt = {"columns": {"prompt": "Why? " * 5000}}
        rows.append(json.dumps({"prompt": prompt, "answers": answers}))
    text = "".join(f"{row}\n" for row in rows)
    first = tmp_path / "rollouts" / "00000001.jsonl"
    first.write_text(text)
    for step in range(2, 61):
        (tmp_path / "rollouts" / f"{step:08d}.jsonl").hardlink_to(first)
    run = Run("long", tmp_path, "running")
    page = section([run])
    rows = Page(page).rows
    steps = {int(row["data-step"]) for row in rows}
    assert len(rows) == TRAJECTORIES and len(steps) == STEPS and {1, 60} <= steps
    assert f"160 of the {20 * 32} trajectories of 20 steps, of 60 in all" in page
    assert len(page) < 1.5 * CHARACTERS
    rewards = [float(row["data-reward"]) for row in rows if row["data-step"] == "60"]
    assert max(rewards) == 7.375 and min(rewards) == 0.0
    many = section([run] * 30)
    assert len(Page(many).rows) <= TRAJECTORIES and "10 more with rollouts are not shown" in many
    out = tmp_path / "r.html"
    (tmp_path / "ledger.jsonl").write_text('{"step": 60, "loss": 1.0}\n')
    report.write_report([tmp_path], out)
    assert out.stat().st_size < 1_000_000


@given(
    rewards=st.lists(st.none() | st.floats(-1, 1), min_size=1, max_size=40),
    endings=st.lists(st.sampled_from(["stop", "length", "turns"]), min_size=40, max_size=40),
    most=st.integers(1, 12),
)
def test_best_worst_and_each_ending_are_in_a_sample(
    rewards: list[float | None], endings: list[str], most: int
) -> None:
    places = [_Place(0, i, *pair) for i, pair in enumerate(zip(rewards, endings, strict=False))]
    chosen = choose(places, most)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(most, len(places))
    graded = [reward for reward in rewards if reward is not None]
    if most >= 5:
        found = [places[i] for i in chosen]
        assert {one.finish for one in found} == {one.finish for one in places}
        if graded:
            own = [one.reward for one in found if one.reward is not None]
            assert max(own) == max(graded)
            assert len(graded) < len(rewards) or min(own) == min(graded)


@given(num=st.integers(0, 200), most=st.integers(1, 50))
def test_what_is_spread_is_even(num: int, most: int) -> None:
    found = spread(range(num), most)
    assert len(found) == min(num, most) == len(set(found)) and found == sorted(found)
    assert not num or found[-1] == num - 1
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or (found[0] == 0 and max(gaps) - min(gaps) <= 1)


# In a browser


@pytest.mark.parametrize("width", [1400, 400])
def test_filters_and_what_is_open(tmp_path: Path, width: int) -> None:
    """By step, ending and reward; and nothing reaches over the edge, opened or not."""
    long = "word" * 400
    for step in range(1, 13):
        one = trajectory(0)
        wide = Trajectory(one.prompt_id, 1, one.branches, "turns",
                          (*one.messages[:-2], {"role": "user", "content": long},
                           one.messages[-1]))  # fmt: skip
        write(tmp_path / "a", step, [(one, 0.1 * step), (wide, -1.0)])
    write(tmp_path / "b", 5, [(trajectory(0, "length"), float("inf"))])
    for name in "ab":
        (tmp_path / name / "ledger.jsonl").write_text('{"step": 12, "loss": 1.0}\n')
    out = tmp_path / "report.html"
    report.write_report([tmp_path / "a", tmp_path / "b"], out)
    told = in_browser(
        out,
        f"const over = () => {OVER};"
        """
        const $$ = (id) => document.getElementById(id);
        const set = (id, value) => {
          $$(id).value = value; $$(id).dispatchEvent(new Event("input"));
        };
        const shown = () => all("#t-rows details").filter((row) => !row.hidden).map((row) =>
          `${row.dataset.step} ${row.dataset.ending} ${row.dataset.reward.slice(0, 3)}`);
        const options = (id) => [...$$(id).options].map((o) => o.text);
        const out = [shown(), options("t-ending"), options("t-step").length];
        set("t-step", ""); out.push(shown().length, $$("t-count").textContent);
        set("t-ending", "stop"); out.push(shown().length);
        set("t-from", "1.05"); out.push(shown());
        set("t-to", "1.15"); out.push(shown());
        set("t-ending", ""); set("t-from", ""); set("t-to", "-0.5"); out.push(shown().length);
        set("t-to", ""); set("t-run", "1"); out.push(shown(), options("t-ending"));
        set("t-from", "5"); out.push(shown());
        set("t-from", ""); set("t-run", "0"); set("t-step", "12");
        for (const row of all("#t-rows details")) row.open = true;
        out.push(over(), all("#t-rows pre").filter((e) => e.clientHeight > 0).length);
        return out;
        """,
        width,
    )
    assert told[:3] == [["12 stop 1.2", "12 turns -1."], ["any", "stop", "turns"], 13]
    assert told[3:5] == [24, "24 of the 24 trajectories here."]
    assert told[5] == 12
    assert told[6:8] == [["11 stop 1.1", "12 stop 1.2"], ["11 stop 1.1"]]
    assert told[8] == 12
    assert told[9:12] == [["5 length Inf"], ["any", "length"], ["5 length Inf"]]
    assert told[12] == [] and told[13] == 12
