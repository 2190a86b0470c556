"""Whether two models mean the same tokens by the same ids."""

from collections.abc import Mapping
from pathlib import Path

from moetrain.data import tokenizer as tokenizers
from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.errors import DataError

REFUSED = (
    "A teacher is asked about the student's own tokens, so both need one vocabulary: distil from a"
    " model of the same family, or fine-tune on the teacher's texts (method: sft)"
)


def check_same(tokenizer: Path, folder: str) -> None:
    """Raise DataError where the model in `folder` brings a tokenizer that means other tokens by an
    id than `tokenizer` does. Further tokens on either side are no difference.
    """
    there = Path(folder).expanduser()
    if not tokenizer_files(there):
        return
    ours = tokenizers.load(tokenizer).get_vocab()
    theirs = tokenizers.load(there).get_vocab()
    if (reason := difference(ours, theirs)) is not None:
        raise DataError(f"teacher.path: in {folder} {reason}. {REFUSED}.")


def difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """What differs first, in words."""
    names = {number: token for token, number in ours.items()}
    for token, number in sorted(theirs.items(), key=lambda pair: pair[1]):
        if ours.get(token, number) != number or names.get(number, token) != token:
            return (
                f"token {number} is {token!r:.60}, and the student's is {names.get(number)!r:.60}"
            )
    return None
