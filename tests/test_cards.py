"""The claims of the docs, as cards: well formed, as the pages show them, and run again."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
import card as one  # noqa: E402
import make_cards as tool  # noqa: E402

from moetrain.errors import ConfigError  # noqa: E402

CARDS = one.all_cards()
PAGES = ("benchmarks.md", "planning.md", "reliability.md")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_its_page_says_and_its_command_exists(name: str) -> None:
    assert not one.problems(CARDS[name])
    assert (one.FOLDER / f"{name}.yaml").read_text() == one.as_yaml(CARDS[name])


def test_the_pages_are_rendered(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("images"))
    tool.render(CARDS, docs)
    pages = {path.name: path.read_text() for path in docs.glob("*.md")}
    others = [name for name, text in pages.items() if text != (ROOT / "docs" / name).read_text()]
    assert not others, "run tools/make_cards.py --render (part of make fix)"


def test_whatever_the_figures_become_the_pages_show_them(tmp_path: Path) -> None:
    """No place of a figure is found by what another figure is."""
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("images"))

    def moved(figure: one.Figure, card: one.Card) -> one.Figure:
        if figure.value is None or not figure.shown:
            return figure
        text = one.place_of(figure, card.section())[1]
        last = 10 ** -len(text.partition(".")[2])
        return figure.model_copy(update={"value": figure.value * 1.5 + 7 * last})

    others = {
        name: card.model_copy(update={"figures": [moved(f, card) for f in card.figures]})
        for name, card in CARDS.items()
    }
    tool.render(others, docs)
    for name, card in others.items():
        for figure, old in zip(card.figures, CARDS[name].figures, strict=True):
            if figure.shown and figure.value is not None and old.value is not None:
                text = one.place_of(figure, card.section(docs))[1]
                assert one.written_like(figure.value, text) == text
                assert one.number(text) != old.value


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_figures_has_a_card(page: str) -> None:
    """So that none is without a command."""
    rows = re.compile(r"^\|[^|\n]*\|(?:[^|\n]*\|)*? *\**[-+]?\d", re.MULTILINE)
    found = {a for a, text in one.sections(ROOT / "docs" / page).items() if rows.search(text)}
    lacking = found - {card.page.partition("#")[2] for card in CARDS.values()}
    assert found and not lacking, "write cards/NAME.yaml for a figure of these (docs/cards.md)"


def _content(**more: Any) -> dict[str, Any]:
    return {
        "claim": "it counts",
        "page": "cards.md#cards",
        "command": "echo counted 12 of 13",
        "status": "measured",
        "machine": {"cores": 2},
        "measured": {"date": "2026-11-29"},
        "minutes": 1,
        "figures": [{"what": "counted", "value": 11, "least": 10, "text": r"counted (\d+) of"}],
    } | more


def _figure(**more: Any) -> list[dict[str, Any]]:
    return [{"what": "counted", "value": 11, "least": 10} | more]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"comand": "x"}, "unknown key 'comand'. Did you mean 'command'?"),
        ({"command": ""}, "command"),
        ({"figures": []}, "figures"),
        ({"status": "unproven"}, "measured"),
        ({"needs": "a GPU"}, "minutes"),
        ({"minutes": None}, "needs"),
        ({"figures": _figure()}, "text, json or clock"),
        ({"figures": _figure(least=None, clock="s")}, "least or most"),
        ({"figures": _figure(least=12, clock="s")}, "bound is least 12"),
        ({"figures": _figure(missed="why", clock="s")}, "only then"),
        ({"figures": _figure(clock="s", text="(1)")}, "Give one"),
        ({"figures": _figure(text="1")}, "one group"),
        ({"figures": _figure(text="(1")}, "(1"),
        ({"figures": _figure(value=None, clock="s")}, "value"),
    ],
)
def test_a_card_that_is_none_is_refused_in_a_line(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    import yaml

    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(_content()))
    assert one.read_card(path).figures[0].value == 11
    path.write_text(yaml.safe_dump(_content(**changed)))
    with pytest.raises(ConfigError) as caught:
        one.read_card(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python tools/bench/no.py", "no file"),
        ("python tools/bench/plan.py $OUT/cpu.yaml --jsn", "does not know --jsn"),
        ("FOO=1 MOETRAIN_NO=1 pytest tests/test_damage.py", "does not know MOETRAIN_NO"),
        ("make everything", "make has no everything"),
        ("make help && moetrain plan", "recipe"),
        ("moetrain train examples/sft_tiny.yaml optim.lrr=1", "optim.lrr"),
        ("examples/no.sh", "no file"),
    ],
)
def test_a_command_that_is_not_here_is_told(command: str, words: str) -> None:
    (told,) = one.problems(one.Card.model_validate(_content(command=command)))
    assert words in told


@pytest.mark.parametrize(
    ("command", "figure", "value"),
    [
        ("echo counted 1,234 of 13", {"text": r"counted ([\d,]+) of"}, 1234),
        (
            """printf 'so\\n{"a": 1}\\n{\\n "b": [3, {"c@1": 12.5}]\\n}\\n'""",
            {"json": "b.1.c@1"},
            12.5,
        ),
        ("sleep 0.3; exit 3", {"clock": "s", "least": 0.3, "most": 5}, None),
    ],
)
def test_a_figure_is_read_and_written(
    command: str, figure: dict[str, Any], value: float | None
) -> None:
    code = 3 if "exit 3" in command else 0
    given = _content(command=command, exit_code=code, figures=_figure(**figure, value=4.0))
    given["figures"][0]["least"] = figure.get("least", 1)
    found = tool.rerun("one", one.Card.model_validate(given))
    assert found.figures[0].value == value or value is None
    assert found.measured is not None and found.measured.commit and found.machine.cores >= 1
    assert one.Card.model_validate(found.model_dump(by_alias=True)) == found


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"command": "echo counted 9 of 13"}, "one: counted is 9, and its bound is least 10"),
        ({"command": "echo counted 9 of 1, counted 9 of 2"}, "there 2 times"),
        ({"command": "echo bad; false"}, "one: exit code 1, not 0: bad"),
        ({"command": "sleep 60", "minutes": 0.005}, "one: not done in its 0.005 min"),
    ],
)
def test_a_card_that_no_longer_holds_is_one_line(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(tool.CardError) as caught:
        tool.rerun("one", one.Card.model_validate(_content(**changed)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_make_runs_one() -> None:
    said = subprocess.run(
        ["make", "-n", "cards", "ONLY=help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tools/make_cards.py --only help" in said.stdout
