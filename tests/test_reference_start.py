"""Preference training that goes on from an adapter: what its reference is, and that a reference
which is another model is said.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import LABELS, PAIRS, write_jsonl
from test_supervised import make_recipe, rows

from moetrain.config.recipe import Recipe
from moetrain.data.loader import RunData
from moetrain.errors import DataError
from moetrain.loops.reference import take_reference
from moetrain.loops.supervised import train
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import save_model

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model, a run that has trained an adapter on it, with its merged export)."""
    folder: Path = tmp_path_factory.mktemp("tuned")
    save_model("qwen3_moe", folder / "model", vocab_size=512)
    run = make_recipe(
        folder,
        "sft",
        model={"hf": None, "path": str(folder / "model")},
        adapter={"rank": 4, "alpha": 32},
        optim={"lr": 3e-2, "schedule": "constant"},
        checkpoint={"export_hf": True},
        train={"steps": 6, "eval_every": None},
        data={"eval": []},
    )
    pool = Workers()
    try:
        assert pool.run(1, train, run) == [0]
    finally:
        pool.close()
    return folder / "model", run.run_dir


def preference(tuned: tuple[Path, Path], folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A preference run of one step from that adapter."""
    method = {"name": "dpo", "beta": 0.5} | sections.pop("method", {})
    records = LABELS if method["name"] == "kto" else PAIRS
    base: dict[str, dict[str, Any]] = {
        "model": {"hf": None, "path": str(tuned[0])},
        "adapter": {"path": str(tuned[1] / "adapter")},
        "method": method,
        "train": {"steps": 1, "eval_every": None},
        "data": {
            "train": [str(write_jsonl(folder / "pairs.jsonl", records))],
            "eval": [],
            "seq_len": 96,
            "cache": str(folder / "cache"),
        },
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return make_recipe(folder, str(len(list(folder.glob("run*"))) or "run"), **base)


def test_the_reference_is_what_the_run_starts_from(
    workers: Workers, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    """As in TRL. The merged model gives the same; the base gives the figures of another model, and
    that is said with the cause.
    """
    first: dict[str, dict[str, Any]] = {}
    tables: dict[str, Any] = {}
    places: list[Path] = []  # each has one of its own in the cache
    for name, reference in (("start", "start"), ("base", "base"), ("other", str(tuned[1] / "hf"))):
        given = {} if name == "start" else {"reference": reference}
        run = preference(tuned, tmp_path, method=given).model_copy(
            update={"run_dir": tmp_path / f"run-{name}"}
        )
        assert workers.run(1, train, run) == [0]
        (first[name],) = rows(run)
        (new,) = set((tmp_path / "cache" / "reference").glob("[!.]*")) - set(places)
        places.append(new)
        tables[name] = np.load(new / "logp.npy")
    assert first["start"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["other"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("start", "other"):
        assert abs(first[name]["rewards/chosen"]) < 1e-3 and "warning" not in first[name]
    assert [(place / "identity.json").read_text().count('"adapter"') for place in places] == [
        1,
        0,
        0,
    ]
    assert tables["other"] == pytest.approx(tables["start"], abs=1e-3)
    assert abs(first["base"]["loss"] - math.log(2)) > 0.01
    assert "method.reference is base" in first["base"]["warning"]
    assert np.abs(tables["start"] - tables["base"]).mean() > 0.5


@pytest.mark.parametrize("method", ["ipo", "hinge", "kto"])
def test_every_method_with_a_reference_starts_at_it(
    workers: Workers, tuned: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    for reference, far in (("start", False), ("base", True)):
        run = preference(tuned, tmp_path, method={"name": method, "reference": reference})
        run = run.model_copy(update={"run_dir": tmp_path / reference})
        assert workers.run(1, train, run) == [0]
        (row,) = rows(run)
        assert ("warning" in row) == far
        assert (abs(row["rewards/chosen"]) < 1e-3) == (not far)


def test_a_reference_made_of_another_start_is_refused(
    workers: Workers, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    """`data.reference` of the base where the run starts from an adapter, and the other way."""
    for given, wanted in (("base", "start"), ("start", "base")):
        folder = tmp_path / given
        folder.mkdir()
        run = preference(tuned, folder, method={"reference": given})
        assert workers.run(1, train, run) == [0]
        (made,) = (folder / "cache" / "reference").glob("[!.]*")
        other = preference(
            tuned, folder, method={"reference": wanted}, data={"reference": str(made)}
        ).model_copy(update={"run_dir": folder / "other"})
        with pytest.raises(DataError, match="made with another adapter"):
            workers.run(1, train, other)


def test_a_reference_of_other_words_is_refused(
    workers: Workers, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    save_model("qwen3_moe", tmp_path / "small", vocab_size=300)
    run = preference(tuned, tmp_path, method={"reference": str(tmp_path / "small")})
    with pytest.raises(DataError, match="300"):
        workers.run(1, _reference, run)


def _reference(recipe: Recipe) -> None:
    take_reference(RunData(recipe), lambda line: None)
