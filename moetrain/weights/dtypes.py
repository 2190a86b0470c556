"""safetensors' names of dtypes and torch's, and rows as tensors."""

import torch
from torch import Tensor

from moetrain.weights.rows import Bytes

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}


def as_tensor(rows: Bytes, dtype_name: str) -> Tensor:
    """[rows, elements of a row]; of rows that lie in a file a copy."""
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).view(TORCH[dtype_name])


def as_rows(values: Tensor) -> Bytes:
    """The bytes of [rows, elements of a row]."""
    return values.contiguous().view(torch.uint8).numpy()
