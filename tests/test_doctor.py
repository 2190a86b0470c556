"""`moetrain doctor` on this machine alone: each check on something that it has to find."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.cluster import doctor
from moetrain.cluster.doctor import files, image, job, links, machine, traffic, versions
from moetrain.cluster.doctor.base import Finding, Level, Planned, Subject
from moetrain.config.load import load_recipe
from moetrain.testing import command
from moetrain.testing.tiny import save_model

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "sft_tiny.yaml"
LARGE = ROOT / "examples" / "dpo_235b.yaml"


def subject(*overrides: str, recipe: Path = TINY, num_procs: int | None = None) -> Subject:
    return Subject(Planned(load_recipe(recipe, overrides), num_procs), recipe_path=recipe)


def run(*words: str, **environ: str) -> tuple[int, dict[str, str]]:
    """(exit code, check -> its line) of `moetrain doctor` in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | environ
    fresh = "PYTHONPATH" in environ
    done = command.run("doctor", *words, env=env, cwd=ROOT, timeout=120, fresh=fresh)
    lines = [line for line in done.stdout.splitlines() if line[5:6] == " "]
    assert not any("the check itself broke" in line for line in lines), done.stdout
    return done.returncode, {line[6:21].strip(): line for line in lines}


@pytest.mark.slow
def test_all_is_well_with_a_tiny_recipe(tmp_path: Path) -> None:
    code, lines = run(str(TINY), f"run_dir={tmp_path}/run")
    assert code == 0, lines
    assert list(lines) == [check.name for check in doctor.CHECKS]
    assert lines["tokenizer"].startswith("ok    tokenizer       2048 tokens")
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


@pytest.mark.slow
def test_a_wrong_version_an_image_that_is_not_there_and_data_that_is_not(tmp_path: Path) -> None:
    """A package is what its metadata says, so metadata is enough to have the wrong one."""
    info = tmp_path / "transformers-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    code, lines = run(
        str(TINY),
        "data.train=/none.jsonl",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        MOETRAIN_IMAGE=f"{tmp_path}/none.sif",
    )
    assert code == 2
    assert lines["versions"].startswith("FAIL")
    assert "transformers 4.0.0 is not <5.20,>=5.16.1" in lines["versions"]
    assert "pip install 'transformers" in lines["versions"]
    assert f"{tmp_path}/none.sif does not exist -> build one" in lines["image"]
    assert lines["image"].startswith("FAIL")
    assert "/none.jsonl does not exist" in lines["data"]


def test_overrides_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from moetrain import cli

    assert cli.main(["doctor", "optim.lr=1"]) == 2
    assert "Give RECIPE before it" in capsys.readouterr().err
    assert cli.main(["doctor", "/none.yaml"]) == 2
    assert "/none.yaml: No such file" in capsys.readouterr().err


def test_exit_code_is_that_of_the_worst() -> None:
    lines = [Finding(level, "x", "y" * (level >= Level.WARN)) for level in Level]
    assert [doctor.EXIT_CODES[finding.level] for finding in lines] == [0, 0, 1, 2]
    assert doctor.line("a", lines[3]) == "FAIL  a               x -> y"
    assert doctor.line("a", Finding(Level.OK, "two\nlines")).count("\n") == 0


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on() -> None:
    def broken(subject: Subject) -> Finding:
        raise RuntimeError("of its own")

    checks = [doctor.Check("a", broken, doctor.ALL), doctor.Check("b", machine.ports, doctor.NODE)]
    found = doctor.examine(Subject(None), checks)
    assert found["a"].level is Level.FAIL
    assert found["a"].text == "RuntimeError: of its own"
    assert found["b"].level is Level.OK


# --- versions


def test_ranges_are_those_of_the_project() -> None:
    """From the checkout's file and from the installed metadata alike."""
    from_file, from_metadata = versions.wanted(ROOT), versions.wanted()
    assert from_file == from_metadata
    assert from_file["torch"][1]
    assert not from_file["vllm"][1]
    assert "ruff" not in from_file


