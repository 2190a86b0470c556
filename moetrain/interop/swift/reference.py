"""What preference methods measure their answers against."""

from moetrain.config.method import SECTIONS, ReferencedMethod
from moetrain.interop.swift.codecs import LIST, TEXT, Entry, Keys, Reading, Writing
from moetrain.interop.swift.policy import is_online

REFERENCED = {name for name, own in SECTIONS.items() if issubclass(own, ReferencedMethod)}


class Reference(Entry):
    """There the reference of an adapter is the base with adapters off, unless another adapter is
    named; of full training it is the model as it was, or another one.
    """

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        if is_online(keys) or keys.get("method.name") == "ppo":
            self._read_online(reading)
        if keys.get("method.name") not in REFERENCED:
            return
        model, adapters = reading.parse("ref_model", TEXT), reading.parse("ref_adapters", LIST)
        if not _adapted(keys):
            if model is not None and model != keys.get("model.path"):
                keys["method.reference"] = model
            if adapters:
                reading.lost("ref_adapters", "method.reference takes a whole model's folder")
            return
        if model is not None:
            reading.note("implied", "ref_model", "there it counts for full training alone")
        adapter = keys.get("adapter.path")
        if adapters and adapters != [adapter]:
            why = "method.reference is the base, or what the run starts from (--adapters)"
            reading.lost("ref_adapters", why)
        elif adapter is not None and not adapters:
            keys["method.reference"] = "base"

    @staticmethod
    def _read_online(reading: Reading) -> None:
        model = reading.parse("ref_model", TEXT)
        if model is None or model == reading.keys.get("model.path"):
            return
        if _adapted(reading.keys) or not reading.keys.get("method.beta"):
            reading.note("implied", "ref_model", "is not used there: of full training with a beta")
        else:
            reading.lost("ref_model", "the reference of a run with rollouts is model.path")

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        writing.covered.add("method.reference")
        if keys.get("method.name") not in REFERENCED:
            return
        reference, adapter = keys.get("method.reference", "start"), keys.get("adapter.path")
        if reference == "start" and adapter is not None:
            writing.flags["ref_adapters"] = (str(adapter),)
        elif reference not in ("start", "base"):
            if _adapted(keys):
                writing.lost("method.reference", "ms-swift's is the base, or an adapter on it")
            else:
                writing.flags["ref_model"] = (str(reference),)


def _adapted(keys: Keys) -> bool:
    return keys.get("adapter.type") is not None or keys.get("adapter.path") is not None
