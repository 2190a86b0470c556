"""Process groups of a mesh's axes, made once for the same ranks where they are gloo's.

Megatron makes a group for each of its 21 axes, and most are of one rank or of ranks that another
axis has too. One of gloo's has three threads, of which one wakes up a hundred times a second, and
connections of its own: they took a tenth to a fifth of a small run's processor time. NCCL's groups
stay apart: traffic of several axes is under way at once there, on streams of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state


@contextmanager
def shared_by_ranks() -> Iterator[None]:
    """Meanwhile Megatron gets the group that it has for the same ranks. All ranks ask for the same
    groups in the same order, so all share alike.

    A group's operations have to begin in one order on all of its ranks, and so they do here: what
    waits for each other on two axes of the same ranks would also have to without sharing, and what
    runs in the background (gradients, parameters) is begun by the main thread, in the order of one
    program.
    """
    make = parallel_state.create_group
    made: dict[tuple[Any, ...], Any] = {}

    def create_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **more: Any):
        key = (*sorted(ranks), backend)  # of half an hour, given or not; torch sorts, too
        if key not in made:
            made[key] = make(ranks, timeout, backend, **more)
        return made[key]

    any_state: Any = parallel_state
    any_state.create_group = create_group
    try:
        yield
    finally:
        any_state.create_group = make
