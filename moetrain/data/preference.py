"""Preference data: two answers to one prompt, or one answer with a label (for KTO).

A pack has a group as [shared prompt][answer][answer]: what both answers' sequences begin with
stands once, and both go on from it. Only the last turn of a conversation is scored.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moetrain.data.chat import Encoded
from moetrain.data.encode import Draft, Extras, Group, Result, SetKind, Spec
from moetrain.data.formats import columns, unread
from moetrain.data.messages import FormatError
from moetrain.data.pair_formats import (
    LABEL_KEYS,
    PAIR_FORMATS,
    pair_columns,
    to_labelled,
    to_pair,
)
from moetrain.errors import DataError

# Values of extras["role"]; 0 is a shared prompt or padding.
CHOSEN, REJECTED, MISMATCHED = 1, 2, 3


def _read_pair(record: Mapping[str, Any]) -> Draft:
    pair = to_pair(record)
    read = (*pair_columns(record), "margin")
    extras: dict[str, tuple[float, ...]] = {"role": (CHOSEN, REJECTED)}
    if pair.margin is not None:
        extras["margin"] = (pair.margin, 0.0)
    return Draft((pair.chosen, pair.rejected), extras, unread(record, read))


def _read_labelled(record: Mapping[str, Any]) -> Draft:
    labelled = to_labelled(record)
    role = CHOSEN if labelled.desirable else REJECTED
    read = (*columns(record), *LABEL_KEYS)
    return Draft((labelled.conversation,), {"role": (role, MISMATCHED)}, unread(record, read))


def _whole(sequences: list[Encoded]) -> Encoded:
    """The sequence of a conversation, up to the last token that is scored."""
    if len(sequences) != 1 or not sequences[0].mask[1:].any():
        raise FormatError("no token to learn from")
    (sequence,) = sequences
    end = int(np.flatnonzero(sequence.mask)[-1]) + 1
    return Encoded(sequence.tokens[:end], sequence.mask[:end])


def _answer_start(sequence: Encoded) -> int:
    """The first scored token; the position before it predicts it, so it is at least 1."""
    return int(np.flatnonzero(sequence.mask[1:])[0]) + 1


def _common(a: Encoded, b: Encoded) -> int:
    """How many first tokens two sequences can share.

    No position that predicts a scored token is among them, since the two predict different ones.
    """
    most = min(_answer_start(a), _answer_start(b)) - 1
    differ = np.flatnonzero(a.tokens[:most] != b.tokens[:most])
    return int(differ[0]) if differ.size else most


def _fit(first: Encoded, second: Encoded, extras: Extras, spec: Spec) -> Group:
    """A pair in one pack: by data.too_long both are cut from the right, the longer one first and
    then both to the same length; or from the left, where the prompt is the same; or refused.
    """
    shared = _common(first, second) if spec.share_prompt else 0
    group = Group((first, second), shared, extras)
    needed = group.num_tokens
    if needed <= spec.seq_len:
        return group
    if spec.too_long == "reject":
        raise FormatError(
            f"{needed} tokens with both answers, more than data.seq_len {spec.seq_len}"
            " (data.too_long is reject)"
        )
    if spec.too_long == "keep_end":
        # What is shared stands once: both lose a token there, and the pack one.
        over = needed - spec.seq_len
        over = over if shared > over else -(-(over + shared) // 2)
        both = (_without_start(s, over, spec) for s in group.sequences)
        return replace(group, sequences=tuple(both), shared=max(0, shared - over), truncated=True)
    room = spec.seq_len - shared
    cap = shared + max(room // 2, room - min(s.tokens.size - shared for s in group.sequences))
    cut = tuple(Encoded(s.tokens[:cap], s.mask[:cap]) for s in group.sequences)
    if room < 0 or not all(s.mask[1:].any() for s in cut):
        raise FormatError(
            f"{needed} tokens with both answers: no part of one of them is within data.seq_len"
            f" {spec.seq_len}"
        )
    return replace(group, sequences=cut, truncated=True)


def _without_start(sequence: Encoded, num: int, spec: Spec) -> Encoded:
    """Without the first `num` tokens. FormatError where nothing of the prompt would be left."""
    if num >= _answer_start(sequence):
        raise FormatError(
            f"{sequence.tokens.size} tokens: data.seq_len {spec.seq_len} has no room for a prompt"
            " before the answer (data.too_long is keep_end)"
        )
    return Encoded(sequence.tokens[num:], sequence.mask[num:])


def _group_pair(sequences: list[list[Encoded]], extras: Extras, spec: Spec) -> tuple[Group, ...]:
    chosen, rejected = map(_whole, sequences)
    if np.array_equal(chosen.tokens, rejected.tokens):  # the chat template can trim a difference
        raise FormatError("chosen and rejected are identical")
    group = _fit(chosen, rejected, extras, spec)
    a, b = group.sequences
    if np.array_equal(a.tokens, b.tokens):
        raise FormatError(
            f"chosen and rejected are identical as far as data.seq_len {spec.seq_len} goes"
        )
    return (group,)


def _group_labelled(
    sequences: list[list[Encoded]], extras: Extras, spec: Spec
) -> tuple[Group, ...]:
    """The answer by itself; `_join_mismatched` adds the other one."""
    (sequence,) = map(_whole, sequences)
    size = sequence.tokens.size
    if size > spec.seq_len and spec.too_long == "reject":
        raise FormatError(
            f"{size} tokens, more than data.seq_len {spec.seq_len} (data.too_long is reject)"
        )
    if size > spec.seq_len and spec.too_long == "keep_end":
        cut = _without_start(sequence, size - spec.seq_len, spec)
        return (Group((cut,), extras=extras, truncated=True),)
    if _answer_start(sequence) >= spec.seq_len:
        raise FormatError(
            f"{size} tokens: no part of the answer is within data.seq_len {spec.seq_len}"
        )
    return (Group((sequence,), extras=extras),)


def _read_alone(record: Mapping[str, Any]) -> Draft:
    draft = _read_labelled(record)
    return replace(draft, extras={"role": draft.extras["role"][:1]})


def _group_alone(sequences: list[list[Encoded]], extras: Extras, spec: Spec) -> tuple[Group, ...]:
    """The answer by itself, for a method that has no use of another."""
    (group,) = _group_labelled(sequences, extras, spec)
    sequence, is_cut = _cut(group.sequences[0], spec.seq_len)
    return (replace(group, sequences=(sequence,), truncated=is_cut or group.truncated),)


def _prompt(result: Result) -> bytes:
    sequence = result.groups[0].sequences[0]
    return sequence.tokens[: _answer_start(sequence)].tobytes()


def _mismatched(result: Result, other: Result, spec: Spec) -> Result:
    """A usable record with the answer of another one after its own prompt."""
    if not result.groups:
        return result
    (group,) = result.groups
    (answered,), (donor,) = group.sequences, other.groups[0].sequences
    start, begin = _answer_start(answered), _answer_start(donor)
    mask = np.concatenate([np.zeros(start, dtype=np.bool_), donor.mask[begin:]])
    answer = Encoded(np.concatenate([answered.tokens[:start], donor.tokens[begin:]]), mask)
    both, *alone = _own_and_mismatched(answered, answer, group.extras, spec)
    both = replace(both, truncated=both.truncated or group.truncated)
    return replace(result, groups=(both, *alone))


def _own_and_mismatched(
    answered: Encoded, answer: Encoded, extras: Extras, spec: Spec
) -> tuple[Group, ...]:
    """A record's own answer, cut by data.seq_len alone, and as much of a mismatched one as there is
    room for in the same pack. Where no token of that has room it stands by itself.
    """
    answered, is_cut = _cut(answered, spec.seq_len)
    shared = _common(answered, answer) if spec.share_prompt else 0
    rest, is_less = _cut(answer, spec.seq_len - answered.tokens.size + shared)
    if rest.mask[1:].any():
        return (Group((answered, rest), shared, extras, truncated=is_cut or is_less),)
    alone, is_less = _cut(answer, spec.seq_len)
    parts = [{name: (values[i],) for name, values in extras.items()} for i in range(2)]
    return (
        Group((answered,), extras=parts[0], truncated=is_cut),
        Group((alone,), extras=parts[1], truncated=is_less),
    )


def _cut(sequence: Encoded, size: int) -> tuple[Encoded, bool]:
    """The first `size` tokens of a sequence, and whether that is less than all."""
    if sequence.tokens.size <= size:
        return sequence, False
    return Encoded(sequence.tokens[:size], sequence.mask[:size]), True


def _join_mismatched(results: Iterable[Result], spec: Spec) -> Iterator[Result]:
    """Give each record the answer of the next usable one that has another prompt, the last ones
    that of the first: KTO's samples of answers to other prompts, which depend on the files alone.
    """
    waiting: list[Result] = []  # usable ones of the same prompt, and unusable ones between them
    prompt: bytes | None = None
    first: Result | None = None
    second: Result | None = None  # the first of another prompt than the first's
    for result in results:
        if result.groups and prompt != (own_prompt := _prompt(result)):
            if prompt is not None:
                second = second or result
                yield from (_mismatched(one, result, spec) for one in waiting)
                waiting = []
            first, prompt = first or result, own_prompt
        waiting.append(result)
    if first is not None and second is None:
        raise DataError(
            f"All usable records in {', '.join(spec.inputs)} have the same prompt: kto measures its"
            " reference point on answers to other prompts, so give at least two."
        )
    if first is None or second is None:
        yield from waiting
        return
    donor = second if prompt == _prompt(first) else first
    yield from (_mismatched(one, donor, spec) for one in waiting)


PAIRS = SetKind(
    name="pairs",
    unit="pairs",
    read=_read_pair,
    group=_group_pair,
    lacking="a rejected answer",
    advice="This method learns from pairs: "
    + "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in PAIR_FORMATS)
    + ".",
)
LABELS = SetKind(
    name="labels",
    unit="answers",
    read=_read_labelled,
    group=_group_labelled,
    join=_join_mismatched,
    lacking="a label",
    advice="kto learns from records of instruction data with label (or kto_tag), true or false.",
)
LABELS_ALONE = replace(LABELS, name="answers", read=_read_alone, group=_group_alone, join=None)
