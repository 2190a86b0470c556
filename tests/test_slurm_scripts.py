"""The scripts in slurm/ without Slurm: they are alike, hold no mistake that shellcheck finds, and
say in one line what is missing. `tests/system/test_slurm.py` runs them.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moetrain.cluster.submit import script_of
from moetrain.errors import ConfigError
from moetrain.testing import command

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if path.name != "common.sh"]
TRAINS = [path for path in JOBS if (ROOT / "examples" / f"{path.stem}.yaml").is_file()]
SCONTROL = "#!/bin/sh\necho n1\n"  # what a script asks Slurm for before it runs anything


def name_of(path: Path) -> str:
    return path.name


def test_they_are_all_there() -> None:
    wanted = "pretrain_235b cpt_235b sft_30b sft_235b dft_235b dpo_30b dpo_235b grpo_30b"
    wanted += " grpo_235b eval convert sweep"
    assert set(wanted.split()) <= {path.stem for path in JOBS}


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: mistakes in slurm/ stay unseen")
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS), str(ROOT / "slurm" / "site.env")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_short_and_kills_nobody_by_name(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(pkill|killall)\b", text)
    assert len(text.splitlines()) <= (150 if path.name == "common.sh" else 40)


def options(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M)
    return {key: value for key, value in found if key not in ("job-name", "output")}


@pytest.mark.parametrize("path", TRAINS, ids=name_of)
def test_a_script_is_what_launch_prints(path: Path) -> None:
    """And the nodes it asks for are the recipe's, which its layout fits."""
    recipe = ROOT / "examples" / f"{path.stem}.yaml"
    done = command.run("launch", recipe, "--dry-run")
    assert done.returncode == 0, done.stderr
    ours, theirs = (text.split("#SBATCH hetjob\n") for text in (path.read_text(), done.stdout))
    assert list(map(options, ours)) == list(map(options, theirs))
    verbs = [text[-1].splitlines()[-1].split()[0] for text in (ours, theirs)]
    assert verbs == ["train_beside_servers" if ours[1:] else "train"] * 2


def test_launch(tmp_path: Path) -> None:
    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        recipe = ROOT / "examples" / "dpo_235b.yaml"
        env = os.environ | {"PATH": str(tmp_path)}  # no Slurm there
        return command.run("launch", recipe, *words, env=env)

    printed = launch(
        "--nodes", "8", "--time", "1:00:00", "--dry-run", "optim.lr=1e-5", "seed=[a b]"
    )
    assert printed.returncode == 2 and "seed" in printed.stderr
    printed = launch("--nodes", "8", "--time", "1:00:00", "--dry-run", "optim.lr=1e-5")
    assert printed.returncode == 0
    assert "--nodes=8\n" in printed.stdout and "--time=1:00:00\n" in printed.stdout
    assert printed.stdout.splitlines()[-1].endswith("dpo_235b.yaml optim.lr=1e-5 cluster.nodes=8")
    assert (
        subprocess.run(["bash", "-n"], input=printed.stdout, text=True, check=False).returncode == 0
    )
    for words, says in (
        (("--nodes", "3"), "24 ranks do not divide"),
        ((), "Slurm is not on this machine (no sbatch)"),
    ):
        done = launch(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_launch_keeps_words_together(tmp_path: Path) -> None:
    """A file may have any name, and a time is one: nothing else comes into the script."""
    odd = tmp_path / "a b'$(touch x)\n#SBATCH --nodes=9\n"
    odd.mkdir()
    recipe = odd / "dpo it's\n#SBATCH --uid=0\n%j.yaml"
    recipe.write_text((ROOT / "examples" / "dpo_235b.yaml").read_text())
    printed = script_of(recipe, ["run_dir=runs/a b"], None, "2-12:30")
    own = options(printed.partition("\nsource ")[0])  # sbatch reads no further
    assert own == options((ROOT / "slurm" / "dpo_235b.sh").read_text()) | {"time": "2-12:30"}
    assert "#SBATCH --job-name=dpo_it_s_SBATCH_--uid=0_j\n" in printed
    words = printed[printed.index("source ") :].replace("source ", ": ")
    says = 'train() { printf "%s\\0" "$@"; }\n' + words
    done = subprocess.run(["bash", "-c", says], capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout.decode() == f"{recipe}\0run_dir=runs/a b\0"
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]
    for time in ("1:00:00\n#SBATCH --uid=0", "1:00 2", "", "soon", "1-"):
        with pytest.raises(ConfigError, match=r"--time .* is no time of Slurm's"):
            script_of(recipe, [], None, time)


def test_words_of_a_command_are_kept(tmp_path: Path) -> None:
    """Empty ones, options, and names of folders here; a file of this repository is found."""
    given = ["", "-n", "-e", "--out", "docs", "a b", "*", "examples/dpo_235b.yaml"]
    for name in ("srun", "moetrain"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\0" "$@" >words\n')
        (tmp_path / name).chmod(0o755)
    paths = {"MOETRAIN_WORK": str(tmp_path), "MOETRAIN_BIN": str(tmp_path / "moetrain")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = start(ROOT / "slurm" / "eval.sh", tmp_path, *given, PATH=path, **paths)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words[words.index("eval") + 1 :] == [*given[:-1], str(ROOT / given[-1])]


def start(path: Path, folder: Path, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    """A script as Slurm starts it, with as much of Slurm as it needs to find a mistake."""
    fake = folder / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "scontrol").write_text(SCONTROL)
    (fake / "scontrol").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MOETRAIN_"))}
    env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"} | given
    env["PATH"] = f"{fake}:{env['PATH']}"
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "1"}
    return subprocess.run(
        ["bash", str(path), *(words or "x")], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_a_site_without_paths(path: Path, tmp_path: Path) -> None:
    done = start(path, tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "slurm/site.env: MOETRAIN_WORK is empty. Give the folder" in done.stderr


def test_what_a_site_can_get_wrong(tmp_path: Path) -> None:
    path, work = ROOT / "slurm" / "dpo_235b.sh", str(tmp_path)
    cases = {
        "is no folder on": {"MOETRAIN_WORK": "/nonexistent"},
        "no moetrain at /nonexistent": {"MOETRAIN_WORK": work, "MOETRAIN_BIN": "/nonexistent"},
        "x.sif does not exist": {"MOETRAIN_WORK": work, "MOETRAIN_IMAGE": "/nonexistent/x.sif"},
        "site.env: not readable": {"MOETRAIN_SITE": "/nonexistent/site.env"},
        "submit it with sbatch": {"SLURM_JOB_ID": ""},
    }
    for says, given in cases.items():
        done = start(path, tmp_path, **given)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.glob(".ends*")), "nothing half-written"
