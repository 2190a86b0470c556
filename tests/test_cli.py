"""The command line, and which mistakes it tells in one line. No torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import __version__, cli
from moetrain.commands.common import Arguments
from moetrain.errors import DivergedError, MoetrainError

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "examples" / "pretrain_tiny.yaml")
PAIRS = str(ROOT / "examples" / "dpo_tiny.yaml")
ONLINE = str(ROOT / "examples" / "grpo_tiny.yaml")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run in a job."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def refused(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return caught.value.code


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert "moetrain recipe [KEY]" in text and "docs/" in text
    for name in cli.COMMANDS:
        assert refused(name, "--help") == 0
    capsys.readouterr()
    assert refused("--version") == 0
    assert capsys.readouterr().out == f"moetrain {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["train"],
        ["train", RECIPE, "--fast"],
        ["train", RECIPE, "--nproc", "0"],
        ["train", RECIPE, "--nproc", "-1"],
        ["train", RECIPE, "--nproc", "two"],
        ["convert", "hf2hf", "a", "b"],
        ["convert", "verify", "a", "b", "c"],
        ["tokenizer", "train", "x"],
        ["tokenizer", "train", "x", "--out", "y", "--vocab-size", "0"],
        ["data", "index", "x", "--out", "y"],
    ],
)
def test_wrong_words_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(*argv) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["m"], ["m", "d"], ["m", "--out", "f"]])
def test_score_wants_a_model_data_and_a_file(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", *words]) == 2
    assert "give MODEL DATA --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.yaml"], "none.yaml: No such file"),
        ([RECIPE, "optim.lrr=1"], "Did you mean 'optim.lr'?"),
        ([RECIPE, "x"], "'x' is not an override"),
        ([RECIPE, "--nproc", "3", "parallel.ep=2"], "Use 2 or 4 ranks"),
        ([RECIPE, "parallel.ep=2"], "1 rank does not divide"),
        ([RECIPE, "--dry-run", "parallel.ep=3"], "ep=3 does not divide 8 experts"),
        (
            [ONLINE, "--dry-run", "rollout.max_tokens=512"],
            "no room for a prompt in data.seq_len=512",
        ),
        ([RECIPE, "model.path=/none"], "model.path=/none"),
        ([PAIRS, "--dry-run", "method.reference=/none"], "method.reference=/none is not there"),
        ([PAIRS, "data.train=/none.jsonl"], "data.train: /none.jsonl does not exist"),
        ([str(ROOT / "examples")], "Is a directory"),
        ([RECIPE, "optim.lr=[1"], "override optim.lr: line 1"),
        ([RECIPE, "--nproc", "2", "train.global_batch=7"], "Use 8."),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And found before any rank is started or torch imported: this file has 5 s."""
    assert cli.main(["train", *words]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("moetrain: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_dry_run_takes_overrides_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPE, "parallel.tp=2", "--nproc", "4", "seed=7", "--dry-run", "optim.lr=0.5"]
    assert cli.main(["train", *words]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.5" in text
    assert "seed: 7" in text
    assert "sp: true" in text
    assert "4 ranks: world_size=4 tp=2" in text


def test_dry_run_of_a_process_imports_no_torch(tmp_path: Path) -> None:
    """By the interpreter's own account, and it leaves nothing behind."""
    words = [RECIPE, "--dry-run", f"run_dir={tmp_path}/run", "parallel.ep=2", "parallel.pp=2"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "moetrain", "train", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "moetrain.run.dry_run" in imported
    heavy = ("torch", "numpy", "transformers", "megatron", "datasets")
    assert not [name for name in imported if name.split(".")[0] in heavy]
    header, *rows = done.stdout.split("# 4 ranks:")[1].split("\n\n")[0].splitlines()[1:]
    assert header.split() == ["rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp"]
    assert [row.split() for row in rows] == [
        ["0", "0", "0", "0", "0", "0", "0", "0"],
        ["1", "0", "0", "1", "0", "0", "1", "0"],
        ["2", "0", "0", "0", "1", "0", "0", "0"],
        ["3", "0", "0", "1", "1", "0", "1", "0"],
    ]
    assert "WARNING" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_warns_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """What does not fit is planned all the same: the layout is what a user tries out here."""
    words = ["model.hf.hidden_size=65536", "model.dtype=bf16"]
    hf = (
        "model={hf: {model_type: qwen3_moe, hidden_size: 1, intermediate_size: 98304,"
        " num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 4, head_dim: 128,"
        " vocab_size: 2048, num_experts: 8, num_experts_per_tok: 2,"
        " moe_intermediate_size: 4096}}"
    )
    assert cli.main(["train", RECIPE, "--dry-run", hf, *words]) == 0
    assert "WARNING: stage 0 needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["  run_dir ", "one of pretrain, cpt, sft", "moetrain recipe SECTION"]),
        (["optim.lr"], ["optim.lr\n", "highest learning rate", "value     number >= 0",
                        "default   0.0001", "optim - The optimizer", "optim.beta1=0.9"]),
        (["optim.lr=1e-5"], ["highest learning rate"]),
        (["method.beta"], ["method.beta (dpo, ipo, ", "method.beta (orpo)",
                           "`moetrain recipe METHOD`, of dpo"]),
        (["dpo"], ["method: dpo - Direct preference", "method.label_smoothing=0.0"]),
        (["data"], ["data - What to train", "data.train ", "data.seq_len=4096"]),
        (["run_dir"], ["default   none, it must be given"]),
        (["code"], ["options: code", "options.languages="]),
    ],
)  # fmt: skip
def test_recipe_says_what_a_key_means(
    words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipe", *words]) == 0
    out = capsys.readouterr().out
    assert not [text for text in said if text not in out], out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optim.lrr", "Did you mean 'optim.lr'?"),
        ("lr", "Did you mean 'optim.lr'?"),
        ("num_train_epochs", "Here it is 'train.epochs'."),
    ],
)
def test_recipe_knows_a_key_by_another_name(
    key: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipe", key]) == 2
    assert f"no recipe has the key '{key}'. {said}" in capsys.readouterr().err


def test_launch_without_slurm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said at once, and not behind what Slurm would have to know."""
    monkeypatch.setenv("PATH", "")
    assert cli.main(["launch", RECIPE]) == 2
    assert "Slurm is not on this machine (no sbatch). Run here with" in capsys.readouterr().err


def test_a_dry_run_says_what_is_not_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """A published model is planned by its name, which is no promise that it is here."""
    assert cli.main(["train", str(ROOT / "examples" / "sft_30b.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("# NOT HERE: ")]
    assert "model.path=models/Qwen3-30B-A3B is not on this machine" in named[0]
    assert "data.train: data/train.jsonl does not exist" in named[1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DivergedError("NaN\nat step 3"), 3, "moetrain: error: NaN at step 3\n"),
        (MoetrainError("no"), 2, "moetrain: error: no\n"),
        (KeyboardInterrupt(), 130, "moetrain: interrupted.\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(args: Arguments) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", lambda parser: None, fail))
    assert cli.main(["fail"]) == code
    assert capsys.readouterr().err == said


def test_convert_finds_its_repository(tmp_path: Path) -> None:
    """From any folder, through a link."""
    link = tmp_path / "convert"
    link.symlink_to(ROOT / "tools" / "convert")
    done = subprocess.run([link, "fly"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: moetrain convert" in done.stderr
    assert all(name in done.stderr for name in ("hf2mcore", "mcore2hf", "verify"))
