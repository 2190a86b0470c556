"""Whose kernels a tensor meets: on the meta device, which has no values, a process says for which
kind of device it stands.
"""

import torch
from torch import Tensor

_meta: str = "cpu"


def meta_is(kind: str) -> None:
    """From now on the meta device stands for `kind`: cpu or cuda."""
    global _meta
    _meta = kind


def kind_of(where: Tensor | torch.device) -> str:
    """cpu or cuda."""
    kind = where.type if isinstance(where, torch.device) else where.device.type
    return _meta if kind == "meta" else kind
