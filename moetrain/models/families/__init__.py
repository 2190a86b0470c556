"""One page a family: it names its parts. A page that is put here is known everywhere."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from moetrain.models.config import HfConfig
from moetrain.models.model import Model


@dataclass(frozen=True)
class Family:
    """A page: transformers' model_type, and what makes a model of a config.json."""

    model_type: str
    build: Callable[[HfConfig], Model]


_PAGES = [import_module(f"{__name__}.{page.name}") for page in pkgutil.iter_modules(__path__)]

# By transformers' name of the architecture with a vocabulary head.
FAMILIES: dict[str, Family] = {
    page.ARCHITECTURE: Family(page.MODEL_TYPE, page.build) for page in _PAGES
}
