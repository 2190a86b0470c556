"""The dense feed-forward block: SwiGLU (arXiv 2002.05202)."""

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.models.parts.base import Shares, Split
from moetrain.models.rules import Weight
from moetrain.models.sharding import Cols, GateUp


@dataclass(frozen=True)
class Glu:
    """What stands between the two matrices: g sigmoid(`slope` g) (up + `offset`), with g the gate
    of at most `limit`, and up within -limit and limit.
    """

    slope: float = 1.0
    offset: float = 0.0
    limit: float | None = None


SWIGLU = Glu()


@dataclass(frozen=True)
class Dense:
    """down(silu(gate x) * up x), with `ffn` columns between."""

    hidden: int
    ffn: int

    def weights(self) -> Iterator[Weight]:
        yield from swiglu(self.hidden, self.ffn, "mlp", "mlp")

    def splits(self) -> Iterator[Split]:
        yield Split("tp", self.ffn, "columns of the MLP")

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return 6 * num_tokens * self.hidden * self.ffn

    def activations(self, shares: Shares) -> float:
        return shares.width * (5 * self.ffn / shares.tp + self.hidden / shares.sequence)


def swiglu(hidden: int, ffn: int, mcore: str, hf: str) -> Iterator[Weight]:
    """The two weights of a dense block under these names."""
    yield Weight(
        f"{mcore}.linear_fc1.weight",
        (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        GateUp((ffn, hidden)),
        adapts="mlp",
    )
    yield Weight(
        f"{mcore}.linear_fc2.weight",
        (f"{hf}.down_proj.weight",),
        Cols((hidden, ffn)),
        adapts="mlp",
        writes=True,
    )
