"""Load a tokenizer, and what a run asks of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from moetrain import manifest
from moetrain.data.tokenizer_check import check_read_as_written
from moetrain.data.tokenizer_files import FILES, check_folder
from moetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load(folder: Path) -> "PreTrainedTokenizerFast":
    """Load the tokenizer in `folder`; code that comes with it is not run.

    DataError when it is not a fast one, or is read otherwise than its tokenizer.json says;
    DamageError when a file of it is not as it was written.
    """
    check_folder(folder)
    manifest.check(folder, FILES)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # damaged JSON, unknown classes, missing files: as many types as causes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"The tokenizer in {folder} cannot be loaded: {reason}") from error
    if not loaded.is_fast:
        raise DataError(
            f"The tokenizer in {folder} has no tokenizer.json, needed to find assistant turns."
        )
    check_read_as_written(loaded, folder)
    return loaded


def vocab_of(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_document(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The token after each document: <|endoftext|> where there is one, else the end of sequence."""
    vocab = tokenizer.get_vocab()
    if END_OF_TEXT in vocab:
        return vocab[END_OF_TEXT]
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path} has no end-of-sequence token to end documents."
        )
    return int(vocab[str(tokenizer.eos_token)])


def check_vocab(needed: int, model_vocab: int | None, what: str) -> None:
    """DataError when token ids up to `needed` - 1 do not fit the model's embedding."""
    if model_vocab is not None and needed > model_vocab:
        raise DataError(
            f"{what} has {needed} tokens but the model's vocab_size is {model_vocab}: a vocabulary"
            " may be larger than the tokenizer, not smaller. Set model.tokenizer or vocab_size."
        )
