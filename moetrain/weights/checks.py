"""Whether a source holds a model's tensors, and nothing else. No torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from moetrain.errors import WeightsError
from moetrain.models import Rule


class Held(Protocol):
    """What a source says of its tensors."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


def check_tensors(source: Held, table: Mapping[str, Rule], ignored: Collection[str]) -> None:
    """WeightsError unless it holds exactly the table's tensors, in the table's shapes; those of
    `ignored` may be there too.
    """
    wanted = {
        key: shape
        for rule in table.values()
        for key, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    held = set(source.names())
    missing = sorted(set(wanted) - held)
    if missing:
        raise WeightsError(
            f"{source}: {len(missing)} of {len(wanted)} tensors are missing: {some(missing)}"
        )
    extra = sorted(held - set(wanted) - set(ignored))
    if extra:
        raise WeightsError(
            f"{source}: {len(extra)} tensors belong to no parameter of this model: {some(extra)}. "
            "Is config.json the one of these weights?"
        )
    for key, shape in wanted.items():
        if source.shape(key) != shape:
            raise WeightsError(
                f"{source}: {key} is {list(source.shape(key))}, config.json asks for "
                f"{list(shape)}. "
                "Check vocab_size and the other sizes in config.json."
            )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
