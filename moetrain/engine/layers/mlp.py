"""The dense feed-forward block: Megatron's own."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from moetrain.models.parts.mlp import Dense


def config_fields(part: Dense) -> dict[str, Any]:
    """Of Megatron's TransformerConfig."""
    return dict(ffn_hidden_size=part.ffn, gated_linear_unit=True, activation_func=F.silu)


def spec() -> Any:
    """Of the torch backend."""
    return partial(MLP.as_mlp_submodule, submodules=LINEAR)


LINEAR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
