"""The report's chart of memory: what it draws of what was predicted and measured, what a page would
act on, and what is no prediction.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moetrain.observe import report
from moetrain.observe.report_memory import FILE, NAMES, POINTS, RUNS, read_predicted, section
from moetrain.observe.runs import find_runs
from tests.browser import OVER, in_browser

HOSTILE = "</title></svg><script>alert(1)</script><!-- ANSWERS -->\"'\x1b[31m\u202e"
CONTENT: dict[str, Any] = {
    "gpu": "H100-80GB",
    "limit": 79.6,
    "rank": 3,
    "ranks": 8,
    "names": ["weights", "optimizer", HOSTILE],
    "points": [[20.0, 30.0, 0.0], [20.0, 30.0, 22.5], [20.0, 30.0, 5.0]],
}


def run_of(folder: Path, content: object = CONTENT, rows: int = 3) -> Path:
    folder.mkdir()
    row = {"loss": 1.0, "predicted/memory_gib": 61.5}
    lines = [json.dumps(row | {"step": i, "memory_gib": 60.0 + i}) for i in range(1, rows + 1)]
    (folder / "ledger.jsonl").write_text("\n".join([*lines, ""]))
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / FILE).write_text(text)
    return folder


def test_predicted_beside_measured(tmp_path: Path) -> None:
    (run,) = find_runs([run_of(tmp_path / "run")])
    text = section([run])
    for words in ("rank 3 of 8 is predicted to hold 72.5 GiB", "the first rank 61.5"):
        assert words in text
    assert "the first rank has held 63.0" in text and "H100-80GB has 79.6" in text
    areas = re.findall(r'<polygon fill="#\w+" points="([^"]+)">', text)
    heights = [[float(pair.split(",")[1]) for pair in area.split()] for area in areas]
    assert len(areas) == 3 and all(len(area) == 6 for area in heights)
    # Upon each other: the upper edge of one is the lower one of the next, read backwards.
    assert heights[0][:3] == heights[1][3:][::-1] and heights[1][:3] == heights[2][3:][::-1]
    lines = {
        float(gib): float(y) for gib, y in re.findall(r'data-gib="([^"]+)".*?y1="([^"]+)"', text)
    }
    scale = (lines[63.0] - lines[79.6]) / (79.6 - 63.0)
    assert min(heights[2]) == pytest.approx(lines[79.6] + scale * (79.6 - 72.5), abs=0.2)


def test_nothing_of_a_name_is_acted_on(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run")
    page = tmp_path / "report.html"
    report.write_report([path], page)
    text = page.read_text()
    assert "alert(1)" in text and "<script>alert" not in text and "\x1b" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)


def test_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report.write_report([run_of(tmp_path / "run")], page)
    for width in (1300, 400):
        told = in_browser(
            page,
            f"""const box = all("#memory svg")[0].getBoundingClientRect();
            const lines = all("#memory line.at").map((e) => e.getBoundingClientRect().y - box.y);
            const over = {OVER};
            return [box.width, box.height, all("#memory polygon").length, lines, over];""",
            width,
        )
        wide, high, areas, (limit, measured), over = told
        assert 250 < wide <= 900 and areas == 3 and over == []
        assert 0 < limit < measured < high / 2  # 79.6 is above 63, and both in the upper half


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 10**5,
        CONTENT | {"more": 1},
        CONTENT | {"points": []},
        CONTENT | {"points": [[1.0, 2.0]]},
        CONTENT | {"points": [[1.0, 2.0, "x"]]},
        CONTENT | {"points": [[1.0, 2.0, -1.0]]},
        CONTENT | {"points": [[0.0, 0.0, 0.0]]},
        CONTENT | {"points": [[1.0, 2.0, True]]},
        CONTENT | {"points": [[1.0, 2.0, 3.0]] * (POINTS + 1)},
        CONTENT | {"points": 3},
        CONTENT | {"names": ["x"] * (NAMES + 1)},
        CONTENT | {"names": None},
        CONTENT | {"limit": float("nan")},
        CONTENT | {"rank": "0"},
    ],
)
def test_what_is_no_prediction_is_left_out(content: object, tmp_path: Path) -> None:
    path = run_of(tmp_path / "run", content)
    assert read_predicted(path / FILE) is None
    assert section(find_runs([path])) == ""


def test_a_run_that_has_not_measured_and_more_runs_than_a_page_takes(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / f"run{i}", rows=0) for i in range(RUNS + 2)]
    one = CONTENT | {"points": [[1.0, 2.0, 3.0]], "gpu": 5}
    (folders[0] / FILE).write_text(json.dumps(one))
    text = section(find_runs(folders))
    assert text.count("<figure>") == RUNS and "2 more runs have one" in text
    assert "first rank has held 6" not in text and "measured" not in text
    # Of the first one's 79.6 GiB nothing would be seen beside 6: it is said, and no line drawn.
    assert text.count("data-gib=") == RUNS - 1 and "5 has 79.6" in text
