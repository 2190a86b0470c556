"""Which tokens of a record are learned, and how a template is told to think."""

from moetrain.interop.swift.codecs import TEXT, TRUTH, Entry, Reading, Writing
from moetrain.interop.swift.policy import is_online

_ANSWERS = ("sft", "dft", "chord_sft")
_EMPTY = "ignore_empty_think"


class Thoughts(Entry):
    """`loss_scale`, whose parts are joined by +. Of a hybrid thinking model ms-swift never learns
    the empty thought, unless told to.
    """

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        name = keys.get("method.name")
        if name in _ANSWERS:
            keep = reading.parse("disable_ignore_empty_think", TRUTH)
            keys["data.empty_thoughts"] = bool(keep)
        self._read_scale(reading, "default" if name in _ANSWERS else "last_round")
        thinks = reading.parse("enable_thinking", TRUTH)
        if thinks is None:
            return
        if is_online(keys):
            keys["data.chat_template_kwargs"] = {"enable_thinking": thinks}
        else:
            reading.note("implied", "enable_thinking", "counts where answers are sampled")

    @staticmethod
    def _read_scale(reading: Reading, own: str) -> None:
        words = reading.given.get("loss_scale")
        if words is None:
            return
        parts = (reading.parse("loss_scale", TEXT) or "").split("+")
        if reading.keys.get("method.name") in ("cpt", "pretrain"):
            own = "all"
        if _EMPTY in parts and reading.keys.get("method.name") in _ANSWERS:
            reading.keys["data.empty_thoughts"] = False
        rest = [part for part in parts if part not in (own, _EMPTY, "")]
        if rest:
            what = {
                "default": "every turn of the assistant is learned, each token alike",
                "last_round": "the last turn is learned, each token alike",
                "all": "every token is learned, each alike",
            }[own]
            reading.lost("loss_scale", f"{what}; there is no {' and no '.join(rest)}")

    def write(self, writing: Writing) -> None:
        keys = writing.keys
        writing.covered |= {"data.empty_thoughts", "data.chat_template_kwargs"}
        if keys.get("method.name") in _ANSWERS and keys.get("data.empty_thoughts", True):
            writing.flags["disable_ignore_empty_think"] = ("true",)
        given = dict(keys.get("data.chat_template_kwargs") or {})
        thinks = given.pop("enable_thinking", None)
        if isinstance(thinks, bool) and is_online(keys):
            writing.flags["enable_thinking"] = TRUTH.show(thinks)
        elif thinks is not None:
            given["enable_thinking"] = thinks
        if given:
            writing.lost("data.chat_template_kwargs", "ms-swift's templates have none of these")
