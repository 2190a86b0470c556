"""Instruction data: the sequences of a conversation, in which the assistant's turns are learned."""

from collections.abc import Mapping
from typing import Any

from moetrain.data.chat import Encoded
from moetrain.data.encode import Draft, Extras, Group, SetKind, Spec
from moetrain.data.formats import columns, to_conversation, unread
from moetrain.data.messages import FormatError


def _read(record: Mapping[str, Any]) -> Draft:
    return Draft((to_conversation(record),), notes=unread(record, columns(record)))


def _group(sequences: list[list[Encoded]], extras: Extras, spec: Spec) -> tuple[Group, ...]:
    """Apply data.too_long; drop what has nothing left to learn (token 0 never counts)."""
    (pieces,) = sequences
    longest = max((s.tokens.size for s in pieces), default=0)
    if longest > spec.seq_len and spec.too_long == "reject":
        raise FormatError(
            f"{longest} tokens, more than data.seq_len {spec.seq_len} (data.too_long is reject)"
        )
    part = slice(-spec.seq_len, None) if spec.too_long == "keep_end" else slice(spec.seq_len)
    cut = [Encoded(s.tokens[part], s.mask[part]) for s in pieces]
    learned = [s for s in cut if s.mask[1:].any()]
    if not learned:
        if longest > spec.seq_len:
            raise FormatError(
                f"{longest} tokens: no part of the answer is within data.seq_len {spec.seq_len}"
            )
        raise FormatError("no token to learn from")
    return tuple(Group((s,), truncated=longest > spec.seq_len) for s in learned)


CHAT = SetKind(name="sft", unit="sequences", read=_read, group=_group)
