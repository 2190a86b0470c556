"""An adapter put into its base: a plain model, one tensor in memory at a time."""

from collections.abc import Iterator

from torch import Tensor

from moetrain.models.adapter import SUFFIX
from moetrain.weights.adapter_init import InitialAdapter, Residual, adapted, whole
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import HEAD
from moetrain.weights.reader import Reader


def merged(base: Reader, adapter: PeftReader) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of the whole model: W + s B A where there is an adapter
    (with DoRA at its magnitude), made in fp32, in the base's dtype; a scalar head in its own.
    """
    table = adapter.table
    if not table.spec.starts_at_base:  # the adapter is one for W - s B0 A0
        base = Residual(base, InitialAdapter(base, table, 0))
    places = adapted(table)
    for key in (key for rule in table.model.table.values() for key in rule.hf):
        if key == HEAD and adapter.head is not None:
            yield key, adapter.head
            continue
        w = whole(base, key)
        if key in places:
            dtype, stem = w.dtype, key.removesuffix(".weight")
            a = whole(adapter, places[key][0].name + SUFFIX["lora_A"]).float()
            b = whole(adapter, stem + SUFFIX["lora_B"]).float()
            w = w.float() + table.spec.scale * (b @ a)
            if table.spec.dora:
                magnitude = whole(adapter, stem + SUFFIX["lora_magnitude"]).float()
                w *= (magnitude / w.norm(dim=1))[:, None]
            w = w.to(dtype)
        yield key, w
