"""The report of runs: what is read from their folders, whole or not, and the page in a browser."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from rich.console import Console

from moetrain import cli
from moetrain.config.load import dump_recipe, load_recipe
from moetrain.errors import MoetrainError
from moetrain.observe import report
from moetrain.observe.runs import find_runs, last_row

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples" / "sft_tiny.yaml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def make_run(
    folder: Path,
    *overrides: str,
    steps: int = 20,
    total: int = 20,
    scale: float = 1.0,
    figures: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """A run folder as `moetrain train` leaves it: settings, ledger with held-out rows."""
    folder.mkdir(parents=True)
    recipe = load_recipe(RECIPE, [f"run_dir={folder}", *overrides])
    (folder / "resolved.yaml").write_text(dump_recipe(recipe))
    (folder / "environment.json").write_text(json.dumps({"num_steps": total}))
    with (folder / "ledger.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            layers = {f"router/layer{i}/load_max_over_mean": 1 + i / 4 for i in range(3)}
            row = {
                "step": step,
                "loss": scale / step,
                "lr": 1e-4,
                "seconds": 0.5,
                **figures,
                **layers,
            }
            file.write(json.dumps(row) + "\n")
            if step % 5 == 0:
                held_out = {"step": step, "eval_loss": 2 * scale / step, "seconds": 9.0}
                file.write(json.dumps(held_out) + "\n")
    return folder


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r"^const DATA = (.*);$", page.read_text(), re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def cells(data: dict[str, Any], key: str) -> list[Any]:
    return next(column["cells"] for column in data["columns"] if column["key"] == key)


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_page_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    first = make_run(runs / "a", "optim.lr=5e-5", figures={"rewards/accuracies": 0.9})
    make_run(runs / "b", "optim.lr=2e-5", "train.epochs=null", scale=3.0)
    (first / "checkpoints").mkdir()
    best = {"name": "step_00000010", "metric": "eval_loss", "value": 0.125}
    (first / "checkpoints" / "best.json").write_text(json.dumps(best))
    (first / "evals").mkdir()
    (first / "evals" / "g.json").write_text(json.dumps({"name": "gsm8k", "score": 0.75}))
    out = tmp_path / "deep" / "report.html"
    assert cli.main(["report", str(runs), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    rows = table_of(tmp_path / "deep" / "report.csv")
    assert [row["run"] for row in rows] == ["a", "b"]
    assert [row["optim.lr"] for row in rows] == ["5e-05", "2e-05"]
    assert "run_dir" not in rows[0] and "optim.beta1" not in rows[0]
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert [float(row["loss"]) for row in rows] == [1 / 20, 3 / 20]
    assert [float(row["eval_loss"]) for row in rows] == [2 / 20, 6 / 20]
    assert rows[0]["seconds"] == "0.5"  # of a training step, not of an evaluation
    assert (rows[0]["gsm8k"], rows[1]["gsm8k"]) == ("0.75", "")
    assert rows[0]["best checkpoint"] == "step_00000010 (eval_loss 0.125)"
    assert "gsm8k" in said and "0.75" in said and "optim.lr" in said
    data = data_of(out)
    assert cells(data, "optim.lr") == [5e-5, 2e-5]
    assert data["shared"]["optim.beta1"] == 0.9
    curve = data["runs"][1]["curves"]["eval_loss"]
    assert data["grids"][curve["g"]] == [5, 10, 15, 20]
    assert curve["m"] == [1.2, 0.6, 0.4, 0.3]
    heat = data["runs"][0]["heat"]
    assert heat["layers"] == [0, 1, 2] and [row[0] for row in heat["rows"]] == [100, 125, 150]
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", out.read_text())


def test_what_runs_are_compared_by_comes_first(tmp_path: Path) -> None:
    figures = {"entropy": 1.0, "kl": 0.1, "logps/chosen": -9.0, "rewards/accuracies": 0.9}
    make_run(tmp_path / "a", figures=figures)
    columns = report.columns_of(find_runs([tmp_path]))
    keys = [column.key for column in columns if column.group == "training"]
    assert keys == ["loss", "rewards/accuracies", "kl", "entropy", "logps/chosen"]


def test_key_only_in_some_runs(tmp_path: Path) -> None:
    """A key that another run's settings lack differs from it; null is a value."""
    make_run(tmp_path / "a", "data.cache=/x")
    make_run(tmp_path / "b")
    path = make_run(tmp_path / "c") / "resolved.yaml"
    content = yaml.safe_load(path.read_text())
    content["method"]["beta"] = 0.1
    path.write_text(yaml.dump(content))
    columns = {column.key: column.cells for column in report.columns_of(find_runs([tmp_path]))}
    assert columns["data.cache"] == ["/x", None, None]
    assert columns["method.beta"] == [None, None, 0.1]


