"""Whole systems: programs that the trainer works with and does not contain. `make system` installs
what they need and runs them; `make test` does not collect them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.testing.gloo import Workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, so that `-m system` finds it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def te_workers() -> Iterator[Workers]:
    """Ranks whose engines have the te backend, from .venv-te."""
    from moetrain.testing.te_workers import FOLDER, TeWorkers

    if not (FOLDER / "lib" / "libcuda.so.1").exists():
        pytest.skip("no .venv-te (make te-cpu), so this stays unproven: the te backend")
    pool = TeWorkers()
    yield pool
    pool.close()
