"""What moved since the last export: known by a digest of each weight's bits, where it lies."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moetrain.manifest import digest_of
from moetrain.weights.ranks import Ranks
from moetrain.weights.transport import LocalParam


class Sent:
    """The weights of this rank as they were exported last. No copy: a digest for each."""

    def __init__(self) -> None:
        self.version: int | None = None  # whose weights these were; None: of none
        self._digests: dict[str, str] = {}

    def forget(self) -> None:
        """From now on everything has moved."""
        self.version, self._digests = None, {}

    def moved(self, local: Iterable[LocalParam], ranks: Ranks) -> set[str]:
        """The canonical names of what moved since the last call, on any rank. Collective."""
        before, self._digests = self._digests, {p.name: digest(p.tensor) for p in local}
        changed = [name for name, bits in self._digests.items() if before.get(name) != bits]
        return {name for names in ranks.gather(changed) for name in names}


def digest(tensor: Tensor) -> str:
    """Of a tensor's bits: -0.0 is not 0.0."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return digest_of(flat.cpu().numpy().data)
