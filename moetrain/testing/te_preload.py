"""As `preload`, with Transformer Engine's modules, and engines of the te backend as on a GPU."""

from typing import Any

from moetrain.testing import te_kernels

te_kernels.install()

from moetrain.engine import engine, model  # noqa: E402
from moetrain.testing import preload  # noqa: E402, F401

_fields = model._default_fields


def _fields_on_gpu(recipe: Any, own: Any, device: Any, backend: str) -> dict[str, Any]:
    return _fields(recipe, own, device, backend) | {"gradient_accumulation_fusion": backend == "te"}


engine.choose_backend = lambda wanted, device: "te"
model._default_fields = _fields_on_gpu
