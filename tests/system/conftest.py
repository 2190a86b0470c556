"""Whole systems: programs that the trainer works with and does not contain. `make system` installs
what they need and runs them; `make test` does not collect them.
"""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, so that `-m system` finds it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.system)