def test_versions_here_are_in_range() -> None:
    assert not list(versions.out_of_range(versions.here()))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"torch": "2.14.0+cu130"}, "torch 2.14.0+cu130 is not <2.14,>=2.11"),
        ({"transformers": "4.57.0"}, "transformers 4.57.0 is not"),
        ({"vllm": "0.31.2"}, "vllm 0.31.2 is not <0.33,>=0.32"),
        ({"megatron-core": None}, "megatron-core is not installed"),
    ],
)
def test_a_version_out_of_range(changed: dict[str, str | None], said: str) -> None:
    merged = {**versions.here(), **changed}
    given = {name: version for name, version in merged.items() if version is not None}
    (found,) = versions.out_of_range(given)
    assert found.level is Level.FAIL
    assert said in found.text
    assert "pip install" in found.remedy


def test_builds_count_as_what_they_build() -> None:
    ranges = versions.wanted()["torch"][0]
    assert versions.fits("2.13.0+cpu", ranges)
    assert versions.fits("2.11.0a0+ab12cd", ranges)  # as NVIDIA's images have it
    assert not versions.fits("2.10.0a0+ab12cd", ranges)


def test_two_packages_at_odds() -> None:
    """torch of this environment asks for its own triton."""
    (found,) = versions.at_odds(versions.here() | {"triton": "3.0.0"})
    assert found.level is Level.WARN
    assert found.text.startswith(f"torch {versions.installed('torch')} asks for triton==")


def test_nodes_that_differ() -> None:
    one, other = {"torch": "2.13.0", "peft": "0.20.0"}, {"torch": "2.12.1", "peft": "0.20.0"}
    (found,) = versions.differing({"n1": one, "n2": other})
    assert found.text == "torch is 2.13.0 on n1 and 2.12.1 on n2"
    assert not versions.differing({"n1": one, "n2": dict(one)})


def test_a_recipe_asks_for_an_extra() -> None:
    asking = subject("model.backend=te")
    (found,) = versions.missing_extras({}, asking)
    assert "model.backend asks for transformer-engine" in found.text
    assert not list(versions.missing_extras({"transformer-engine": "2.11"}, asking))


# --- image


@pytest.fixture
def labels() -> dict[str, str]:
    """Of an image that was built from this checkout."""
    names = (*versions.TOGETHER, *versions.wanted(ROOT))
    held = {name: version for name in names if (version := versions.installed(name)) is not None}
    packages = {image.PACKAGE + name: version for name, version in held.items()}
    commit = image._commit(ROOT)
    assert commit is not None
    return {image.VERSION: "0.1.0", image.COMMIT: commit, **packages}


def test_an_image_of_this_checkout(labels: dict[str, str]) -> None:
    assert not list(image.compare(labels, ROOT, subject()))


@pytest.mark.parametrize(
    ("changed", "level", "said"),
    [
        ({image.VERSION: "0.0.9"}, Level.FAIL, "it holds moetrain 0.0.9, the checkout is 0.1.0"),
        ({image.COMMIT: "f" * 40}, Level.WARN, "it was built from commit ffffffffffff"),
        ({image.PACKAGE + "torch": "2.9.1"}, Level.FAIL, "in it, torch 2.9.1 is not"),
        ({image.PACKAGE + "peft": None}, Level.FAIL, "in it, peft is not installed"),
        ({image.VERSION: None}, Level.FAIL, "it has no moetrain labels"),
    ],
)
def test_an_image_of_something_else(
    changed: dict[str, str | None], level: Level, said: str, labels: dict[str, str]
) -> None:
    given = {key: v for key, v in {**labels, **changed}.items() if v is not None}
    (found,) = image.compare(given, ROOT, subject())
    assert found.level is level
    assert said in found.text
    assert "containers/build.sh" in found.remedy


