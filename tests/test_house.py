"""The rules of the house that a reader could break without noticing."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted((ROOT / "moetrain").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py"))
BENCHES = sorted((ROOT / "examples" / "evals").glob("*.yaml"))
EXAMPLES = sorted(set((ROOT / "examples").rglob("*.yaml")) - set(BENCHES))
MOETRAIN = Path(sys.executable).with_name("moetrain")
MAX_FILE, MAX_FUNCTION = 400, 60
# What a command that only reads or plans a recipe may not load: each costs from half a second up.
HEAVY = ("torch", "transformers", "megatron", "datasets", "peft", "matplotlib", "tensorboard")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str | Path) -> str:
    """Run a command in the repository root; its stdout."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import moetrain.cli",
        "import moetrain.config.load",
        "import moetrain.layout.mesh, moetrain.layout.memory",
        "import moetrain.models",
    ],
)
def test_imports_nothing_heavy(statement: str) -> None:
    loaded = run(sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_help_and_dry_run_import_nothing_heavy() -> None:
    alone = [path for path in EXAMPLES if path.name.endswith("_tiny.yaml")]
    alone = [path for path in alone if "path: runs/" not in path.read_text()]  # begin from others
    assert {"pretrain_tiny.yaml", "sft_tiny.yaml"} <= {path.name for path in alone}
    plans = [["train", str(path), "--dry-run"] for path in alone]
    # One after another in one process: what an earlier one imports, later ones have, too.
    code = f"import sys\nfrom moetrain.cli import main\nheavy = {HEAVY}\n"
    code += f"for argv in {[['--help'], ['recipe', 'optim.lr'], *plans]}:\n"
    code += "    try:\n        code = main(argv)\n"
    code += "    except SystemExit as end:\n        code = end.code\n"
    code += "    assert not code, (argv, code)\n"
    code += "    assert not set(heavy) & set(sys.modules), argv\n"
    run(sys.executable, "-c", code)


def test_help_is_quick() -> None:
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        assert "train" in run(MOETRAIN, "--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_version_is_the_package_version() -> None:
    import moetrain

    assert moetrain.__version__ in run(MOETRAIN, "--version")


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, "a second idea lives in this file: find it a file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} at line {node.lineno} has {lines} lines"


# What may call torch.distributed: the World and what it is opened with, sums under autograd, moving
# weights, the doctor, which tries groups that no run has, and the bench, which times collectives.
TRANSPORT = (
    "engine/world.py",
    "engine/meeting.py",
    "engine/compat_meta.py",
    "ops/reduce.py",
    "weights/transport.py",
    "cluster/doctor/",
    "planner/bench.py",
    "rollout/remote/",
    "testing/",
)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_ranks_talk_through_the_world(path: Path) -> None:
    """No other module calls torch.distributed, or asks by itself whether there is a GPU."""
    name, text = name_of(path).removeprefix("moetrain/"), path.read_text()
    if not name.startswith(("tools/", *TRANSPORT)):
        assert not re.search(r"\bdist\.[a-z_]+\(", text)
    if not name.startswith(("tools/", "engine/device.py", "cluster/doctor/", "testing/")):
        assert "cuda.is_available" not in text


def test_the_map_of_rooms_is_made_from_the_imports() -> None:
    run(sys.executable, ROOT / "tools/room_map.py", "--check")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=name_of)
def test_no_test_mocks_collectives(path: Path) -> None:
    """A fake collective proves that the fake works."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            patches = node.func.attr == "setattr" and ast.unparse(node)
            assert not (patches and re.search(r"\bdist\b|distributed", patches)), node.lineno
    assert not [name for name in imported if name.startswith(("unittest.mock", "mock"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_every_example_is_a_recipe(path: Path) -> None:
    from moetrain.config.load import load_recipe

    assert load_recipe(path).run_dir.parts, "a recipe names its run_dir"


@pytest.mark.parametrize("path", BENCHES, ids=name_of)
def test_every_benchmark_is_one(path: Path) -> None:
    from moetrain.config.bench import load_bench

    bench = load_bench(path)
    assert bench.source or bench.data.startswith("builtin:"), "say where its file is to be had"


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert lines and not odd


def test_every_dependency_is_pinned() -> None:
    """What pyproject asks for, without the extras that need a GPU, has an exact version."""
    import tomllib

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {normal(re.split(r"[\[<>=!~ ]", line, maxsplit=1)[0]) for line in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert names <= {normal(line.split("==")[0]) for line in lines}


def test_recipe_docs_are_current() -> None:
    assert "up to date" in run(sys.executable, ROOT / "tools/recipe_docs.py", "--check")


def test_commands_are_executable() -> None:
    for name in (".ci/run", "tools/convert", "tools/bench/gpu_step.py"):
        assert os.access(ROOT / name, os.X_OK), name


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_what_is_imported_from_the_engine_is_there(path: Path) -> None:
    """Its package answers any name at first use, so no type checker sees one that is gone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "moetrain.engine":
            for name in {alias.name for alias in node.names} - {"Engine", "StepResult"}:
                assert (ROOT / "moetrain/engine" / f"{name}.py").is_file(), name


def test_every_page_is_two_clicks_from_the_readme() -> None:
    def linked(page: Path) -> set[Path]:
        found = re.findall(r"\]\((?!https?:)([^)\s#]+\.md)", page.read_text())
        return {(page.parent / path).resolve() for path in found}

    first = linked(ROOT / "README.md")
    reached = first.union(*map(linked, first))
    assert not {path.name for path in (ROOT / "docs").glob("*.md") if path not in reached}


def test_links_between_pages_lead_somewhere() -> None:
    def anchor(heading: str) -> str:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.lower())
        return re.sub(r"[^\w\- ]", "", plain.strip()).replace(" ", "-")

    dead: list[str] = []
    for name in run("git", "ls-files", "*.md").split():
        page = ROOT / name
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
            path, _, place = link.partition("#")
            target = page.parent / path if path else page
            headings = []
            if target.suffix == ".md" and target.is_file():
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            if not target.exists() or (place and place not in map(anchor, headings)):
                dead.append(f"{name}: {link}")
    assert not dead
