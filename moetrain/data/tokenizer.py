"""Tokenizers: train one, find one, load one."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain import files, manifest
from moetrain.data.rejects import Reject, write_rejects
from moetrain.data.sources import find_sources, read_rows
from moetrain.data.tokenizer_check import check_read_as_written
from moetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# How GPT-2 and its heirs cut text before merging, digits one by one as Qwen does.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {%- if message['reasoning_content'] %}
            {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# What a tokenizer's folder may hold; its content decides what text becomes.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def train(inputs: Iterable[str | Path], vocab_size: int, out: str | Path) -> Path:
    """Train a byte-level BPE on text files or records' texts, and write a Hugging Face folder.

    The folder has a ChatML template, `<|im_end|>` as end of sequence and `<|endoftext|>` as padding
    and end of document. `vocab_size` counts special tokens; a small corpus can give fewer.
    Records that cannot be read go to `out`.rejected.jsonl. DataError when it is too small for bytes
    and special tokens, `out` exists, or there is no text.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise DataError(f"{out} exists. Give another folder or remove it.")
    rejects: list[Reject] = []
    texts = _all_texts(inputs, rejects)
    first = next(texts, None)
    if first is None:
        why = "".join(f"; {r.file}:{r.line}: {r.reason}" for r in rejects[:1])
        raise DataError(f"There is no text in {', '.join(map(str, inputs))}{why}.")
    trained = fit(chain([first], texts), vocab_size)
    listed = out.with_name(out.name + ".rejected.jsonl")
    write_rejects(listed, rejects)
    if rejects:
        print(f"{len(rejects)} records cannot be read, see {listed}")
    try:
        with files.publish_folder(out) as folder:
            trained.save_pretrained(str(folder))
        return out
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from error


def fit(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """The tokenizer that `train` writes, of texts in memory or from a generator."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"A vocabulary of {vocab_size} is too small: bytes and special tokens need {smallest}."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def _all_texts(inputs: Iterable[str | Path], rejects: list[Reject]) -> Iterator[str]:
    """Every text of every record; those that cannot be read go to `rejects`."""
    for source in find_sources(inputs):
        for row in read_rows(source):
            if isinstance(row, Reject):
                rejects.append(row)
            else:
                yield from _texts(row.value)


def _texts(record: Any) -> list[str]:
    """Every text in a record, however it is nested."""
    found: list[str] = []
    todo: list[Any] = [record]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return found


def locate(name: str | Path) -> Path:
    """The local folder of a folder, "builtin:NAME" or Hub name (HF_HUB_OFFLINE is honoured)."""
    if str(name).startswith("builtin:"):
        from moetrain.data import assets  # it trains tokenizers itself

        return assets.resolve(str(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in FILES):
            raise DataError(
                f"{folder} holds no tokenizer (tokenizer.json). Name one with model.tokenizer."
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.exists():
        raise DataError(
            f"{name} is no tokenizer folder. Give a folder, builtin:NAME or a Hub name (org/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is no folder here and cannot be had from the Hub: {reason}"
        ) from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of `folder` that decide what text becomes."""
    return [folder / file for file in FILES if (folder / file).is_file()]


def load(name: str | Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer; code that comes with it is not run.

    DataError when it is not a fast one, or is read otherwise than its tokenizer.json says;
    DamageError when a file of it is not as it was written.
    """
    folder = locate(name)
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