def test_the_checkout_is_found_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert image.checkout_of(subject()) == ROOT
    assert image.checkout_of(Subject(None)) is None
    monkeypatch.chdir(ROOT / "docs")
    assert image.checkout_of(Subject(None)) == ROOT


# --- layout, GPUs, memory, ports


def test_layout() -> None:
    assert job.layout(subject(recipe=LARGE)).text == "32 ranks: tp=4 pp=4 ep=8 dp=2"
    found = job.layout(subject(recipe=LARGE, num_procs=64))
    assert found.level is Level.FAIL
    assert "64 ranks were started where cluster.nodes=4" in found.text
    (found,) = doctor.examine(
        subject("parallel.ep=3"), [doctor.Check("l", job.layout, doctor.FIRST)]
    ).values()
    assert found.level is Level.FAIL
    assert "parallel.ep=3 does not divide 8 experts" in found.text


SMI = """\
NVIDIA H100 80GB HBM3, 81559, 4, 0
NVIDIA H100 80GB HBM3, 81559, 71000, 0
NVIDIA H100 80GB HBM3, 40000, 4, 3
"""


def test_gpus_are_compared_with_the_recipe() -> None:
    found = machine.read_gpus(SMI)
    assert [round(gpu.total, 1) for gpu in found] == [79.6, 79.6, 39.1]
    lines = machine.compare(found, 3, subject(recipe=LARGE))
    assert [line.text for line in lines] == [
        "1 of 3 GPUs hold 69.3 GiB already",
        "1 GPUs have uncorrected memory errors",
        "a GPU of 39.1 GiB where cluster.gpu=H100-80GB has 79.6",
    ]
    assert all(line.remedy for line in lines)
    assert not machine.compare(found[:1], 1, subject(recipe=LARGE))
    assert machine.read_gpus("No devices were found\n") == []
    without_ecc = "NVIDIA RTX A6000, 49140, 4, [N/A]\n"
    assert machine.read_gpus(without_ecc)[0].errors == 0


def test_gpus_that_were_given_and_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if machine.given_gpus({}):
        pytest.skip("this machine has GPUs: what a job without them is told stays unproven here")
    assert machine.gpus(subject()).level is Level.SKIP
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    found = machine.gpus(subject())
    assert found.level is Level.FAIL
    assert "--nv" in found.remedy


def test_a_recipe_too_large_for_its_gpus() -> None:
    if machine.given_gpus({}):
        pytest.skip("this machine has GPUs: the check without them stays unproven here")
    assert machine.gpus(subject(recipe=LARGE)).level is Level.SKIP
    too_large = subject("adapter=null", "parallel.ep=1", "parallel.pp=1", recipe=LARGE)
    found = machine.gpus(too_large)
    assert found.level is Level.FAIL
    assert "more ranks" in found.remedy


def test_memory_is_what_the_cgroup_leaves(tmp_path: Path) -> None:
    """The files as Linux writes them, in a folder of our own."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (cgroups / "job/step").mkdir(parents=True)
    assert machine.available_memory(proc, cgroups) == 16
    (cgroups / "job/memory.max").write_text(f"{6 * 2**30}\n")
    (cgroups / "job/memory.current").write_text(f"{2 * 2**30}\n")
    (cgroups / "job/step/memory.max").write_text("max\n")
    (cgroups / "job/step/memory.current").write_text("0\n")
    assert machine.available_memory(proc, cgroups) == 4


def test_memory_of_a_recipe() -> None:
    small, workers = subject(), subject("data.num_workers=4")
    need = machine.needed_memory(small)
    assert machine.needed_memory(workers) == pytest.approx(need + 4 * machine.WORKER_GIB)
    large = subject("adapter=null", "data.num_workers=10000", recipe=LARGE)
    found = machine.memory(large)
    assert found.level is Level.FAIL
    assert "--mem=0" in found.remedy


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    assert machine.ports(subject()).level is Level.OK
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        found = machine.ports(subject())
    assert found.level is Level.FAIL
    assert "MASTER_PORT" in found.remedy


def test_few_open_files() -> None:
    """The limit of a process of its own."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from moetrain.cluster.doctor import machine\n"
        "from moetrain.cluster.doctor.base import Subject\n"
        "print(machine.ports(Subject(None)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Level.WARN" in done.stdout, done.stderr
    assert "ulimit -n" in done.stdout


