"""When Python looks for garbage. What is imported for training makes a million objects that stay:
to go through them again and again took a fifth of the time of the imports, and afterwards 0.25 s at
every full collection, in which the other ranks wait for this one. No torch.
"""

import gc

_USUAL = gc.get_threshold()
_IMPORTING = 50_000  # new objects


def expect_imports() -> None:
    """Look seldom, until `all_imported`."""
    gc.set_threshold(_IMPORTING, *_USUAL[1:])


def all_imported() -> None:
    """Look as often as usual: a circle may hold a tensor."""
    gc.set_threshold(*_USUAL)


def keep_what_is_there() -> None:
    """Never look again through what is there now, for a process that runs one job."""
    gc.freeze()
