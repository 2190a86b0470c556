"""The report of runs: what is read from their folders, whole or not, and the page in a browser."""

import csv
import io
import json
import re
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
from moetrain.observe.table import SETTINGS, columns_of
from moetrain.observe.terminal import broken, print_runs
from tests.browser import OVER, in_browser

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples" / "sft_tiny.yaml"
GRPO = ("method=grpo", "rewards=[accuracy]", "rollout={engine: embedded}")


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


def test_what_a_method_is_about_comes_first(tmp_path: Path) -> None:
    """Then the settings that differ, then the other figures: the loss, where a run samples."""
    pairs = {"entropy": 1.0, "kl": 0.1, "logps/chosen": -9.0, "rewards/accuracies": 0.9}
    for beta in (0.1, 0.3):
        make_run(tmp_path / "dpo" / f"{beta}", f"method={{name: dpo, beta: {beta}}}", figures=pairs)
    columns = columns_of(find_runs([tmp_path / "dpo"]))
    assert [c.key for c in columns if c.group == "held out"] == ["eval_loss"]
    assert [c.key for c in columns if c.group == "training"] == ["rewards/accuracies", "loss", "kl"]
    groups = list(dict.fromkeys(c.group for c in columns))
    assert groups == ["run", "held out", "training", "settings", "more", "health"]
    assert {"entropy", "logps/chosen"} == {c.key for c in columns if c.group == "more"}
    sampled = {"reward/mean": 0.4, "length/mean": 90.0, "groups/no_signal": 0.5, "kl": 0.1}
    make_run(tmp_path / "grpo", *GRPO, figures=sampled)
    columns = columns_of(find_runs([tmp_path / "grpo"]))
    assert [c.key for c in columns if c.group == "training"] == [
        "reward/mean", "length/mean", "kl", "groups/no_signal"
    ]  # fmt: skip
    assert "loss" in {c.key for c in columns if c.group == "more"}


