"""The stream of training packs, its place in it, and the held-out packs.

The stream is one for the whole job: step s takes its packs [s*G, (s+1)*G) for a global batch of G,
and DP rank r of them every dp_size-th from r. So neither the layout nor a resume changes what is
learned when.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from moetrain.errors import DataError
from moetrain.ops.packed import Packed, blank


class Packs(Protocol):
    """Packs of the same length, `len` of them an epoch, in an order per epoch."""

    fingerprint: str  # equal for equal content and order

    def __len__(self) -> int: ...

    def at(self, epoch: int, number: int) -> Packed:
        """The `number`-th pack of an epoch."""
        ...


class Loader:
    """This DP rank's share of the training stream.

    Every rank of the job makes one, TP and PP neighbours the same.
    """

    def __init__(
        self,
        packs: Packs,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        limit: int | None = None,
    ) -> None:
        if global_batch % dp_size:
            raise DataError(
                f"train.global_batch {global_batch} does not divide over {dp_size} data-parallel"
                " ranks:"
                f" use a multiple of {dp_size}."
            )
        self.packs, self.global_batch, self.dp_rank, self.dp_size = (
            packs,
            global_batch,
            dp_rank,
            dp_size,
        )
        self.limit = limit  # packs of the job's stream that are read at all; None: no end
        self._position = 0  # those that are used up

    def next(self) -> list[Packed]:
        """global_batch / dp_size packs of [seq_len] tokens, and one step further in the stream.

        At its limit the stream ends: the last step has fewer packs, blank ones where the ranks'
        shares differ.
        """
        start = self._position
        self._position = start + self.global_batch
        if self.limit is not None:
            self._position = min(self._position, self.limit)
        assert start < self._position, "the stream is at its end"
        per_epoch = len(self.packs)
        numbers = range(start, self._position)[self.dp_rank :: self.dp_size]
        packs = [self.packs.at(*divmod(number, per_epoch)) for number in numbers]
        if len(packs) * self.dp_size < self._position - start:
            packs.append(_blank(self.packs.at(*divmod(start, per_epoch))))
        return packs

    def steps_left(self) -> int | None:
        """Steps until the stream's limit; None where it has none."""
        if self.limit is None:
            return None
        return math.ceil((self.limit - self._position) / self.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream: small, and the same on every rank and at every layout."""
        return {"position": self._position, "fingerprint": self.packs.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError when the data is not the same."""
        if state["fingerprint"] != self.packs.fingerprint:
            raise DataError(
                "The checkpoint was taken with other training data (or data.seq_len, data.pack,"
                " seed, tokenizer or"
                " chat template): restore what it was made with, or start another run_dir."
            )
        self._position = int(state["position"])


class EvalPacks(Sequence[Packed]):
    """This DP rank's held-out packs. Every rank has the same number.

    Where packs run out, one without valid tokens.
    """

    def __init__(self, packs: Packs, limit: int | None, dp_rank: int, dp_size: int) -> None:
        self.packs, self.dp_rank, self.dp_size = packs, dp_rank, dp_size
        self.num_packs = min(
            len(packs), limit if limit is not None else len(packs)
        )  # over all ranks

    def __len__(self) -> int:
        return -(-self.num_packs // self.dp_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index * self.dp_size + self.dp_rank
        return self.packs.at(0, number) if number < self.num_packs else _blank(self.packs.at(0, 0))

    def __iter__(self) -> Iterator[Packed]:
        return (self[i] for i in range(len(self)))


def _blank(like: Packed) -> Packed:
    return blank(like.num_tokens, like)
