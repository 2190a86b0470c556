"""Train a tokenizer."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain import files
from moetrain.data.rejects import Reject, write_rejects
from moetrain.data.sources import find_sources, read_rows
from moetrain.data.tokenizer import END_OF_TEXT
from moetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
    texts: list[str] = []
    todo: list[Any] = [record]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return texts