def test_runs_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    cut = make_run(folder / "cut", steps=7)
    with (cut / "ledger.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    zeros = make_run(folder / "zeros", steps=3)
    with (zeros / "ledger.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    binary = make_run(folder / "binary")
    (binary / "ledger.jsonl").write_bytes(b"\xff\xfe\x00\n")
    odd = make_run(folder / "odd", steps=2)
    (odd / "resolved.yaml").write_text("a: [")
    (odd / "environment.json").write_text("[]")
    (odd / "evals").mkdir()
    (odd / "evals" / "x.json").write_text("{}")
    (odd / "checkpoints").mkdir()
    (odd / "checkpoints" / "best.json").write_text("[]")
    failed = folder / "failed"
    failed.mkdir()
    (failed / "train.log").write_text("$ a\nmoetrain: error: old\n$ b\nmoetrain: error: no data\n")
    plan = [{"name": name, "overrides": [f"seed={i}"]} for i, name in enumerate(["later", "cut"])]
    (folder / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plan) + "{")
    assert cli.main(["report", str(folder), "-o", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr()
    rows = {row["run"]: row for row in table_of(tmp_path / "r.csv")}
    assert list(rows) == ["later", "cut", "binary", "failed", "odd", "zeros"]
    states = {name: row["status"] for name, row in rows.items()}
    assert states == {
        "later": "not started",
        "cut": "stopped",
        "binary": "no steps",
        "failed": "failed",
        "odd": "unknown length",
        "zeros": "stopped",
    }
    assert rows["later"]["seed"] == "0", "what it is planned to be"
    assert rows["cut"]["steps"] == "7/20"
    for line in (
        "cut: ledger.jsonl: the last line is cut short",
        "zeros: ledger.jsonl: 1 of 4 lines are no rows",
        "binary: ledger.jsonl: 1 of 1 lines are no rows",
        "odd: resolved.yaml is not readable (ConfigError)",
        "odd: evals/x.json has no name and score",
        "odd: checkpoints/best.json is not readable",
        "failed: no data",
    ):
        assert line in said.out.splitlines()
    assert not said.err


@pytest.mark.parametrize("name", ["none", "empty", "file"])
def test_no_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moetrain: error: ") and err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with pytest.raises(MoetrainError, match="Is a directory"):
        report.write_report([run], tmp_path)
    with pytest.raises(MoetrainError, match="one file"):
        report.write_report([run], tmp_path / "r.csv")


def test_runs_of_one_name(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("x/run", "y/run", "other")]
    assert [run.name for run in find_runs([*paths, paths[0]])] == ["x/run", "y/run", "other"]


def test_terminal_shows_what_fits(tmp_path: Path) -> None:
    """A long name is folded; what a model's config is made of is counted."""
    run = make_run(tmp_path / "a", figures={f"metric_number_{i}": 0.5 for i in range(12)})
    hf = ("model.path=null", "model.hf={hidden_size: 64, rope_parameters: {rope_theta: 1e4}}")
    other = make_run(tmp_path / "b", f"data.train={'x' * 300}", *hf)
    for is_terminal, width in ((True, 70), (False, 120)):
        text = io.StringIO()
        console = Console(file=text, width=70, force_terminal=is_terminal, color_system=None)
        report.print_runs(find_runs([run, other]), console)
        lines = text.getvalue().splitlines()
        table = [line for line in lines if line[:1] in "┏┃└│"]
        assert max(map(len, table)) <= width
        assert not any("hidden_size" in line for line in table)
        (left,) = (line for line in lines if line.startswith("not shown: "))
        assert left.endswith(", metric_number_11, model.hf.* (2)")


def test_curves_are_thinned_and_the_page_stays_small(tmp_path: Path) -> None:
    """Means with least and greatest, the same for a run that ended early; ten runs of 2,000 steps
    and 22 metrics stay under a megabyte.
    """
    metrics = {f"rewards/metric_{i}": 0.123456789 * i for i in range(20)}
    for i in range(10):
        make_run(tmp_path / f"r{i}", steps=500 if i == 3 else 2000, total=2000, figures=metrics)
    out = tmp_path / "r.html"
    report.write_report([tmp_path], out)
    assert out.stat().st_size < 1_000_000
    data = data_of(out)
    long, short = (data["runs"][i]["curves"]["loss"] for i in (0, 3))
    assert long["n"] == short["n"] > 1
    steps = data["grids"][long["g"]]
    assert data["grids"][short["g"]] == [min(s, 500) for s in steps[: len(short["m"])]]
    n = long["n"]
    assert steps[:2] == [n, 2 * n] and steps[-1] == 2000
    second = [1 / step for step in range(n + 1, 2 * n + 1)]
    assert long["m"][1] == pytest.approx(sum(second) / n, rel=1e-4)
    assert (long["lo"][1], long["hi"][1]) == pytest.approx((min(second), max(second)), rel=1e-4)


def test_last_row_reads_the_end_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=2000, total=2000)
    size = (run / "ledger.jsonl").stat().st_size
    assert size > 2 * (1 << 16)
    row = last_row(run)
    assert (row["step"], row["loss"], row["eval_loss"]) == (2000, 1 / 2000, 2 / 2000)
    assert last_row(tmp_path) == {}


# In a browser


def in_browser(page: Path, script: str) -> Any:
    """Open the page, run `script` in it, which ends in `return`; what it returns. `all(selector)`
    is the list of a selector's elements.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: sorting, toggling and hovering of the page stay unproven")
    probe = page.with_name("probe.html")
    told = """<script>window.errors = []; addEventListener("error", (e) => errors.push(e.message));
    </script>"""
    answer = f"""<script>addEventListener("load", () => {{
      const all = (selector) => [...document.querySelectorAll(selector)];
      let told; try {{ told = (() => {{ {script} }})(); }} catch (e) {{ errors.push(String(e)); }}
      const out = document.createElement("pre"); out.id = "answer";
      out.textContent = JSON.stringify({{ told, errors }}); document.body.append(out); }});
    </script>"""
    text = page.read_text().replace("<meta charset", told + "<meta charset", 1)
    probe.write_text(text.replace("</html>", answer + "</html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"]
    flags += ["--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [browser, *flags, profile, "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    answered = json.loads(html.unescape(found[1]))
    assert answered["errors"] == []
    return answered.get("told")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three runs: a sweep's names, a hostile name, a run without steps, a warning."""
    runs = tmp_path / "runs"
    make_run(runs / "lr=9e-6", "optim.lr=9e-6", scale=2.0, figures={"kl": 0.5})
    warned = make_run(runs / "lr=1e-5", "optim.lr=1e-5", figures={"kl": 0.25})
    with (warned / "ledger.jsonl").open("a") as file:
        file.write('{"step": 20, "warning": "KL <b>4.2</b> is past 4"}\n')
    make_run(runs / "<script>alert(1)<", "optim.lr=2e-4", scale=3.0)
    make_run(runs / "none", "optim.lr=5e-4", steps=0)
    out = tmp_path / "report.html"
    report.write_report([runs], out)
    return out


def test_table_sorts(page: Path) -> None:
    told = in_browser(
        page,
        """
        const rows = () => all("#runs tbody tr").map((row) => row.dataset.run);
        const press = (key) => all(`#runs th[data-key="${key}"] button`)[0].click();
        const state = (key) => all(`#runs th[data-key="${key}"]`)[0].ariaSort;
        const out = [];
        press("optim.lr"); out.push(rows(), state("optim.lr"));
        press("optim.lr"); out.push(rows(), state("optim.lr"));
        press("eval_loss"); out.push(rows(), state("optim.lr"));
        press("eval_loss"); out.push(rows());
        out.push(document.querySelectorAll("th[data-key=seconds]").length);
        document.getElementById("more").click();
        out.push(document.querySelectorAll("th[data-key=seconds]").length);
        out.push([...document.querySelectorAll(".best")].map((c) => c.textContent));
        return out;
        """,
    )
    first, second, third = "lr=9e-6", "lr=1e-5", "<script>alert(1)<"
    assert told[:2] == [[first, second, third, "none"], "ascending"]
    assert told[2:4] == [["none", third, second, first], "descending"]
    assert told[4:6] == [[second, first, third, "none"], "none"]
    assert told[6] == [third, first, second, "none"], "what is missing stays last"
    assert told[7:9] == [0, 1]
    assert told[9] == ["0.1000", "0.0500"]


def test_curves_are_chosen_and_toggled(page: Path) -> None:
    told = in_browser(
        page,
        """
        const drawn = () => all("[data-curve]").map((group) => group.dataset.curve);
        const choose = (name) => {
          const select = document.getElementById("metric");
          select.value = name; select.dispatchEvent(new Event("input"));
        };
        const path = () => all("[data-curve='lr=1e-5'] .curve")[0].getAttribute("d");
        const out = [[...document.getElementById("metric").options].map((o) => o.value), drawn()];
        const before = path();
        choose("eval_loss"); out.push(drawn(), path() !== before);
        choose("kl"); out.push(drawn());
        document.querySelector("[data-toggle='lr=1e-5']").click();
        out.push(drawn(), document.querySelector("[data-toggle='lr=1e-5']").ariaPressed);
        document.querySelector("[data-toggle='lr=1e-5']").click(); out.push(drawn());
        return out;
        """,
    )
    first, second, third = "lr=9e-6", "lr=1e-5", "<script>alert(1)<"
    assert told[0][:3] == ["loss", "kl", "eval_loss"]
    assert {"lr"} < set(told[0]) and not {"seconds", "step"} & set(told[0])
    assert sorted(told[1]) == sorted(told[2]) == sorted([first, second, third])
    assert told[3] is True
    assert sorted(told[4]) == [second, first]
    assert told[5:7] == [[first], "false"]
    assert sorted(told[7]) == [second, first]


def test_hover_warnings_and_router(page: Path) -> None:
    told = in_browser(
        page,
        """
        const chart = document.querySelector("#chart > svg"), box = chart.getBoundingClientRect();
        const at = (x, y) => ({ clientX: x, clientY: y, bubbles: true });
        chart.dispatchEvent(new PointerEvent("pointermove", at(box.left + 63, box.top + 60)));
        const tip = document.getElementById("tip"), out = [tip.innerText];
        out.push(tip.getBoundingClientRect().height < 200);
        chart.dispatchEvent(new PointerEvent("pointerleave")); out.push(tip.hidden);
        out.push(document.querySelector("#warnings tbody").innerText);
        out.push([...document.querySelectorAll("[data-heat]")].map((f) => f.dataset.heat));
        const figure = document.querySelector("[data-heat='lr=1e-5']");
        const canvas = figure.querySelector("canvas"), frame = canvas.getBoundingClientRect();
        const corner = at(frame.right - 2, frame.bottom - 2);
        canvas.dispatchEvent(new PointerEvent("pointermove", corner));
        out.push(figure.querySelector(".tip").textContent, document.documentElement.scrollWidth);
        return out;
        """,
    )
    lines = [line.split("\t")[:2] for line in told[0].strip().splitlines() if line.strip()]
    assert lines[0] == ["step 1"]
    shown = {name.strip(): value for name, value in lines[1:]}
    assert shown == {"<script>alert(1)<": "3.0000", "lr=9e-6": "2.0000", "lr=1e-5": "1.0000"}
    assert told[1:3] == [True, True]
    assert "lr=1e-5\t20\tKL <b>4.2</b> is past 4" in told[3]
    assert len(told[4]) == 3
    assert told[5] == "layer 2, step 20: 1.50"
    assert told[6] <= 1300, "no wider than the window"
