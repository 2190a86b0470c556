"""An adapter's first values, and the base that goes with them, the same at every layout."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from moetrain.models.adapter import AdapterTable, Matrix, Place
from moetrain.weights.reader import Reader, Slices, seeded


def whole(base: Reader, name: str) -> Tensor:
    """A tensor with all that is in it."""
    return base.read(name, tuple(slice(0, size) for size in base.shape(name)))


def matrix_of(base: Reader, matrix: Matrix) -> Tensor:
    """W [out, in], fp32."""
    return torch.cat([whole(base, key) for key in matrix.weights]).float()


def idle(place: Place, base: Reader, shape: tuple[int, ...]) -> Tensor:
    """What a tensor holds that is not trained: 0, and of a magnitude the base's norms."""
    if place.tensors != "lora_magnitude":
        return torch.zeros(shape)
    return matrix_of(base, place.matrix).norm(dim=1)[slice(*place.rows)]


class InitialAdapter:
    """What an adapter starts from, fp32, under the names of its table.

    A is uniform within 1 / sqrt(in) (Kaiming's with a = sqrt(5), PEFT's choice) and B is 0. With
    OLoRA (arXiv 2406.01775) B and A are the first r columns of Q and rows of R of
    W = Q R; with PiSSA (arXiv 2404.02948, equations 2 and 3) U_r sqrt(S_r / s) and
    sqrt(S_r / s) V_r' of W = U S V'. A magnitude is W's row norms.

    Args:
        base: the untouched base.
        device: where the factorisations run. Their last bits depend on it.
    """

    def __init__(
        self, base: Reader, table: AdapterTable, seed: int, device: torch.device | str = "cpu"
    ):
        self.base, self.table, self.seed, self.device = base, table, seed, device
        self._shapes = table_shapes(table)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __str__(self) -> str:
        return f"an adapter made from seed {self.seed}"

    def names(self) -> Collection[str]:
        return self.table.places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, slices: Slices) -> Tensor:
        return self._whole(name, self.table.places[name])[slices]

    def _whole(self, name: str, place: Place) -> Tensor:
        shape = self._shapes[name]
        if not place.live or place.tensors == "lora_magnitude":
            return idle(place, self.base, shape)
        if not self.table.spec.starts_at_base:
            a, b = self.factors(place.matrix)
            return a if place.tensors == "lora_A" else b[slice(*place.rows)]
        if place.tensors == "lora_B":
            return torch.zeros(shape)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=seeded(self.seed, name))

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] that OLoRA or PiSSA start from; kept, being costly."""
        if matrix.name not in self._factors:
            spec = self.table.spec
            w = matrix_of(self.base, matrix).to(self.device)
            if spec.init == "olora":
                q, r = torch.linalg.qr(w)
                a, b = r[: spec.rank], q[:, : spec.rank]
            else:
                u, s, vh = torch.linalg.svd(w, full_matrices=False)
                root = (s[: spec.rank] / spec.scale).sqrt()
                a, b = root[:, None] * vh[: spec.rank], u[:, : spec.rank] * root
            self._factors[matrix.name] = a.contiguous().cpu(), b.contiguous().cpu()
        return self._factors[matrix.name]


class Residual:
    """The base for an adapter whose s B A is not 0 at first: W - s B0 A0, so that W is what they
    make together. In the base's dtype, to which it is rounded once.
    """

    def __init__(self, base: Reader, initial: InitialAdapter):
        self.base, self.initial = base, initial
        self._adapted = adapted(initial.table)
        self.names, self.shape, self.dtype = base.names, base.shape, base.dtype

    def __str__(self) -> str:
        return str(self.base)

    def read(self, name: str, slices: Slices) -> Tensor:
        if name not in self._adapted:
            return self.base.read(name, slices)
        matrix, rows = self._adapted[name]
        a, b = self.initial.factors(matrix)
        # whole, then cut: a product of slices would differ in its last bits from layout to layout
        w = whole(self.base, name).float() - self.initial.table.spec.scale * (b[rows] @ a)
        return w[slices].to(self.base.dtype(name))


def table_shapes(table: AdapterTable) -> dict[str, tuple[int, ...]]:
    """Of each of the adapter's tensors, global."""
    return {
        key: shape
        for rule in table.values()
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }


def adapted(table: AdapterTable) -> dict[str, tuple[Matrix, slice]]:
    """By name of the base's tensor: the matrix with an adapter and its rows that the tensor is."""
    result: dict[str, tuple[Matrix, slice]] = {}
    for matrix in table.matrices.values():
        rows = matrix.shape[0] // len(matrix.weights)
        for part, key in enumerate(matrix.weights):
            result[key] = matrix, slice(part * rows, (part + 1) * rows)
    return result