@pytest.mark.parametrize(
    "overrides, figures, best",
    [
        (["optim.lr=2e-5"], {}, {"eval_loss": 1}),
        (["data.train=builtin:other"], {}, {"eval_loss": 1}),
        (["data.eval=builtin:other"], {}, {}),  # of other questions
        (["method={name: dft}"], {}, {}),  # a loss of another kind
        (["model.tokenizer=other"], {}, {}),  # of other tokens
        (["optim.lr=2e-5"], {"rewards/accuracies": (0.5, 0.9), "rewards/graded": (99, 99)},
         {"eval_loss": 1, "eval_rewards/accuracies": 1}),
        (["optim.lr=2e-5"], {"rewards/accuracies": (0.5, 0.6), "rewards/graded": (99, 99)},
         {"eval_loss": 1}),  # as near as chance
        (["optim.lr=2e-5"], {"rewards/accuracies": (0.5, 0.9)}, {"eval_loss": 1}),  # of how many?
    ],
)  # fmt: skip
def test_a_best_is_one_that_can_be_compared(
    tmp_path: Path, overrides: list[str], figures: Mapping[str, Any], best: dict[str, int]
) -> None:
    """Of held-out figures, where all that defines them is equal, by more than their intervals."""
    for i, more in enumerate(([], overrides)):
        run = make_run(tmp_path / f"{i}", *more, scale=2.0 - i)
        row = {"step": 20} | {f"eval_{name}": own[i] for name, own in figures.items()}
        with (run / "ledger.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    columns = columns_of(find_runs([tmp_path]))
    assert {c.key: c.best for c in columns if c.best is not None} == best


def test_no_best_loss_across_betas_but_an_accuracy(tmp_path: Path) -> None:
    for beta in (0.1, 0.3):
        run = make_run(tmp_path / f"{beta}", f"method={{name: dpo, beta: {beta}}}", scale=1 / beta)
        with (run / "ledger.jsonl").open("a") as file:
            row = {"eval_rewards/accuracies": 0.5 + beta, "eval_rewards/graded": 400}
            file.write(json.dumps({"step": 20, **row}) + "\n")
    columns = columns_of(find_runs([tmp_path]))
    assert {c.key: c.best for c in columns if c.best is not None} == {"eval_rewards/accuracies": 1}


@pytest.mark.parametrize(
    "both, own, is_comparable",
    [
        ([], ["rollout.top_p=0.9"], True),  # held-out answers are greedy
        (["rollout.eval_temperature=1.0"], ["rollout.top_p=0.9"], False),
        ([], ["rollout.stop=[x]"], False),
    ],
)
def test_a_best_of_answers_that_were_drawn_alike(
    tmp_path: Path, both: list[str], own: list[str], is_comparable: bool
) -> None:
    for i, more in enumerate(([], own)):
        run = make_run(tmp_path / f"{i}", *GRPO, *both, *more)
        with (run / "ledger.jsonl").open("a") as file:
            row = {"eval_rewards/accuracies": 0.5 + i / 4, "eval_rewards/graded": 400}
            file.write(json.dumps({"step": 20, **row}) + "\n")
    best = {c.key: c.best for c in columns_of(find_runs([tmp_path])) if c.best is not None}
    assert best == ({"eval_rewards/accuracies": 1} if is_comparable else {})


def test_many_settings_that_differ_come_behind(tmp_path: Path) -> None:
    """Runs of two methods have little in common: what all have comes first, eight at most."""
    make_run(tmp_path / "sft", "optim.lr=2e-5")
    make_run(tmp_path / "grpo", *GRPO)
    columns = columns_of(find_runs([tmp_path]))
    settings = [c.key for c in columns if c.group == "settings"]
    assert {"method.name", "optim.lr"} <= set(settings) and len(settings) <= SETTINGS
    behind = {c.key for c in columns if c.group == "more"}
    assert "method.clip_low" in behind and not behind & set(settings)


def test_a_report_goes_into_the_folder_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "runs/a"]) == 0
    assert cli.main(["report", "runs"]) == 0
    assert cli.main(["report", "runs/a", "runs/b"]) == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("report.*")}
    (tmp_path / "runs" / "hf").mkdir()  # an export, say; the page of `runs` is there as well
    assert cli.main(["report", *map(str, sorted(Path("runs").iterdir())), "-o", "report.html"]) == 0
    assert cli.main(["report", "runs/hf", "runs/report.csv"]) == 2
    places = ("runs/a/", "runs/", "")
    assert found == {f"{p}report.{end}" for p in places for end in ("html", "csv")}


def test_key_only_in_some_runs(tmp_path: Path) -> None:
    """A key that another run's settings lack differs from it; null is a value."""
    make_run(tmp_path / "a", "data.cache=/x")
    make_run(tmp_path / "b")
    path = make_run(tmp_path / "c") / "resolved.yaml"
    content = yaml.safe_load(path.read_text())
    content["method"]["beta"] = 0.1
    path.write_text(yaml.dump(content))
    columns = {column.key: column.cells for column in columns_of(find_runs([tmp_path]))}
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
        lines = printed([run, other], 70, is_terminal=is_terminal)
        table = [line for line in lines if line[:1] in "┏┃└│"]
        assert max(map(len, table)) <= width
        assert not any("hidden_size" in line for line in table)
        assert " ".join(lines).rstrip().endswith(" metric_number_11, model.hf.* (2)")
        assert any(line.startswith("not shown: ") for line in lines)
        assert not is_terminal or max(map(len, lines)) <= width


