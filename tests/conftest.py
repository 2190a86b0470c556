"""Shared fixtures: gloo workers that live for the whole session, and tiny transformers models on
disk.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moetrain.testing.gloo import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Any]]:
    """`tiny(family)` -> (folder, transformers model), made once."""
    made: dict[str, tuple[str, Any]] = {}

    def make(family: str) -> tuple[str, Any]:
        from moetrain.testing.tiny import save_model

        if family not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            made[family] = (str(folder), save_model(family, folder))
        return made[family]

    return make
