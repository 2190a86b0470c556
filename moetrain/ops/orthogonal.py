"""The nearest orthogonal matrix, nearly: Newton-Schulz as Muon has it.

K. Jordan, https://kellerjordan.github.io/posts/muon (his coefficients); arXiv 2502.16982 for models
of many billions.
"""

from typing import Literal

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315

Scale = Literal["spectral", "shape_scaling", "unit_rms_norm"]


def orthogonal(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """matrix [m, n] -> [m, n] fp32, with its singular vectors and singular values near 1; computed
    in `dtype`. A matrix of zeros stays one.
    """
    wide = matrix.size(0) <= matrix.size(1)
    x = matrix if wide else matrix.T
    x = (x / x.square().sum().sqrt().clamp(min=1e-30)).to(dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.T).float()


def scale_of(rows: int, columns: int, mode: Scale) -> float:
    """What an orthogonal update is multiplied by, so that one learning rate fits every shape.

    spectral: arXiv 2502.16982, equation 4 without its 0.2; shape_scaling: K. Jordan's;
    unit_rms_norm: arXiv 2502.07529.
    """
    match mode:
        case "spectral":
            return max(rows, columns) ** 0.5
        case "shape_scaling":
            return max(1.0, rows / columns) ** 0.5
        case "unit_rms_norm":
            return (rows / columns) ** 0.5