def printed(paths: list[Path], width: int, *, is_terminal: bool = True) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=is_terminal, color_system=None)
    print_runs(find_runs(paths), console)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_has_the_figures_first_and_no_word_cut_in_two(tmp_path: Path, width: int) -> None:
    """In 80 columns the rate, its interval and the settings that differ stand there whole."""
    pairs = {"rewards/accuracies": 0.613, "rewards/margins": 1.5, "rewards/graded": 64.0, "kl": 2.0}
    for lr in ("5e-05", "2e-05"):
        name = f"model=qwen3-moe-tiny_lr={lr}"
        run = make_run(tmp_path / name, "method=dpo", f"optim.lr={lr}", figures=pairs)
        with (run / "ledger.jsonl").open("a") as file:
            file.write(json.dumps({"step": 20} | {f"eval_{k}": v for k, v in pairs.items()}) + "\n")
    lines = printed([tmp_path], width)
    assert lines[0] == "2 runs: 2 finished, steps 20/20"
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= width
    words = {word for line in table for word in re.split(r"[\s┃│]+", line)}
    assert {"eval_rewards/", "accuracies", "of", "64", "0.613", "±0.12", "margins"} <= words
    assert max(map(len, lines)) <= width and "eval_rewards/graded" in " ".join(lines).split(", ")
    whole = "model=qwen3-moe-tiny_lr=5e-05"
    parts = {whole} if width == 120 else {"model=qwen3-moe-tiny_", "lr=5e-05"}
    assert parts <= words, "names end where their parts do"
    head = " ".join(line for line in table if line.startswith("┃"))
    assert ("optim.lr" in head) == (width == 120), "settings come behind"


@pytest.mark.parametrize(
    "text, width, lines",
    [
        ("eval_rewards/accuracies", 13, ["eval_rewards/", "accuracies"]),
        ("lr=5e-5_beta=0.1", 9, ["lr=5e-5_", "beta=0.1"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
        ("", 10, [""]),
    ],
)
def test_a_name_is_broken_between_its_parts(text: str, width: int, lines: list[str]) -> None:
    assert broken(text, width).split("\n") == lines


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
    assert told[9] == ["0.1000"], "held out; the last batch of training is no comparison"


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
    assert told[0][:3] == ["loss", "eval_loss", "kl"]
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


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_overflows_and_the_first_figure_is_shown(tmp_path: Path, width: int) -> None:
    """A run that samples, long names, a warning: the page is as wide as the window, and what is
    wider than its box can be scrolled. At 1400 the table is not.
    """
    figures = {"reward/mean": 0.613, "length/mean": 90.0, "groups/no_signal": 0.875, "kl": 5e-4}
    figures |= {"groups/graded": 8.0, "groups/std": 0.2, "entropy": 1.0, "rewards/x": 1e-5}
    for lr in ("5e-05", "2e-05"):
        run = make_run(tmp_path / f"a_long_name_of_a_run_lr={lr}", *GRPO, f"optim.lr={lr}",
                       f"data.train={lr}{'/long/path' * 20}", figures=figures)  # fmt: skip
        with (run / "ledger.jsonl").open("a") as file:
            text = f"Collapse: 0.88 of the groups {'word ' * 40}"
            file.write(json.dumps({"step": 20, "warning": text}) + "\n")
    out = tmp_path / "report.html"
    report.write_report([tmp_path], out)
    told = in_browser(
        page=out,
        width=width,
        script=f"const over = {OVER};"
        """
        const page = document.documentElement;
        const table = document.getElementById("runs");
        document.getElementById("smooth").value = 0.5;
        document.getElementById("smooth").dispatchEvent(new Event("input"));
        const room = table.parentElement.clientWidth - table.offsetWidth;
        return [page.clientWidth, page.scrollWidth, over, room,
          document.getElementById("metric").value, all("[data-small]").map((b) => b.dataset.small),
          all("#chart .raw").length, document.getElementById("lines").textContent,
          all("#runs td.num")[0].textContent, all("#runs tbody td").map((c) => c.textContent)];
        """,
    )
    assert told[0] == width and told[1] <= width and told[2] == []
    assert told[3] >= 0 or width == 400, "the table fits the page"
    assert told[4] == "reward/mean"
    assert told[5] == ["reward/mean", "length/mean", "kl", "groups/no_signal"]
    assert told[6] == 2 and "Thin lines: raw values. Thick lines: smoothed" in told[7]
    assert "0.613 ±0.13 of 8" in told[9] and "5.00e-4" in told[9] and "0.875 ±0.22 of 8" in told[9]
