"""Shared fixtures: gloo workers that live for the whole session, and tiny transformers models on
disk.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetrain.testing.gloo import FromServer, Workers

# Importing torch and collecting makes millions of objects that stay: going through them again and
# again to look for garbage took a third of the time of a collection.
gc.disable()

# The files that take longest. They come first, so that at the end no worker of xdist is left alone
# with one of them (`--dist loadfile --no-loadscope-reorder`).
LONGEST = (
    "composed", "rl", "settings_runs", "trace", "kill", "docs", "disks", "temperature", "fuzz",
    "cut_answers", "transport", "parity", "rewards", "rewards_run", "data_sft", "offline_runs",
    "fake_cuda", "online_engine", "megatron_lm", "megatron_fields", "methods_engine", "lora",
    "reference_start", "data_sets", "data_preference", "quickstart", "code", "meeting", "services",
    "supervised", "muon", "sandbox", "bad_runs", "doctor", "doctor_ranks", "export", "sweep",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Look for garbage from here on, among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture
def forked_tracers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's processes are forked off one that has imported torch and Megatron; two that
    are spawned import for 9 CPU seconds at every search.
    """
    from moetrain.planner import search

    start = SimpleNamespace(get_context=lambda _: FromServer())
    monkeypatch.setattr(search, "multiprocessing", start)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Any]]:
    """`tiny(family)` -> (folder, transformers model) of four layers, made once; `tiny(family,
    parallel)` has as many layers as that layout needs.
    """
    made: dict[tuple[str, int], tuple[str, Any]] = {}

    def make(family: str, parallel: Mapping[str, Any] | None = None) -> tuple[str, Any]:
        from moetrain.testing.tiny import layers_for, save_model

        key = (family, 4 if parallel is None else layers_for(parallel))
        if key not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            made[key] = (str(folder), save_model(family, folder, num_hidden_layers=key[1]))
        return made[key]

    return make