# --- links


TOPOLOGY = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \t{}\tPIX\t0-51\t0
GPU1\t{}\t X \tPIX\t0-51\t0
"""


@pytest.mark.parametrize(
    ("kind", "gpu", "expected"),
    [
        ("NV18", "NVIDIA H100 80GB HBM3", links.Link("18 NVLinks", 450)),
        ("NV12", "NVIDIA A100-SXM4-80GB", links.Link("12 NVLinks", 300)),
        ("NV18", "NVIDIA B200", links.Link("18 NVLinks", 900)),
        ("NV4", "Some other", links.Link("4 NVLinks", None)),
        ("SYS", "NVIDIA H100 PCIe", links.Link("PCIe (SYS)", None)),
    ],
)
def test_nvlinks_by_topology(kind: str, gpu: str, expected: links.Link) -> None:
    assert links.nvlink_of(TOPOLOGY.format(kind, kind), gpu) == expected
    assert links.nvlink_of("", gpu) is None


def test_ports_of_a_node(tmp_path: Path) -> None:
    """/sys as Linux writes it, in a folder of our own."""
    assert links.nics_of_node(tmp_path) is None
    for name, state in [("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")]:
        port = tmp_path / "infiniband" / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert links.nics_of_node(tmp_path) == links.Link("2 InfiniBand ports of 400 Gbit/s", 100)
    slot = tmp_path / "slot"
    slot.mkdir()
    assert links.pcie_of(slot) is None
    (slot / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (slot / "max_link_width").write_text("16\n")
    found = links.pcie_of(slot)
    assert found is not None
    assert found.gb_s == pytest.approx(63.0, abs=0.1)


def test_what_ports_allow_between_nodes() -> None:
    """8 ports of 50 GB/s, 2 nodes of 8: an all-to-all keeps 7 of 15 parts at home."""
    reduce, exchange = links.between_nodes(400, 8, 16)
    assert reduce == 400
    assert exchange == pytest.approx(50 * 15 / 8)


@pytest.mark.parametrize(
    ("measured", "level"), [(400, Level.OK), (200, Level.WARN), (40, Level.FAIL)]
)
def test_a_slow_link(measured: float, level: Level) -> None:
    found = traffic.judged("x", "18 NVLinks", [(420, 450), (measured, 450)], "look")
    assert found.level is level
    assert f"{100 * measured / 450:.0f} % of 18 NVLinks" in found.text
    assert bool(found.remedy) == (level >= Level.WARN)


# --- files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)])
    if mounted.returncode:
        pytest.skip("mounting takes root: a full disk stays unproven here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills(small_disk: Path) -> None:
    inside = subject(f"run_dir={small_disk}/a/run")
    assert files.shared(inside).level is not Level.FAIL
    assert files.space(inside).level is Level.FAIL
    assert "GiB free for 3 checkpoints of 0.03 GiB" in files.space(inside).text
    (small_disk / "other").write_bytes(bytes(12 * 2**20))  # the file that is tried takes 16
    found = files.shared(inside)
    assert found.level is Level.FAIL
    assert "No space left" in found.text
    assert os.listdir(small_disk) == ["other"]


def test_a_disk_that_may_not_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    found = files.shared(subject(f"run_dir={small_disk}/run"))
    assert found.level is Level.FAIL
    assert "Read-only file system" in found.text


def test_checkpoints_are_as_large_as_planned(tmp_path: Path) -> None:
    """Against one that the engine writes."""
    words = ["train.steps=1", f"run_dir={tmp_path}/run", "data.eval=[]", "data.seq_len=64"]
    done = command.run("train", TINY, *words, "train.global_batch=1", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (step,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    written = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    plan = subject().plan
    assert plan is not None
    planned = files.checkpoint_bytes(plan.model.table, plan.recipe, plan.learns)
    assert written == pytest.approx(planned, rel=0.05)


def test_a_model_with_a_file_missing(tmp_path: Path) -> None:
    """And with two sets of weights, tensors of another model, and then nothing wrong."""
    checks = [doctor.Check("model", files.model, doctor.FIRST)]

    def found(path: str = str(tmp_path)) -> Finding:
        asked = subject(f"model.path={path}", "model.tokenizer=builtin:stdlib-tokenizer")
        return doctor.examine(asked, checks)["model"]

    def says(words: str) -> None:
        assert found().level is Level.FAIL and words in found().text, found().text

    says("no config.json")
    model = save_model("qwen3_moe", tmp_path)
    assert found().level is Level.OK, found().text
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    says("two sets of weights")
    (tmp_path / "model.safetensors").unlink()
    assert found().level is Level.OK, found().text
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.rename(tmp_path / "other")
    says(f"shards are missing: {shard.name}")
    (tmp_path / "other").rename(shard)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    says("belong to no parameter")
    (tmp_path / "moetrain.json").write_text("{}")
    says("holds a Megatron checkpoint (moetrain.json) and a Hugging Face model")
    assert found("builtin:qwen3-moe-tiny").level is Level.OK


def test_a_template_that_does_not_mark_answers(tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    checks = [doctor.Check("tokenizer", files.tokenizer, doctor.FIRST)]
    (found,) = doctor.examine(subject(f"data.chat_template={template}"), checks).values()
    assert found.level is Level.FAIL
    (found,) = doctor.examine(subject("model.hf.vocab_size=7", "model.path=null"), checks).values()
    assert found.level is Level.FAIL
    assert "model.tokenizer" in found.text


@pytest.mark.parametrize(("num_bad", "level"), [(0, Level.OK), (1, Level.WARN), (30, Level.FAIL)])
def test_records_that_cannot_be_learned_from(num_bad: int, level: Level, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(good)] * (60 - num_bad) + ['{"other": 1}'] * num_bad
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = files.data(subject(f"data.train={path}", "data.eval=[]"))
    assert found.level is level
    assert f"{60 - num_bad} of 60 records looked at" in found.text


def test_prompts_and_corpora(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "2 + 2?"}\n{"other": 1}\n')
    grpo = ROOT / "examples" / "grpo_tiny.yaml"
    found = files.data(subject(f"data.train={prompts}", "data.eval=[]", recipe=grpo))
    assert found.level is Level.FAIL  # half of them
    assert "1 of 2 records" in found.text
    pretrain = ROOT / "examples" / "pretrain_tiny.yaml"
    corpus = subject(f"data.train={tmp_path}/corpus", "data.eval=[]", recipe=pretrain)
    assert "moetrain data index" in files.data(corpus).remedy
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").write_bytes(b"x")
    assert files.data(corpus).level is Level.OK


def test_a_gpu_that_may_be_too_small() -> None:
    """Before activations is a failure, with their bound a warning."""
    gpu = machine.Gpu("x", 80.0, 0.0, 0)
    levels = [
        [finding.level for finding in machine.too_small((static, most, "x"), [gpu])]
        for static, most in ((10, 70), (10, 90), (90, 100))
    ]
    assert levels == [[], [Level.WARN], [Level.FAIL]]


def test_what_the_recipe_names_and_is_not_there() -> None:
    pairs = subject(
        "method.reference=/none", "data.eval=/none", recipe=ROOT / "examples/dpo_tiny.yaml"
    )
    found = files.inputs(pairs)
    assert found.level is Level.FAIL
    assert found.text == "method.reference=/none is not there. Check the path.; and 1 more"
    assert files.inputs(subject()).level is Level.OK
